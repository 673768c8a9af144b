"""Tokens drawn from a language model's logits."""

import torch
from torch import Tensor

_LIKELIEST = 512  # tokens among which top_p mostly ends


def probabilities(
    logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int | None = None, looks: bool = False
) -> Tensor:
    """Return the distributions float32 [..., V] that tokens are drawn from; faster if it may look at values."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = torch.softmax(logits, -1)
    if top_p < 1:
        ordered, tokens = _largest(p, top_p) if looks else p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter_(-1, tokens, ordered.masked_fill(before >= top_p, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def _largest(p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities and their tokens, which sum to `top_p` at least: all are slow to sort."""
    ordered, tokens = p.topk(min(_LIKELIEST, p.shape[-1]))
    return (ordered, tokens) if bool((ordered.sum(-1) > top_p).all()) else p.sort(descending=True, stable=True)


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the first tokens (int64 [...]) at which weights [..., V] sum to more than shares [...] in [0, 1)."""
    sums = weights.double().cumsum(-1)
    share = draws[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, share, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)
