"""Measure a training step on random inputs: `python tests/benchmarks/training_step.py [option=value ...]`.

Prints one JSON line. Needs torch and transformers only. `implementation=plain` measures the plain twin
(tests/twins/plain_ttt.py), `both` the two and their ratios, `depths=1,2,3` heads of so many layers and their ratios to
the first: only figures of one process compare.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_options import parse_options
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead
from fledge.models.head.vocabulary import build_vocabulary
from fledge.train.loss.fused import SUMS, KLRows
from fledge.train.loss.losses import LOSSES
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import TTTModule
from fledge.train.metrics.cost import matmul_rate, plain_flops, wait
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "twins"))  # where this is started as a command
from plain_ttt import PlainTTTModule


@dataclass
class Options:
    """What is measured. `preset` sets the sizes; options that follow it change them."""

    hidden_size: int = 256
    intermediate_size: int = 688
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    vocab_size: int = 16000
    draft_vocab_size: int = 16000
    seq_len: int = 2048  # tokens of the batch
    documents: int = 1  # of equal length
    turns: int = 4  # of a document: each a prompt, then the answer that counts
    counted_share: float = 1.0  # of the tokens of a turn
    ttt_steps: int = 7
    num_layers: int = 1
    depths: str = ""  # several num_layers, as 1,2,3
    sliding_window: int = 0  # of every layer; 0: none
    num_aux: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    implementation: str = "fused"  # fused, plain, both
    loss: str = "kl"
    train_lm_head: bool = True
    recompute: bool = False  # activation checkpointing
    triton: bool = False  # attention in Triton
    loss_kernel: bool = False  # the row-wise part of the kl loss in Triton
    repeats: int = 3
    threads: int = 0  # of the CPU; 0: torch's default
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    "a": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "draft_vocab_size": 8000,
        "seq_len": 1024,
    },
    "b": {},
    "maverick": {
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 202048,
        "draft_vocab_size": 202048,
        "seq_len": 8192,
        "dtype": "bfloat16",
    },
    "llama31_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "draft_vocab_size": 32000,
        "seq_len": 8192,
        "dtype": "bfloat16",
    },
}
IMPLEMENTATIONS: dict[str, type[TTTModule]] = {"fused": TTTModule, "plain": PlainTTTModule}
CHOICES = {
    "implementation": [*IMPLEMENTATIONS, "both"],
    "loss": list(LOSSES),
    "dtype": ["float32", "bfloat16", "float64"],
    "device": ["cpu", "cuda"],
}


def parse(arguments: list[str]) -> Options:
    """Read `name=value` arguments, in order."""
    return parse_options(arguments, Options(), PRESETS, CHOICES)


def head_config(options: Options) -> DraftHeadConfig:
    """Give the head's shape."""
    return DraftHeadConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        head_dim=options.head_dim or options.hidden_size // options.num_attention_heads,
        vocab_size=options.vocab_size,
        draft_vocab_size=options.draft_vocab_size,
        verifier_hidden_size=options.hidden_size,
        aux_layers=tuple(range(options.num_aux)),
        max_position_embeddings=options.seq_len + options.ttt_steps,
        num_layers=options.num_layers,
        sliding_window=options.sliding_window or None,
        window_layers=tuple(range(options.num_layers)) if options.sliding_window else (),
    )


def draw_batch(options: Options) -> PackedBatch:
    """Draw tokens and which of them count, without the verifier's states."""
    lengths = _shares(options.seq_len, options.documents)
    produced = []
    for tokens in lengths:
        for turn in _shares(tokens, options.turns):
            answer = round(turn * options.counted_share)
            produced += [False] * (turn - answer) + [True] * answer
    return PackedBatch(
        input_ids=torch.randint(options.vocab_size, (options.seq_len,)),
        loss_mask=torch.tensor(produced),
        document=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        position=torch.cat([torch.arange(tokens) for tokens in lengths]),
        aux_hidden_states=None,
        last_hidden_state=None,
        lengths=lengths,
        sample_ids=[str(number) for number in range(len(lengths))],
    )


