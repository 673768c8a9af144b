"""The Triton kernels of training next to their plain twins in float64: for runs, and for tests in the interpreter."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...conf.schema import TrainConfig
from ...models.head.config import DraftHeadConfig
from ...models.head.ttt_attention import MAX_HEAD_DIM, SplitAttention, TTTAttention
from ...models.kernels.self_check import TOLERANCES, Check, Checked, Figure, check_kernels
from .rows import find_useful_rows

if TYPE_CHECKING:
    from ..ranks.group import Ranks  # DeepSpeed's

ATTENTION = "attention"
LENGTHS = [300, 1, 37, 2, 129]  # rows of a case's documents: of one row, of two, and of several blocks of keys
WINDOW = 70  # of a case, at most, if layers have a window: its borders lie within blocks


def check_training(options: TrainConfig, head: DraftHeadConfig, ranks: Ranks) -> Checked:
    """Check the kernels that a run may use, in its shapes and dtype, on all its ranks."""
    dtype = getattr(torch, options.dtype.value)
    checks = [Check(ATTENTION, partial(compare_attention, head, options.ttt_steps, dtype, ranks.device))]
    return check_kernels("train.triton", options.triton, ranks.device, checks, ranks.gather, ranks.rank == 0)


def compare_attention(
    head: DraftHeadConfig, ttt_steps: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Figure]:
    """Compare attention, forward and backward; of a deep head also the layers in which every row is a query."""
    if head.head_dim > MAX_HEAD_DIM:
        raise ValueError(f"it is made for heads of up to {MAX_HEAD_DIM}, and these have {head.head_dim}")
    heads = head.num_attention_heads, head.num_key_value_heads
    windows = {head.window(layer) for layer in range(head.num_layers)}
    cases = itertools.product(range(1, min(2, head.num_layers) + 1), windows)
    errors = [
        attention_errors(
            *(LENGTHS, heads, head.head_dim, dtype, device, ttt_steps),
            num_layers=num_layers,
            window=window and min(window, max(WINDOW, ttt_steps)),
        )
        for num_layers, window in cases
    ]
    outputs, gradients = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()  # no number if any is none
    return {"outputs": Figure(outputs, TOLERANCES[dtype]), "gradients": Figure(gradients, TOLERANCES[dtype])}


def attention_errors(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    ttt_steps: int,
    counted: float = 0.9,
    num_layers: int = 1,
    kernels: bool = True,
    window: int | None = None,
) -> tuple[float, float]:
    """Return the largest errors of the outputs, and of the gradients relative to their largest entry.

    `heads` are of queries, and of keys. The fewer tokens are `counted`, the more the rows are torn apart. With two
    layers step 0 has every row as a query, as the first of them has. Without `kernels` blocks of rows are compared.
    """
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(lengths)
    mask = torch.rand(num_rows, generator=generator) < counted
    rows = find_useful_rows(mask, lengths, ttt_steps).to(torch.device(device))
    drawn = [torch.randn(ttt_steps, num_rows, width, head_dim, generator=generator) for width in (*heads, heads[1])]
    inputs = [values.to(device, dtype).requires_grad_() for values in drawn]
    exact = [values.detach().double().requires_grad_() for values in inputs]
    split, plain = (
        SplitAttention(rows, num_layers, kernels, lambda _: window),
        TTTAttention(lengths, 1, lambda _: window),
    )
    found, expected = [], []
    for step in range(ttt_steps):
        at = rows.rows[rows.steps[step]]
        own = slice(None) if step == 0 else at
        queries = slice(None) if step == 0 and num_layers > 1 else at
        q, k, v = (values[step] for values in inputs)
        found.append(split.at(step)(0, q[queries], k[own], v[own]))
        expected.append(plain(0, *(values[step] for values in exact))[queries])
    weights = [torch.randn(out.shape, generator=generator).to(device) for out in found]

    def gradients(outs: list[Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
        total = torch.stack([(out * weight).sum() for out, weight in zip(outs, weights, strict=True)]).sum()
        return torch.autograd.grad(total, of)

    pairs = zip(gradients(found, inputs), gradients(expected, exact), strict=True)
    far = [(a - b).abs().max() / b.abs().max().clamp(min=1e-3) for a, b in pairs]
    near = [(a - b).detach().abs().flatten() for a, b in zip(found, expected, strict=True)]
    near.append(torch.zeros(1, dtype=torch.float64, device=device))  # if no row is of use
    return float(torch.cat(near).max()), float(torch.stack(far).max())  # no number if any is none
