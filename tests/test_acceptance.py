"""Sampled speculation keeps the verifier's distribution: counted over many draws, and a fault in the rule shows.

A right rule fails a test here with probability `ALPHA`; the seeds are fixed, so that what passes once passes again.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from builders import make_head
from fledge.conf.journal import read_journal
from fledge.conf.schema import Config, EvaluateConfig
from fledge.eval.acceptance import GREEDY, Proposal, Sampled
from fledge.eval.answers import decode_question
from fledge.eval.draft_decoder import DraftDecoder
from fledge.eval.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.questions import Question
from fledge.eval.speculative import speculate
from fledge.models.verifier import Verifier

ALPHA = 1e-6
CPU = torch.device("cpu")


def p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test of counts; cells in which fewer than five are expected count as one."""
    expected = probabilities.flatten().double() * observed.sum()
    observed, rare = observed.flatten().double(), expected < 5
    observed, expected = (torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (observed, expected))
    used = expected > 0
    assert observed[~used].sum() == 0, "a token that the verifier never gives"
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    return float(torch.special.gammaincc((used.sum() - 1).double() / 2, statistic / 2))


class ResidualForgotten(Sampled):
    """After a rejection it draws from p."""

    def _residual(self, p, q):
        return p


class TemperatureForgotten(Sampled):
    """It says of drafts that they were drawn at temperature 1."""

    def choose(self, logits):
        return super().choose(logits)[0], logits.softmax(-1)


class BonusFromTheWrongRow(Sampled):
    """The verifier's own token comes from the position before."""

    def accept(self, proposal, logits):
        return super().accept(proposal, torch.cat([logits[:1], logits[:-1]]))


FAULTS = [ResidualForgotten, TemperatureForgotten, BonusFromTheWrongRow]


def three_tokens(rule: Sampled, logits: torch.Tensor, of_drafter: torch.Tensor, certain: int | None) -> list[int]:
    """A round of two drafts on distributions that depend on the position alone, and what a round left open."""
    if certain is None:
        drawn = [rule.choose(row) for row in of_drafter]
        proposal = Proposal([token for token, _ in drawn], torch.stack([q for _, q in drawn]))
    else:
        proposal = Proposal([certain, certain])
    tokens = rule.accept(proposal, logits)
    return tokens + [rule.choose(row)[0] for row in logits[len(tokens) :]]


def counts_of_rounds(kind: type[Sampled], certain: int | None, temperature: float = 0.4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    logits, of_drafter = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)
    rule, counts = kind(temperature, CPU, "rounds"), torch.zeros(4, 4, 4)
    for _ in range(4000):
        counts[tuple(three_tokens(rule, logits, of_drafter, certain))] += 1
    return counts, torch.einsum("i,j,k->ijk", *(logits / temperature).softmax(-1))


@pytest.mark.parametrize("certain", [None, 2])
def test_tokens_of_a_round_have_the_verifiers_distribution(certain):
    assert p_value(*counts_of_rounds(Sampled, certain)) > ALPHA


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_rule_is_found_out(fault):
    assert p_value(*counts_of_rounds(fault, None)) < ALPHA


def test_drafts_that_are_the_verifiers_own_are_always_accepted():
    rule, logits = Sampled(1.0, CPU, "same"), torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    for _ in range(50):
        drawn = [rule.choose(row) for row in logits[:2]]
        proposal = Proposal([token for token, _ in drawn], torch.stack([q for _, q in drawn]))
        tokens = rule.accept(proposal, logits)
        assert tokens[:2] == proposal.tokens
        assert len(tokens) == 3


def test_drafts_that_the_verifier_never_gives_are_never_accepted():
    rule, logits = Sampled(1.0, CPU, "apart"), torch.tensor([[0.0, 0.0, -1e9]] * 2)
    for _ in range(20):
        (token,) = rule.accept(Proposal([2]), logits)
        assert token != 2


def test_a_low_temperature_is_nearly_greedy_and_accepts_the_same():
    generator = torch.Generator().manual_seed(5)
    for number in range(20):
        logits = torch.randn(4, 30, generator=generator)
        proposal = Proposal([int(logits[0].argmax()), int(logits[1].argmax()), number])
        assert Sampled(1e-4, CPU, "cold").accept(proposal, logits) == GREEDY.accept(proposal, logits)


# -- the whole loop, on a verifier of four tokens ----------------------------------------------------------------------

PROMPT = [1, 2, 3, 1, 2]


