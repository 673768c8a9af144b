"""Check fledge on a GPU in ten minutes: `make test-gpu`, or `python tests/tools/gpu_kit.py` on a bare machine.

Needs torch for CUDA, triton, transformers and pytest; fledge need not be installed. Each part is a process of its own
with a time limit, and what fails or is cut does not keep the next from running. Each line printed is JSON, flushed as
it comes: what a part tells, with its name in `part`, then its `status`: passed, failed, or cut at its limit. The last
line sums up. Exit code: 0, 1 if a part failed or was cut, 2 without a GPU.

`--rehearse` runs the same on a machine without a GPU, small, and the kernels in Triton's interpreter.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
TEST_GPU = ROOT / "tests" / "models" / "kernels" / "test_gpu.py"
TAIL = 25  # lines of a part that failed, of those that are not JSON


class Part(NamedTuple):
    """A command of Python's, and how long it may take."""

    name: str
    arguments: list[str]
    limit_s: float


def parts(rehearse: bool) -> list[Part]:
    """Give the parts in their order; limits sum up to 555 s."""
    kit = [__file__, *(["--rehearse"] if rehearse else [])]
    small = ["hidden_size=32", "intermediate_size=48", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=16"]
    small += ["vocab_size=100", "draft_vocab_size=60"]
    step, decode = [str(BENCHMARKS / "training_step.py")], [str(BENCHMARKS / "decoding.py")]
    if rehearse:
        presets, decoding, on = {"small": [*small, "seq_len=64", "repeats=1"]}, [*small, "rounds=6"], ["triton=true"]
    else:
        presets = {name: [f"preset={name}", "device=cuda"] for name in ("maverick", "llama31_8b")}
        decoding, on = ["preset=llama8b"], ["triton=true", "loss_kernel=true"]
    steps = [
        Part(f"step of {name}, {way}", [*step, *options, *kernels], 40)
        for name, options in presets.items()
        for way, kernels in (("kernels", on), ("plain", []))
    ]
    return [
        Part("machine", [*kit, "machine"], 30),
        Part("self-checks", [*kit, "checks"], 60),
        Part("tests", [*kit, "tests"], 220),
        *steps,
        Part("decoding, kernels and graphs", [*decode, *decoding], 45),
        Part("decoding, plain", [*decode, *decoding, "kernels=false", "cuda_graphs=false"], 40),
    ]


def say(**told: Any) -> None:
    """Print a line."""
    print(json.dumps(told), flush=True)


def run(part: Part, environment: dict[str, str]) -> str:
    """Run a part, pass its lines on as they come, and say how it ended; return its status."""
    started, tail, cut = time.monotonic(), collections.deque[str](maxlen=TAIL), threading.Event()
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )

    def end() -> None:
        cut.set()
        os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(part.limit_s, end)
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                say(part=part.name, **json.loads(line, parse_constant=str))  # NaN is no JSON
            elif line.strip():
                tail.append(line.rstrip()[:500])
        code = process.wait()
    finally:
        limit.cancel()
        if process.poll() is None:  # the kit itself is stopped
            end()
    status = "cut" if cut.is_set() else "failed" if code else "passed"
    more = {} if status == "passed" else {"exit_code": code, "output": list(tail)}
    say(part=part.name, status=status, seconds=round(time.monotonic() - started, 1), limit_s=part.limit_s, **more)
    return status


def main(rehearse: bool) -> int:
    """Run every part; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fledge").symlink_to(ROOT)
        paths = [
            folder,
            *(str(ROOT / "tests" / name) for name in ("support", "twins", "benchmarks", "models/kernels")),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        if rehearse:
            environment["TRITON_INTERPRET"] = "1"
        for part in parts(rehearse):
            found[part.name] = run(part, environment)
            if found["machine"] != "passed":
                return 2
    bad = [name for name, status in found.items() if status != "passed"]
    say(part="all", status="failed" if bad else "passed", of=len(found), bad=bad)
    return int(bool(bad))


# -- the parts that are here -------------------------------------------------------------------------------------------


def machine(rehearse: bool) -> int:
    """Say what is here; return 1 if there is no GPU."""
    import torch
    import transformers
    import triton

    versions = {module.__name__: module.__version__ for module in (torch, transformers, triton)}
    say(python=sys.version.split()[0], cpus=os.cpu_count(), cuda=torch.version.cuda, **versions)
    if not torch.cuda.is_available():
        say(gpu=None, reason="torch finds no GPU: nothing of this kit can be measured here")
        return int(not rehearse)
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    say(gpu=properties.name, capability=capability, memory_gib=round(properties.total_memory / 2**30, 1))
    return 0


def checks(rehearse: bool) -> int:
    """Check every kernel in the shapes of the presets; return 1 if any is left out."""
    import kl_kernel
    import torch
    import training_step
    from fledge.conf.schema import DraftSampling
    from fledge.eval.decoding.acceptance import AcceptanceRule
    from fledge.eval.decoding.kernel_checks import decoding_checks
    from fledge.models import kernels
    from fledge.models.kernels.self_check import Check, check_kernels
    from fledge.train.loss import kernel_checks

    device, dtype, presets = torch.device("cuda"), torch.bfloat16, ["preset=llama31_8b", "preset=maverick"]
    if rehearse:
        device, dtype, presets = torch.device("cpu"), torch.float32, ["head_dim=16 vocab_size=300 draft_vocab_size=100"]
        kernels.DEVICE, kernel_checks.LENGTHS = "cpu", [40, 1, 7, 2]
    drawn = AcceptanceRule(0.8, draft_sampling=DraftSampling.sampled)
    ways = {  # rule, draft tokens, whether they are a tree
        "greedy chain": (AcceptanceRule(), 3, False),
        "sampled tree": (AcceptanceRule(0.8, top_p=0.9), 60, True),
        "drawn chain": (drawn, 7, False),
    }
    left_out = 0
    for preset in presets:
        options = training_step.parse(preset.split())
        head = training_step.head_config(options)
        cases: list[tuple[str, Check]] = [
            ("", Check("attention", partial(kernel_checks.compare_attention, head, 7, dtype, device))),
            ("", Check("kl", partial(kl_kernel.compare_kl, options.draft_vocab_size, dtype, device))),
        ]
        for way, (rule, number, is_tree) in ways.items():
            found = decoding_checks(rule, head, number, is_tree, dtype, device)
            cases += [(way, check) for check in found]
        for way, check in cases:
            record = check_kernels("kernels", "auto", device, [check], speaks=False).record[check.kernel]
            say(kernel=check.kernel, shape=preset, way=way, dtype=str(dtype), **record)
            left_out += not record["used"]
    return int(left_out > 0)


class Reporter:
    """Tells each test's outcome in a line, with what it printed, past pytest's own capture."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Print a line once a test has run, or could not."""
        if report.when != "call" and report.outcome == "passed":
            return
        more = {"said": report.capstdout.strip()} if report.capstdout.strip() else {}
        if report.outcome == "failed":
            more["error"] = report.longreprtext[-1500:]
        told = {
            "test": report.nodeid.rpartition("::")[2],
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        print("\n" + json.dumps({**told, **more}), file=self._out, flush=True)  # pytest's own line may stand open


def tests(rehearse: bool) -> int:
    """Run tests/models/kernels/test_gpu.py."""
    import pytest

    return int(pytest.main(["--noconftest", "-q", "-m", "gpu", str(TEST_GPU)], [Reporter()]))


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--rehearse"]
    run_here = {"machine": machine, "checks": checks, "tests": tests}[names[0]] if names else main
    sys.exit(run_here("--rehearse" in sys.argv))
