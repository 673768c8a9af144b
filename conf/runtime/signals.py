"""Signals that ask to stop: announced at once, and obeyed as soon as nothing is lost by it.

While a command runs (`answered`), a signal ends it where it stands, as a kill would, but with a message and an exit
code that asks for another start. What must not be torn apart is `deferred`: it is finished first, or the stage looks at
`received` and ends itself. A thread announces: Python's own handlers run between two operations only, and one operation
of a large verifier may take a minute.
"""

import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# SIGTERM comes from schedulers and launchers, SIGUSR1 from `sbatch --signal=USR1@120`, SIGINT from a keyboard.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_AGAIN = 75  # not at its end: the same command goes on from what is saved (EX_TEMPFAIL of sysexits.h)
_REPEAT_S = 1.0  # a keyboard's signal and the same passed on by a launcher are one
_GRACE_S = 60  # for a command to end if nothing is deferred; then it is ended


class Stopped(SystemExit):
    """A signal has asked this process to stop."""


class StopSignals:
    """Signals that a process has received, and its answer."""

    def __init__(self, command: str = "") -> None:
        self.command = command
        self.received: signal.Signals | None = None  # the first, once the process is between two operations
        self.listeners: list[Callable[[signal.Signals], None]] = []  # called by a thread
        self.waits: str | Callable[[], str] | None = None  # says what is deferred
        self._first: signal.Signals | None = None  # as soon as it comes
        self._latest_s = 0.0
        self._announced = threading.Event()
        self._raised = False

    @property
    def name(self) -> str:
        """Name of the signal; another rank may have received one while this rank did not."""
        return self.received.name if self.received else "a signal"

    @property
    def exit_code(self) -> int:
        """Code to end with: 130 after a keyboard's signal, else the one that asks for another start."""
        return 128 + signal.SIGINT if signal.SIGINT in (self.received, self._first) else EXIT_AGAIN

    def stop(self) -> None:
        """End the command, which has been asked to stop."""
        self._raised = True
        self._announced.wait(1.0)
        raise Stopped(self.exit_code)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal, and end the command unless that is deferred."""
        self.received = self.received or signal.Signals(number)
        self.stop_if_due()

    def stop_if_due(self) -> None:
        """End the command if a signal has come and nothing is deferred."""
        if self.received and self.waits is None and not self._raised:
            self.stop()

    def watch(self, wakeup: socket.socket) -> None:
        """Announce each signal as it comes, until the socket is closed; end a process that does not end by itself."""
        idle = 0
        while True:
            if select.select([wakeup], [], [], 1.0 if self._first else None)[0]:
                numbers = wakeup.recv(64)
                if not numbers:
                    return
                for number in filter(_SIGNALS.__contains__, numbers):
                    self._announce(signal.Signals(number))
            elif (idle := idle + 1 if self.waits is None else 0) >= _GRACE_S:
                self._print(f"it has not ended in {_GRACE_S} s, and is ended")
                os._exit(self.exit_code)

    def _announce(self, number: signal.Signals) -> None:
        now, waits = time.monotonic(), self.waits
        if self._first and now - self._latest_s < _REPEAT_S:
            return
        self._latest_s = now
        for listener in list(self.listeners):
            listener(number)
        if self._first and number is signal.SIGINT:
            self._print("SIGINT received again: it ends at once")
            os._exit(128 + signal.SIGINT)
        self._first = self._first or number
        what = waits() if callable(waits) else waits or "it ends now, what it has saved stays"
        self._print(f"{number.name} received: {what}" + ("; Ctrl-C ends it at once" if waits else ""))
        self._announced.set()

    def _print(self, text: str) -> None:
        line = f"{self.command}: {text}\n"
        with suppress(OSError):  # nobody may be left to read it
            os.write(2, (f"\n{line}" if sys.stderr.isatty() else line).encode())  # waits for no lock of Python's


_this = StopSignals()  # a process has one


@contextmanager
def answered(command: str) -> Iterator[None]:
    """Answer the signals that ask to stop, while a command runs in this process."""
    global _this
    outer, _this = _this, StopSignals(command)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_this.watch, args=(reader,), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            signal.signal(number, _this.handle)
        yield
    except Stopped:
        print(f"{command}: stopped by {_this.name}; the same command goes on", file=sys.stderr, flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        _this = outer


@contextmanager
def deferred(waits: str | Callable[[], str], then_stop: bool = True) -> Iterator[StopSignals]:
    """Let no signal end the command in here: the body looks at `received`, or is short.

    `waits` says what the command does before it ends, in a clause; of nested ones the outermost is said. With
    `then_stop` the command ends afterwards, if a signal has come.
    """
    outer, _this.waits = _this.waits, _this.waits or waits
    try:
        yield _this
    finally:
        _this.waits = outer
    if then_stop:
        _this.stop_if_due()


@contextmanager
def listening(listener: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Have a function called, by a thread, with every signal that asks to stop."""
    _this.listeners.append(listener)
    try:
        yield
    finally:
        _this.listeners.remove(listener)


def end_with_parent(_worker: int = 0) -> None:
    """Leave signals to the process that started this helper, and end as soon as that has, however it did."""
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
