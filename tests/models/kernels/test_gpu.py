"""The Triton kernels, the training engine and speculative decoding on a real GPU, at sizes that matter.

    pytest --noconftest -m gpu tests/models/kernels/test_gpu.py

needs torch for CUDA, triton, transformers and pytest alone; `make test-gpu` runs it among others.
"""

import pytest
import torch
from decoding_twins import (
    SHAPES,
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
from fledge.eval.decoding.prompt_lookup import NoDraft, PromptLookup
from fledge.eval.decoding.proposal import accepted_path
from fledge.eval.decoding.speculator import Request
from fledge.models.head import ttt_attention
from fledge.models.kernels import choosing
from fledge.models.kernels.self_check import TOLERANCES
from fledge.train.loss.fused import add_product
from fledge.train.loss.kernel_checks import attention_errors
from fledge.train.loss.unroll import TTTModule
from kl_kernel import compare_kl, kl_rows
from plain_ttt import PlainTTTModule
from small_heads import make_batch, make_head, matrices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def kernels_only(monkeypatch):
    """Fail where the kernels are not what is run."""
    monkeypatch.setattr(ttt_attention.JoinedAttention, "apply", None)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "options"),
    [
        ([900, 1, 37, 1100], (8, 2), 128, {"ttt_steps": 7}),
        ([2048], (5, 1), 128, {"ttt_steps": 3, "counted": 0.97}),
        ([333, 500, 2], (4, 4), 80, {"ttt_steps": 3, "num_layers": 2}),
        ([700, 3, 300], (8, 4), 64, {"ttt_steps": 4}),
        ([31] * 20, (4, 2), 32, {"ttt_steps": 7}),
        ([257, 255], (2, 1), 96, {"ttt_steps": 2}),
        ([1, 2, 1], (4, 2), 64, {"ttt_steps": 3}),
        ([900, 1, 37, 1100], (8, 2), 128, {"ttt_steps": 7, "window": 300}),
    ],
    ids=["packed", "one_document", "every_row", "d64", "short_documents", "d96", "no_useful_row", "window"],
)
def test_attention_equals_the_plain_form_forward_and_backward(lengths, heads, head_dim, options, dtype):
    outputs, gradients = attention_errors(lengths, heads, head_dim, dtype, "cuda", **options)
    print(f"{dtype}: outputs {outputs:.1e}, gradients {gradients:.1e}")
    assert outputs <= TOLERANCES[dtype]
    assert gradients <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attention_in_blocks_of_rows_equals_the_plain_form(dtype):
    outputs, gradients = attention_errors([900, 1, 37, 1100], (8, 2), 128, dtype, "cuda", ttt_steps=4, kernels=False)
    print(f"{dtype}: outputs {outputs:.1e}, gradients {gradients:.1e}")
    assert outputs <= TOLERANCES[dtype]
    assert gradients <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_narrow_factors_are_added_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in ((700, 9001), (700, 1024)))
    total = torch.ones(9001, 1024, device="cuda")
    add_product(total, a.T, b)  # of several slices
    torch.testing.assert_close(total, (a.double().T @ b.double() + 1).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [32000, 202048, 1001])
def test_rows_of_the_kl_loss_equal_their_definition(width, dtype):
    figures = compare_kl(width, dtype, "cuda", num_rows=150)
    print(f"{dtype}, {width} columns: {figures}")
    assert all(figure.found <= figure.allowed for figure in figures.values())


def on_gpu(batch, ttt_steps, dtype):
    return batch.to(torch.device("cuda"), dtype, ttt_steps)


def gradients_of(module, batch, *frozen):
    module.zero_grad()
    loss, sums = module(batch, *frozen)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sums


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("loss_kernel", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_engine_equals_its_plain_twin_in_float32(num_layers, loss_kernel):
    head = make_head(num_layers=num_layers).cuda()
    batch = on_gpu(make_batch([300, 1, 170, 40], seed=5), 7, torch.float32)
    frozen = [matrix.cuda() for matrix in matrices()]
    module = TTTModule(head, 7, 0.8, kernels=True, kl_rows=kl_rows if loss_kernel else None)
    found = gradients_of(module, batch, *frozen)
    expected = gradients_of(PlainTTTModule(head, 7, 0.8), batch, *frozen)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-3, atol=1e-3)
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


@pytest.mark.usefixtures("kernels_only")
def test_a_step_in_bfloat16_gives_the_same_gradients_every_time():
    head = make_head().bfloat16().cuda()
    batch = on_gpu(make_batch([700, 90, 210], seed=6), 7, torch.bfloat16)
    frozen = [matrix.bfloat16().cuda() for matrix in matrices()]
    module = TTTModule(head, 7, 0.8, kernels=True)
    (_, first, _), (_, second, _) = (gradients_of(module, batch, *frozen) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("kernels_only")
def test_a_step_waits_for_nothing_on_the_device():
    head = make_head().bfloat16().cuda()
    batch = on_gpu(make_batch([700, 90, 210], seed=6), 7, torch.bfloat16)
    frozen = [matrix.bfloat16().cuda() for matrix in matrices()]
    module = TTTModule(head, 7, 0.8, kernels=True)
    gradients_of(module, batch, *frozen)
    module.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch, *frozen)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- speculative decoding ----------------------------------------------------------------------------------------------

RULES = {
    "greedy": AcceptanceRule(),
    "sampled": AcceptanceRule(0.8),
    "cut": AcceptanceRule(0.8, top_p=0.9, top_k=20),
    "drawn": AcceptanceRule(0.8, draft_sampling=DraftSampling.sampled),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 4096), (2, 5120), (8, 96), (40, 8192)])
