"""Triton kernels for the GPU. Nothing outside this package imports triton, and its modules are imported on use."""

from functools import cache
from importlib.util import find_spec

import torch

DEVICE = "cuda"  # the type that they run on
DECODING = frozenset({"choose", "join", "move", "way"})  # the kernels of speculative decoding, by name


def run_on(device: torch.device) -> bool:
    """Return whether kernels can run there: on a GPU, with Triton, which has wheels for Linux only."""
    return device.type == DEVICE and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