def make_inputs(options: Options) -> tuple[DraftHead, PackedBatch, Tensor, Tensor]:
    """Draw a head, a batch and the verifier's embedding and lm_head."""
    torch.manual_seed(options.seed)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    width, length = options.hidden_size, options.seq_len
    # The greedy token of a random verifier is any, so that most rows of a reduced vocabulary would not be counted:
    # its last tokens are made unlikely, as rare tokens are.
    vocabulary = build_vocabulary(torch.arange(options.vocab_size, 0, -1), options.draft_vocab_size)
    with torch.device(device):
        head = DraftHead(head_config(options), vocabulary).to(device, dtype)
        lm_head = torch.randn(options.vocab_size, width, dtype=dtype) * 2 * width**-0.5
        lm_head[options.draft_vocab_size :] *= 0.1
        embedding = torch.randn(options.vocab_size, width, dtype=dtype)
        aux = torch.randn(length, options.num_aux * width, dtype=dtype)
        last = torch.randn(length, width, dtype=dtype)
    head.lm_head.weight.requires_grad_(options.train_lm_head)
    batch = dataclasses.replace(draw_batch(options), aux_hidden_states=aux, last_hidden_state=last)
    return head, batch.to(device, dtype, options.ttt_steps), embedding, lm_head


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


class PeakMemory:
    """The most memory in use since it was made, above what was in use then.

    On the CPU the resident size, whose peak the kernel keeps and lets a process reset; None where it does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = _status("VmRSS") if _reset_peak() else None

    def read_mb(self) -> float | None:
        """Give it in MB (10^6 bytes)."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        return round((peak - self._before) / 1e6, 1)


def _give_back_memory() -> None:
    """Return freed memory to the system, so that it counts again when it is taken again (glibc; else nothing)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Read a size of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def loss_kernel(options: Options) -> KLRows | None:
    """Give the kernel that `loss_kernel` asks for; imports triton."""
    if not options.loss_kernel:
        return None
    from kl_kernel import kl_rows

    return kl_rows


def measure(options: Options) -> dict[str, Any]:
    """Measure one implementation."""
    head, batch, embedding, lm_head = make_inputs(options)
    module = IMPLEMENTATIONS[options.implementation](
        head,
        options.ttt_steps,
        0.8,
        LOSSES[options.loss],
        recompute=options.recompute,
        kernels=options.triton,
        kl_rows=loss_kernel(options),
    )
    device, on_cpu = torch.device(options.device), options.device == "cpu"
    cpu_s, wall_s, peaks, rates = [], [], [], []
    for _ in range(options.repeats + 1):
        module.zero_grad()
        _give_back_memory()
        memory = PeakMemory(device)
        wait(device)
        cpu, wall = time.process_time(), time.perf_counter()
        loss, sums = module(batch, embedding, lm_head)
        loss.backward()
        wait(device)
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
        peaks.append(memory.read_mb())
        # In turn: the machine's pace varies.
        size, clock = (2048, time.process_time) if on_cpu else (8192, time.perf_counter)
        rates.append(matmul_rate(device, getattr(torch, options.dtype), size, clock))
    # The first time is a warm-up.
    cpu_median, wall_median = statistics.median(cpu_s[1:]), statistics.median(wall_s[1:])
    num_counted = sums[:, SUMS.index("counted")].tolist()
    flops = plain_flops(head.config, options.train_lm_head, batch.lengths, num_counted)
    rate = statistics.median(rates[1:])
    return {
        "implementation": options.implementation,
        "cpu_s": round(cpu_median, 4),
        "wall_s": round(wall_median, 4),
        "peak_memory_mb": peaks[-1],
        "tokens_per_s": round(options.seq_len / wall_median, 1),
        "utilisation": round(flops / rate / (cpu_median if on_cpu else wall_median), 3),
        "plain_tflop": round(flops / 1e12, 4),
        "machine_gflops": round(rate / 1e9, 1),
        "loss": float(loss.detach()),
    }


def compare(option: str, values: Sequence[Any], options: Options) -> dict[str, Any]:
    """Measure with each value of an option in turn, and each one's ratios to the first."""
    found = {str(value): measure(dataclasses.replace(options, **{option: value})) for value in values}
    first = found[str(values[0])]
    for result in found.values():
        result["cpu_ratio"] = round(result["cpu_s"] / first["cpu_s"], 3)
        if result["peak_memory_mb"] is not None:
            result["memory_ratio"] = round(result["peak_memory_mb"] / first["peak_memory_mb"], 3)
    return found


def main(arguments: list[str]) -> None:
    """Measure and print one JSON line."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and this machine has no GPU that torch can use: set it to cpu")
    if options.loss_kernel and (options.device, options.loss) != ("cuda", "kl"):
        raise ValueError("loss_kernel needs device=cuda and loss=kl: set it to false")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.depths:
        result = compare("num_layers", [int(depth) for depth in options.depths.split(",")], options)
    elif options.implementation == "both":
        result = compare("implementation", ["plain", "fused"], options)
    else:
        result = measure(options)
    print(json.dumps({**result, "options": dataclasses.asdict(options)}))


if __name__ == "__main__":
    main(sys.argv[1:])
