"""The embedded verifier: its conversations, prompts and questions, its checkpoint, and how it was made."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import make_embedded
import pytest
import torch
from fledge.models.embedded.verifier import CHECKPOINT, conversations, prompts, questions
from make_embedded import EmbeddedSettings, make_document, make_model, make_tokenizer, shared_embedded, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST_LOSSES = [7.41339, 7.28326, 7.00333, 6.61482]  # nats a token, on another machine
SMALLEST = EmbeddedSettings(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16, vocab_size=400,
    num_conversations=48, steps=3, batch_tokens=512,
)  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Explain gravity to Anna."},
    {"role": "assistant", "content": " Gravity pulls.\n"},
    {"role": "user", "content": "\nNow say it shorter."},
    {"role": "assistant", "content": "It pulls."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def user_turns(conversation: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in conversation if message["role"] == "user"]


def test_no_question_opens_like_a_conversation_or_a_prompt():
    opening = {question["turns"][0] for question in questions()}
    seen = {user_turns(messages)[0] for messages in conversations()} | {prompt["turns"][0] for prompt in prompts()}
    assert len(opening) == 80
    assert not opening & seen


def test_questions_have_the_form_of_mt_bench():
    assert [question["category"] for question in questions()] == [name for name in CATEGORIES for _ in range(10)]
    assert len({question["question_id"] for question in questions()}) == 80
    assert all(len(question["turns"]) == 2 and all(question["turns"]) for question in questions())


def test_prompts_are_unique_and_of_every_category():
    made = prompts()
    assert len({prompt["id"] for prompt in made}) == len({tuple(prompt["turns"]) for prompt in made}) == 2000
    assert [prompt["category"] for prompt in made[:16]] == [*CATEGORIES, *CATEGORIES]
    assert {len(prompt["turns"]) for prompt in made} == {1, 2}


def test_conversations_alternate_over_one_to_three_turns_and_leave_no_slot_open():
    for messages in conversations():
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    texts = [message["content"] for message in itertools.chain(*conversations())]
    assert {len(user_turns(messages)) for messages in conversations()} == {1, 2, 3}
    assert all(text.strip() for text in texts)
    assert not [text for text in texts if "<" in text.replace("item < best", "") or "|" in text]
    assert not [text for text in texts if "{" in text and not text.startswith('{"')]


def test_arithmetic_in_answers_is_right():
    texts = (message["content"] for message in itertools.chain(*conversations()))
    sums = [match for text in texts for match in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)]
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert len(sums) > 200
    assert all(operations[sign](int(left), int(right)) == int(result) for left, sign, right, result in sums)


def test_its_chat_template_is_append_only(tokenizer):
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    for count in range(1, len(MESSAGES)):
        assert whole.startswith(tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False))
        asks = MESSAGES[count]["role"] == "assistant"
        assert whole.startswith(
            tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=asks)
        )


def test_its_chat_template_marks_answers_with_their_end(tokenizer):
    rendered = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == " Gravity pulls.\n<|end|>It pulls.<|end|>"
    document = make_document(tokenizer, MESSAGES, EmbeddedSettings())
    assert document.ids == rendered["input_ids"]
    assert [int(weight == 1.0) for weight in document.weights] == rendered["assistant_masks"]


def test_every_string_survives_its_tokenizer(tokenizer):
    text = "  Zoë said: \t«42»\n\n  def f(x):  # 漢字 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_checkpoint_loads_and_ends_on_its_end_of_turn_token(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    end = tokenizer.convert_tokens_to_ids(make_embedded.END)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == end


def test_its_tokenizer_and_the_first_steps_of_its_training_are_made_again_from_the_files():
    settings = EmbeddedSettings()
    tokenizer = make_tokenizer(settings)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads((CHECKPOINT / "tokenizer.json").read_text())
    documents = [make_document(tokenizer, messages, settings) for messages in conversations()[:400]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = make_model(settings, tokenizer)
        losses = train(model, documents, replace(settings, steps=4, warmup=0.5))
    shapes = {name: tensor.shape for name, tensor in load_file(CHECKPOINT / "model.safetensors").items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert losses == pytest.approx(FIRST_LOSSES, rel=1e-3)


def test_processes_that_want_the_same_verifier_make_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(make_embedded.tempfile, "tempdir", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(shared_embedded, [SMALLEST] * 4))
    assert len(made) == 1
    assert sorted(Path(path).name for path in made) == [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert shared_embedded(replace(SMALLEST, steps=2)) not in made
