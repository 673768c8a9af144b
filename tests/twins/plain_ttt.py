"""The plain twin of train/loss/unroll.py: every row at every step, logits and losses as they are defined.

Slow and of memory K x T x V; what tests and the benchmark compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fledge.models.head.draft_head import DraftHead
from fledge.models.head.ttt_attention import TTTAttention, wide_dtype
from fledge.models.verifier.config import LogitTransform
from fledge.train.loss.fused import Targets
from fledge.train.loss.losses import Rows
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import TTTModule
from torch import Tensor


def ahead(values: Tensor, distance: int) -> Tensor:
    """Give at each row the value `distance` rows further on; the last row's beyond the end (never counted there)."""
    rows = torch.arange(len(values), device=values.device) + distance
    return values[rows.clamp(max=len(values) - 1)]


def counted_rows(loss_mask: Tensor, document: Tensor, ttt_steps: int) -> Tensor:
    """Give the rows counted at each step (bool [K, T]): the verifier produced tokens r+1 ... r+2+k, in one document."""
    rows = torch.arange(len(loss_mask), device=loss_mask.device)

    def produced(distance: int) -> Tensor:
        inside = (rows + distance < len(rows)) & (ahead(document, distance) == document)
        return inside & ahead(loss_mask, distance)

    so_far = produced(1)
    counted = []
    for step in range(ttt_steps):
        so_far = so_far & produced(step + 2)
        counted.append(so_far)
    return torch.stack(counted)


def plain_unroll(head: DraftHead, batch: PackedBatch, embedding: Tensor, ttt_steps: int) -> Iterator[Tensor]:
    """Run K draft steps on every row and yield each step's normed states [T, H]."""
    attention = TTTAttention(batch.lengths, head.config.num_layers, head.config.window)
    state = head.fuse(batch.states[0])
    for step in range(ttt_steps):
        fed = head.embed(ahead(batch.input_ids, step + 1), embedding)
        state, normed = head.step(fed, state, head.rotary(batch.position + step, state), attention)
        yield normed


@dataclass
class VerifierDistributions:
    """The verifier's distribution at each position p, for token p+1."""

    probabilities: Tensor  # at least float32 [T, Vd], restricted to the draft vocabulary and renormalised
    mass: Tensor  # [T], what of the distribution lies in the draft vocabulary
    top: Tensor  # int64 [T], the verifier's greedy token
    inside: Tensor  # bool [T], whether that token is in the draft vocabulary


@torch.no_grad()
def verifier_distributions(
    head: DraftHead, last_hidden_state: Tensor, verifier_lm_head: Tensor, transform: LogitTransform
) -> VerifierDistributions:
    """Compute the verifier's distributions from its recorded final states [T, H] and its lm_head [V, H]."""
    logits = transform.apply_((last_hidden_state @ verifier_lm_head.T).to(wide_dtype(last_hidden_state.dtype)))
    inside = logits[:, head.target_ids]
    mass = (inside.logsumexp(-1) - logits.logsumexp(-1)).exp()
    top = logits.argmax(-1)
    return VerifierDistributions(inside.softmax(-1), mass, top, head.t2d[top])


class PlainTTTModule(TTTModule):
    """`TTTModule` in the plain form; it counts its rows itself where it is not told N_k."""

    def forward(
        self,
        batch: PackedBatch,
        embedding: Tensor,
        verifier_lm_head: Tensor,
        targets: Targets | None = None,
        num_counted: Tensor | None = None,
        acceptance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give the loss of a packed batch and the sums its metrics are made of, as `TTTModule` does; no `targets`."""
        verifier = verifier_distributions(self.head, batch.states[1], verifier_lm_head, self.transform)
        in_answer = counted_rows(batch.loss_mask, batch.document, self.ttt_steps)
        prefix = torch.ones_like(batch.loss_mask)
        reach = torch.ones_like(verifier.mass)
        loss = torch.zeros_like(verifier.mass[0])
        sums = []
        for step, normed in enumerate(plain_unroll(self.head, batch, embedding, self.ttt_steps)):
            rows = in_answer[step].nonzero().squeeze(1)
            at = rows + step + 1
            counted = verifier.inside[at]
            log_q = self.head.lm_head(normed[rows]).to(wide_dtype(normed.dtype)).log_softmax(-1)
            p, mass = verifier.probabilities[at], verifier.mass[at]
            kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.loss.coefficients is not None):
                overlap = torch.minimum(p * mass[:, None], log_q.exp()).sum(-1)
            # A row that is not counted at a step still decides whether later ones are reached.
            reach = reach.index_put((rows,), reach[rows] * torch.where(counted, overlap, overlap.detach()))
            blend = 1.0 if acceptance is None else (-self.blend_rate * acceptance[step]).exp()
            value = self.loss.value(Rows(kl, overlap, reach[rows], self.gamma**step, blend, p, log_q))
            num = counted.sum() if num_counted is None else num_counted[step]
            loss = loss + (value * counted).sum() / num.clamp(min=1)
            with torch.no_grad():
                agrees = self.head.target_ids[log_q.argmax(-1)] == verifier.top[at]
                hit = torch.zeros_like(prefix)
                hit[rows] = agrees & counted
                prefix &= hit
                entropy = -torch.xlogy(p, p).sum(-1)
                columns = (value, kl, torch.ones_like(kl), agrees, prefix[rows], overlap, entropy)
                sums.append(torch.stack([*((column * counted).sum() for column in columns), (~counted).sum()]))
        return loss, torch.stack(sums)
