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
from ..models.ttt_attention import wide_dtype
from .fused_loss import product, rows_in_chunk
from .rows import PackedBatch
from .ttt import unroll


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
    rows = batch.useful_rows(num_draft_tokens)
    proposed = head.lm_head(unroll(head, batch, rows, embedding), greedy_tokens)
    hits = torch.zeros_like(batch.input_ids)
    for step, places in enumerate(rows.steps):
        at = rows.rows[places]
        running = hits[at] == step
        hits[at] += running & (head.target_ids[proposed[step]] == batch.input_ids[at + step + 2])
    return hits


def greedy_tokens(states: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Give the most likely draft ids (int64 [n]) after each of several tensors of states [n, H], chunk by chunk."""
    size = rows_in_chunk(1, len(weight), weight.dtype, weight.device)
    logits = weight.new_empty(size, len(weight), dtype=wide_dtype(weight.dtype))
    every = torch.cat(states)
    tokens = [product(part, weight.T, logits[: len(part)]).argmax(-1) for part in every.split(size)]
    return list(torch.cat(tokens).split([len(part) for part in states]))


def walk(hits: list[int], loss_mask: list[bool], num_draft_tokens: int) -> Walk:
    """Walk the rounds of every answer of one conversation; an answer is a run of `loss_mask`."""
    result = Walk()
    for first, last in _answers(loss_mask):
        row = first - 1
        while row + 1 < last:
            accepted = min(hits[row], num_draft_tokens)
            result.rounds += 1
            result.accepted += accepted
            row += accepted + 1
    return result


def _answers(loss_mask: list[bool]) -> list[tuple[int, int]]:
    """Give the first and the last position of each answer."""
    answers: list[tuple[int, int]] = []
    for i, produced in enumerate(loss_mask):
        if produced and answers and answers[-1][1] == i - 1:
            answers[-1] = (answers[-1][0], i)
        elif produced:
            answers.append((i, i))
    return answers


Walks = dict[int, dict[str, Walk]]  # by number of draft tokens, then by sample id


def walk_batches(head: DraftHead, batches: Iterable[PackedBatch], embedding: Tensor, lengths: list[int]) -> Walks:
    """Walk every conversation of held-out batches for several numbers of draft tokens."""
    walks: Walks = {length: {} for length in lengths}
    for batch in batches:
        hits = leading_hits(head, batch, embedding, max(lengths)).split(batch.lengths)
        masks = batch.loss_mask.split(batch.lengths)
        for sample_id, row_hits, mask in zip(batch.sample_ids, hits, masks, strict=True):
            for length in lengths:
                walks[length][sample_id] = walk(row_hits.tolist(), mask.tolist(), length)
    return walks


def total(walks: Iterable[Walk]) -> Walk:
    """Add up rounds over conversations."""
    listed = list(walks)
    return Walk(sum(walked.rounds for walked in listed), sum(walked.accepted for walked in listed))
