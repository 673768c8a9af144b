"""Progress of long work: a bar on a terminal, a plain line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Progress(tqdm):
    """A tqdm bar that writes whole lines if there is no terminal, the first after an interval.

    `total` is None if nobody knows it; `done` units were finished by an earlier start.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self._terminal = sys.stderr.isatty()
        self.disable = False
        layout = "{l_bar}{bar}| " if self._terminal else "{desc}: "
        layout += "{n_fmt}/{total_fmt}, {rate_noinv_fmt}, {elapsed} < {remaining}{postfix}"
        if total is None:
            layout = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}, {elapsed}{postfix}"
        super().__init__(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            unit_scale=total is not None and total > 100_000,
            mininterval=0.5 if self._terminal else LINE_EVERY_S,
            maxinterval=6 * LINE_EVERY_S,
            delay=0 if self._terminal else LINE_EVERY_S,
            dynamic_ncols=self._terminal,
            bar_format=layout,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or print a line."""
        if self._terminal:
            return super().display(msg, pos)
        if line := str(self) if msg is None else msg:
            print(line, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._terminal or self.disable:
            super().close()
            return
        if self.n != self.last_print_n:
            self.display()
        self.disable = True
        self._decr_instances(self)
