"""What is counted, and what is made of the counts.

acceptance length = 1 + accepted / rounds: tokens gained per verifier forward, the bonus token included; over all
rounds of all questions (micro). Acceptance at position i = rounds that accepted draft token i / rounds
(unconditional, vLLM's definition); the conditional rate divides by the rounds that accepted token i-1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Counts:
    """Counts over rounds; the names are vLLM's, where a round is a `draft`."""

    num_draft_tokens_per_round: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] | None = None
    num_output_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.num_accepted_tokens_per_pos is None:
            self.num_accepted_tokens_per_pos = [0] * self.num_draft_tokens_per_round

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

    @property
    def acceptance_length(self) -> float:
        """Give tokens gained per verifier forward; 1 where there was no round."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Give counts and rates under the names of acceptance.json."""
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
            "tokens_per_s": self.num_output_tokens / self.seconds if self.seconds else None,
        }


def count(records: Iterable[dict[str, Any]], drafter: str, num_draft_tokens: int) -> Counts:
    """Add up what a drafter did in the records of questions."""
    counts = Counts(num_draft_tokens)
    for record in records:
        for answer in record["answers"]:
            rounds = answer["drafters"][drafter]
            counts.add(rounds["drafted"], rounds["accepted"], rounds["output_tokens"], rounds["seconds"])
    return counts


def macro_acceptance_length(records: list[dict[str, Any]], drafter: str, num_draft_tokens: int) -> float:
    """Give the mean over questions of each question's acceptance length."""
    lengths = [count([record], drafter, num_draft_tokens).acceptance_length for record in records]
    return sum(lengths) / len(lengths) if lengths else 1.0
