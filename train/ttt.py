"""Training-time test (EAGLE-3, arXiv:2503.01840): the unroll of K draft steps and its loss, in the plain form.

Row r of a document stands for the verifier's position r. At step k it is fed token x[r+1+k] and predicts x[r+2+k];
its target is the verifier's distribution at position r+1+k. With the prompt `u v` and the answer `A B <eot>`:

    position   0  1  2  3  4
    token      u  v  A  B  <eot>
    loss_mask  0  0  1  1  1
    row 0, step 0: fed v with a_0, predicts A                         not counted: the verifier gives A by itself
    row 1, step 0: fed A with a_1, predicts B                         counted: the first draft of every request
    row 1, step 1: fed B with the head's own state, predicts <eot>    counted
    row 2, step 0: fed B with a_2, predicts <eot>                     counted
    row 3, step 0: fed <eot> with a_3                                 not counted: nothing of the verifier's follows
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.draft_head import DraftHead
from ..models.ttt_attention import TTTAttention

# Columns of the sums that `TTTModule` gives per step.
SUMS = ("loss", "counted", "agreement", "prefix_agreement", "overlap", "outside_draft_vocab")


@dataclass
class PackedBatch:
    """Documents laid end to end, T tokens in all."""

    input_ids: Tensor  # int64 [T]
    loss_mask: Tensor  # bool [T]
    document: Tensor  # int64 [T], number of the document a token belongs to
    position: Tensor  # int64 [T], within the document
    aux_hidden_states: Tensor  # [T, A*H]
    last_hidden_state: Tensor  # [T, H]
    lengths: list[int]  # tokens of each document
    sample_ids: list[str]

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedBatch:
        """Move to a device, states in `dtype`."""
        return PackedBatch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.document.to(device),
            self.position.to(device),
            self.aux_hidden_states.to(device, dtype),
            self.last_hidden_state.to(device, dtype),
            self.lengths,
            self.sample_ids,
        )


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


def unroll(head: DraftHead, batch: PackedBatch, embedding: Tensor, ttt_steps: int) -> Iterator[Tensor]:
    """Run K draft steps on every row and yield each step's normed states [T, H], which `head.lm_head` multiplies.

    Args:
        embedding: the verifier's token embedding [V, H].
    """
    attention = TTTAttention(batch.lengths, head.config.num_layers)
    state = head.fuse(batch.aux_hidden_states)
    for step in range(ttt_steps):
        fed = head.embed(ahead(batch.input_ids, step + 1), embedding)
        state, normed = head.step(fed, state, head.rotary(batch.position + step, state), attention)
        yield normed


@dataclass
class Targets:
    """The verifier's distribution at each position p, for token p+1."""

    probabilities: Tensor  # float32 [T, Vd], restricted to the draft vocabulary and renormalised
    mass: Tensor  # float32 [T], what of the distribution lies in the draft vocabulary
    top: Tensor  # int64 [T], the verifier's greedy token
    in_vocabulary: Tensor  # bool [T], whether that token is in the draft vocabulary


@torch.no_grad()
def verifier_targets(head: DraftHead, last_hidden_state: Tensor, verifier_lm_head: Tensor) -> Targets:
    """Compute the verifier's distributions from its recorded final states [T, H] and its lm_head [V, H]."""
    logits = (last_hidden_state @ verifier_lm_head.T).float()
    inside = logits[:, head.target_ids]
    mass = (inside.logsumexp(-1) - logits.logsumexp(-1)).exp()
    top = logits.argmax(-1)
    return Targets(inside.softmax(-1), mass, top, head.t2d[top])


class TTTModule(nn.Module):
    """The trained module: a draft head and the loss of its unroll."""

    def __init__(self, head: DraftHead, ttt_steps: int, gamma: float) -> None:
        super().__init__()
        self.head = head
        self.ttt_steps = ttt_steps
        self.gamma = gamma

    def forward(
        self, batch: PackedBatch, embedding: Tensor, verifier_lm_head: Tensor, num_counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give the loss of a packed batch and the sums its metrics are made of.

        L = sum_k gamma^k sum_counted KL(p || q) / N_k, in nats, softmax in float32. Rows whose target's greedy token is
        outside the draft vocabulary are not counted.

        Args:
            embedding, verifier_lm_head: the verifier's frozen matrices [V, H].
            num_counted: N_k, float32 [K], rows counted over all ranks and micro-batches of the optimizer step; this
                batch's own where None.

        Returns:
            The loss, and float32 [K, 6]: the columns of `SUMS`.
        """
        targets = verifier_targets(self.head, batch.last_hidden_state, verifier_lm_head)
        in_answer = counted_rows(batch.loss_mask, batch.document, self.ttt_steps)
        prefix = torch.ones_like(batch.loss_mask)
        loss = torch.zeros((), device=embedding.device)
        sums = []
        for step, normed in enumerate(unroll(self.head, batch, embedding, self.ttt_steps)):
            counted = in_answer[step] & ahead(targets.in_vocabulary, step + 1)
            rows = counted.nonzero().squeeze(1)
            at = rows + step + 1
            log_q = self.head.lm_head(normed[rows]).float().log_softmax(-1)
            p = targets.probabilities[at]
            kl = (torch.xlogy(p, p) - p * log_q).sum()
            num = counted.sum() if num_counted is None else num_counted[step]
            loss = loss + self.gamma**step * kl / num.clamp(min=1)
            with torch.no_grad():
                agrees = self.head.target_ids[log_q.argmax(-1)] == targets.top[at]
                hit = torch.zeros_like(prefix)
                hit[rows] = agrees
                prefix &= hit
                overlap = torch.minimum(p * targets.mass[at, None], log_q.exp()).sum()
                outside = in_answer[step].sum() - len(rows)
                sums.append(
                    torch.stack([kl.detach(), counted.sum(), agrees.sum(), prefix[rows].sum(), overlap, outside])
                )
        return loss, torch.stack(sums)


@torch.no_grad()
def count_rows(head: DraftHead, batch: PackedBatch, verifier_lm_head: Tensor, ttt_steps: int) -> Tensor:
    """Give the rows this batch counts at each step (float32 [K]), before any of it is unrolled."""
    counted = counted_rows(batch.loss_mask, batch.document, ttt_steps)
    if len(head.d2t) == len(head.t2d):
        return counted.sum(-1).float()
    inside = head.t2d[(batch.last_hidden_state @ verifier_lm_head.T).argmax(-1)]
    return torch.stack([(counted[k] & ahead(inside, k + 1)).sum() for k in range(ttt_steps)]).float()
