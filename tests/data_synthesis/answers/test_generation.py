"""Many answers at a time are those of one at a time, whatever else is being answered."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from architectures import IMAGE_TEXT_MODELS, MODELS, make_model, save_verifier
from fledge.data_synthesis.answers import generation
from fledge.data_synthesis.answers.generation import Generated, Generation, GenerationRequest, Task
from fledge.eval.decoding.speculator import answer_alone
from fledge.models.verifier.cache import CachedVerifier
from fledge.models.verifier.model import Verifier

LFM2 = "lfm2, final norm by another name"
TEXTS = [
    "Name a colour.",
    "Name a colour.",
    "What is 3 plus 4? " * 9,
    "Say it again: red, blue, green and blue.",
    "Why?",
    "Name a fruit, and a colour that it has.",
    "Name a colour.",
]


def asked(verifier: Verifier, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return verifier.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def request(verifier: Verifier, context: list[int], **fields: object) -> GenerationRequest:
    return GenerationRequest(context, **{"max_tokens": 24, "end_token_ids": verifier.end_token_ids, **fields})


def generated(verifier: Verifier, requests: list[GenerationRequest], num_rows: int) -> list[Generated]:
    answers: dict[int, Generated] = {}

    def task(number: int) -> Task:
        answers[number] = yield requests[number]

    Generation(verifier, num_rows).run(task(number) for number in range(len(requests)))
    return [answers[number] for number in range(len(requests))]


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_greedy_answers_are_the_verifiers_own(verifier, num_rows):
    requests = [request(verifier, asked(verifier, text), max_tokens=8 + 5 * n) for n, text in enumerate(TEXTS)]
    for one, answer in zip(requests, generated(verifier, requests, num_rows), strict=True):
        assert answer.tokens == answer_alone(verifier, one.context, one.max_tokens)
        assert answer.ended == (answer.tokens[-1] in verifier.end_token_ids)


def test_sampled_answers_depend_on_the_seed_and_not_on_each_other(verifier):
    requests = [
        request(verifier, asked(verifier, text), temperature=1.0, top_p=0.9, seed=n) for n, text in enumerate(TEXTS)
    ]
    alone = [generated(verifier, [one], 1)[0] for one in requests]
    assert generated(verifier, requests, 3) == generated(verifier, requests[::-1], 7)[::-1] == alone
    assert len({tuple(alone[n].tokens) for n in (0, 1, 6)}) > 1, "the same question, three seeds"


def test_tokens_are_drawn_as_often_as_they_are_likely(verifier):
    context, number = asked(verifier, "Name a colour."), 2000
    with torch.no_grad():
        logits = verifier.forward(torch.tensor([context])).logits[0, -1]
    expected = torch.softmax(logits / 0.8, -1)
    requests = [request(verifier, context, max_tokens=1, temperature=0.8, seed=seed) for seed in range(number)]
    counts = Counter(answer.tokens[0] for answer in generated(verifier, requests, 100))
    for token, probability in enumerate(expected.tolist()):
        deviation = (number * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - number * probability) < 5 * deviation + 1


def test_a_task_asks_on_in_the_cache_of_its_earlier_turns(verifier, monkeypatch):
    read: list[int] = []
    forward = generation.CachedVerifier.forward

    def counted(cached, tokens, *arguments, **keywords):
        read.append(tokens.shape[1])
        return forward(cached, tokens, *arguments, **keywords)

    chats: list[tuple[list[int], list[int]]] = []

    def task(number: int) -> Task:
        context = asked(verifier, TEXTS[number])
        for _ in range(3):
            answer = yield request(verifier, context, max_tokens=12)
            chats.append((context, answer.tokens))
            context = [*context, *answer.tokens, *asked(verifier, "And another?")]

    runner = Generation(verifier, 2)
    monkeypatch.setattr(generation.CachedVerifier, "forward", counted)
    runner.run(task(number) for number in range(4))
    monkeypatch.undo()
    assert all(tokens == answer_alone(verifier, context, 12) for context, tokens in chats)
    new = len(asked(verifier, "And another?"))
    assert [n for n in read if 1 < n <= new + 15].count(-(-new // 16) * 16) >= 8, (
        "of later turns what is new alone is read"
    )
    assert len([n for n in read if n > 1]) == 8 + 3, "and a first context that another has read is not"


def test_none_begins_after_a_signal_and_none_goes_on_after_its_grace(verifier):
    ended: list[int] = []

    def task(number: int) -> Task:
        yield request(verifier, asked(verifier, TEXTS[number]), max_tokens=4 + number, end_token_ids=())
        ended.append(number)

    Generation(verifier, 3).run((task(n) for n in range(7)), may_begin=lambda: not ended)
    assert ended == [0, 1, 2]
    ended.clear()
    Generation(verifier, 3).run((task(n) for n in range(7)), may_go_on=lambda: len(ended) < 2)
    assert ended == [0, 1]


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in (*MODELS, *IMAGE_TEXT_MODELS)), (LFM2, {"layer_types": ["conv", "full_attention"] * 4})],
)
def test_every_architecture_answers_as_it_does_without_a_cache(name, more, verifier, tmp_path, capsys):
    model = make_model(name, verifier.model.config.get_text_config().vocab_size, **more)
    other = Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path))
    requests = [request(other, asked(other, text), max_tokens=6 + n) for n, text in enumerate(TEXTS[:4])]
    for one, answer in zip(requests, generated(other, requests, 3), strict=True):
        text = list(one.context)
        while len(text) < len(one.context) + len(answer.tokens):
            text.append(int(other.forward(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert answer.tokens == text[len(one.context) :]
    assert ("no static cache" in capsys.readouterr().out) == (name == "falcon h1" or "layer_types" in more)


def test_a_verifier_without_a_static_cache_answers_in_batches_until_a_signal(verifier, tmp_path):
    model = make_model(LFM2, verifier.model.config.vocab_size, layer_types=["conv", "full_attention"] * 4)
    other = Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path))
    answers: dict[int, list[int]] = {}

    def task(number: int) -> Task:
        for _ in range(number % 3):
            temperature = number % 2
            one = request(other, asked(other, TEXTS[number]), max_tokens=5, temperature=temperature, end_token_ids=(0,))
            answers.setdefault(number, []).append(len((yield one).tokens))

    Generation(other, 4).run(task(number) for number in range(7))
    assert answers == {1: [5], 2: [5, 5], 4: [5], 5: [5, 5]}
    answers.clear()
    Generation(other, 2).run((task(number) for number in range(7)), may_begin=lambda: not answers)
    assert answers == {1: [5]}
    answers.clear()
    Generation(other, 7).run((task(number) for number in range(7)), may_go_on=lambda: False)
    assert not any(answers.values())


def test_an_answer_may_fill_the_context(verifier, tmp_path):
    model = make_model("llama", verifier.model.config.vocab_size, max_position_embeddings=70)
    other = Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path))
    contexts = [asked(other, "Name it: red, blue, green.")[-50:], list(range(7, 7 + 69)), list(range(9, 9 + 33))]
    requests = [request(other, c, max_tokens=70 - len(c), end_token_ids=()) for c in contexts]
    answers = generated(other, requests, 2)
    assert [len(c) + len(a.tokens) for c, a in zip(contexts, answers, strict=True)] == [70] * 3


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_text_ends_before_other_lengths_change_its_angles(kind, verifier, tmp_path):
    factors = {"long_factor": [4.0] * 16, "short_factor": [1.0] * 16} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    model = make_model("llama", verifier.model.config.vocab_size, rope_parameters=rope)
    other = Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path))
    assert CachedVerifier(other, 1).context == 64
    one = request(other, list(range(7, 67)), max_tokens=9, end_token_ids=())
    text = list(one.context)
    while len(text) < 69:
        text.append(int(other.forward(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    assert generated(other, [one, one], 2)[1].tokens == text[60:]


def test_logits_that_are_no_numbers_end_it(verifier):
    runner = Generation(verifier, 1)
    with pytest.raises(ValueError, match=r"verifier\.dtype: the verifier's logits are not numbers in float32"):
        runner._choose(torch.tensor([[0.0, torch.nan]]))
