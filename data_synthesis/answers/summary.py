"""What conversations are like: counts, lengths, sources, and a few of them to read."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conversations import read_conversations
from ..preview import printable

_SHOWN, _SHOWN_CHARS = 3, 240


@dataclass
class Summary:
    """Counts of a folder of conversations."""

    counts: dict[str, int]
    sources: dict[str, int]  # conversations of each
    lengths: array[int] = field(default_factory=lambda: array("L"))  # tokens the verifier produced in each, ascending
    examples: list[dict[str, Any]] = field(default_factory=list)

    def show(self) -> None:
        """Print it."""
        counts = self.counts
        print(
            f"conversations: {counts['conversations']} with {counts['answers']} answers, {counts['truncated']} of them "
            f"cut by synthesize.max_tokens; {counts['cut_short']} conversations have turns left unanswered"
        )
        if self.lengths:
            middle, high = (self.lengths[int(share * (len(self.lengths) - 1))] for share in (0.5, 0.95))
            print(
                f"  {counts['completion_tokens']} tokens produced; a conversation: median {middle}, 95 % up to {high}, "
                f"longest {self.lengths[-1]}"
            )
        for source, number in sorted(self.sources.items()):
            print(f"  {source}: {number}")
        for record in self.examples:
            print(f"  --- {record['id']}")
            for message in record["messages"]:
                print(f"  {message['role']}: {_shortened(message['content'])}")


def summarise(folder: Path) -> Summary:
    """Read the conversations of a folder once."""
    counts = Counter(conversations=0, answers=0, truncated=0, cut_short=0, completion_tokens=0)
    sources: Counter[str] = Counter()
    summary = Summary(counts, sources)
    lengths = array("L")
    for record in read_conversations(folder):
        counts["conversations"] += 1
        counts["answers"] += len(record["finish_reasons"])
        counts["truncated"] += "length" in record["finish_reasons"]
        counts["cut_short"] += record.get("unanswered_turns", 0) > 0
        counts["completion_tokens"] += record["usage"]["completion_tokens"]
        sources[record["source"]] += 1
        lengths.append(record["usage"]["completion_tokens"])
        if len(summary.examples) < _SHOWN:
            summary.examples.append(record)
    summary.lengths = array("L", sorted(lengths))
    return summary


def _shortened(content: Any) -> str:
    text = content if isinstance(content, str) else " ".join(part.get("text", f"<{part['type']}>") for part in content)
    text = printable(" ".join(text.split()))
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " …"
