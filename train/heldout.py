"""Acceptance length on held-out conversations, without decoding.

Greedy: under teacher forcing the leading hits of row r are the draft tokens a decoder would have accepted from row r.
The verifier answered held-out prompts greedily. So r -> r + hits(r) + 1, from the last prompt token of each answer on,
makes the rounds of greedy decoding; only the last round of an answer can differ (drafts beyond its end).

At temperature 1 draft token k of row r is accepted with probability alpha_k = sum_v min(P, q), so that a round from
there is expected to accept sum_k alpha_0 ... alpha_k. The mean over rows is an estimate of what decoding gains, and a
high one: rounds begin more often where drafts are rejected, and the text is the verifier's greedy one, not a sample.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from .loss.fused import draft_tokens
from .loss.rows import PackedBatch
from .loss.unroll import TTTModule

_FIRST_BUCKET = 512  # tokens of a text's first part by which rounds are counted; each next one ends at twice as many


@dataclass
class HeldoutCounts:
    """Rounds of greedy chain decoding in one conversation, for a number of draft tokens, and each row as a round."""

    rounds: int = 0
    accepted: int = 0
    rows: int = 0  # from which decoding could start
    expected: float = 0.0  # tokens accepted from them at temperature 1, one round each
    # rounds, and what they accepted, by where in the text they begin: before token 512, 1024, 2048 and so on
    by_position: list[list[int]] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Return 1 + accepted / rounds; 1 if there was no round."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def acceptance_length_t1(self) -> float:
        """Return 1 + expected / rows, the estimate at temperature 1; 1 if there is no row."""
        return 1 + self.expected / self.rows if self.rows else 1.0


@torch.no_grad()
def acceptance(
    module: TTTModule, batch: PackedBatch, embedding: Tensor, verifier_lm_head: Tensor, num_draft_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return what would be accepted from each row of a batch.

    That is how many draft tokens in a row equal the text after it (int64 [T]), and the probability that at temperature
    1 a draft token and all before it are accepted (float32 [T, num_draft_tokens]). Both are 0 for rows from which no
    decoding starts, and for draft tokens beyond the answer's end.
    """
    head, rows = module.head, batch.useful_rows(num_draft_tokens)
    job = module.job(batch, rows, verifier_lm_head)
    proposed, overlaps = head.lm_head(module.unroll(head, batch, rows, embedding), partial(draft_tokens, job))
    hits = torch.zeros_like(batch.input_ids)
    reach = torch.zeros(len(hits), num_draft_tokens, device=hits.device)
    for step, places in enumerate(rows.steps):
        at = rows.rows[places]
        running = hits[at] == step
        hits[at] += running & (head.target_ids[proposed[step]] == batch.input_ids[at + step + 2])
        reach[at, step] = overlaps[step].float() * (reach[at, step - 1] if step else 1)
    return hits, reach


def teacher_forced_rounds(hits: list[int], loss_mask: list[bool], num_draft_tokens: int) -> HeldoutCounts:
    """Count the rounds of every answer of one conversation; an answer is a run of `loss_mask`."""
    counts = HeldoutCounts()
    for is_answer, run in itertools.groupby(range(len(loss_mask)), key=loss_mask.__getitem__):
        positions = list(run)
        row = positions[0] - 1
        while is_answer and row + 1 < positions[-1]:
            accepted = min(hits[row], num_draft_tokens)
            counts.rounds += 1
            counts.accepted += accepted
            bucket = (row // _FIRST_BUCKET).bit_length()
            counts.by_position += [[0, 0] for _ in range(len(counts.by_position), bucket + 1)]
            counts.by_position[bucket][0] += 1
            counts.by_position[bucket][1] += accepted
            row += accepted + 1
    return counts


HeldoutByLength = dict[int, dict[str, HeldoutCounts]]  # by number of draft tokens, then by sample id


def count_heldout(
    module: TTTModule, batches: Iterable[PackedBatch], embedding: Tensor, verifier_lm_head: Tensor, lengths: list[int]
) -> HeldoutByLength:
    """Return the counts of every conversation of held-out batches, for several numbers of draft tokens."""
    heldout: HeldoutByLength = {length: {} for length in lengths}
    for batch in batches:
        hits, reach = acceptance(module, batch, embedding, verifier_lm_head, max(lengths))
        useful = torch.zeros_like(batch.loss_mask)
        useful[batch.useful_rows(max(lengths)).rows] = True
        by_row = hits, batch.loss_mask, useful, reach.double().cumsum(-1)
        by_sample = zip(*(values.split(batch.lengths) for values in by_row), strict=True)
        for sample_id, (row_hits, mask, rows, expected) in zip(batch.sample_ids, by_sample, strict=True):
            num_rows, sums = int(rows.sum()), expected.sum(0).tolist()
            text = row_hits.tolist(), mask.tolist()
            for length in lengths:
                counts = teacher_forced_rounds(*text, length)
                heldout[length][sample_id] = replace(counts, rows=num_rows, expected=sums[length - 1])
    return heldout


def total(counts: Iterable[HeldoutCounts]) -> HeldoutCounts:
    """Add up rounds and rows over conversations."""
    whole = list(counts)
    buckets = itertools.zip_longest(*(one.by_position for one in whole), fillvalue=[0, 0])
    return HeldoutCounts(
        rounds=sum(one.rounds for one in whole),
        accepted=sum(one.accepted for one in whole),
        rows=sum(one.rows for one in whole),
        expected=sum(one.expected for one in whole),
        by_position=[list(map(sum, zip(*bucket, strict=True))) for bucket in buckets],
    )


def acceptance_lengths(heldout: HeldoutByLength) -> dict[str, float]:
    """Return the metrics of a measurement: greedy and at temperature 1, of each number of draft tokens."""
    totals = {length: total(by_sample.values()) for length, by_sample in heldout.items()}
    greedy = {f"acceptance_length_{length}": counts.acceptance_length for length, counts in totals.items()}
    return greedy | {f"acceptance_length_t1_{length}": counts.acceptance_length_t1 for length, counts in totals.items()}


def heldout_metrics(heldout: HeldoutByLength, ids_by_store: list[set[str]]) -> dict[str, float]:
    """Return all metrics of a measurement: of all conversations, by position, and by store if several have some."""
    parts = {"heldout": acceptance_lengths(heldout), "heldout_by_position": acceptance_by_position(heldout)}
    if sum(map(bool, ids_by_store)) > 1:
        for number, ids in enumerate(ids_by_store):
            own = {length: {name: of[name] for name in of if name in ids} for length, of in heldout.items()}
            parts[f"heldout_store_{number}"] = acceptance_lengths(own)
    return {f"{part}/{name}": value for part, metrics in parts.items() for name, value in metrics.items()}


def acceptance_by_position(heldout: HeldoutByLength) -> dict[str, float]:
    """Return the greedy acceptance length of the rounds that begin in each part of a text, if there are several."""
    metrics = {}
    for length, by_sample in heldout.items():
        parts = total(by_sample.values()).by_position
        for number, (rounds, accepted) in enumerate(parts):
            if rounds and len(parts) > 1:
                start = _FIRST_BUCKET << (number - 1) if number else 0
                metrics[f"acceptance_length_{length}_from_{start}"] = 1 + accepted / rounds
    return metrics
