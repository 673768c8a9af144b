"""The Triton kernels beside their plain twins in float64, for the interpreter (CPU) and for a GPU alike.

Needs torch, transformers and triton alone.
"""

from __future__ import annotations

import torch
from fledge.models.kernels.kl_loss import kl_rows
from fledge.models.ttt_attention import SplitAttention, TTTAttention
from fledge.train.rows import find_useful_rows


def attention_errors(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    ttt_steps: int,
    counted: float = 0.9,
    num_layers: int = 1,
    kernels: bool = True,
) -> tuple[float, float]:
    """Give the largest errors of the outputs, and of the gradients relative to their largest entry.

    Args:
        heads: of queries, and of keys.
        counted: the share of tokens that are counted: the fewer, the more the rows are torn apart.
        kernels: whether they are used; else blocks of rows on a GPU.
        num_layers: with 2, step 0 has every row as a query, as the first of two layers has.
    """
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    rows = find_useful_rows(torch.rand(total, generator=generator) < counted, lengths, ttt_steps).to(
        torch.device(device)
    )
    drawn = [torch.randn(ttt_steps, total, width, head_dim, generator=generator) for width in (*heads, heads[1])]
    inputs = [values.to(device, dtype).requires_grad_() for values in drawn]
    exact = [values.detach().double().requires_grad_() for values in inputs]
    split, plain = SplitAttention(rows, num_layers, kernels), TTTAttention(lengths, 1)
    found, expected = [], []
    for step in range(ttt_steps):
        at = rows.rows[rows.steps[step]]
        own = slice(None) if step == 0 else at
        queries = slice(None) if step == 0 and num_layers > 1 else at
        q, k, v = (values[step] for values in inputs)
        found.append(split.at(step)(0, q[queries], k[own], v[own]))
        expected.append(plain(0, *(values[step] for values in exact))[queries])
    weights = [torch.randn(out.shape, generator=generator).to(device) for out in found]

    def gradients(outs, of):
        return torch.autograd.grad(sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)), of)

    pairs = zip(gradients(found, inputs), gradients(expected, exact), strict=True)
    far = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs]
    near = [float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True) if len(a)]
    return max(near, default=0.0), max(far)


def kl_errors(num_rows: int, width: int, dtype: torch.dtype, device: str, block: int) -> tuple[float, float, float]:
    """Give the largest errors of KL, of the overlap and of the gradient; greedy tokens have to agree.

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
    found = kl_rows(z, probabilities, targets, mass.float(), entropy.float(), top, block=block)
    assert torch.equal(found[2], first == top[targets])
    pairs = ((found[0], divergence), (found[1], overlap), (z, exact.grad))
    kl, shared, gradient = (float((a - b).detach().abs().max()) for a, b in pairs)
    return kl, shared, gradient
