"""The kernels in Triton's interpreter: run by test_kernels.py in a process of its own, with TRITON_INTERPRET=1.

Not in bfloat16, with which the interpreter computes as if it were integers.
"""

import pytest
import torch
from fledge.models import kernels as kernels_module
from fledge.models.kernels.ttt_attention import _seers
from fledge.train.loss import fused as fused_loss
from fledge.train.loss.kernel_checks import attention_errors
from fledge.train.loss.unroll import TTTModule
from kl_kernel import compare_kl, kl_rows
from small_heads import make_batch, make_head, matrices

torch.set_num_threads(1)
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Let the kernels run on this CPU."""
    monkeypatch.setattr(kernels_module, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "options"),
    [
        ([5, 1, 37, 3, 20], (4, 2), 32, {"ttt_steps": 7}),
        ([1, 1, 2, 1], (4, 4), 32, {"ttt_steps": 3}),
        ([90, 2, 61], (3, 3), 80, {"ttt_steps": 2, "counted": 0.5}),
        ([150], (4, 1), 128, {"ttt_steps": 2}),
        ([9, 40, 1], (5, 1), 64, {"ttt_steps": 3, "counted": 0.7, "num_layers": 2}),
        ([31, 33, 63, 20], (2, 1), 96, {"ttt_steps": 1}),
        ([9, 1, 130], (2, 1), 32, {"ttt_steps": 2, "window": 90, "num_layers": 2}),
        ([40, 2, 33], (2, 1), 32, {"ttt_steps": 4, "window": 4, "counted": 0.8}),
    ],
    ids=["all_steps", "no_useful_row", "torn_rows", "one_document", "every_row", "first_step", "window", "narrow"],
)
def test_attention_equals_the_plain_form_forward_and_backward(lengths, heads, head_dim, options, dtype):
    outputs, gradients = attention_errors(lengths, heads, head_dim, dtype, "cpu", **options)
    assert outputs <= TOLERANCES[dtype]
    assert gradients <= TOLERANCES[dtype]


@pytest.mark.parametrize("window", [1, 10, 50, 1000])
def test_a_block_of_keys_walks_the_queries_that_see_any_of_them_and_no_other(window):
    rows = torch.tensor([row for row in range(150) if row % 7])
    firsts = torch.tensor([0, 20, 33, 120])[torch.bucketize(rows, torch.tensor([19, 32, 119]))]  # of documents
    firsts = torch.maximum(firsts, rows - window + 1)
    for block, (begin, end) in enumerate(_seers(rows, firsts, 150, 16).T.tolist()):
        sees = (rows >= 16 * block) & (firsts < 16 * block + 16)
        assert list(range(begin, end)) == sees.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("num_rows", "width", "block"), [(5, 300, 64), (3, 64, 64), (1, 7, 64), (2, 5000, 2048)])
def test_rows_of_the_kl_loss_equal_their_definition(num_rows, width, block, dtype):
    found = {name: figure.found for name, figure in compare_kl(width, dtype, "cpu", num_rows, block).items()}
    assert found["KL"] <= 1e-5
    assert found["overlap"] <= 1e-6
    assert found["gradient"] <= (1e-6 if dtype == torch.float32 else 5e-4)
    assert found["greedy tokens"] == 0


def test_the_engine_with_both_kernels_equals_the_engine_without(monkeypatch):
    monkeypatch.setattr(fused_loss, "rows_in_chunk", lambda *_: 7)
    batch, frozen = make_batch([17, 2, 12], seed=3), matrices()
    found = []
    for kernels in (True, False):
        head = make_head(num_layers=2)
        module = TTTModule(head, 3, 0.8, kernels=kernels, kl_rows=kl_rows if kernels else None)
        loss, sums = module(batch, *frozen)
        loss.backward()
        found.append((loss.detach(), sums, [p.grad for p in head.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
