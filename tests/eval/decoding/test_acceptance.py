"""Sampled speculation keeps the verifier's distribution: counted over many draws, and a fault in the rule shows.

A right rule fails a test here with probability `ALPHA`; the seeds are fixed, so that what passes once passes again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import make_head
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import Config, DraftSampling, EvaluateConfig
from fledge.eval.decoding.acceptance import GREEDY, NUM_DRAWS, AcceptanceRule, draw, uniform_draws
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.decoding.proposal import Proposal, accepted_path
from fledge.eval.decoding.speculator import Request, Speculator
from fledge.eval.local import Answerer
from fledge.eval.questions.question import Question
from fledge.models.formats.plain import load_head
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.sampling import probabilities

ALPHA = 1e-6
DRAWN = {"draft_sampling": DraftSampling.sampled}


def p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test of counts; cells in which fewer than five are expected count as one."""
    expected = probabilities.flatten().double() * observed.sum()
    observed, rare = observed.flatten().double(), expected < 5
    observed, expected = (torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (observed, expected))
    used = expected > 0
    assert observed[~used].sum() == 0, "a token that the verifier never gives"
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    return float(torch.special.gammaincc((used.sum() - 1).double() / 2, statistic / 2))


def count_texts(texts: torch.Tensor) -> torch.Tensor:
    """Count texts [number, 3] of four tokens: [4, 4, 4]."""
    return torch.bincount(texts @ torch.tensor([16, 4, 1]), minlength=64).view(4, 4, 4)


class ResidualForgotten(AcceptanceRule):
    """After a rejection it draws from p."""

    def residual(self, p, q):
        return p


class TemperatureForgotten(AcceptanceRule):
    """It says of drafts that they were drawn at temperature 1."""

    def draft(self, logits, draws):
        return super().draft(logits, draws)[0], logits.softmax(-1)


class TokenFromTheWrongRow(AcceptanceRule):
    """The verifier's own token comes from the position before."""

    def choose(self, logits, proposal, draws):
        return super().choose(torch.cat([logits[:, :1], logits[:, :-1]], 1), proposal, draws)


class OneNumberForAll(AcceptanceRule):
    """It draws every token of a round by the same number."""

    def choose(self, logits, proposal, draws):
        return super().choose(logits, proposal, draws[:, :1].expand_as(draws))


FAULTS = [ResidualForgotten, TemperatureForgotten, TokenFromTheWrongRow, OneNumberForAll]


def counts_of_rounds(kind, drawn: bool, number: int = 20_000, temperature: float = 0.4) -> tuple[torch.Tensor, ...]:
    """Rounds of two drafts on distributions that depend on the position alone, and what a round left open."""
    generator = torch.Generator().manual_seed(3)
    logits, of_drafter = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)
    rule = kind(temperature, **(DRAWN if drawn else {}))
    draws = torch.rand(number, 3, NUM_DRAWS, generator=generator, dtype=torch.float64)
    drafts = [rule.draft(row.expand(number, -1), draws[:, step]) for step, row in enumerate(of_drafter)]
    tokens, q = (torch.stack(parts, 1) if drawn or not i else None for i, parts in enumerate(zip(*drafts, strict=True)))
    every = logits.expand(number, -1, -1)
    proposal = Proposal(tokens, probabilities=q)
    way = accepted_path(proposal, rule.choose(every, proposal, draws))
    rest = draw(rule.probabilities(every), torch.rand(number, 3, generator=generator, dtype=torch.float64))
    texts = torch.where(torch.arange(3) <= way.accepted[:, None], way.tokens, rest)
    return count_texts(texts), torch.einsum("i,j,k->ijk", *(logits / temperature).softmax(-1))


@pytest.mark.parametrize("drawn", [True, False])
def test_tokens_of_a_round_have_the_verifiers_distribution(drawn):
    assert p_value(*counts_of_rounds(AcceptanceRule, drawn)) > ALPHA


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_rule_is_found_out(fault):
    assert p_value(*counts_of_rounds(fault, drawn=True)) < ALPHA


