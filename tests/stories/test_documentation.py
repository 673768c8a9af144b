"""The commands of README and docs, page by page, on the tests' verifier: those that need nothing a test has not."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from commands import run_command
from doc_commands import doc_commands

SUITES_OWN = ("make", "pip", "pytest")  # what starts the suite and sets it up; test_docs.py holds their arguments
COMMANDS = {command.text: command for command in reversed(doc_commands()) if not command.needs}  # on its first page
RUN = {text: command.page for text, command in COMMANDS.items() if text.split()[0] not in SUITES_OWN}
SIZES = ("hidden_size=32", "intermediate_size=48", "vocab_size=60", "draft_vocab_size=40")
FEW_STEPS = ("train.max_steps=2", "train.save_every=2", "train.heldout_every=2", "train.log_every=2")
SMALLER = {  # besides what makes a run of the tests small: by a word of the command, options after it
    "-m": FEW_STEPS,
    "hydra/sweeper=optuna": ("hydra.sweeper.n_trials=1",),
    "overwrite=true": ("evaluate.max_tokens=6", "evaluate.heldout_prompts=0"),
    "name=more": FEW_STEPS,
    "name=mix": FEW_STEPS,
    "doctor": ("doctor.num_prompts=4", "doctor.max_tokens=16"),
    "tests/benchmarks/training_step.py": (*SIZES, "seq_len=60", "repeats=1"),
    "tests/benchmarks/decoding.py": (*SIZES, "num_attention_heads=4", "head_dim=8", "rounds=2"),
}


@pytest.fixture
def folder(finished, tmp_path):
    """A folder with the run that the pages go on with, under each name that they have for one."""
    shutil.copytree(finished.path, tmp_path / "runs" / "demo")
    for name in ("first", "second", "mav", "chat", "code"):
        (tmp_path / "runs" / name).symlink_to("demo")
    return tmp_path


def in_small(words: list[str], finished) -> list[str]:
    """Return the words of a command of fledge's, with values for placeholders and sizes of the tests."""
    values = {"ORG/VERIFIER": str(finished.verifier), "step-716": "step-24"}
    for name, value in (values | dict.fromkeys(("FOLDER", "ORG/HEAD"), "runs/demo/exports/plain")).items():
        words = [word.replace(name, value) for word in words]
    smaller = [option for word in words for option in SMALLER.get(word, ())]
    sizes = [option for option in finished.arguments() if not option.startswith(("name=", "runs_dir="))]
    sizes = sizes if words[0] == "demo" or "experiment=demo" in words else []
    options = {word.partition("=")[0]: word for word in [*sizes, *words[1:], *smaller]}
    return [words[0], *options.values()]


@pytest.mark.parametrize("page", sorted(set(RUN.values())))
def test_the_commands_of_a_page_run(page, finished, folder):
    for text in reversed([text for text, first in RUN.items() if first == page]):
        program, *words = shlex.split(text)
        if program == "fledge":
            done = run_command([sys.executable, "-m", "fledge", *in_small(words, finished)], cwd=folder)
            found_something = done.returncode == 1 and words[0] == "doctor"
            assert not done.returncode or found_something, f"{text}\n{done.stdout}\n{done.stderr}"
        elif program == "python":
            import_module(words[0].removesuffix(".py").rpartition("/")[2]).main([*words[1:], *SMALLER[words[0]]])
        else:
            subprocess.run(text, shell=True, check=True, cwd=folder)
