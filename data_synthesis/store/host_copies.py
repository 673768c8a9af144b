"""Copies between the host and a GPU that the host does not wait for, one by one."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; one of the host goes to a GPU from pinned memory, and the host goes on at once."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_host(computed: Iterable[tuple[int, Tensors]], num_rows: int) -> Iterator[tuple[int, Tensors]]:
    """Yield numbered tensors on the host, in the same order.

    From a GPU they are copied to pinned memory (which `to` takes if it does not block). There is one wait for
    `num_rows` rows or more, and only once as many again are queued behind them: the GPU never runs out of work.
    """
    arriving, queued = list[tuple[int, Tensors]](), list[tuple[int, Tensors]]()
    arrived, device, rows = None, None, 0
    for number, tensors in computed:
        copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        device = next(iter(tensors.values())).device
        if device.type != "cuda":
            yield number, copies
            continue
        queued.append((number, copies))
        rows += max(map(len, copies.values()))
        if rows >= num_rows:
            if arrived:
                arrived.synchronize()
                yield from arriving
            arriving, queued, rows = queued, [], 0
            arrived = torch.cuda.current_stream(device).record_event()
    if arriving or queued:
        torch.cuda.current_stream(device).synchronize()
        yield from arriving + queued
