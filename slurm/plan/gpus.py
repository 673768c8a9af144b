"""Kinds of GPUs: the figures of NVIDIA's data sheets, dense, of the SXM forms."""

from __future__ import annotations

from dataclasses import dataclass

from ...conf.schema import Gpu


@dataclass(frozen=True)
class GpuFigures:
    """What one GPU has."""

    memory_gib: float  # that a process can use
    bf16_tflops: float
    fp8_tflops: float  # as bf16's where it has no fp8
    bandwidth_tb_s: float


GPUS = {
    Gpu.a100: GpuFigures(79, 312, 312, 2.04),
    Gpu.h100: GpuFigures(79, 989, 1979, 3.35),
    Gpu.h200: GpuFigures(139, 989, 1979, 4.8),
    Gpu.b200: GpuFigures(178, 2250, 4500, 7.7),
}
