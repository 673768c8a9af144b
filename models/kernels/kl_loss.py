"""The row-wise part of the KL loss in Triton: each row of logits is read twice and its gradient written over it.

docs/fused_loss.md derives it; train/loss/fused.py has the same in PyTorch operations, `Chunk.compare`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def kl_kernel(
    z, probabilities, targets, mass, entropy, top, kl, overlap, hits, num_columns, block: tl.constexpr
):  # fmt: skip
    """Do one row; sums and the maximum are kept for each of `block` lanes, so that long rows keep their digits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    z += row * num_columns
    probabilities += target * num_columns
    lane = tl.arange(0, block)
    highest = tl.full([block], -1e30, tl.float32)  # finite: -inf - -inf is no number
    best = tl.zeros([block], tl.int32)
    total = tl.zeros([block], tl.float32)
    cross = tl.zeros([block], tl.float32)
    for start in range(0, num_columns, block):
        column = start + lane
        inside = column < num_columns
        logit = tl.load(z + column, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.load(probabilities + column, mask=inside, other=0.0)
        cross += p * tl.where(inside, logit, 0.0)
        higher = tl.maximum(highest, logit)
        total = total * tl.exp(highest - higher) + tl.exp(logit - higher)
        best = tl.where(logit > highest, column, best)
        highest = higher
    peak = tl.max(highest, 0)
    log_normaliser = peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))
    greedy = tl.min(tl.where(highest == peak, best, num_columns), 0)
    mass_here = tl.load(mass + target)
    tl.store(kl + row, log_normaliser - tl.sum(cross, 0) / mass_here - tl.load(entropy + target))
    tl.store(hits + row, greedy == tl.load(top + target))
    shared = tl.zeros([block], tl.float32)
    for start in range(0, num_columns, block):
        column = start + lane
        inside = column < num_columns
        logit = tl.load(z + column, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.load(probabilities + column, mask=inside, other=0.0)
        q = tl.exp(logit - log_normaliser)
        shared += tl.minimum(p, q)
        tl.store(z + column, (q - p / mass_here).to(z.dtype.element_ty), mask=inside)
    tl.store(overlap + row, tl.sum(shared, 0))


BLOCK, NUM_WARPS = 2048, 8  # columns at a time; reckoned, not measured


def kl_rows(
    z: Tensor,
    probabilities: Tensor,
    targets: Tensor,
    mass: Tensor,
    entropy: Tensor,
    top: Tensor,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into q - p, in place, which is the gradient of KL(p || q), and compare q with the verifier.

    Args:
        z: [rows, Vd], contiguous, in float32 or 16 bits.
        probabilities: float32 [window, Vd], contiguous, the verifier's P; [window]: its sum `mass`, the entropy of
            p = P / mass, and the greedy token `top`.
        targets: int64 [rows], which row of the window is a row's target.

    Returns:
        KL(p || q), sum min(P, q), and whether the greedy tokens are the same (of equal logits the first), each [rows].
    """
    assert z.is_contiguous()
    assert probabilities.is_contiguous()
    kl, overlap = torch.empty(2, len(z), dtype=torch.float32, device=z.device)
    hits = torch.empty(len(z), dtype=torch.bool, device=z.device)
    inputs = z, probabilities, targets, mass, entropy, top
    with torch.cuda.device_of(z):
        kl_kernel[(len(z),)](*inputs, kl, overlap, hits, z.shape[1], block=block, num_warps=NUM_WARPS)
    return kl, overlap, hits
