"""What is measured on a GPU runs on a bare machine, which has torch, triton, transformers and pytest alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_kit
import pytest

pytest.importorskip("triton")  # has no wheels beside Linux

TESTS = Path(__file__).parents[2]
ABSENT = [  # whatever fledge depends on and those four do not bring along
    *("accelerate", "aiohttp", "compressed_tensors", "datasets", "deepspeed", "hydra", "matplotlib"),
    *("omegaconf", "pandas", "PIL", "prometheus_client", "psutil", "pyarrow", "tensorboard", "torchvision"),
    *("wandb", "xxhash"),
]


HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
hidden = lambda cls, name, *rest: None if name.partition(".")[0] in {ABSENT} else find(name, *rest)
PathFinder.find_spec = classmethod(hidden)
"""


@pytest.fixture
def bare(tmp_path):
    """Give an environment in which these packages are not found, in child processes too."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    paths = [str(tmp_path), *os.environ["PYTHONPATH"].split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def run(environment, *command):
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


def test_its_modules_import_on_a_bare_machine(bare):
    done = run(bare, "-c", "import decoding, training_step, decoding_twins, small_heads; print('all'); import PIL")
    assert done.stdout == "all\n", done.stderr
    assert "No module named 'PIL'" in done.stderr


def test_the_tests_of_a_gpu_are_collected_on_a_bare_machine(bare):
    done = run(
        bare, "-m", "pytest", "--noconftest", "-m", "gpu", "--collect-only", "-q", "tests/models/kernels/test_gpu.py"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout


def lines(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_kit_says_first_that_there_is_no_gpu(bare):
    done = run(bare, "tests/tools/gpu_kit.py")
    said = lines(done)
    assert done.returncode == 2, done.stderr
    assert said[0]["part"] == "machine"
    assert {"torch", "triton", "transformers"} <= said[0].keys()
    assert said[1]["gpu"] is None
    assert said[2]["status"] == "failed"
    assert len(said) == 3


@pytest.mark.slow
def test_the_kits_rehearsal_runs_every_part_on_a_bare_machine(bare):
    done = run(bare, "tests/tools/gpu_kit.py", "--rehearse")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    said = lines(done)
    ended = {line["part"]: line["status"] for line in said if "status" in line}
    assert list(ended) == [*(part.name for part in gpu_kit.parts(True)), "all"]
    assert set(ended.values()) == {"passed"}
    kernels = [line for line in said if "kernel" in line]
    assert {line["kernel"] for line in kernels} == {"attention", "kl", "join", "choose", "way", "move"}
    assert all(line["used"] and line["figures"] for line in kernels)
    assert len([line for line in said if line.get("outcome") == "skipped"]) > 100  # the tests of a GPU
    assert sum("wall_s" in line for line in said) == 2
    assert sum("tokens_per_s_alone" in line for line in said) == 2


def test_the_kit_ends_within_ten_minutes_whatever_its_parts_do():
    for rehearse in (False, True):
        assert sum(part.limit_s for part in gpu_kit.parts(rehearse)) <= 555


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("print('{\"a\": NaN}')", "passed", [{"a": "NaN"}]),
        ("print('{\"a\": 1}', flush=True); raise SystemExit('broken')", "failed", [{"a": 1}]),
        ("import os; print('{\"a\": 1}', flush=True); os.abort()", "failed", [{"a": 1}]),
        ("import time; print('{\"a\": 1}', flush=True); time.sleep(60)", "cut", [{"a": 1}]),
        ("import subprocess; print('x', flush=True); subprocess.run(['sleep', '60'])", "cut", []),
    ],
    ids=["passes", "fails", "crashes", "hangs", "hangs_in_a_child"],
)
def test_a_part_tells_its_lines_as_they_come_and_how_it_ended(code, status, told, capsys):
    limit_s = 1.5 if status == "cut" else 60
    assert gpu_kit.run(gpu_kit.Part("p", ["-c", code], limit_s), dict(os.environ)) == status
    *said, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"part": "p", **line} for line in told]
    assert last["status"] == status
    assert last["seconds"] < 50
    assert ("output" in last) == (status != "passed")
    if status == "failed" and "broken" in code:
        assert last["output"] == ["broken"]
