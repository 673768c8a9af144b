"""A text that the verifier cannot be asked fails alone and by name, in every stage, before and behind others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, conversations_run, converse_all, recorded_sequence, save_byte_tokenizer
from builders import conversation_record as record
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import Config, Device, DraftConfig, Dtype, EvaluateConfig, VerifierConfig
from fledge.data_synthesis.answers.conversation import Conversation
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.prompts.rows import Prompt
from fledge.eval.compare import _questions
from fledge.eval.evaluate import evaluate
from fledge.eval.local import Answerer
from fledge.eval.questions.question import load_questions
from fledge.eval.questions.reader import QuestionReader, UnaskableError
from fledge.models.formats.plain import save_head
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead
from fledge.models.verifier.config import load_config
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import verifier_identity

END, BEYOND = 256, ("<image_soft_token>", "<tool_result>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% if m.role == 'assistant' %}{{ '<end>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
LONG = "river " * 60  # of a context of 200 tokens, which are bytes


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> VerifierConfig:
    """A random verifier whose tokenizer has two tokens, special and plain, beyond the rows of its embedding."""
    folder = tmp_path_factory.mktemp("verifier")
    save_byte_tokenizer(folder, TEMPLATE, special=BEYOND[:1], plain=BEYOND[1:])
    config = transformers.LlamaConfig(
        **SMALL_DECODER, vocab_size=END + 1, intermediate_size=64, max_position_embeddings=200, eos_token_id=END
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return VerifierConfig(path=str(folder), dtype=Dtype.float32, device=Device.cpu)


@pytest.fixture(scope="module")
def head(narrow) -> DraftHead:
    return DraftHead(DraftHeadConfig.from_verifier(DraftConfig(vocab_size=None), load_config(narrow)))


def asking(narrow: VerifierConfig, folder: Path, *rows: str | dict, **options: object) -> Config:
    """An evaluation of these rows, objects or lines of JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "q.jsonl").write_text("".join(line + "\n" for line in lines))
    options = {"max_tokens": 8, "num_draft_tokens": 2, "baselines": False, **options}
    evaluation = EvaluateConfig(questions=str(folder / "q.jsonl"), **options)
    config = Config(name="run", runs_dir=str(folder), verifier=narrow, evaluate=evaluation)
    config.tracking.wandb = config.tracking.wandb.disabled
    return config


@pytest.mark.parametrize("token", BEYOND)
def test_a_prompt_with_a_token_beyond_the_embedding_fails_alone_and_keeps_the_turns_before(narrow, token):
    asked = [("Name a colour.",), (f"What is {token}?",), ("And a fruit?", f"What is {token}?")]
    conversations = [Conversation(Prompt(str(number), "s", turns)) for number, turns in enumerate(asked)]
    converse_all(Verifier.load(narrow), conversations, 0.7, 1)
    assert [len(conversation.answers) for conversation in conversations] == [1, 0, 1]
    ended = conversations[1].ended_by
    assert (ended.reason, repr(token) in ended.detail) == ("the verifier has no embedding of a token", True)
    assert conversations[0].ended_by is None


@pytest.mark.parametrize("token", BEYOND)
def test_a_conversation_with_a_token_beyond_the_embedding_is_left_out_of_the_store(narrow, tmp_path, capsys, token):
    ids = [65, END + 1 + BEYOND.index(token), 66, END]
    config = conversations_run(
        tmp_path,
        narrow,
        record("good", "Hello.", "Hi."),
        record("asked", f"What is {token}?", "It is one."),
        record("recorded", "u", "a", sequences=[recorded_sequence(ids, (2, 4))]),
    )
    config.draft.vocab_size = None
    dump(config)
    counts = read_manifest(config.hidden_states_folder, "hidden_states")["counts"]
    assert (counts["conversations"], counts["unknown_tokens"], counts["template"]) == (1, 2, 0)
    said = capsys.readouterr().out
    assert f"dump: asked is left out: it holds the token {token!r} with id" in said
    assert "2 conversations with tokens that the verifier has no embedding of" in said


