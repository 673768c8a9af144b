"""The row-wise part of the KL loss in Triton: each row of logits is read twice and its gradient written over it.

docs/internals/fused_loss.md derives it; train/loss/fused.py has the same in PyTorch operations, `Chunk.compare`. No run
uses it until it has been measured: `python tests/benchmarks/training_step.py loss_kernel=true` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fledge.models.kernels.self_check import Figure
from torch import Tensor

GRADIENT = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # how far it may be off


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
    z: Tensor, probabilities: Tensor, targets: Tensor, mass: Tensor, entropy: Tensor, top: Tensor, block: int = BLOCK
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


def compare_kl(
    width: int, dtype: torch.dtype, device: torch.device | str, num_rows: int = 24, block: int = 2048
) -> dict[str, Figure]:
    """Compare the row-wise part of the KL loss: KL, the overlap, the gradient, and rows whose greedy tokens differ.

    The verifier's distributions are of 1.25 * width tokens, of which the draft knows the first.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows + 3, width + width // 4, generator=generator).to(device)
    probabilities = logits.softmax(-1)[:, :width].contiguous()
    wide = probabilities.double()
    mass = wide.sum(-1)
    p = wide / mass[:, None]
    entropy, top = -torch.special.xlogy(p, p).sum(-1), p.argmax(-1)
    targets = torch.randint(0, len(p), (num_rows,), generator=generator).to(device)
    z = (logits[targets, :width] + torch.randn(num_rows, width, generator=generator).to(device)).to(dtype)
    exact = z.double().requires_grad_()
    q = exact.softmax(-1)
    divergence = (torch.special.xlogy(p, p)[targets] - p[targets] * exact.log_softmax(-1)).sum(-1)
    divergence.sum().backward()
    overlap = torch.minimum(q, wide[targets]).sum(-1)
    first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    kl, shared, hits = kl_rows(z, probabilities, targets, mass.float(), entropy.float(), top, block=block)
    assert exact.grad is not None
    return {
        "KL": Figure(float((kl - divergence).detach().abs().max()), 1e-4),
        "overlap": Figure(float((shared - overlap).detach().abs().max()), 1e-5),
        "gradient": Figure(float((z - exact.grad).abs().max()), GRADIENT[dtype]),
        "greedy tokens": Figure(float((hits != (first == top[targets])).sum()), 0),
    }
