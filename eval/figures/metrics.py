"""Counts over rounds, and acceptance, speed-up and their intervals.

acceptance length = 1 + accepted / rounds: tokens gained per verifier forward, the bonus token included; over all
rounds of all questions (micro). Acceptance at position i = rounds that accepted draft token i / rounds
(unconditional, vLLM's definition); the conditional rate divides by the rounds that accepted token i-1. With a tree
position i is depth i, and a round accepts one path.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import Record

_CONFIDENCE = 0.95
_RESAMPLES = 10_000
_CHUNK = 1 << 22  # of drawn numbers in memory
_TINY = 1e-30
FEWEST = 4  # questions of an interval: of three, one draw in nine is of one question alone, and spread over anything
_FEWEST_TIMED = 6  # of a speed-up's: bounds are those of single questions at most, which hold of fewer too seldom


_Array = NDArray[np.float64]
_Statistic = Callable[[_Array], tuple[_Array, _Array]]  # of sums [draws, width]: its values and their derivatives


@dataclass
class Counts:
    """Counts over rounds; the names are vLLM's, where a round is a `draft`."""

    num_accepted_tokens_per_pos: list[int]  # for each draft token that a round can accept
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_output_tokens: int = 0
    seconds: float = 0.0

    def add(self, answer: dict[str, Any]) -> None:
        """Add what a drafter did in an answer: lists over rounds, or sums, which are all that a server reports."""
        num_positions = len(self.num_accepted_tokens_per_pos)
        if "num_drafts" not in answer:
            accepted = answer["accepted"]
            depth = max(num_positions, *accepted, 0)
            by_position = [sum(number > position for number in accepted) for position in range(depth)]
            sums = {"num_drafts": len(accepted), "num_draft_tokens": sum(answer["drafted"])}
            sums |= {"num_accepted_tokens": sum(accepted), "num_accepted_tokens_per_pos": by_position}
            answer = {**answer, **sums}
        by_position = answer["num_accepted_tokens_per_pos"]
        if any(by_position[num_positions:]):
            raise ValueError(
                f"evaluate.num_draft_tokens must be what is drafted a round: tokens were accepted at position "
                f"{len(by_position)}, got {num_positions}"
            )
        for position, number in enumerate(by_position[:num_positions]):
            self.num_accepted_tokens_per_pos[position] += number
        self.num_drafts += answer["num_drafts"]
        self.num_draft_tokens += answer["num_draft_tokens"]
        self.num_accepted_tokens += answer["num_accepted_tokens"]
        self.num_output_tokens += answer["output_tokens"]
        self.seconds += answer["seconds"]

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
        by_position = self.num_accepted_tokens_per_pos
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
    """Add up what a drafter did in records; a round can accept `num_positions` tokens (`evaluate.draft_depth`)."""
    counts = Counts([0] * num_positions)
    for record in records:
        for answer in record["answers"]:
            counts.add(answer["drafters"][drafter])
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

    Questions are drawn again, not rounds: the rounds of an answer are alike, and would give too narrow an interval.
    It is of other questions of the same kind, and says nothing of another training.

    Bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5) by a fixed seed: each draw is divided by
    its own standard error, which keeps the level if questions are few (docs/evidence/experiments.md). None of fewer
    than four questions with a round. If all questions accepted alike both bounds are that value.
    """
    return rate_interval(_by_question(records, drafter, num_positions), num_positions)


def rate_interval(columns: _Array, most: int) -> list[float] | None:
    """Return that interval of columns [questions, 2], rounds and accepted tokens, of which a round has `most`."""
    if np.count_nonzero(columns[:, 0]) < FEWEST:
        return None
    return (1 + np.clip(_bootstrap_t(columns, _rate), 0.0, float(most))).tolist()


def paired_difference(
    ours: list[Record], theirs: list[Record], drafter: str, num_positions: tuple[int, int]
) -> tuple[float, list[float] | None]:
    """Return how much longer our acceptance length is than theirs on the same questions, and the 95 % interval of that.

    The same questions are drawn for both, so what makes one easy or hard for both falls out. Records are in the same
    order; `num_positions` are of ours and of theirs.
    """
    first, second = (
        _by_question(side, drafter, most) for side, most in zip((ours, theirs), num_positions, strict=True)
    )
    return rate_difference(first, second, num_positions)


def rate_difference(ours: _Array, theirs: _Array, most: tuple[int, int]) -> tuple[float, list[float] | None]:
    """Return that difference and its interval of columns [questions, 2], as in `rate_interval`."""
    columns = np.concatenate([ours, theirs], 1)
    difference = float(_rate(columns.sum(0, keepdims=True))[0][0])
    if min(np.count_nonzero(side[:, 0]) for side in (ours, theirs)) < FEWEST:
        return difference, None
    return difference, np.clip(_bootstrap_t(columns, _rate), -float(most[1]), float(most[0])).tolist()


def speedup_interval(records: Iterable[Record], drafter: str) -> list[float] | None:
    """Return the 95 % bootstrap interval of tokens a second with drafts over tokens a second of the verifier alone.

    Questions are drawn again, each with its times: how questions differ and how unsteady single times are is in it,
    what slows the machine for long is not. Bootstrap-t as above, of the logarithm. Bounds are within the speed-ups of
    single questions. None of fewer than six questions with a round, or if the verifier was not run alone.
    """
    asked = list(records)
    columns = _summed(asked, np.array([_times(record, drafter) for record in asked]).reshape(-1, 4))
    single = columns[(columns > 0).all(1)]
    if np.isnan(columns).any() or len(single) < _FEWEST_TIMED:
        return None
    possible, _ = _log_speedup(single)
    return np.exp(np.clip(_bootstrap_t(columns, _log_speedup), possible.min(), possible.max())).tolist()


def _times(record: Record, drafter: str) -> list[float]:
    """Return tokens and seconds of a question's answers with drafts, then without; nan if nobody took the time."""
    answers = record["answers"]
    alone = [np.nan if answer["seconds_alone"] is None else answer["seconds_alone"] for answer in answers]
    drafted = [sum(answer["drafters"][drafter][name] for answer in answers) for name in ("output_tokens", "seconds")]
    return [*drafted, sum(answer["output_tokens"] for answer in answers), sum(alone)]


