"""Signals that end a stage soon, with everything saved."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from .run import EXIT_AGAIN

# SIGTERM comes from schedulers and launchers, SIGUSR1 from `sbatch --signal=USR1@120`, SIGINT from a keyboard.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers the first signal that asks to stop; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    @property
    def name(self) -> str:
        """Give the signal's name; another rank may have got one where this rank got none."""
        return self.received.name if self.received else "a signal"

    @property
    def exit_code(self) -> int:
        """Give the code to end with: 130 after a keyboard's signal, else the one that asks for another start."""
        return 128 + signal.SIGINT if self.received is signal.SIGINT else EXIT_AGAIN

    def exit(self, stage: str) -> NoReturn:
        """End a stage that a signal has asked to stop, everything saved."""
        print(f"{stage}: stopped by {self.name}; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(self.exit_code)


def end_with_parent(_worker: int = 0) -> None:
    """In a helper process: leave signals to the one that started it, and end as soon as that has, however it did."""
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
