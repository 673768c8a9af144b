"""The kernels of speculative decoding in Triton's interpreter: run by test_kernels.py, with TRITON_INTERPRET=1.

Not in bfloat16, with which the interpreter computes as if it were integers.
"""

import pytest
import torch
from decoding_twins import (
    Loop,
)
from fledge.conf.schema import DraftSampling
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.kernel_checks import (
    chain,
    choices_for,
    count_other_choices,
    count_other_draws,
    count_other_slots,
    count_other_steps,
    joined_error,
    random_tree,
)
from fledge.eval.decoding.proposal import accepted_path
from fledge.models import kernels
from fledge.models.head.ttt_attention import TTTAttention
from fledge.models.kernels import choosing
from small_heads import FORMS, make_head, matrices

torch.set_num_threads(1)
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
RULES = {
    "warm": AcceptanceRule(0.7),
    "hot": AcceptanceRule(2.5),
    "cut": AcceptanceRule(1.0, top_p=0.9, top_k=50),
}
DRAWN = AcceptanceRule(0.8, draft_sampling=DraftSampling.sampled)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Let the kernels run on this CPU."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 96), (2, 80), (5, 33), (3, 5120), (7, 1)])
def test_the_input_of_a_draft_step_equals_its_definition(num_rows, width, dtype):
    assert joined_error(num_rows, width, dtype, "cpu") <= (2e-6 if dtype == torch.float32 else 4e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_a_step_that_looks_its_embeddings_up_equals_one_that_is_given_them(changes):
    head, embedding = make_head(**changes), matrices()[0]
    tokens, state = torch.arange(40, 47), torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    rotary, layers = head.rotary(torch.arange(7), state), head.config.num_layers
    found, expected = (
        head.step(given, state, rotary, TTTAttention([7], layers))
        for given in (head.lookup(tokens, embedding), head.embed(tokens, embedding))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), [((4, 7), 64), ((2, 3, 300), 64), ((1, 5000), 4096)])
def test_the_likeliest_token_is_the_first_of_equal_ones(shape, block, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    assert torch.equal(choosing.likeliest(logits, block), logits.argmax(-1))
    logits = -torch.rand(shape, generator=generator).to(dtype)
    assert torch.equal(choosing.likeliest(logits, block), logits.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("width", [7, 300, 5000])
def test_tokens_are_drawn_as_by_the_twin(width, rule, dtype):
    differ, wrong = count_other_draws(100, width, dtype, "cpu", rule)
    assert differ <= 1
    assert wrong == 0


def test_a_token_without_weight_is_never_drawn_and_the_last_with_weight_is_where_the_number_is_near_one():
    weights = torch.zeros(3, 1000)
    weights[:, [130, 131, 700]] = torch.tensor([0.1, 1e-30, 0.7])
    numbers = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert choosing.draw(weights, numbers, block=64).tolist() == [130, 700, 700]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("likeness", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("sequences", "drafts", "width"), [(20, 3, 7), (8, 6, 300), (6, 2, 5000), (30, 1, 40)])
def test_drawn_drafts_are_accepted_or_replaced_as_by_the_twin(sequences, drafts, width, likeness, cut, dtype):
    rule = AcceptanceRule(0.8, top_p=0.8 if cut else 1.0, draft_sampling=DraftSampling.sampled)
    differ, wrong, accepted = count_other_choices(sequences, drafts, width, dtype, "cpu", rule, likeness)
    assert differ <= 1
    assert wrong == 0
    assert accepted == 1.0 if likeness == 1.0 else accepted < 1.0


@pytest.mark.parametrize("kind", ["all", "none", "some"])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    ("make", "num_nodes"), [(chain, 0), (chain, 1), (chain, 7), (random_tree, 1), (random_tree, 60)]
)
def test_the_way_is_the_twins_and_its_slots_come_together_as_by_the_twin(make, num_nodes, sequences, kind):
    proposal = make(sequences, num_nodes, "cpu")
    choices = choices_for(proposal, kind)
    assert count_other_steps(proposal, choices) == 0
    accepted = accepted_path(proposal, choices).accepted.sum()
    assert accepted == 0 if kind == "none" or not num_nodes else accepted > 0 or (kind, sequences) == ("some", 1)
    nodes = accepted_path(proposal, choices).nodes
    for heads, head_dim, dtype in ((2, 48, torch.float32), (3, 400, torch.float16)):
        assert count_other_slots(nodes, heads, head_dim, dtype) == 0


QUICK = [("chain", "greedy"), ("tree", "warm")]
OTHERS = [("chain", "warm"), ("chain", "cut"), ("chain", "drawn"), ("tree", "greedy"), ("tree", "cut")]
LOOPS = [*QUICK, *(pytest.param(*loop, marks=pytest.mark.slow) for loop in OTHERS)]


@pytest.mark.parametrize(("shape", "name"), LOOPS)
def test_the_loop_with_kernels_equals_the_loop_without(shape, name):
    rule = {"greedy": AcceptanceRule(), "drawn": DRAWN, **RULES}[name]
    loop = Loop(max_tokens=12)
    (found, alone), (expected, _) = (loop.answers(shape, rule, kernels=kernels) for kernels in (True, False))
    assert [(a.tokens, a.accepted) for a in found] == [(a.tokens, a.accepted) for a in expected]
    if rule is not DRAWN:
        assert [a.tokens for a in found] == [a.tokens for a in alone]
    assert sum(sum(a.accepted) for a in found) > 0
