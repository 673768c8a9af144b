"""Acceptance length on held-out conversations, without decoding.

Under teacher forcing the leading hits of row r are the draft tokens a decoder would have accepted from row r. The
verifier answered held-out prompts greedily, so walking r -> r + hits(r) + 1 from the last prompt token of each answer
makes the rounds that greedy decoding makes; only the last round of an answer can differ (drafts beyond its end).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.draft_head import DraftHead
from .ttt import PackedBatch, ahead, counted_rows, unroll


@dataclass
class Walk:
    """Rounds of greedy chain decoding, counted."""

    rounds: int = 0
    accepted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Give 1 + accepted / rounds; 1 where there was no round."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0


@torch.no_grad()
def leading_hits(head: DraftHead, batch: PackedBatch, embedding: Tensor, num_draft_tokens: int) -> Tensor:
    """Give how many draft tokens in a row equal the text after each row (int64 [T])."""
    counted = counted_rows(batch.loss_mask, batch.document, num_draft_tokens)
    running = torch.ones_like(batch.loss_mask)
    hits = torch.zeros_like(batch.input_ids)
    for step, normed in enumerate(unroll(head, batch, embedding, num_draft_tokens)):
        proposed = head.target_ids[head.lm_head(normed).argmax(-1)]
        running = running & counted[step] & (proposed == ahead(batch.input_ids, step + 2))
        hits += running
    return hits


def walk(hits: list[int], loss_mask: list[int], document: list[int], num_draft_tokens: int) -> Walk:
    """Walk the rounds of every answer; an answer is a run of `loss_mask` within one document."""
    result = Walk()
    for first, last in _answers(loss_mask, document):
        row = first - 1
        while row + 1 < last:
            accepted = min(hits[row], num_draft_tokens)
            result.rounds += 1
            result.accepted += accepted
            row += accepted + 1
    return result


def _answers(loss_mask: list[int], document: list[int]) -> list[tuple[int, int]]:
    """Give the first and the last position of each answer."""
    answers: list[tuple[int, int]] = []
    for i, produced in enumerate(loss_mask):
        if not produced:
            continue
        if answers and answers[-1][1] == i - 1 and document[i] == document[i - 1]:
            answers[-1] = (answers[-1][0], i)
        else:
            answers.append((i, i))
    return answers


def walk_batches(
    head: DraftHead, batches: Iterable[PackedBatch], embedding: Tensor, lengths: list[int]
) -> dict[int, Walk]:
    """Walk held-out batches for several numbers of draft tokens."""
    totals = {length: Walk() for length in lengths}
    for batch in batches:
        hits = leading_hits(head, batch, embedding, max(lengths)).tolist()
        mask, document = batch.loss_mask.tolist(), batch.document.tolist()
        for length, total in totals.items():
            part = walk(hits, mask, document, length)
            total.rounds += part.rounds
            total.accepted += part.accepted
    return totals
