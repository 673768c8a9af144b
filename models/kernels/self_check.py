"""Triton kernels are compared with their plain twins at the start of a run, on its GPU, in its shapes and dtype.

A kernel whose results differ, or that Triton cannot compile, is left out with one warning that names the figures, and
plain PyTorch does its work. The cases: train/loss/kernel_checks.py, eval/decoding/kernel_checks.py.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import run_on

# Of outputs, and of gradients relative to their largest entry.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Figure(NamedTuple):
    """How far a kernel is off, and how far it may be."""

    found: float
    allowed: float


class Check(NamedTuple):
    kernel: str
    compare: Callable[[], dict[str, Figure]]  # compiles the kernel, runs it and its plain twin; figures by name


class Checked(NamedTuple):
    used: frozenset[str]  # kernels
    record: dict[str, dict[str, Any]]  # by kernel, JSON-able


def require_gpu(option: str, setting: bool | str, device: torch.device) -> None:
    """Raise ValueError by the name of the option if it is `true` and the device can run no kernel."""
    if setting is True and not run_on(device):
        raise ValueError(f"{option}=true needs a GPU and Triton, and there is {_lack(device)}: set it to auto")


def check_kernels(
    option: str,
    setting: bool | str,
    device: torch.device,
    checks: Sequence[Check],
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    speaks: bool = True,
) -> Checked:
    """Return which kernels agree with their plain twins, on every rank the same.

    Args:
        option: dotted name of the option, whose value is `setting`: "auto", True or False.
        gather: gives the values of all ranks.
        speaks: whether this rank logs the figures.

    Raises:
        ValueError: the option is true, and a kernel is not right; or one has left the GPU unusable.
    """
    require_gpu(option, setting, device)
    if setting is False or not run_on(device):
        reason = f"{option}=false" if setting is False else _lack(device)
        return Checked(frozenset(), {check.kernel: {"used": False, "reason": reason} for check in checks})
    record = {}
    for check in checks:
        of_ranks = gather(_compare(option, check, device))
        entry = record[check.kernel] = next((entry for entry in of_ranks if not entry["used"]), of_ranks[0])
        what = f"Triton kernel {check.kernel}"
        if setting is True and not entry["used"]:
            raise ValueError(f"{option}=true: {what} {entry['reason']}: set it to auto or false")
        if speaks and entry["used"]:
            figures = f"{_describe(entry['figures'])}; {entry['seconds']} s"
            print(f"{option}: {what} agrees with its plain twin ({figures})", flush=True)
        elif speaks:
            message = f"{option}: {what} {entry['reason']}; plain PyTorch does its work, slower"
            logging.getLogger(__name__).warning(message)
    return Checked(frozenset(name for name, entry in record.items() if entry["used"]), record)


def _lack(device: torch.device) -> str:
    return "no Triton" if device.type == "cuda" else "no GPU"


def _compare(option: str, check: Check, device: torch.device) -> dict[str, Any]:
    """Return a kernel's record: whether it is used, its figures as [found, allowed], or else a reason."""
    started = time.perf_counter()
    try:
        figures = {name: Figure(*map(float, figure)) for name, figure in check.compare().items()}
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        _check_device(option, check, device)
        return {"used": False, "reason": f"fails ({type(error).__name__}: {' '.join(str(error).split())[:300]})"}
    used = all(figure.found <= figure.allowed for figure in figures.values())  # false for what is no number
    return {
        "used": used,
        "figures": {n: [f.found if math.isfinite(f.found) else None, f.allowed] for n, f in figures.items()},
        "seconds": round(time.perf_counter() - started, 1),
        **({} if used else {"reason": f"differs from its plain twin ({_describe(figures)})"}),
    }


def _describe(figures: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} off by {found:.1e}, allowed {most:.1e}" for name, (found, most) in figures.items())


def _check_device(option: str, check: Check, device: torch.device) -> None:
    """Refuse to go on if a kernel has left the GPU unusable to this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise ValueError(
            f"{option}: Triton kernel {check.kernel} broke this process's use of the GPU "
            f"({' '.join(str(error).split())[:200]}): set {option}=false"
        ) from None
