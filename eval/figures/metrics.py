"""What is counted, and what is made of the counts.

acceptance length = 1 + accepted / rounds: tokens gained per verifier forward, the bonus token included; over all
rounds of all questions (micro). Acceptance at position i = rounds that accepted draft token i / rounds
(unconditional, vLLM's definition); the conditional rate divides by the rounds that accepted token i-1. With a tree
position i is depth i, and a round accepts one path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import Record

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_CHUNK = 1 << 22  # of drawn numbers in memory
_TINY = 1e-30
_FEWEST = 4  # questions of an interval: of three, one draw in nine is of one question alone, and spread over anything
_FEWEST_TIMED = 6  # of a speed-up's: bounds are those of single questions at most, which hold of fewer too seldom


@dataclass
class Counts:
    """Counts over rounds; the names are vLLM's, where a round is a `draft`."""

    num_positions: int  # draft tokens that a round can accept
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] | None = None
    num_output_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.num_accepted_tokens_per_pos is None:
            self.num_accepted_tokens_per_pos = [0] * self.num_positions

    def add(self, drafted: Iterable[int], accepted: Iterable[int], output_tokens: int, seconds: float) -> None:
        """Add the rounds of one answer."""
        assert self.num_accepted_tokens_per_pos is not None
        for proposed, taken in zip(drafted, accepted, strict=True):
            self.num_drafts += 1
            self.num_draft_tokens += proposed
            self.num_accepted_tokens += taken
            for position in range(taken):
                self.num_accepted_tokens_per_pos[position] += 1
        self.num_output_tokens += output_tokens
        self.seconds += seconds

    def add_sums(self, sums: dict[str, Any]) -> None:
        """Add an answer of which a server reports sums only.

        Raises:
            ValueError: it accepted tokens at positions that the evaluation does not draft.
        """
        assert self.num_accepted_tokens_per_pos is not None
        by_position = list(sums["num_accepted_tokens_per_pos"])
        if any(by_position[self.num_positions :]):
            raise ValueError(
                f"evaluate.num_draft_tokens must be what the server drafts a round: it accepted tokens at position "
                f"{len(by_position)}, got {self.num_positions}"
            )
        for position, taken in enumerate(by_position[: self.num_positions]):
            self.num_accepted_tokens_per_pos[position] += taken
        self.num_drafts += sums["num_drafts"]
        self.num_draft_tokens += sums["num_draft_tokens"]
        self.num_accepted_tokens += sums["num_accepted_tokens"]
        self.num_output_tokens += sums["output_tokens"]
        self.seconds += sums["seconds"]

    @property
    def acceptance_length(self) -> float:
        """Return tokens gained per verifier forward; 1 if there was no round."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def tokens_per_s(self) -> float | None:
        """Return output tokens a second of decoding."""
        return self.num_output_tokens / self.seconds if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return counts and rates under the names of acceptance.json."""
        by_position = self.num_accepted_tokens_per_pos or []
        before = [self.num_drafts, *by_position]
        return {
            "acceptance_length": self.acceptance_length,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_accepted_tokens_per_pos": by_position,
            "acceptance_rate_per_pos": [n / max(1, self.num_drafts) for n in by_position],
            "conditional_acceptance_rate_per_pos": [n / max(1, b) for n, b in zip(by_position, before, strict=False)],
            "num_output_tokens": self.num_output_tokens,
            "tokens_per_s": self.tokens_per_s,
        }


def count(records: Iterable[Record], drafter: str, num_positions: int) -> Counts:
    """Add up what a drafter did in the records of questions.

    Args:
        num_positions: draft tokens that a round can accept (`evaluate.draft_depth`).
    """
    counts = Counts(num_positions)
    for record in records:
        for answer in record["answers"]:
            rounds = answer["drafters"][drafter]
            if "num_drafts" in rounds:
                counts.add_sums(rounds)
            else:
                counts.add(rounds["drafted"], rounds["accepted"], rounds["output_tokens"], rounds["seconds"])
    return counts


def question_lengths(records: Iterable[Record], drafter: str, num_positions: int) -> list[float]:
    """Return the acceptance length of each question that had a round."""
    counts = [count([record], drafter, num_positions) for record in records]
    return [one.acceptance_length for one in counts if one.num_drafts]


def macro_acceptance_length(records: Iterable[Record], drafter: str, num_positions: int) -> float:
    """Return the mean over questions of each question's acceptance length; 1 if no question had a round."""
    lengths = question_lengths(records, drafter, num_positions)
    return sum(lengths) / len(lengths) if lengths else 1.0


def acceptance_interval(records: Iterable[Record], drafter: str, num_positions: int) -> list[float] | None:
    """Return the 95 % bootstrap interval [low, high] of the acceptance length over all rounds.

    Questions are drawn again, not rounds: the rounds of an answer are alike (its text is easy or hard throughout), so
    as many independent rounds would say far more than they do, and the interval would be too narrow. It tells what
    other questions of the same kind would have given, and nothing of another training.

    Bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5): 10,000 draws by a fixed seed, each
    divided by its own standard error, which keeps the level where questions are few, as in a category of MT-Bench
    (docs/experiments.md). Where all questions accepted alike both bounds are that value.

    Returns:
        None if fewer than four questions had a round: they say too little of how questions differ.
    """
    side = _by_question(records, drafter, num_positions)
    if np.count_nonzero(side[0]) < _FEWEST:
        return None
    return _interval([side], 1 + _ratio(side), (1.0, 1.0 + num_positions))


