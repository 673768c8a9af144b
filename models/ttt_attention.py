"""Attention of the training-time-test unroll, in its plain form: dense scores, document by document.

At step k a row attends to step 0's keys at rows <= its own in the same document, and to the keys of steps 1 ... k at
its own row alone. Exact, O(T^2) memory in the length of a document; the reference for any faster form.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TTTAttention:
    """Keys and values of the steps so far. Called once per step and layer, in order of steps.

    Args:
        lengths: rows of each document, in the order in which they are laid end to end.
        num_layers: layers of the head, each with keys of its own.
    """

    def __init__(self, lengths: list[int], num_layers: int) -> None:
        self._lengths = lengths
        self._keys: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._values: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with queries [T, heads, D]; keys and values [T, kv_heads, D] join those of earlier steps."""
        group = q.shape[1] // k.shape[1]
        self._keys[layer].append(k.repeat_interleave(group, dim=1))
        self._values[layer].append(v.repeat_interleave(group, dim=1))
        keys = [key.split(self._lengths) for key in self._keys[layer]]
        values = [value.split(self._lengths) for value in self._values[layer]]
        documents = zip(q.split(self._lengths), zip(*keys, strict=True), zip(*values, strict=True), strict=True)
        return torch.cat([_attend(*document) for document in documents])


def _attend(q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
    """Attend within one document; `keys` and `values` hold one tensor [T, heads, D] per step so far."""
    num_rows = len(q)
    future = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).triu(1)
    causal = torch.einsum("thd,shd->hts", q, keys[0]).masked_fill(future, float("-inf"))
    own_row = [torch.einsum("thd,thd->ht", q, key)[..., None] for key in keys[1:]]
    scores = torch.cat([causal, *own_row], dim=-1).float() * q.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1).to(q.dtype)
    out = torch.einsum("hts,shd->thd", weights[..., :num_rows], values[0])
    for step, value in enumerate(values[1:]):
        out = out + weights[..., num_rows + step].T[..., None] * value
    return out