def random_proposal(number: int, logits: torch.Tensor, rule: AcceptanceRule) -> tuple[Proposal, torch.Tensor]:
    """Two drafts drawn from the first two rows of logits, and the numbers of the round."""
    draws = torch.rand(number, 3, NUM_DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drafts = [rule.draft(row.expand(number, -1), draws[:, step]) for step, row in enumerate(logits[:2])]
    tokens, q = (torch.stack(parts, 1) for parts in zip(*drafts, strict=True))
    return Proposal(tokens, probabilities=q), draws


def test_drafts_that_are_the_verifiers_own_are_always_accepted():
    rule, logits = AcceptanceRule(1.0, **DRAWN), torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    proposal, draws = random_proposal(200, logits, rule)
    way = accepted_path(proposal, rule.choose(logits.expand(200, -1, -1), proposal, draws))
    assert way.accepted.tolist() == [2] * 200
    assert torch.equal(way.tokens[:, :2], proposal.tokens)


@pytest.mark.parametrize("options", [DRAWN, {}], ids=["drawn", "not drawn"])
def test_drafts_that_the_verifier_never_gives_are_never_accepted(options):
    rule, number = AcceptanceRule(1.0, **options), 200
    logits = torch.tensor([[0.0, 0.0, -1e9]] * 2).expand(number, -1, -1)
    certain = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(number, -1, -1)
    proposal = Proposal(torch.full((number, 1), 2), probabilities=certain if options else None)
    draws = torch.rand(number, 2, NUM_DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    way = accepted_path(proposal, rule.choose(logits, proposal, draws))
    assert way.accepted.tolist() == [0] * number
    assert set(way.tokens[:, 0].tolist()) == {0, 1}


def test_a_low_temperature_is_nearly_greedy_and_accepts_the_same():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20, 4, 30, generator=generator)
    tokens = torch.stack([*logits[:, :2].argmax(-1).T, torch.arange(20)], 1)
    draws = torch.rand(20, 4, NUM_DRAWS, generator=generator, dtype=torch.float64)
    cold = AcceptanceRule(1e-4).choose(logits, Proposal(tokens), draws)
    assert torch.equal(cold, GREEDY.choose(logits, Proposal(tokens), draws))


def kept_naively(logits: torch.Tensor, temperature: float, top_p: float, top_k: int | None) -> torch.Tensor:
    """The distribution with tokens left out one by one, the least likely first."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k]
    p = p * torch.tensor([token in kept for token in range(len(p))])
    p = p / p.sum()
    while len(kept) > 1 and p[kept[:-1]].sum() >= top_p:
        kept.pop()
    p = p * torch.tensor([token in kept for token in range(len(p))])
    return p / p.sum()


@pytest.mark.parametrize("options", [(0.7, 0.9, None), (1.0, 1.0, 5), (1.0, 0.8, 6), (1.3, 0.05, None), (1.0, 1.0, 99)])
def test_top_p_and_top_k_keep_the_likeliest_tokens(options):
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    found = AcceptanceRule(*options).probabilities(logits)
    expected = torch.stack([kept_naively(row, *options) for row in logits])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(probabilities(logits, *options, num_sorted=number), found) for number in (1, 2, 29, 30))


def test_a_number_draws_the_token_whose_share_it_falls_into_and_never_one_without_a_share():
    weights = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).expand(6, -1)
    draws = torch.tensor([0.0, 0.49999, 0.5, 0.74999, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, draws).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(weights * 3, draws).tolist() == [1, 1, 3, 3, 4, 4]


# -- the whole loop, on a verifier of four tokens ----------------------------------------------------------------------

PROMPT = [1, 2, 3, 1, 2]
RULES = {"temperature 1": (1.0,), "temperature 0.7": (0.7,), "top-p 0.9": (1.0, 0.9)}
SHAPES = {"chain": {"num_draft_tokens": 2}, "tree": {"num_draft_tokens": 5, "tree_depth": 2, "tree_top_k": 2}}


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


def exact(small: Verifier, rule: AcceptanceRule) -> torch.Tensor:
    """The verifier's joint distribution of the three tokens after the prompt."""
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    texts = torch.cat([torch.tensor(PROMPT).expand(16, -1), first[:, None], second[:, None]], dim=1)
    logits = small.forward(texts).logits[:, -3:]
    p = torch.stack([kept_naively(row, rule.temperature, rule.top_p, rule.top_k) for row in logits.flatten(0, 1)])
    one, two, three = p.view(16, 3, 4).unbind(1)
    rows = torch.arange(16)
    return (one[rows, first] * two[rows, second])[:, None] * three


def counts_of_answers(
    small: Verifier, rule: AcceptanceRule, drafter: str, number: int = 20_000, at_once: int = 1000
) -> tuple[torch.Tensor, float]:
    """Count answers of three tokens; give also the mean number of drafts accepted."""
    if drafter == "lookup":
        chosen = PromptLookup(2, at_once)
    else:
        head = make_head(vocab_size=4, draft_vocab_size=3, aux_layers=(0,))
        embedding = small.model.get_input_embeddings().weight.detach()
        chosen = DraftDecoder(head, embedding, **SHAPES[drafter], rule=rule, num_sequences=at_once)
    speculator = Speculator(small, [chosen], rule, at_once)
    texts, accepted = [], 0
    for first in range(0, number, at_once):
        speculator.prefill([Request(PROMPT, 3, f"answer {first + i}") for i in range(at_once)])
        answers = speculator.decode(chosen)
        texts += [answer.tokens for answer in answers]
        accepted += sum(sum(answer.accepted) for answer in answers)
    return count_texts(torch.tensor(texts)), accepted / number


@pytest.mark.parametrize("sampling", RULES)
@pytest.mark.parametrize("drafter", ["chain", "chain, drawn", "tree"])
def test_sampled_speculation_has_the_verifiers_distribution(small, drafter, sampling):
    drawn = drafter.endswith("drawn")
    rule = AcceptanceRule(*RULES[sampling], **(DRAWN if drawn else {}))
    counts, accepted = counts_of_answers(small, rule, drafter.removesuffix(", drawn"))
    assert accepted > 0.2, "or nothing was put to the test"
    assert p_value(counts, exact(small, rule)) > ALPHA


def test_prompt_lookup_keeps_the_verifiers_distribution(small):
    counts, accepted = counts_of_answers(small, AcceptanceRule(1.0), "lookup", 2000)
    assert accepted > 0.2
    assert p_value(counts, exact(small, AcceptanceRule(1.0))) > ALPHA


@pytest.mark.parametrize("fault", [ResidualForgotten, OneNumberForAll])
def test_a_faulty_rule_is_found_out_in_the_whole_loop_too(small, fault):
    rule = fault(1.0, **DRAWN)
    assert p_value(counts_of_answers(small, rule, "chain", 4000)[0], exact(small, rule)) < ALPHA


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(verifier):
    speculator = Speculator(verifier, [], AcceptanceRule(1.0))
    answers = []
    for seed in ("a", "a", "b"):
        speculator.prefill([Request(list(range(10, 40)), 20, seed)])
        answers.append(speculator.decode(NoDraft())[0].tokens)
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(uniform_draws("a", 9)[:5], uniform_draws("a", 5))


def test_a_sampled_evaluation_shows_the_estimate_and_claims_no_equality(finished, run):
    checkpoint = finished.path / "training" / "checkpoints" / "step-24"
    run.path.mkdir(parents=True)
    (run.path / "conversations").symlink_to(finished.path / "conversations")
    options = ["evaluate.temperature=1.0", "evaluate.max_tokens=12", "evaluate.heldout_prompts=6"]
    options += ["evaluate.draft_sampling=sampled"]
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


def test_a_sampled_evaluation_whose_drafts_are_not_drawn_gives_the_verifiers_own_answers(finished, run):
    checkpoint = finished.path / "training" / "checkpoints" / "step-24"
    options = ["evaluate.temperature=1.0", "evaluate.top_p=0.95", "evaluate.max_tokens=12", "evaluate.batch_size=4"]
    tree = ["evaluate.num_draft_tokens=9", "evaluate.tree_depth=3", "evaluate.tree_top_k=3"]
    out = run("evaluate", f"evaluate.checkpoint={checkpoint}", *options, *tree).stdout
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    lossless = results["lossless"]
    assert lossless["decoded_answers"] == 3 * sum(len(r["answers"]) for r in read_journal(records_of(run))) > 0
    assert lossless["equal_to_verifier"] == lossless["decoded_answers"]
    assert f"{lossless['decoded_answers']} of {lossless['decoded_answers']} answers equal the verifier's own" in out
    assert len(results["acceptance_rate_per_pos"]) == 3


def records_of(run) -> Path:
    return run.path / "evaluation" / "questions.jsonl"


def test_sampled_answers_depend_on_the_question_and_not_on_the_order_or_the_batch(verifier, verifier_config, finished):
    options = EvaluateConfig(temperature=1.0, max_tokens=8)
    questions = [Question(name, "all", ("Hello there, who are you?",) * 2) for name in ("a", "b", "c")]
    head, _ = load_head(finished.path / "training" / "checkpoints" / "step-24")

    def answers(asked: list[Question], batch_size: int) -> dict[str, list[str]]:
        options.batch_size = batch_size
        answerer = Answerer(Config(name="x", verifier=verifier_config, evaluate=options), verifier, head)
        groups = [asked[first : first + batch_size] for first in range(0, 3, batch_size)]
        records = [record for group in groups for record in answerer.answer(group)]
        return {record["id"]: [answer["text"] for answer in record["answers"]] for record in records}

    forward, backward, together = answers(questions, 1), answers(questions[::-1], 1), answers(questions, 2)
    assert forward == backward == together
    assert forward["a"] != forward["b"]