def test_the_input_of_a_draft_step_equals_its_definition(num_rows, width, dtype):
    assert joined_error(num_rows, width, dtype, "cuda") <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [300, 128256, 202048])
def test_the_likeliest_token_is_the_first_of_equal_ones(width, dtype):
    logits = torch.randint(-3, 4, (4, 8, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(choosing.likeliest(logits.cuda()).cpu(), logits.float().argmax(-1))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["sampled", "cut"])
@pytest.mark.parametrize("width", [300, 128256, 202048])
def test_tokens_are_drawn_as_by_the_twin(width, name, dtype):
    differ, wrong = count_other_draws(200, width, dtype, "cuda", RULES[name])
    assert differ <= 2
    assert wrong == 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("likeness", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("sequences", "drafts", "width"), [(30, 3, 300), (8, 7, 32000), (4, 3, 202048)])
def test_drawn_drafts_are_accepted_or_replaced_as_by_the_twin(sequences, drafts, width, likeness, dtype):
    differ, wrong, accepted = count_other_choices(sequences, drafts, width, dtype, "cuda", RULES["drawn"], likeness)
    assert differ <= 1
    assert wrong == 0
    assert likeness < 1 or accepted == 1.0


@pytest.mark.parametrize("kind", ["all", "none", "some"])
@pytest.mark.parametrize(
    ("make", "num_nodes"), [(chain, 0), (chain, 1), (chain, 7), (random_tree, 1), (random_tree, 60)]
)
def test_the_way_is_the_twins_and_its_slots_come_together_as_by_the_twin(make, num_nodes, kind):
    proposal = make(16, num_nodes, "cuda")
    choices = choices_for(proposal, kind)
    assert count_other_steps(proposal, choices) == 0
    accepted = accepted_path(proposal, choices).accepted.sum()
    assert (accepted > 0) == (num_nodes > 0) if kind == "all" else accepted == 0 or kind == "some"
    nodes = accepted_path(proposal, choices).nodes
    for heads, head_dim, dtype in ((8, 128, torch.bfloat16), (3, 400, torch.float32), (2, 48, torch.float16)):
        assert count_other_slots(nodes, heads, head_dim, dtype) == 0


LOOPS = [(shape, name) for shape in SHAPES for name in ("greedy", "sampled", "cut")] + [("chain", "drawn")]
WINDOWS = [(*loop, None) for loop in LOOPS] + [(shape, "greedy", 20) for shape in SHAPES]


@pytest.mark.parametrize(("shape", "name", "window"), WINDOWS)
def test_the_loop_with_graphs_and_kernels_equals_the_loop_without(shape, name, window, capsys):
    loop = Loop("cuda", max_tokens=40, window=window)
    found, alone = loop.answers(shape, RULES[name], kernels=True, cuda_graphs=True)
    expected, _ = loop.answers(shape, RULES[name], kernels=False, cuda_graphs=False)
    assert "no CUDA graphs" not in capsys.readouterr().err
    assert [(a.tokens, a.accepted) for a in found] == [(a.tokens, a.accepted) for a in expected]
    if name != "drawn":
        assert [a.tokens for a in found] == [a.tokens for a in alone]
    assert sum(sum(a.accepted) for a in found) > 0


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_prompt_lookup_with_graphs_equals_prompt_lookup_without(name):
    loop, answers = Loop("cuda", max_tokens=40), []
    for cuda_graphs in (True, False):
        speculator, _ = loop.speculator("tree", RULES[name], kernels=True, cuda_graphs=cuda_graphs)
        lookup = PromptLookup(3, 3)
        answers.append([(a.tokens, a.drafted, a.accepted) for a in speculator.decode(lookup)])
        captured = speculator._graphs._captured if speculator._graphs else {}
        assert any(key[0] is lookup for key in captured) is cuda_graphs
    assert answers[0] == answers[1]
    assert sum(map(sum, (accepted for _, _, accepted in answers[0]))) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_follow_caches_that_grow_drafters_that_take_turns_and_checks_between(dtype):
    """With the same kernels a graph gives the very bits of the rounds it was captured from."""
    loop, found = Loop("cuda", dtype), []
    for cuda_graphs in (True, False):
        speculator, drafter = loop.speculator("chain", RULES["sampled"], kernels=True, cuda_graphs=cuda_graphs)
        alone = NoDraft()
        answers = []
        for length in (9, 90, 20, 200, 30):
            prompts = [[(7 * i + place) % 40 for i in range(length)] for place in range(3)]
            speculator.cached.check(prompts[0])
            speculator.prefill([Request(prompt, 60, str(length)) for prompt in prompts])
            for one in (alone, drafter, alone, drafter):
                answers += [(a.tokens, a.accepted) for a in speculator.decode(one)]
        assert (speculator._graphs is not None and len(speculator._graphs._captured) > 1) is cuda_graphs
        found.append(answers)
    assert found[0] == found[1]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(("shape", "name"), LOOPS)
def test_a_round_waits_for_nothing_on_the_device(shape, name, cuda_graphs):
    speculator, drafter = Loop("cuda", "bfloat16").speculator(shape, RULES[name], kernels=True, cuda_graphs=cuda_graphs)
    speculator.decode(drafter)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            told = speculator._run_round(drafter, 64)
        with pytest.raises(RuntimeError, match="synchronizing"):
            told.tolist()  # which is the one wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
