"""Packed batches and the rows of them that training needs.

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

An answer at positions s ... e thus has the *useful rows* s-1 ... e-2, the last k of which end before step k. Numbered
through over all answers of the batch, useful row j has at step k the target j+k: targets are numbered as rows are.

    answers      A B C D        E F G          (the u's before them are left out)
    useful row   0 1 2          3 4
    step 0       0 1 2          3 4            targets at the positions of B C D, F G
    step 1       0 1            3              the same targets, from the second on
    step 2       0
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.ttt_attention import Span


@dataclass
class UsefulRows:
    """The rows that counted targets need, for K steps; indices on the device, spans on the host."""

    rows: Tensor  # int64 [n_0], ascending: the useful rows of the batch
    steps: list[Tensor]  # per step int64 [n_k], ascending: which of `rows` go as far as that step
    kept: list[Tensor]  # per step int64 [n_k]: where they stand among the rows of the step before
    spans: list[list[Span]]  # per step: the same rows as spans
    documents: list[Span]  # every row
    starts: list[list[int]]  # per step [n_0 + 1]: how many of its rows come before useful row j
    firsts: Tensor  # int64 [T], first row of each row's document

    def to(self, device: torch.device) -> UsefulRows:
        """Move the indices to a device."""
        steps, kept = [step.to(device) for step in self.steps], [step.to(device) for step in self.kept]
        rows, firsts = self.rows.to(device), self.firsts.to(device)
        return UsefulRows(rows, steps, kept, self.spans, self.documents, self.starts, firsts)


@dataclass
class PackedBatch:
    """Documents laid end to end, T tokens in all."""

    input_ids: Tensor  # int64 [T]
    loss_mask: Tensor  # bool [T]
    document: Tensor  # int64 [T], number of the document a token belongs to
    position: Tensor  # int64 [T], within the document
    aux_hidden_states: Tensor | None  # [T, A*H]; None until the verifier of an online run has read the batch
    last_hidden_state: Tensor | None  # [T, H]
    lengths: list[int]  # tokens of each document
    sample_ids: list[str]
    useful: UsefulRows | None = None  # set by `to`

    def to(self, device: torch.device, dtype: torch.dtype, ttt_steps: int) -> PackedBatch:
        """Move to a device, states in `dtype`; the useful rows of K steps are found before, while the mask is here."""
        return PackedBatch(
            self.input_ids.to(device),
            self.loss_mask.to(device),
            self.document.to(device),
            self.position.to(device),
            None if self.aux_hidden_states is None else self.aux_hidden_states.to(device, dtype),
            None if self.last_hidden_state is None else self.last_hidden_state.to(device, dtype),
            self.lengths,
            self.sample_ids,
            self.useful_rows(ttt_steps).to(device),
        )

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Aux [T, A*H] and last hidden states [T, H] of a batch that has them."""
        assert self.aux_hidden_states is not None, "the verifier has not read this batch"
        assert self.last_hidden_state is not None
        return self.aux_hidden_states, self.last_hidden_state

    def useful_rows(self, ttt_steps: int) -> UsefulRows:
        """Give the useful rows of K steps; those found by `to` if they are for as many."""
        if self.useful is not None and len(self.useful.steps) == ttt_steps:
            return self.useful
        return find_useful_rows(self.loss_mask, self.lengths, ttt_steps).to(self.loss_mask.device)


def _answer_spans(loss_mask: list[bool], documents: list[Span]) -> list[Span]:
    """Give the useful rows of every answer, as spans."""
    spans = []
    for document in documents:
        start, end = document.first, document.first + document.rows
        for produced, run in itertools.groupby(range(start, end), key=loss_mask.__getitem__):
            positions = list(run)
            first = max(positions[0] - 1, start)
            if produced and first < positions[-1] - 1:
                spans.append(Span(start, first, positions[-1] - 1 - first))
    return spans


def find_useful_rows(loss_mask: Tensor, lengths: list[int], ttt_steps: int) -> UsefulRows:
    """Find the useful rows of a packed batch, on the host.

    Args:
        loss_mask: bool [T].
        lengths: tokens of each document.
    """
    starts = [0, *itertools.accumulate(lengths)]
    documents = [Span(start, start, length) for start, length in zip(starts, lengths, strict=False)]
    spans = _answer_spans(loss_mask.tolist(), documents)
    rows = [row for span in spans for row in range(span.first, span.first + span.rows)]
    steps_left = torch.tensor([left for span in spans for left in range(span.rows, 0, -1)], dtype=torch.int64)
    steps, kept = [], []
    before = torch.arange(len(rows))
    for step in range(ttt_steps):
        kept.append((steps_left[before] > step).nonzero().squeeze(1))
        before = before[kept[-1]]
        steps.append(before)
    return UsefulRows(
        rows=torch.tensor(rows, dtype=torch.int64),
        steps=steps,
        kept=kept,
        spans=[[span._replace(rows=span.rows - k) for span in spans if span.rows > k] for k in range(ttt_steps)],
        documents=documents,
        starts=[[0, *(steps_left > step).cumsum(0).tolist()] for step in range(ttt_steps)],
        firsts=torch.repeat_interleave(torch.tensor(starts[:-1]), torch.tensor(lengths)),
    )
