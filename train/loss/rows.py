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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...data_synthesis.store.state_format import decode
from ...models.head.ttt_attention import Span


@dataclass
class UsefulRows:
    """The rows that counted targets need, for K steps; indices on the device, spans on the host."""

    indices: Tensor  # int64: the four kinds below end to end, of which they are views
    sizes: list[int]
    spans: list[list[Span]]  # per step: the rows it has, as spans
    documents: list[Span]  # every row
    starts: list[list[int]]  # per step [n_0 + 1]: how many of its rows come before useful row j
    rows: Tensor = field(init=False)  # [n_0], ascending: the useful rows of the batch
    firsts: Tensor = field(init=False)  # [T], first row of each row's document
    steps: list[Tensor] = field(init=False)  # per step [n_k], ascending: which of `rows` go as far as that step
    from_previous: list[Tensor] = field(init=False)  # per step [n_k]: places among the rows of the step before

    def __post_init__(self) -> None:
        self.rows, self.firsts, *others = self.indices.split(self.sizes)
        self.steps, self.from_previous = others[: len(others) // 2], others[len(others) // 2 :]

    def __reduce__(self) -> tuple[Any, ...]:
        return UsefulRows, (self.indices, self.sizes, self.spans, self.documents, self.starts)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> UsefulRows:
        """Change all indices by one call, for one transfer."""
        return replace(self, indices=change(self.indices))

    def to(self, device: torch.device) -> UsefulRows:
        """Move the indices to a device."""
        return self.mapped(lambda indices: _to(indices, device))


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
    useful: UsefulRows | None = None  # set when it is read, or by `to`
    aux_scale: Tensor | None = None  # [T, A], of float8 as it is stored, until `to` decodes it
    last_scale: Tensor | None = None  # [T, 1]

    def to(self, device: torch.device, dtype: torch.dtype, ttt_steps: int) -> PackedBatch:
        """Move to a device, then bring states into `dtype`; useful rows are found before, while the mask is here."""
        batch = replace(self, useful=self.useful_rows(ttt_steps)).mapped(lambda tensor: _to(tensor, device))
        aux, last = batch.aux_hidden_states, batch.last_hidden_state
        aux = None if aux is None else decode(aux, batch.aux_scale, dtype)
        last = None if last is None else decode(last, batch.last_scale, dtype)
        return replace(batch, aux_hidden_states=aux, last_hidden_state=last, aux_scale=None, last_scale=None)

    def pin_memory(self) -> PackedBatch:
        """Copy into pinned memory, from where a GPU fetches while it computes (called by torch's DataLoader)."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Change every tensor."""
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        useful = None if self.useful is None else self.useful.mapped(change)
        return replace(self, **changed, useful=useful)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Return aux [T, A*H] and last hidden states [T, H] of a batch that has them."""
        assert self.aux_hidden_states is not None, "the verifier has not read this batch"
        assert self.last_hidden_state is not None
        return self.aux_hidden_states, self.last_hidden_state

    def finite_documents(self) -> list[bool]:
        """Return of each document whether all its states are finite; waits for the device."""
        aux, last = self.states
        finite = (aux.isfinite().all(-1) & last.isfinite().all(-1)).cpu()
        return [bool(part.all()) for part in finite.split(self.lengths)]

    def non_finite_samples(self) -> list[str]:
        """Return the ids of the documents with states that are not finite, or of all if every state is finite."""
        parts = zip(self.sample_ids, self.finite_documents(), strict=True)
        return [name for name, finite in parts if not finite] or self.sample_ids

    def without_non_finite(self) -> PackedBatch:
        """Return the batch with zeros as the states of documents that are not finite, of which no row counts then."""
        finite = self.finite_documents()
        if all(finite):
            return self
        keep = torch.tensor(finite).repeat_interleave(torch.tensor(self.lengths)).to(self.loss_mask.device)
        aux, last = (torch.where(keep[:, None], states, 0) for states in self.states)
        mask = self.loss_mask & keep
        return replace(self, aux_hidden_states=aux, last_hidden_state=last, loss_mask=mask, useful=None)

    def useful_rows(self, ttt_steps: int) -> UsefulRows:
        """Return the useful rows of K steps; those found by `to` if they are for as many."""
        if self.useful is not None and len(self.useful.steps) == ttt_steps:
            return self.useful
        return find_useful_rows(self.loss_mask, self.lengths, ttt_steps).to(self.loss_mask.device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=device.type == "cuda")  # waits for nothing if the memory is pinned


def _answer_spans(loss_mask: list[bool], documents: list[Span]) -> list[Span]:
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
    """Return the useful rows of a packed batch by its mask, bool [T], and tokens of each document, on the host."""
    starts = [0, *itertools.accumulate(lengths)]
    documents = [Span(start, start, length) for start, length in zip(starts, lengths, strict=False)]
    spans = _answer_spans(loss_mask.tolist(), documents)
    rows = [row for span in spans for row in range(span.first, span.first + span.rows)]
    steps_left = torch.tensor([left for span in spans for left in range(span.rows, 0, -1)], dtype=torch.int64)
    steps, from_previous = [], []
    before = torch.arange(len(rows))
    for step in range(ttt_steps):
        from_previous.append((steps_left[before] > step).nonzero().squeeze(1))
        before = before[from_previous[-1]]
        steps.append(before)
    firsts = torch.repeat_interleave(torch.tensor(starts[:-1]), torch.tensor(lengths))
    indices = [torch.tensor(rows, dtype=torch.int64), firsts, *steps, *from_previous]
    return UsefulRows(
        indices=torch.cat(indices),
        sizes=[len(part) for part in indices],
        spans=[[span._replace(rows=span.rows - k) for span in spans if span.rows > k] for k in range(ttt_steps)],
        documents=documents,
        starts=[[0, *(steps_left > step).cumsum(0).tolist()] for step in range(ttt_steps)],
    )
