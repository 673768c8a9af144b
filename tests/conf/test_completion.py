"""Shell completion, in the shells."""

import os
import pty
import shutil
import subprocess
import sys

import pytest

WRAPPER = """#!/bin/sh
if [ "$1" = completion ]; then exec {python} -m fledge "$@"; fi
echo "typed: $*."
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder whose `fledge` completes, and else says how it was called."""
    program = tmp_path / "fledge"
    program.write_text(WRAPPER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def typed(shell: list[str], keys: str) -> str:
    """Type keys into an interactive shell; return what the terminal shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(shell, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.write(master, f"{keys}\nexit\n".encode())
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # the shell has ended
        pass
    process.wait()
    os.close(master)
    return shown.decode()


SHELLS = {
    "bash": (["--noprofile", "--rcfile"], "rc"),
    "zsh": (["-d", "-i"], ".zshrc"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_options_groups_and_values(path, monkeypatch, shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    options, file = SHELLS[shell]
    (path / file).write_text(f'eval "$(fledge completion {shell})"\n')
    monkeypatch.setenv("ZDOTDIR", str(path))
    command = [program, *options, *([str(path / file), "-i"] if shell == "bash" else [])]
    shown = typed(command, "fledge tr\texperiment=de\ttrain.too\td\ttrain.verify_c\tf\t")
    assert "typed: train experiment=demo train.too_long=drop train.verify_checksums=false." in shown, shown


def completions(line: str) -> list[str]:
    script = """eval "$(fledge completion bash)"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(fledge); _fledge
    printf '%s\n' "${COMPREPLY[@]}" """
    environment = {**os.environ, "COMP_LINE": line}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("fledge train train.l", ["train.log_every=", "train.lora_rank=", "train.loss=", "train.lr="]),
        ("fledge train train.lr=", ["0.0001"]),
        ("fledge train experiment=demo train.lr=", ["0.001"]),
        ("fledge train tracking.wandb=", ["online", "offline", "disabled"]),
        ("fledge train --help dee", ["deepspeed"]),
        ("fledge train --m", ["--multirun"]),
        ("fledge nothing x", []),
        ("fledge train a=[ tr", []),
    ],
)
def test_what_completes_a_line(path, line, found):
    assert completions(line) == found
