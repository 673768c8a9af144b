"""The losses of `train.loss`, one entry each in `LOSSES`; docs/internals/add_a_loss.md says how to add one.

Of a row at draft step k: q is the draft's distribution over its vocabulary; P the verifier's at the same tokens, of its
whole vocabulary; m = sum P and p = P / m; alpha = sum min(P, q) the probability that the verifier, sampling, accepts;
R_k = alpha_0 ... alpha_k the probability that draft token k is reached and accepted; s = sum of q where q < P.

This module imports nothing of fledge, and torch for type checkers only: every command checks `train.loss` by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What a loss reads of n rows at one draft step."""

    kl: Tensor  # [n], KL(p || q), nats
    overlap: Tensor  # [n], alpha
    reach: Tensor  # [n], R_k
    gamma: Tensor | float  # gamma^k
    blend: Tensor | float  # b = exp(-blend_rate * running mean of alpha at this step): 1 while the head is far off
    p: Tensor | None = None  # [n, Vd]; it and log_q are None in the fused pass
    log_q: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A loss: its value, and its gradient in the draft's logits, which is one of these, times gamma^k / N_k.

    q - p, KL's own, if neither `coefficients` nor `gradient_` is given;
    a (q - p) + b q (s - [q < P]), with the `coefficients` a and b, so b belongs to -alpha, and None is 0;
    what `gradient_` writes.

    `reach_share` c says that `value` subtracts c R_k; the engine adds its gradient to that of `coefficients`.
    """

    value: Callable[[Rows], Tensor]  # [n], but for 1 / N_k
    coefficients: Callable[[Rows], tuple[Tensor | float | None, Tensor | float]] | None = None
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None  # turns q into it; see _reverse_kl_
    reach_share: Callable[[Tensor], Tensor] | None = None  # of b
    blends: bool = False  # whether it reads b, so that training keeps the running mean of alpha

    @property
    def is_kl(self) -> bool:
        """Return whether the gradient is q - p."""
        return self.coefficients is None and self.gradient_ is None


def _reverse_kl(rows: Rows) -> Tensor:
    assert rows.p is not None
    assert rows.log_q is not None
    return rows.gamma * (rows.log_q.exp() * (rows.log_q - rows.p.log())).sum(-1)


def _reverse_kl_(q: Tensor, probabilities: Tensor, mass: Tensor, scratch: Tensor) -> Tensor:
    """Turn q [n, Vd], in place, into the gradient of KL(q || p), q (log q - log p - KL), and return that KL [n].

    P and scratch are [n, Vd], m is [n]. What underflows counts as the tiniest number.
    """
    import torch

    tiny = torch.finfo(q.dtype).tiny
    log_p = probabilities.clamp(min=tiny).log() - mass.log()[:, None]
    ratio = q.clamp(min=tiny).log_().sub_(log_p)
    kl = torch.mul(q, ratio, out=scratch).sum(-1)
    q.mul_(ratio.sub_(kl[:, None]))
    return kl


LOSSES = {
    # KL(verifier || draft)
    "kl": Loss(lambda rows: rows.gamma * rows.kl),
    # KL(draft || verifier)
    "reverse_kl": Loss(_reverse_kl, gradient_=_reverse_kl_),
    # 1 - probability of acceptance
    "total_variation": Loss(lambda rows: rows.gamma * (1 - rows.overlap), lambda rows: (None, 1.0)),
    # - log probability of acceptance
    "lk_alpha": Loss(lambda rows: -rows.gamma * rows.overlap.log(), lambda rows: (None, 1 / rows.overlap)),
    # KL, and 1 - probability of acceptance the more of it there is (LK losses: arXiv:2602.23881)
    "lk_lambda": Loss(
        lambda rows: rows.gamma * (rows.blend * rows.kl + (1 - rows.blend) * (1 - rows.overlap)),
        lambda rows: (rows.blend, 1 - rows.blend),
        blends=True,
    ),
    # KL, and - expected number of accepted tokens
    "acceptance_length": Loss(
        lambda rows: rows.gamma * rows.blend * rows.kl - (1 - rows.blend) * rows.reach,
        lambda rows: (rows.blend, 0.0),
        reach_share=lambda blend: 1 - blend,
        blends=True,
    ),
}


def find_loss(name: str) -> Loss:
    """Return the loss that `train.loss` names; ValueError if there is none of that name."""
    if name not in LOSSES:
        raise ValueError(f"train.loss: Invalid value {name!r}, expected one of [{', '.join(LOSSES)}]")
    return LOSSES[name]
