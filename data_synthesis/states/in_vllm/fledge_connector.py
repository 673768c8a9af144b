"""Without a GPU: the connector by which vLLM writes hidden states to files, without streams and pinned memory.

Loaded by vLLM (`kv_connector_module_path`). Nothing but the copy out of vLLM's cache differs from its own connector.
"""

import fcntl
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector

# The event of a copy that is complete when it returns: nothing is left to wait for.
_DONE = SimpleNamespace(synchronize=lambda: None, query=lambda: True)


class CPUHiddenStatesConnector(ExampleHiddenStatesConnector):
    """vLLM's connector of hidden states, on the CPU."""

    def _submit_async_write(self, pending: Any) -> None:
        """Copy a finished request's states [T, layers, H] out of the cache, and let a thread write them.

        The file's lock is held until they are written; its reader waits for it.
        """
        if not self._is_tp_rank_zero:
            return
        blocks = self._kv_cache[torch.tensor(pending.block_ids)]  # [blocks, layers, tokens of a block, H]
        states = blocks.transpose(1, 2).flatten(0, 1)[: len(pending.token_ids)]
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids}
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None:
            lock = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        future = self._executor.submit(self._write_tensors, tensors, _DONE, pending.filename, lock)
        self._req_copy_events[pending.req_id], self._req_futures[pending.req_id] = _DONE, future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))