def _log_speedup(sums: _Array) -> tuple[_Array, _Array]:
    signs, sums = np.array([1.0, -1.0, -1.0, 1.0]), np.maximum(sums, _TINY)
    return np.log(sums) @ signs, signs / sums


def _by_question(records: Iterable[Record], drafter: str, num_positions: int) -> _Array:
    """Return rounds and accepted tokens [questions, 2]."""
    asked = list(records)
    counts = [count([record], drafter, num_positions) for record in asked]
    return _summed(asked, np.array([(c.num_drafts, c.num_accepted_tokens) for c in counts], float).reshape(-1, 2))


def _summed(records: list[Record], columns: _Array) -> _Array:
    """Add up the rows of what is one question at several context lengths (`id@length`), drawn as one."""
    at_lengths = [one["id"].rpartition("@")[0] if one["category"].startswith("context ") else "" for one in records]
    names = [name or number for number, name in enumerate(at_lengths)]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(places), columns.shape[1]))
    np.add.at(sums, [places[name] for name in names], columns)
    return sums


def _rate(sums: _Array) -> tuple[_Array, _Array]:
    """Return accepted tokens / rounds of sums [draws, 2]; of [draws, 4] the first two's less that of the others."""
    signs, drafts = np.array([1.0, -1.0][: sums.shape[1] // 2]), np.maximum(sums[:, 0::2], 1.0)
    rates = sums[:, 1::2] / drafts
    return rates @ signs, np.stack([-rates * signs / drafts, signs / drafts], 2).reshape(sums.shape)


def _bootstrap_t(columns: _Array, statistic: _Statistic) -> _Array:
    """Return the bounds around a statistic of the sums of columns [questions, width].

    A question pulls at it by its row times the derivatives w. The standard error is the root of the sum of the squares
    of all pulls: in a draw with replacement w' M w, with M the sums of products of columns over the drawn questions.
    """
    (value,), (derivatives,) = statistic(columns.sum(0, keepdims=True))
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
    drawn_values, weights = statistic(both[:, :width])
    squares = np.einsum("di,dij,dj->d", weights, both[:, width:].reshape(-1, width, width), weights)
    tail, error = (1 - _CONFIDENCE) / 2, np.linalg.norm(columns @ derivatives)
    return value - error * np.quantile((drawn_values - value) / np.sqrt(np.maximum(squares, _TINY)), [1 - tail, tail])
