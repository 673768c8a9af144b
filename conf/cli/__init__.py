"""The `fledge` command: `fledge COMMAND [overrides]`, configured by Hydra."""

import importlib
import logging
import os
import sys
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ... import __version__
from ...train.loss.losses import find_loss
from ..errors import USER_ERRORS, explain, fail
from ..runtime.output import Output, readers_may_leave
from ..runtime.signals import answered
from ..schema import Config, validate
from ..schema.free_names import quoted, with_free_names
from . import completion, help, sweep
from .commands import COMMANDS


def main(arguments: list[str] | None = None) -> None:
    """Run `fledge COMMAND [overrides]`; exit code 2 for what the user can fix."""
    _limit_spinning()
    arguments = sys.argv[1:] if arguments is None else arguments
    # The DeepSpeed launcher says the local rank twice, in the environment and as an argument, which Hydra refuses.
    arguments = [argument for argument in arguments if argument != f"--local_rank={os.environ.get('LOCAL_RANK')}"]
    try:
        with readers_may_leave():
            _run(arguments)
    except SystemExit as ended:
        _leave(ended.code)
        raise
    _leave(0)


def _leave(code: Any) -> None:
    """End a process that is one of several here: gloo's threads may abort one whose interpreter shuts down."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        os._exit(code if isinstance(code, int) else int(code is not None))


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        text = _information(command, rest)
    except ValueError as error:
        fail(str(error))
    if text is None:
        run_command(command, overrides_of(command, rest))
    else:
        print(text)


def _information(command: str, arguments: list[str]) -> str | None:
    """Return what is printed without a configuration, None if a command is to run."""
    if command in ("-h", "--help", "help"):
        return help.usage()
    if command == "--version":
        return __version__
    if command == "completion":
        return completion.completion(arguments, COMMANDS)
    if command not in COMMANDS:
        hint = help.did_you_mean(command, [*COMMANDS, "completion"])
        raise ValueError(f"unknown command {command!r}{hint}; commands are {', '.join(COMMANDS)}")
    for number, argument in enumerate(arguments, 1):
        if argument in ("-h", "--help"):
            topic = arguments[number : number + 1]
            return help.topic_help(topic[0]) if topic else help.command_help(command)
    return None


def _limit_spinning() -> None:
    """Let waiting OpenMP threads sleep sooner than libgomp does by itself, if the user has not said how they wait.

    libgomp reads this when torch loads it. Threads that spin for long hold cores that others need; threads that sleep
    at once are slow alone (measured: docs/evidence/experiments.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


def overrides_of(command: str, arguments: list[str]) -> list[str]:
    """Return the overrides that arguments stand for: a command's flags, folders and names, others as they are."""
    option, flags = COMMANDS[command].option, COMMANDS[command].flags
    overrides = [flags.get(argument, argument) for argument in arguments]
    if not option:
        return _with_defaults(overrides, "experiment=demo", "name=demo") if command == "demo" else overrides
    places = [number for number in range(len(overrides)) if _is_place(overrides, number)]
    texts = [quoted(overrides[number]) for number in places]
    if command in ("compare", "tune"):
        overrides = [override for number, override in enumerate(overrides) if number not in places]
        overrides += [f"{option}=[{','.join(texts)}]"] if places else []
    elif places:
        overrides[places[0]] = f"{option}={texts[0]}"
    if any(override.startswith("experiment=") for override in overrides):
        return overrides
    return _with_defaults(overrides, f"name={command}", "verifier.path=recorded")  # required, and files name theirs


def _is_place(arguments: list[str], number: int) -> bool:
    """Return whether an argument is a folder that exists, or a name, and no option."""
    argument, before = arguments[number], arguments[number - 1] if number else ""
    of_hydra = argument.startswith("-") or before in ("--cfg", "-c", "--package", "-p")
    return os.path.isdir(argument) or not (of_hydra or "=" in argument)


def _with_defaults(overrides: list[str], *defaults: str) -> list[str]:
    named = {override.split("=")[0] for override in overrides}
    return [default for default in defaults if default.split("=")[0] not in named] + overrides


def checked(composed: Any) -> Config:
    """Return a composed configuration as the schema's objects; ValueError if an option's value is not allowed."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    validate(config)
    find_loss(config.train.loss)
    return config


def run_command(command: str, overrides: list[str]) -> None:
    """Compose the configuration from overrides and hand it to the function of a command."""
    ConfigStore.instance().store(name="schema", node=Config)
    show_traceback = os.environ.get("FLEDGE_TRACEBACK") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here as exceptions, not as Hydra's own text and exit code 1
    jobs = sweep.Sweep(command, with_free_names(overrides))
    sys.argv = [f"fledge {command}", *jobs.arguments()]

    def task(composed: Any) -> float | None:
        try:  # in here: Hydra would print the overrides first
            config = checked(composed)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                return jobs.job(config)
            Output.stage = "" if COMMANDS[command].prints or config.submit.dry_run else command
            _quiet_libraries(command)
            module, function = COMMANDS[command].function.split(":")
            getattr(importlib.import_module(module), function)(config)
            return None
        except USER_ERRORS as error:
            if show_traceback:
                raise
            fail(explain(error))

    try:
        with answered(command):
            hydra.main(version_base="1.3", config_path="pkg://fledge.conf", config_name="config")(task)()
        jobs.report()
    except sweep.JobError as error:
        jobs.report()
        print(f"fledge: error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        fail(explain(error))


def _quiet_libraries(command: str) -> None:
    """Progress and results are ours to print; libraries speak from warnings up. Commands that only read load none."""
    if not COMMANDS[command].prints:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of the seconds that its list of fonts takes
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers too, when it is loaded
        if "transformers" in sys.modules:
            importlib.import_module("transformers.utils.logging").disable_progress_bar()
