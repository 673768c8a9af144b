"""Claims about the embedded verifier: its corpus, its checkpoint, its cache."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fledge.models.embedded import corpus, library_text, verifier
from fledge.models.embedded.verifier import EmbeddedSettings, embedded_verifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = EmbeddedSettings(
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the tiny verifier once."""
    return embedded_verifier(TINY, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    """Load the tiny verifier's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def user_turns(conversation: list[dict[str, str]]) -> list[str]:
    """Give the contents of the user messages."""
    return [message["content"] for message in conversation if message["role"] == "user"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Load the checkpoint's tensors."""
    return load_file(path / "model.safetensors")


def test_no_held_out_question_enters_training():
    held_out = {question["turns"][0] for question in corpus.questions()}
    trained = {user_turns(messages)[0] for messages in corpus.training_conversations(20_000, 0)}
    prompted = {prompt["turns"][0] for prompt in corpus.prompts(8_000, 0)}
    assert len(held_out) == 80
    assert not held_out & (trained | prompted)
    assert all(corpus.is_held_out(turn) for turn in held_out)
    assert not any(corpus.is_held_out(turn) for turn in trained | prompted)


def test_questions_have_the_form_of_mt_bench():
    questions = corpus.questions()
    assert [question["category"] for question in questions] == [name for name in corpus.CATEGORIES for _ in range(10)]
    assert len({question["question_id"] for question in questions}) == 80
    assert all(len(question["turns"]) == 2 and all(question["turns"]) for question in questions)
    assert questions == corpus.questions()


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_are_unique_and_repeatable(seed: int):
    prompts = corpus.prompts(4_000, seed)
    assert len({prompt["id"] for prompt in prompts}) == len({tuple(prompt["turns"]) for prompt in prompts}) == 4_000
    assert {prompt["category"] for prompt in prompts} == set(corpus.CATEGORIES)
    assert {len(prompt["turns"]) for prompt in prompts} == {1, 2}
    assert prompts[:100] == corpus.prompts(100, seed)


def test_training_conversations_alternate_over_one_to_three_turns():
    conversations = list(corpus.training_conversations(800, 3))
    for messages in conversations:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in messages)
    assert {len(user_turns(messages)) for messages in conversations} == {1, 2, 3}
    assert conversations == list(corpus.training_conversations(800, 3))
    assert conversations != list(corpus.training_conversations(800, 4))


def test_no_slot_is_left_open():
    texts = [message["content"] for messages in corpus.training_conversations(4_000, 5) for message in messages]
    assert not [text for text in texts if "<" in text.replace("item < best", "") or "|" in text]
    assert not [text for text in texts if "{" in text and not text.startswith('{"')]


def test_arithmetic_in_answers_is_right():
    sums = [
        match
        for messages in corpus.training_conversations(2_000, 6)
        for message in messages
        for match in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", message["content"])
    ]
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert len(sums) > 200
    assert all(operations[sign](int(left), int(right)) == int(result) for left, sign, right, result in sums)


def test_an_installation_without_docstrings_and_topics_still_has_a_corpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library_text, "_module", lambda name: SimpleNamespace(sqrt=SimpleNamespace(__doc__=None)))
    for cached in (library_text.code_functions, library_text.math_functions, library_text.topic_sentences):
        cached.cache_clear()
    try:
        assert not library_text.code_functions()
        assert not library_text.math_functions()
        assert not library_text.topic_sentences()
        assert len(corpus.questions()) == 80
        assert len(list(corpus.training_conversations(200, 0))) == 200
    finally:
        monkeypatch.undo()
        for cached in (library_text.code_functions, library_text.math_functions, library_text.topic_sentences):
            cached.cache_clear()


def test_the_library_carries_real_text():
    assert len(library_text.code_functions()) >= 15
    assert len(library_text.math_functions()) >= 8
    assert len(library_text.topic_sentences()) >= 20


def test_the_default_model_has_distinct_auxiliary_layers():
    settings = EmbeddedSettings()
    assert len({1, settings.num_layers // 2 - 1, settings.num_layers - 4}) == 3
    assert settings.head_dim >= 32


def test_chat_template_is_append_only(tokenizer):
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    for count in range(1, len(MESSAGES)):
        rendered = tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False)
        assert whole.startswith(rendered)
        asks = MESSAGES[count]["role"] == "assistant"
        assert whole.startswith(
            tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=asks)
        )


def test_chat_template_marks_answers_with_their_end(tokenizer):
    rendered = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == " Gravity pulls.\n<|end|>It pulls.<|end|>"


def test_training_sees_what_the_chat_template_renders(tokenizer):
    document = verifier._document(tokenizer, MESSAGES, TINY)
    rendered = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert document.ids == rendered["input_ids"]
    assert [int(weight == 1.0) for weight in document.weights] == rendered["assistant_masks"]


def test_every_string_survives_the_tokenizer(tokenizer):
    text = "  Zoë said: \t«42»\n\n  def f(x):  # 漢字 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_checkpoint_loads_and_ends_on_its_end_of_turn_token(folder: Path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    end = tokenizer.convert_tokens_to_ids(verifier.END)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == end


def test_same_settings_give_the_same_weights(folder: Path, tmp_path: Path):
    state = torch.get_rng_state()
    again = embedded_verifier(TINY, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert again.name == folder.name
    first, second = weights(folder), weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "tokenizer.json").read_text() == (again / "tokenizer.json").read_text()


def test_cache_is_reused_and_a_killed_build_is_not_taken_for_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def build(settings: EmbeddedSettings, target: Path) -> None:
        calls.append(settings)
        (target / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt
        shutil.copytree(folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(verifier, "_build", build)
    with pytest.raises(KeyboardInterrupt):
        embedded_verifier(TINY, tmp_path)
    made = embedded_verifier(TINY, tmp_path)
    assert len(calls) == 2
    assert weights(made).keys() == weights(folder).keys()
    assert embedded_verifier(TINY, tmp_path) == made
    assert len(calls) == 2
    assert sorted(path.name for path in made.parent.iterdir() if path.is_dir()) == [made.name]


def test_two_askers_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(verifier, "_build", lambda settings, target: calls.append(target))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: embedded_verifier(TINY, tmp_path), range(4)))
    assert len(calls) == 1
    assert len(set(made)) == 1


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FLEDGE_CACHE", raising=False)
    assert verifier._cache_root(None) == tmp_path / "xdg" / "fledge"
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "own"))
    assert verifier._cache_root(None) == tmp_path / "own"
    assert verifier._cache_root(tmp_path) == tmp_path


def test_other_settings_get_another_folder():
    assert verifier._key(TINY) != verifier._key(EmbeddedSettings())
