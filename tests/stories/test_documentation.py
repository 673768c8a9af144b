"""The commands of README and docs, page by page, on the tests' verifier: those that need nothing a test has not."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import fledge
import pytest
from builders import Run, copy_folder
from commands import popen, run_command
from doc_commands import ROOT, code_lines, doc_commands
from fledge.conf.runtime import launch

SUITES_OWN = ("make", "pip", "pytest")  # what starts the suite and sets it up; test_docs.py holds their arguments
RUN: dict[str, str] = {}  # command -> the first page that has it
for found in doc_commands():
    if not found.needs and found.text.split()[0] not in SUITES_OWN:
        RUN.setdefault(found.text, found.page)
FEW_STEPS = ("train.max_steps=2", "train.save_every=2", "train.heldout_every=2", "train.log_every=2")
SMALLER = {  # besides what makes a run of the tests small: by a word of the command, options after it
    "-m": FEW_STEPS,
    "hydra/sweeper=optuna": ("hydra.sweeper.n_trials=1",),
    "overwrite=true": ("evaluate.max_tokens=6", "evaluate.heldout_prompts=0", "evaluate.baselines=false"),
    "name=more": FEW_STEPS,
    "name=mix": FEW_STEPS,
    "name=mine": (*FEW_STEPS, "data.sources=[{path:embedded,name:mine,limit:24}]"),
    "layers": ("layers.steps=2", "layers.num_sets=1"),
    "doctor": ("doctor.num_prompts=4", "doctor.max_tokens=16"),
}


@pytest.fixture
def folder(finished, tmp_path):
    """A folder with the run that the pages go on with, under each name that they have for one."""
    copy_folder(finished.path, tmp_path / "runs" / "demo")
    for name in ("first", "second", "mav", "chat", "code"):
        (tmp_path / "runs" / name).symlink_to("demo")
    return tmp_path


def in_small(words: list[str], finished: Run) -> list[str]:
    """Return the words of a command of fledge's, with values for placeholders and sizes of the tests."""
    values = {"ORG/VERIFIER": str(finished.verifier), "step-716": "step-24"}
    for name, value in (values | dict.fromkeys(("FOLDER", "ORG/HEAD"), "runs/demo/exports/plain")).items():
        words = [word.replace(name, value) for word in words]
    smaller = [option for word in words for option in SMALLER.get(word, ())]
    sizes = sizes_of(finished) if words[0] == "demo" or "experiment=demo" in words else []
    options = {word.partition("=")[0]: word for word in [*sizes, *words[1:], *smaller]}
    return [words[0], *options.values()]


def sizes_of(run: Run) -> list[str]:
    """Return the options of a run of the tests, but for its place."""
    return [option for option in run.arguments() if not option.startswith(("experiment=", "name=", "runs_dir="))]


@pytest.mark.parametrize("page", sorted(set(RUN.values())))
def test_the_commands_of_a_page_run(page, finished, folder):
    for text in [text for text, first in RUN.items() if first == page]:
        program, *words = shlex.split(text)
        if program == "fledge":
            done = run_command([sys.executable, "-m", "fledge", *in_small(words, finished)], cwd=folder)
            expected = (0, 1) if words[0] == "doctor" else (0,)  # 1: it found something
            assert done.returncode in expected, f"{text}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
        elif program == "python":
            import_module(Path(words[0]).stem).parse(words[1:])  # tests of its own run it, in small
        else:
            subprocess.run(text, shell=True, check=True, cwd=folder)


def test_the_python_of_the_reference_runs(finished, folder, monkeypatch, capsys):
    load_config = fledge.load_config
    monkeypatch.setattr(fledge, "load_config", lambda *options: load_config(*sizes_of(finished), *options))
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=popen))
    monkeypatch.chdir(folder)
    names: dict = {}
    for lines in code_lines(ROOT / "docs" / "reference" / "python.md", "python"):
        exec("\n".join(lines), names)
    assert f"{names['results']['acceptance_length']}\n" in capsys.readouterr().out
    assert names["record"]["verifier"]
