"""Tokens drawn from a language model's logits."""

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int | None = None, num_sorted: int | None = None
) -> Tensor:
    """Return the distributions float32 [..., V] that tokens are drawn from.

    Args:
        num_sorted: tokens that are sorted for `top_p` at first, and more if they are too few; None: all, without a look
            at values, which a graph cannot take. To sort all takes a CPU longer than a step of a small model.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = torch.softmax(logits, -1)
    if top_p < 1:
        p = _cut(p, top_p, num_sorted or p.shape[-1])
        p = p / p.sum(-1, keepdim=True)
    return p


def _cut(p: Tensor, top_p: float, num_sorted: int) -> Tensor:
    """Set all but the likeliest tokens that together have `top_p` to 0."""
    is_all = num_sorted >= p.shape[-1]
    ordered, tokens = p.sort(descending=True, stable=True) if is_all else p.topk(num_sorted)
    before = ordered.cumsum(-1) - ordered
    cut = torch.zeros_like(p).scatter_(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
    if not is_all and bool((few := ordered.sum(-1) <= top_p).any()):
        cut[few] = _cut(p[few], top_p, 16 * num_sorted)
    return cut


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the first tokens (int64 [...]) at which weights [..., V] sum to more than shares [...] in [0, 1)."""
    sums = weights.double().cumsum(-1)
    share = draws[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, share, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)
