"""What a training step costs: operations of its matrix products, and this machine's own rate of them."""

import time
from collections.abc import Callable

import torch

from ...models.head.config import DraftHeadConfig


def plain_flops(
    head: DraftHeadConfig, train_lm_head: bool, lengths: list[int], num_counted: list[float], lora: bool = False
) -> float:
    """Return the operations of the matrix products of the plain algorithm, forward and backward.

    Every row runs at every step, with causal attention (half of a square, or a window's band); the draft's lm_head runs
    on counted rows, the verifier's once on every row. A product with a trained weight is done three times, with
    `lora` (whose own products are small) twice, and once less if its input needs no gradient (fc); the verifier's once.
    `lengths` are the documents', `num_counted` the rows of each TTT step.
    """
    width, rows = head.hidden_size, sum(lengths)
    heads, keys = head.num_attention_heads * head.head_dim, 2 * head.num_key_value_heads * head.head_dim
    inputs = head.num_layers + 1  # of all layers, in widths: the first has two
    layers = inputs * width * (heads + keys) + head.num_layers * (heads * width + 3 * width * head.intermediate_size)
    windows = [head.window(layer) for layer in range(head.num_layers)]
    attention = heads * sum(_square(length, window) for window in windows for length in lengths)
    times = 2 if lora else 3
    return (
        2 * rows * len(head.aux_layers) * head.verifier_hidden_size * width * (times - 1)
        + 2 * rows * head.verifier_hidden_size * head.vocab_size
        + len(num_counted) * (times * 2 * rows * layers + 3 * 2 * attention)
        + (3 if train_lm_head else 2) * 2 * sum(num_counted) * width * head.draft_vocab_size
    )


def _square(length: int, window: int | None) -> int:
    """Return twice the pairs of a row and a key it sees: a square, or the band of a window."""
    seen = min(length, window or length)
    return seen * (2 * length - seen)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the operations a second of square products of `size`, by a clock in seconds."""
    repeats = 4 if device.type == "cpu" else 8
    generator = torch.Generator(device)  # its own: training's is not to be moved on
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    wait(device)
    started = clock()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    wait(device)
    return repeats * 2 * size**3 / (clock() - started)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
