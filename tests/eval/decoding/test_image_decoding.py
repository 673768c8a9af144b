"""Questions with images: decoded as the model itself does, or refused."""

import re
from pathlib import Path

import pytest
import torch
from fledge.conf.runtime.artifact import file_digest
from fledge.conf.schema import Config, DraftConfig, EvaluateConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.data_synthesis.tokens.image_tokens import ImageReader, ImageTokenizer
from fledge.data_synthesis.tokens.images import conversation_images, template_messages
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.speculator import Request, Speculator
from fledge.eval.local import Answerer
from fledge.eval.questions.question import Question
from fledge.eval.questions.reader import QuestionReader, UnaskableError
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.verifier.config import load_config
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import VerifierWeights
from image_verifiers import asked, make_pictures, save_llama4, save_qwen3_vl
from oracles import Oracle, TreeOracle


def request_of(config, verifier: Verifier, messages, max_tokens: int = 30) -> Request:
    reader = ImageReader(config)
    images = reader.read(conversation_images(messages))
    prompt = prompt_tokens(ImageTokenizer(verifier.tokenizer, images), template_messages(messages))
    return Request(prompt, max_tokens, inputs=verifier.place(reader.model_inputs(torch.tensor(prompt), images)))


def test_speculation_after_images_gives_what_the_model_generates(tmp_path, tiny_verifier_folder):
    config = save_llama4(tmp_path / "verifier", tiny_verifier_folder)
    verifier, pictures = Verifier.load(config), make_pictures(tmp_path)
    conversations = [[{"role": "user", "content": asked(*pictures[:n])}] for n in (1, 3)]
    conversations.append([{"role": "user", "content": "What is it?"}])
    requests = [request_of(config, verifier, messages) for messages in conversations[:2]]
    requests.append(Request(prompt_tokens(verifier.tokenizer, conversations[2]), 30))
    expected = []
    for request in requests:
        output = verifier.model.generate(
            torch.tensor([request.prompt]), max_new_tokens=30, do_sample=False, **request.inputs,
            eos_token_id=verifier.end_token_ids,
        )  # fmt: skip
        expected.append(output[0, len(request.prompt) :].tolist())
    assert expected[0] != expected[1]
    drafters = [NoDraft(), Oracle(expected, 3, wrong=0.2), TreeOracle(expected, 11, 4, wrong=0.2)]
    speculator = Speculator(verifier, drafters, num_sequences=3)
    speculator.cached.check(requests[0].prompt, requests[0].inputs)
    speculator.prefill(requests)
    for drafter in drafters:
        assert [answer.tokens for answer in speculator.decode(drafter)] == expected


def test_a_model_that_counts_positions_by_image_is_refused_for_images(tmp_path, tiny_verifier_folder):
    config = save_qwen3_vl(tmp_path / "verifier", tiny_verifier_folder)
    verifier, pictures = Verifier.load(config), make_pictures(tmp_path)
    request = request_of(config, verifier, [{"role": "user", "content": asked(pictures[3])}])
    cached = Speculator(verifier, []).cached
    cached.check(list(range(20, 40)))
    with pytest.raises(ValueError, match="gives other logits with fledge's cache than by itself for images"):
        cached.check(request.prompt, request.inputs)


def test_questions_with_images_are_answered_beside_others_and_told_from_them(tmp_path, tiny_verifier_folder):
    config = save_llama4(tmp_path / "verifier", tiny_verifier_folder)
    verifier, weights, pictures = Verifier.load(config), VerifierWeights(config), make_pictures(tmp_path)
    head = DraftHead(DraftHeadConfig.from_verifier(DraftConfig(vocab_size=None), load_config(config)))
    initialise(head, weights.embedding(), weights.lm_head(), 0)
    options = EvaluateConfig(max_tokens=12, batch_size=2)
    answerer = Answerer(Config(name="x", verifier=config, evaluate=options), verifier, head)
    asked_of = [
        Question("a", "all", ("What is it?", "And why?"), images=(pictures[0],)),
        Question("b", "all", ("Who?",)),
    ]
    records = answerer.answer(asked_of)
    assert [record.get("images") for record in records] == [[file_digest(Path(pictures[0]))], None]
    assert [len(record["answers"]) for record in records] == [2, 1]
    drafted = [one for r in records for answer in r["answers"] for one in answer["drafters"].values()]
    assert len(drafted) == 9
    assert all(one["equals_verifier"] for one in drafted)
    blind = [Question("a", "all", asked_of[0].turns, images=(pictures[3],))]
    assert answerer.answer(blind)[0]["answers"][0]["prompt_tokens"] > records[0]["answers"][0]["prompt_tokens"]
    gone = Question("c", "all", ("Who?",), images=(str(tmp_path / "gone.png"),))
    (left_out,) = answerer.answer([gone])
    assert (left_out["id"], left_out["answers"]) == ("c", [])
    assert re.search(r"image 1 .* cannot be read", left_out["left_out"])


def test_an_image_that_could_be_read_before_is_asked_for_again_by_the_next_start(tmp_path, tiny_verifier_folder):
    config = Config(name="x", verifier=save_llama4(tmp_path / "verifier", tiny_verifier_folder))
    picture, *_ = make_pictures(tmp_path)
    reader, text = QuestionReader(config), Question("b", "all", ("Who?",))
    here, gone = (Question(name, "all", ("Who?",), images=(name,)) for name in (picture, str(tmp_path / "gone.png")))
    reader.check([here, gone, text])
    Path(picture).unlink()
    with pytest.raises(UnaskableError, match=r"gone\.png.* cannot be read"):
        reader.read(gone, [])
    with pytest.raises(ValueError, match=r"^question .* cannot be read: .*; the same command asks it again"):
        reader.read(here, [])
