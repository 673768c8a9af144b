"""What became of each prompt: a conversation, or a failure that is tried again at the next start."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ...conf.runtime.journal import Journal, read_journal
from ...conf.runtime.progress import Progress
from ..conversations import SYNC_EVERY_S, Conversation, Failure, open_conversations

FILE = "failures.jsonl"
_TELL_EVERY_S = 0.2


class Outcomes:
    """Takes down what becomes of each prompt, so that a start after a kill knows it.

    Args:
        folder: of the conversations.
        max_attempts: starts in which a prompt that fails is tried.
    """

    def __init__(self, folder: Path, max_attempts: int) -> None:
        self._journal = open_conversations(folder)
        self._failure_journal = Journal(folder / FILE, sync_every_s=SYNC_EVERY_S)
        self._max_attempts = max_attempts
        self.failures: dict[str, Failure] = {}
        for record in read_journal(folder / FILE):
            self._remember(record["id"], Failure(record["reason"], record["detail"], final=record["final"]))
        for made in self._journal.done & self.failures.keys():
            del self.failures[made]
        self._progress: Progress | None = None
        self.in_flight: int | None = None  # conversations, for the progress line
        self.num_failed = self._num_tokens = 0  # in this start
        self._began, self._told_at = time.monotonic(), 0.0

    def _remember(self, prompt_id: str, failure: Failure) -> None:
        earlier = self.failures[prompt_id].attempts if prompt_id in self.failures else 0
        self.failures[prompt_id] = replace(failure, attempts=earlier + 1)

    def wants(self, prompt_id: str) -> bool:
        """Say whether a prompt is to be answered in this start."""
        return prompt_id not in self._journal.done and not self._given_up(prompt_id)

    def _given_up(self, prompt_id: str) -> bool:
        failure = self.failures.get(prompt_id)
        return failure is not None and (failure.final or failure.attempts >= self._max_attempts)

    @property
    def num_done(self) -> int:
        """Conversations that earlier starts have made."""
        return len(self._journal.done)

    @property
    def to_try_again(self) -> list[Failure]:
        """Give the failures of conversations that the next start tries again."""
        return [failure for prompt_id, failure in self.failures.items() if not self._given_up(prompt_id)]

    def show(self, progress: Progress) -> None:
        """Report to a progress bar from now on."""
        self._progress = progress

    def made(self, conversations: list[Conversation], temperature: float) -> None:
        """Write finished conversations."""
        records = [conversation.record(temperature) for conversation in conversations]
        self._journal.append(records)
        self._num_tokens += sum(record["usage"]["completion_tokens"] for record in records)
        for record in records:
            self.failures.pop(record["id"], None)
        self._report(len(records))

    def failed(self, prompt_id: str, failure: Failure) -> None:
        """Write why a conversation could not be made."""
        record = {"id": prompt_id, "reason": failure.reason, "detail": failure.detail, "final": failure.final}
        self._failure_journal.append([record])
        self._remember(prompt_id, failure)
        self.num_failed += 1
        self._report(0)

    def _report(self, made: int) -> None:
        if self._progress is None:
            return
        seconds = time.monotonic() - self._began
        if seconds > self._told_at + _TELL_EVERY_S:
            self._told_at = seconds
            flying = f"{self.in_flight} in flight, " if self.in_flight is not None else ""
            text = f"{flying}{self._num_tokens / seconds:,.0f} tokens/s, {self.num_failed} failed"
            self._progress.set_postfix_str(text, refresh=False)
        self._progress.update(made)

    def close(self) -> None:
        """Make everything durable."""
        self._journal.close()
        self._failure_journal.close()
        if self._progress is not None:
            self._progress.close()
