"""The twin of train/ttt.py in the plain form: every row at every step, logits and losses written as they are defined.

Slow and of memory K x T x V; what tests and the benchmark compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conf.schema import TTTLoss
from ..models.draft_head import DraftHead
from ..models.ttt_attention import TTTAttention
from ..models.verifier import LogitTransform
from .fused_loss import Targets
from .rows import PackedBatch, ahead, counted_rows
from .ttt import TTTModule


def plain_unroll(head: DraftHead, batch: PackedBatch, embedding: Tensor, ttt_steps: int) -> Iterator[Tensor]:
    """Run K draft steps on every row and yield each step's normed states [T, H]."""
    attention = TTTAttention(batch.lengths, head.config.num_layers)
    state = head.fuse(batch.aux_hidden_states)
    for step in range(ttt_steps):
        fed = nn.functional.embedding(ahead(batch.input_ids, step + 1), embedding)
        state, normed = head.step(fed, state, head.rotary(batch.position + step, state), attention)
        yield normed


@dataclass
class VerifierDistributions:
    """The verifier's distribution at each position p, for token p+1."""

    probabilities: Tensor  # P, at least float32 [T, Vd], of the draft vocabulary's tokens
    log_p: Tensor  # [T, Vd], restricted to the draft vocabulary and renormalised
    top: Tensor  # int64 [T], the verifier's greedy token
    inside: Tensor  # bool [T], whether that token is in the draft vocabulary


@torch.no_grad()
def verifier_distributions(
    head: DraftHead, last_hidden_state: Tensor, verifier_lm_head: Tensor, transform: LogitTransform
) -> VerifierDistributions:
    """Compute the verifier's distributions from its recorded final states [T, H] and its lm_head [V, H]."""
    logits = _wide(last_hidden_state @ verifier_lm_head.T)
    logits = transform.apply_(logits)
    inside = logits[:, head.target_ids]
    probabilities = (inside - logits.logsumexp(-1, keepdim=True)).exp()
    top = logits.argmax(-1)
    return VerifierDistributions(probabilities, inside.log_softmax(-1), top, head.t2d[top])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        verifier = verifier_distributions(self.head, batch.last_hidden_state, verifier_lm_head, self.transform)
        in_answer = counted_rows(batch.loss_mask, batch.document, self.ttt_steps)
        prefix = torch.ones_like(batch.loss_mask)
        reach = torch.ones(len(prefix), device=prefix.device, dtype=verifier.log_p.dtype)
        loss = torch.zeros((), device=embedding.device, dtype=verifier.log_p.dtype)
        sums = []
        for step, normed in enumerate(plain_unroll(self.head, batch, embedding, self.ttt_steps)):
            counted = in_answer[step] & ahead(verifier.inside, step + 1)
            at = ahead(torch.arange(len(prefix), device=prefix.device), step + 1)
            rows = in_answer[step].nonzero().squeeze(1)
            here = counted[rows]
            log_q = _wide(self.head.lm_head(normed[rows])).log_softmax(-1)
            log_p, probabilities = verifier.log_p[at[rows]], verifier.probabilities[at[rows]]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            overlap = torch.minimum(probabilities, log_q.exp()).sum(-1)
            # Where alpha is not counted it still decides whether later tokens are reached.
            factor = torch.where(here, overlap, overlap.detach())
            reach = reach.index_put((rows,), reach[rows] * factor)
            blend = 1.0 if acceptance is None else (-self.blend_rate * acceptance[step]).exp()
            value = self._value(step, kl, overlap, reach[rows], blend, log_p, log_q)
            num = counted.sum() if num_counted is None else num_counted[step]
            loss = loss + (value * here).sum() / num.clamp(min=1)
            with torch.no_grad():
                agrees = self.head.target_ids[log_q.argmax(-1)] == verifier.top[at[rows]]
                hit = torch.zeros_like(prefix)
                hit[rows] = agrees & here
                prefix &= hit
                entropy = -(log_p.exp() * log_p).sum(-1)
                columns = (value, kl, torch.ones_like(kl), agrees, prefix[rows], overlap, entropy)
                sums.append(torch.stack([*((column * here).sum() for column in columns), (~here).sum()]))
        return loss, torch.stack(sums)

    def _value(
        self,
        step: int,
        kl: Tensor,
        overlap: Tensor,
        reach: Tensor,
        blend: Tensor | float,
        log_p: Tensor,
        log_q: Tensor,
    ) -> Tensor:
        weight = self.gamma**step
        losses = {
            TTTLoss.kl: lambda: kl,
            TTTLoss.reverse_kl: lambda: (log_q.exp() * (log_q - log_p)).sum(-1),
            TTTLoss.total_variation: lambda: 1 - overlap,
            TTTLoss.lk_alpha: lambda: -overlap.log(),
            TTTLoss.lk_lambda: lambda: blend * kl + (1 - blend) * (1 - overlap),
            TTTLoss.acceptance_length: lambda: blend * kl - (1 - blend) * reach / weight,
        }
        return weight * losses[self.loss]()
