"""Greedy speculation gives what the verifier gives alone, in chains and trees: 200 prompts by eight, 50 one by one."""

from __future__ import annotations

import pytest
import torch
from architectures import make_model, save_verifier
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.proposal import Drafter
from fledge.eval.decoding.speculator import Answer, Request, Speculator
from fledge.models.verifier.model import Verifier
from oracles import Oracle, TreeOracle

MAX_TOKENS = 16
PROPOSALS = {"chain": (Oracle, (4,)), "tree": (TreeOracle, (14, 4))}


@pytest.fixture(scope="module", params=["llama", "llama 4 text", "qwen3"])
def other(request, tmp_path_factory, verifier) -> Verifier:
    model = make_model(request.param, verifier.model.config.vocab_size)
    return Verifier.load(save_verifier(model, verifier.tokenizer, tmp_path_factory.mktemp("verifier")))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (200,), generator=generator).tolist()
    return [torch.randint(10, 500, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def alone(other, prompts) -> list[list[int]]:
    return [decoded.tokens for decoded in answers(other, lambda _: NoDraft(), prompts, 8)]


def answers(verifier, drafter_of, prompts: list[list[int]], num_sequences: int) -> list[Answer]:
    """Answer prompts, each group with a drafter for the places of its first and last prompt."""
    first: Drafter = drafter_of(range(num_sequences))
    speculator = Speculator(verifier, [first], num_sequences=num_sequences)
    decoded = []
    for start in range(0, len(prompts), num_sequences):
        places = range(start, start + num_sequences)
        speculator.prefill([Request(prompts[place], MAX_TOKENS) for place in places])
        decoded += speculator.decode(drafter_of(places))
    return decoded


def test_the_verifier_alone_gives_what_transformers_generates(other, prompts, alone):
    for prompt, answer in list(zip(prompts, alone, strict=True))[::10]:
        output = other.model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=other.end_token_ids
        )
        assert output[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("num_sequences", [1, 8])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_greedy_speculation_equals_the_verifier_alone(other, prompts, alone, proposal, num_sequences):
    kind, sizes = PROPOSALS[proposal]

    def drafter_of(places: range) -> Drafter:
        return kind([alone[place] for place in places], *sizes, wrong=0.2, seed=places.start)

    num_prompts = 200 if num_sequences > 1 else 50
    decoded = answers(other, drafter_of, prompts[:num_prompts], num_sequences)
    assert [answer.tokens for answer in decoded] == alone[:num_prompts]
    accepted = [number for answer in decoded for number in answer.accepted]
    assert set(accepted) >= {1, 2, 3, 4}