def paired_difference(
    ours: list[Record], theirs: list[Record], drafter: str, num_positions: tuple[int, int]
) -> tuple[float, list[float] | None]:
    """Return how much longer our acceptance length is than theirs on the same questions, and the 95 % interval of that.

    The same questions are drawn for both, so what makes a question easy or hard for both of them falls out.

    Args:
        ours: records of the questions, in the order of `theirs`.
        num_positions: of ours and of theirs.
    """
    sides = [_by_question(side, drafter, num) for side, num in zip((ours, theirs), num_positions, strict=True)]
    difference = _ratio(sides[0]) - _ratio(sides[1])
    if min(np.count_nonzero(drafts) for drafts, _ in sides) < _FEWEST:
        return difference, None
    return difference, _interval(sides, difference, (-float(num_positions[1]), float(num_positions[0])))


def speedup_interval(records: Iterable[Record], drafter: str) -> list[float] | None:
    """Return the 95 % bootstrap interval of tokens a second with drafts over tokens a second of the verifier alone.

    Questions are drawn again, each with its times, so it tells how questions differ and how unsteady single times
    are; what slows the machine for long is not in it. Bootstrap-t as above, of the logarithm: a sum over tokens and
    seconds, whose pull by question i is n_i / N - s_i / S with drafts, less that without.

    Returns:
        Bounds within the speed-ups of single questions; None if fewer than six questions had a round, or the
        verifier was not run alone.
    """
    columns = np.array([_times(record, drafter) for record in records]).reshape(-1, 4)
    single = columns[(columns > 0).all(1)]
    if np.isnan(columns).any() or len(single) < _FEWEST_TIMED:
        return None
    signs, totals = np.array([1.0, -1.0, -1.0, 1.0]), columns.sum(0)
    drawn, products = _resampled(columns)
    sums = np.maximum(drawn, _TINY)
    weights = signs / sums
    squares = np.einsum("di,dij,dj->d", weights, products, weights)
    error = float(np.sqrt((((columns / totals) @ signs) ** 2).sum()))
    bounds = _studentised(float(np.log(totals) @ signs), error, np.log(sums / totals) @ signs, squares)
    possible = np.log(single) @ signs
    return np.exp(np.clip(bounds, possible.min(), possible.max())).tolist()


def _times(record: Record, drafter: str) -> list[float]:
    """Return tokens and seconds of a question's answers with drafts, then without; nan if nobody took the time."""
    pairs = [(answer["drafters"][drafter], answer) for answer in record["answers"]]
    alone = [np.nan if answer["seconds_alone"] is None else answer["seconds_alone"] for _, answer in pairs]
    drafted = [sum(rounds[name] for rounds, _ in pairs) for name in ("output_tokens", "seconds")]
    return [*drafted, sum(answer["output_tokens"] for _, answer in pairs), sum(alone)]


_Side = tuple[NDArray[np.float64], NDArray[np.float64]]  # rounds and accepted tokens of each question


def _by_question(records: Iterable[Record], drafter: str, num_positions: int) -> _Side:
    counts = [count([record], drafter, num_positions) for record in records]
    return np.array([float(c.num_drafts) for c in counts]), np.array([float(c.num_accepted_tokens) for c in counts])


def _ratio(side: _Side) -> float:
    drafts, accepted = side
    return float(accepted.sum() / max(drafts.sum(), 1.0))


def _interval(sides: list[_Side], value: float, bounds: tuple[float, float]) -> list[float]:
    """Return the bootstrap-t interval around `value`: one side's ratio accepted / rounds, or the difference of two.

    With R a side's ratio and D its rounds, question i pulls at it by (a_i - R d_i) / D; the standard error is the root
    of the sum of the squares of what it pulls in all. In a draw R and D are that draw's, and the sum of squares is a
    quadratic form c' M c of sums M over the drawn questions.
    """
    signs = np.array([1.0, -1.0][: len(sides)])
    pulls = [(drafts, accepted - _ratio((drafts, accepted)) * drafts) for drafts, accepted in sides]
    columns = np.stack([column for side in pulls for column in side], 1)  # [questions, 2 * sides]
    drawn, products = _resampled(columns)
    drafts = np.maximum(drawn[:, 0::2], 1.0)
    changes = drawn[:, 1::2] / drafts  # of each side's ratio, by draw
    weights = np.stack([-changes * signs / drafts, signs / drafts], 2).reshape(drawn.shape)
    squares = np.einsum("di,dij,dj->d", weights, products, weights)
    totals = [max(drafts.sum(), 1.0) for drafts, _ in sides]
    error = float(np.sqrt((((columns[:, 1::2] / totals) @ signs) ** 2).sum()))
    return [float(np.clip(bound, *bounds)) for bound in _studentised(value, error, changes @ signs, squares)]


def _studentised(
    value: float, error: float, changes: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the bounds around a value: of each draw its change and the square of its own standard error."""
    tail = (1 - CONFIDENCE) / 2
    return value - error * np.quantile(changes / np.sqrt(np.maximum(squares, _TINY)), [1 - tail, tail])


def _resampled(columns: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums [draws, columns], and of products of columns, over questions drawn with replacement."""
    generator = np.random.default_rng(0)
    number, width = columns.shape
    values = np.concatenate([columns, (columns[:, :, None] * columns[:, None, :]).reshape(number, -1)], 1)
    rows = max(1, _CHUNK // number)
    sums = []
    for start in range(0, _RESAMPLES, rows):
        size = min(rows, _RESAMPLES - start)
        drawn = generator.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
        sums.append(times.astype(np.float64) @ values)
    both = np.concatenate(sums)
    return both[:, :width], both[:, width:].reshape(-1, width, width)
