"""What became of each prompt: a conversation, or a failure that the next start tries again; and a summary of them."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ...conf.runtime.journal import Journal, read_journal
from ...conf.runtime.progress import Progress
from ..conversations import FILE as CONVERSATIONS
from ..conversations import check_record, read_conversations
from .conversation import Conversation, Failure

FILE = "failures.jsonl"
_SYNC_EVERY_S = 5.0


class AnswerLog:
    """Writes what becomes of each prompt next to the conversations, so that a start after a kill knows it."""

    def __init__(self, folder: Path, max_attempts: int) -> None:
        self._journal = Journal(folder / CONVERSATIONS, check_record, _SYNC_EVERY_S)
        self._failure_journal = Journal(folder / FILE, sync_every_s=_SYNC_EVERY_S)
        self._max_attempts = max_attempts
        self.failures: dict[str, Failure] = {}
        for record in read_journal(folder / FILE):
            if record["id"] not in self._journal.done:
                self._count(record["id"], Failure(record["reason"], record["detail"], final=record["final"]))
        self.num_done = len(self._journal.done)  # conversations that earlier starts have made
        self.progress: Progress | None = None  # to report to
        self.in_flight: int | None = None  # conversations, for the progress line
        self.num_failed = self._num_tokens = 0  # in this start
        self._began = time.monotonic()

    def _count(self, prompt_id: str, failure: Failure) -> None:
        earlier = self.failures[prompt_id].attempts if prompt_id in self.failures else 0
        self.failures[prompt_id] = replace(failure, attempts=earlier + 1)

    def wants(self, prompt_id: str) -> bool:
        """Return whether a prompt is to be answered in this start."""
        return prompt_id not in self._journal.done and not self._given_up(prompt_id)

    def _given_up(self, prompt_id: str) -> bool:
        failure = self.failures.get(prompt_id)
        return failure is not None and (failure.final or failure.attempts >= self._max_attempts)

    @property
    def to_try_again(self) -> list[Failure]:
        """Return the failures of conversations that the next start tries again."""
        return [failure for prompt_id, failure in self.failures.items() if not self._given_up(prompt_id)]

    def add(self, conversations: list[Conversation], temperature: float | None) -> None:
        """Write finished conversations; the temperature of their answers, None if it is not known."""
        records = [conversation.record(temperature) for conversation in conversations]
        self._journal.append(records)
        self._num_tokens += sum(record["usage"]["completion_tokens"] for record in records)
        for record in records:
            self.failures.pop(record["id"], None)
        self._report(len(records))

    def fail(self, prompt_id: str, failure: Failure) -> None:
        """Write why a conversation could not be made."""
        record = {"id": prompt_id, "reason": failure.reason, "detail": failure.detail, "final": failure.final}
        self._failure_journal.append([record])
        self._count(prompt_id, failure)
        self.num_failed += 1
        self._report(0)

    def _report(self, conversations: int) -> None:
        if self.progress is not None:
            rate = f"{self._num_tokens / (time.monotonic() - self._began):,.0f} tokens/s, {self.num_failed} failed"
            flying = f"{self.in_flight} in flight, " if self.in_flight is not None else ""
            self.progress.set_postfix_str(flying + rate, refresh=False)
            self.progress.update(conversations)

    def close(self) -> None:
        """Make everything durable."""
        self._journal.close()
        self._failure_journal.close()
        if self.progress is not None:
            self.progress.close()


def summarise(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Print counts of the conversations of a folder; return them, and those of conversations by source."""
    counts, sources = Counter(conversations=0, answers=0, truncated=0, cut_short=0, completion_tokens=0), Counter[str]()
    for record in read_conversations(folder):
        tokens, reasons = record["usage"]["completion_tokens"], record["finish_reasons"]
        counts.update(conversations=1, answers=len(reasons), truncated="length" in reasons, completion_tokens=tokens)
        counts["cut_short"] += record.get("unanswered_turns", 0) > 0
        sources[record["source"]] += 1
    print(
        f"conversations: {counts['conversations']} with {counts['answers']} answers, {counts['truncated']} of them "
        f"cut by synthesize.max_tokens; {counts['cut_short']} conversations have turns left unanswered; "
        f"{counts['completion_tokens']} tokens produced"
    )
    for source, number in sorted(sources.items()):
        print(f"  {source}: {number}")
    return counts, sources