UNASKABLE = {
    "half": ('{"prompt": "half \\ud83d here"}', r"q\.jsonl line \d is not valid UTF-8"),
    "half an id": ('{"prompt": "a?", "id": "\\udc00"}', r"q\.jsonl line \d is not valid UTF-8"),
    "half a second turn": ('{"turns": ["a?", "\\ud83d"]}', r"q\.jsonl line \d is not valid UTF-8"),
    "long": ({"prompt": LONG}, "its prompt of 364 tokens fills the verifier's context of 200"),
    "long article": ({"article": LONG}, "its prompt of 375 tokens fills the verifier's context of 200"),
    "special": ({"prompt": f"What is {BEYOND[0]}?"}, "'<image_soft_token>' with id 257, and the verifier has"),
    "added": ({"turns": [BEYOND[1]]}, "'<tool_result>' with id 258, and the verifier has embeddings of ids below 257"),
}


@pytest.mark.parametrize("kind", UNASKABLE)
def test_a_question_that_cannot_be_asked_is_named_before_any_is_decoded(narrow, tmp_path, capsys, kind):
    row, reason = UNASKABLE[kind]
    config = asking(narrow, tmp_path, {"prompt": "Name a colour."}, row)
    questions = load_questions(config.evaluate)
    reader = QuestionReader(config)
    reader.check(questions)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fledge: questions that cannot be asked are left out, 1 of them: q/")
    with pytest.raises(UnaskableError, match=reason):
        reader.read(questions[1], [])
    with pytest.raises(ValueError, match="evaluate.questions: none of them can be asked: .*" + reason):
        reader.check(questions[1:])


def test_questions_that_cannot_be_asked_are_left_out_and_the_others_measured(narrow, head, tmp_path, capsys):
    rows = [{"prompt": "Name a colour."}, *(row for row, _ in UNASKABLE.values()), {"turns": ["A fruit?", LONG]}]
    config = asking(narrow, tmp_path, *rows, batch_size=4, heldout_prompts=0)
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", head, {"verifier": verifier_identity(narrow)}, torch.float32)
    config.evaluate.checkpoint = str(tmp_path / "head")
    evaluate(config)
    said = capsys.readouterr()
    assert "questions that cannot be asked are left out, 7 of them: " in said.err
    results = json.loads((config.run_folder / "evaluation" / "acceptance.json").read_text())
    assert (results["num_questions"], len(results["left_out"])) == (2, 8)
    assert results["left_out"]["q/9"].startswith("turn 2: its prompt of")
    assert "Left out: q/9, from turn 2: its prompt of" in said.out
    assert (config.run_folder / "evaluation" / "report.md").read_text().count("Left out: ") == 8
    assert ", 8 left out)" in _questions(results)
    records = {r["id"]: r for r in read_journal(config.run_folder / "evaluation" / "questions.jsonl")}
    assert len(records) == 9
    assert {name for name, r in records.items() if r["answers"]} == {"q/1", "q/9"}


def test_what_is_left_out_changes_no_other_answer(narrow, head, tmp_path):
    config = asking(narrow, tmp_path, {"prompt": "Name a colour."}, {"prompt": LONG}, {"prompt": "And a fruit?"})
    questions = load_questions(config.evaluate)
    config.evaluate.batch_size = 3
    answerer = Answerer(config, Verifier.load(narrow, list(head.config.aux_layers)), head)
    together, alone = answerer.answer(questions), answerer.answer([questions[0], questions[2]])
    said = [[answer["text"] for answer in told["answers"]] for told in together]
    assert said == [[alone[0]["answers"][0]["text"]], [], [alone[1]["answers"][0]["text"]]]


def test_questions_that_all_fail_are_refused_before_anything_is_written(narrow, head, tmp_path):
    config = asking(narrow, tmp_path, {"prompt": LONG}, {"prompt": BEYOND[0]})
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", head, {"verifier": verifier_identity(narrow)}, torch.float32)
    config.evaluate.checkpoint, config.evaluate.heldout_prompts = str(tmp_path / "head"), 0
    with pytest.raises(ValueError, match=r"^evaluate\.questions: none of them can be asked: q/1: .*; q/2: it holds"):
        evaluate(config)
    assert not (config.run_folder / "evaluation").exists()