@pytest.fixture(scope="module")
def small(tiny_verifier_folder) -> Verifier:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # sharper than chance
    # Its end-of-turn token is beyond the four: three tokens are always given.
    return Verifier(model, transformers.AutoTokenizer.from_pretrained(tiny_verifier_folder), [0])


@pytest.fixture(scope="module")
def exact(small) -> torch.Tensor:
    """The verifier's joint distribution of the three tokens after the prompt."""
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    texts = torch.cat([torch.tensor(PROMPT).expand(16, -1), first[:, None], second[:, None]], dim=1)
    one, two, three = small.forward(texts).logits[:, -3:].softmax(-1).unbind(1)
    rows = torch.arange(16)
    return (one[rows, first] * two[rows, second])[:, None] * three


def counts_of_answers(small: Verifier, kind: type[Sampled], lookup: bool, number: int) -> tuple[torch.Tensor, float]:
    head = make_head(vocab_size=4, draft_vocab_size=3, aux_layers=(0,))
    drafter = PromptLookup() if lookup else DraftDecoder(head, small.model.get_input_embeddings().weight.detach())
    counts, accepted = torch.zeros(4, 4, 4), 0
    for draw in range(number):
        decoded = speculate(small, drafter, PROMPT, 2, 3, kind(1.0, CPU, f"answer {draw}"))
        counts[tuple(decoded.tokens)] += 1
        accepted += sum(decoded.accepted)
    return counts, accepted / number


@pytest.mark.parametrize("lookup", [False, True])
def test_sampled_speculation_has_the_verifiers_distribution(small, exact, lookup):
    counts, accepted = counts_of_answers(small, Sampled, lookup, 500)
    assert accepted > 0.2, "or nothing was put to the test"
    assert p_value(counts, exact) > ALPHA


def test_a_faulty_rule_is_found_out_in_the_whole_loop_too(small, exact):
    counts, _ = counts_of_answers(small, ResidualForgotten, False, 500)
    assert p_value(counts, exact) < ALPHA


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(verifier):
    prompt = list(range(10, 40))
    one, again, other = (
        speculate(verifier, NoDraft(), prompt, 3, 20, Sampled(1.0, CPU, seed)).tokens for seed in ("a", "a", "b")
    )
    assert one == again != other


def test_a_sampled_evaluation_shows_the_estimate_and_claims_no_equality(finished, run):
    checkpoint = finished.path / "training" / "checkpoints" / "step-24"
    run.path.mkdir(parents=True)
    (run.path / "conversations").symlink_to(finished.path / "conversations")
    options = ["evaluate.temperature=1.0", "evaluate.max_tokens=12", "evaluate.heldout_prompts=6"]
    out = run("evaluate", f"evaluate.checkpoint={checkpoint}", "evaluate.baselines=false", *options).stdout
    folder = run.path / "evaluation"
    results = json.loads((folder / "acceptance.json").read_text())
    assert (results["temperature"], results["seed"]) == (1.0, 0)
    assert "lossless" not in results
    assert 1.0 < results["acceptance_length"] < 4.0
    heldout = results["heldout"]
    assert "walked_acceptance_length" not in heldout
    told, decoded = heldout["estimated_acceptance_length_t1"], heldout["decoded"]["acceptance_length"]
    assert f"acceptance length {told:.2f} estimated in training (temperature 1, over greedy answers), " in out
    assert f"{decoded:.2f} sampled at temperature 1" in out
    assert "token for token" not in (folder / "report.md").read_text()
    records = list(read_journal(folder / "questions.jsonl"))
    answers = [answer for r in records if r["category"] != "heldout" for answer in r["answers"]]
    decoded = [answer["drafters"]["trained head"] for answer in answers]
    assert results["num_output_tokens"] == sum(one["output_tokens"] for one in decoded)
    assert any(d["output_tokens"] != a["output_tokens"] for d, a in zip(decoded, answers, strict=True))
    assert not any("equals_verifier" in one for one in decoded)


def test_sampled_answers_depend_on_the_question_and_not_on_the_order(verifier, verifier_config):
    config = Config(name="x", verifier=verifier_config, evaluate=EvaluateConfig(temperature=1.0, max_tokens=8))
    questions = [Question(name, "all", ("Hello there, who are you?",) * 2) for name in ("a", "b")]

    def answers(asked: list[Question]) -> dict[str, list[str]]:
        records = [decode_question(verifier, {"lookup": PromptLookup()}, question, config) for question in asked]
        return {record["id"]: [answer["text"] for answer in record["answers"]] for record in records}

    forward, backward = answers(questions), answers(questions[::-1])
    assert forward == backward
    assert forward["a"] != forward["b"]
