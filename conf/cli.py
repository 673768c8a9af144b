"""The `fledge` command: `fledge COMMAND [overrides]`, configured by Hydra."""

import importlib
import logging
import os
import sys
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import __version__
from ..train.loss.losses import find_loss
from .errors import USER_ERRORS, explain, fail
from .runtime.output import Output, readers_may_leave
from .runtime.signals import answered
from .schema import Config, validate
from .schema.free_names import with_free_names

# command -> (module and function that run it, what it does)
COMMANDS = {
    "synthesize": ("fledge.data_synthesis.synthesize:synthesize", "the verifier answers every prompt"),
    "dump": ("fledge.data_synthesis.dump:dump", "record the verifier's hidden states on those conversations"),
    "train": ("fledge.train.setup:train", "train the draft head on the hidden states"),
    "evaluate": ("fledge.eval.evaluate:evaluate", "measure acceptance length by decoding"),
    "compare": ("fledge.eval.compare:compare", "print evaluations side by side, with published figures"),
    "export": ("fledge.models.export:export", "write the checkpoint that engines serve"),
    "import": ("fledge.models.import_head:import_head", "read a head made elsewhere, to evaluate or export it"),
    "doctor": ("fledge.eval.doctor.doctor:doctor", "say why a head loses acceptance, and which field to change"),
    "preview": ("fledge.data_synthesis.preview:preview", "print a conversation, what the verifier wrote coloured"),
    "inspect": ("fledge.data_synthesis.inspect_store:inspect_store", "print what a store holds, and if it is sound"),
    "plan": ("fledge.slurm.plan.plan:plan", "say what a run needs: tokens, disk, GPU memory"),
    "run": ("fledge.conf.runtime.launch:run", "synthesize to export in order, skipping what is complete"),
    "submit": ("fledge.slurm.submit:submit", "run every stage as Slurm jobs that follow each other"),
    "status": ("fledge.slurm.status:status", "print where a submitted run stands"),
    "demo": ("fledge.conf.runtime.launch:run", "run with experiment=demo: a small verifier that comes with fledge"),
}

PRINTING = ("compare", "doctor", "preview", "inspect", "plan", "status")  # end when nobody reads them; others go on

SHORTHANDS = {  # command -> (option that folders and names among its arguments are, options that its flags are)
    "inspect": ("inspect.store", {"--verify": "inspect.verify=true"}),
    "compare": ("compare.runs", {}),
    "status": ("status.run", {}),
    "submit": ("", {"--dry-run": "submit.dry_run=true"}),
}

USAGE = """fledge trains EAGLE-3 draft heads for speculative decoding.

usage: fledge COMMAND [option=value ...]

  prompts --synthesize--> runs/NAME/conversations/
          --dump--------> runs/NAME/hidden_states/
          --train-------> runs/NAME/training/
          --evaluate----> runs/NAME/evaluation/
          --export------> runs/NAME/exports/FORMAT/
  a head --import-------> runs/NAME/imports/FOLDER/

commands:
{commands}

  fledge demo                                        every stage on a laptop, in minutes
  fledge plan experiment=llama31_8b name=first       disk and memory, before it begins
  fledge run experiment=llama31_8b name=first        a whole run
  fledge train experiment=llama31_8b name=first train.lr=5e-5
  torchrun --nproc-per-node 8 -m fledge.train experiment=llama31_8b name=first        on 8 GPUs
  srun python -m fledge.train experiment=llama31_8b name=first                        one Slurm task a GPU
  fledge submit experiment=llama31_8b cluster=slurm_gpu name=first --dry-run      the job files, printed
  fledge COMMAND --cfg job                           show the resolved configuration
  fledge COMMAND --help                              groups and options

Every option, with its meaning: conf/schema/. FLEDGE_TRACEBACK=1 shows the traceback of an error.
"""


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
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items())))
    elif command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        fail(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    else:
        run_command(command, overrides_of(command, arguments[1:]))


def _limit_spinning() -> None:
    """Let waiting OpenMP threads sleep sooner than libgomp does by itself, if the user has not said how they wait.

    libgomp reads this when torch loads it. Threads that spin for long hold cores that others need; threads that sleep
    at once are slow alone (measured: docs/evidence/experiments.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


def overrides_of(command: str, arguments: list[str]) -> list[str]:
    """Return the overrides that arguments stand for: flags, folders and names by SHORTHANDS, others as they are."""
    option, flags = SHORTHANDS.get(command, ("", {}))
    overrides = [flags.get(argument, argument) for argument in arguments]
    if not option:
        return _with_defaults(overrides, "experiment=demo", "name=demo") if command == "demo" else overrides
    places = [number for number in range(len(overrides)) if _is_place(overrides, number)]
    quoted = ["'" + overrides[number].replace("'", "\\'") + "'" for number in places]
    if command == "compare":
        overrides = [override for number, override in enumerate(overrides) if number not in places]
        overrides += [f"{option}=[{','.join(quoted)}]"] if places else []
    elif places:
        overrides[places[0]] = f"{option}={quoted[0]}"
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


def run_command(command: str, overrides: list[str]) -> None:
    """Compose the configuration from overrides and hand it to the function of a command."""
    ConfigStore.instance().store(name="schema", node=Config)
    show_traceback = os.environ.get("FLEDGE_TRACEBACK") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors arrive here as exceptions, not as Hydra's own text and exit code 1
    sys.argv = [f"fledge {command}", *with_free_names(overrides)]

    def task(composed: Any) -> None:
        try:  # in here: Hydra would print the overrides first
            config = OmegaConf.to_object(composed)
            assert isinstance(config, Config)
            validate(config)
            find_loss(config.train.loss)
            Output.stage = "" if command in PRINTING or config.submit.dry_run else command
            _quiet_libraries(command)
            module, function = COMMANDS[command][0].split(":")
            getattr(importlib.import_module(module), function)(config)
        except USER_ERRORS as error:
            if show_traceback:
                raise
            fail(explain(error))

    try:
        with answered(command):
            hydra.main(version_base="1.3", config_path="pkg://fledge.conf", config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        fail(explain(error))


def _quiet_libraries(command: str) -> None:
    """Progress and results are ours to print; libraries speak from warnings up. Commands that only read load none."""
    if command not in PRINTING:
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
