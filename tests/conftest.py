"""Fixtures: a tiny verifier, trained once for all processes, and configurations that use it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from builders import Run
from filelock import FileLock
from fledge.conf.schema import Device, Dtype, VerifierConfig
from fledge.models.verifier.model import Verifier
from make_embedded import TINY, shared_embedded

_HELPERS = [str(Path(__file__).parent / name) for name in ("support", "doubles", "twins", "benchmarks", "tools")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])  # of scripts
# Files of a minute or more come first, so that no worker ends with one alone.
_LONG = [
    *("test_kernels", "test_training", "test_doctor_measure", "test_lossless", "test_dump_signals", "test_fake_gpu"),
    *("test_interruptions", "test_sweep", "test_online", "test_tensor_parallel", "test_training_memory", "test_kill"),
]
torch.set_num_threads(1)  # tiny tensors; and threads of several processes on few cores wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take, the long ones first."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


@pytest.fixture(scope="session")
def tiny_verifier_folder() -> Path:
    """A verifier checkpoint of a few hundred thousand parameters, in float32."""
    return shared_embedded(TINY)


@pytest.fixture(scope="session")
def verifier_config(tiny_verifier_folder: Path) -> VerifierConfig:

    return VerifierConfig(path=str(tiny_verifier_folder), dtype=Dtype.float32, device=Device.cpu)


@pytest.fixture(scope="session")
def verifier(verifier_config: VerifierConfig) -> Verifier:
    return Verifier.load(verifier_config)


@pytest.fixture
def run(tmp_path: Path, tiny_verifier_folder: Path) -> Run:
    """An empty run of its own."""
    return Run(tmp_path / "runs", tiny_verifier_folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_verifier_folder: Path) -> Run:
    """A run with every stage done, not to be written to; made by the first worker that asks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    whole, done = Run(folder, tiny_verifier_folder), folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            whole("run")
            done.touch()
    return whole
