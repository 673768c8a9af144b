"""Shards are written by a thread, while the verifier fills the next one."""

import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from torch import Tensor

from ...conf.runtime.signals import Stopped, deferred
from .mapped_shard import part_name, shard_name
from .shard import Shard, write_shard


class BackgroundWriter:
    """Writes shards in the order they are put; one is written and one waits. A context: at its end all are written.

    `scratch`, of the same file system, takes unfinished files. What the thread met is raised by `put` or at the end,
    as ValueError if a shard cannot be written.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch
        self._waiting: queue.Queue[tuple[int, Shard] | None] = queue.Queue(maxsize=1)
        self._spare: queue.SimpleQueue[dict[str, Tensor]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard writer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with deferred("it ends as soon as the shards it has are written"):
            self._waiting.put(None)
            self._thread.join()
        if self._error and (kind is None or issubclass(kind, Stopped)):
            raise self._error

    def spare_buffers(self) -> dict[str, Tensor]:
        """Return the buffers of a shard that is written, if there are any."""
        return {} if self._spare.empty() else self._spare.get()

    def put(self, number: int, shard: Shard) -> None:
        """Hand over a shard, which is not to be changed any more; waits while another waits."""
        if self._error:
            raise self._error
        self._waiting.put((number, shard))

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            number, shard = item
            if self._error is None:  # else nothing more is written, and nobody is kept waiting
                try:
                    write_shard(self._folder, number, shard, self._scratch)
                    if not shard.is_part:  # what an interrupted start had of it is done with
                        (self._folder / part_name(number)).unlink(missing_ok=True)
                        self._spare.put(shard.buffers)
                except (OSError, SafetensorError) as error:
                    self._error = ValueError(
                        f"{self._folder / shard_name(number)} cannot be written ({error}): see to room and rights "
                        "there, or set dump.folder to another disk; the same command goes on after the shards written"
                    )
                except BaseException as error:  # raised where the shards come from, which would wait for ever
                    self._error = error
            del item, shard  # while the next one is waited for, its memory is free
