"""`fledge COMMAND -m`: each job of a sweep is a process of its own, and a run of its own.

Hydra's sweeper chooses the values: the basic one all combinations, Optuna's plugin by the acceptance length of the jobs
before.
"""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from ...models.formats.training_folder import best_acceptance_length
from ..runtime.launch import environments, run_stage
from ..runtime.rank_info import read_rank_info
from ..runtime.signals import EXIT_AGAIN, deferred
from ..schema import Config
from ..schema.free_names import quoted
from ..schema.limits import require

_NAMING = ("train", "run", "demo", "submit")  # their jobs get names by the values; jobs of others share a run, or print
_TRAINING = ("train", "run", "demo")


class JobError(Exception):
    """A job ended with an exit code that is not 0."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"job {name} ended with exit code {code}; the same command goes on there")
        self.code = code


@dataclass
class Sweep:
    """The jobs of `fledge COMMAND -m`."""

    command: str
    overrides: list[str]  # as they were typed
    results: dict[str, float | None] = field(default_factory=dict)  # run folder -> held-out acceptance length

    def arguments(self) -> list[str]:
        """Return the arguments for Hydra: options in one piece, and a sweep by Optuna maximises, unless it is told."""
        flags = [text for text in self.overrides if text in ("-m", "--multirun")]
        others = [text for text in self.overrides if text not in flags]
        if flags:  # of one option the latest: Optuna would take the first that is fixed
            others = list({text.partition("=")[0]: text for text in others}.values())
        is_optuna = "hydra/sweeper=optuna" in others
        told = any(text.startswith("hydra.sweeper.direction=") for text in others)
        return [*flags, *others, *["hydra.sweeper.direction=maximize"] * (is_optuna and not told)]

    def job(self, config: Config) -> float | None:
        """Run a job in a process of its own, and return the held-out acceptance length of its best checkpoint."""
        if read_rank_info(os.environ).world > 1:
            raise ValueError("-m starts the processes of each job: set train.num_processes, without torchrun or srun")
        name, overrides = self._as_typed(config)
        print(f"[{len(self.results) + 1}] {name}", flush=True)
        processes = environments(config.train.num_processes if self.command == "train" else 1)
        with deferred(lambda: f"passed on to job {name}, which ends first", then_stop=False) as signals:
            code = run_stage([sys.executable, "-m", "fledge", self.command, *overrides], processes)
            if signals.received:
                signals.stop()
        if code == EXIT_AGAIN:
            sys.exit(code)
        run = Path(config.runs_dir) / name
        self.results[str(run)] = None
        if code:
            raise JobError(name, code)
        self.results[str(run)] = best_acceptance_length(run / "training") if self.command in _TRAINING else None
        return self.results[str(run)]

    def report(self) -> None:
        """Print the runs, the best first."""
        if measured := {run: length for run, length in self.results.items() if length is not None}:
            from ...eval.figures.walks import walks_tables  # imports numpy, which most commands do without

            best_first = sorted(measured, key=lambda run: -measured[run])
            print(*walks_tables({Path(run).name: Path(run) / "training" for run in best_first}), sep="\n\n")

    def _as_typed(self, config: Config) -> tuple[str, list[str]]:
        """Return the name of a job's run and its overrides: those that were typed, and the values it was given."""
        parser = OverridesParser.create()
        typed = [text for text in self.overrides if not text.startswith("-")]
        latest = {override.key_or_group: override for override in parser.parse_overrides(typed)}  # which Hydra takes
        fixed = [override for override in latest.values() if not override.is_sweep_override()]
        given = parser.parse_overrides(list(HydraConfig.get().overrides.task))
        names = {override.key_or_group for override in fixed}
        chosen = [override for override in given if override.key_or_group not in names]
        swept = {override.key_or_group: override.input_line or "" for override in chosen}
        ours = {override.key_or_group: override.input_line or "" for override in fixed}
        ours = {name: text for name, text in ours.items() if not name.startswith(("hydra.", "hydra/"))} | swept
        if "name" in swept:
            return config.name, list(ours.values())
        require(self.command in _NAMING, f"-m with {self.command} needs names to sweep over: give name=first,second")
        values = (re.sub(r"[^\w.+=-]+", "_", text.lstrip("+")).replace("=", "-", 1) for text in swept.values())
        name = "-".join([config.name, *values])
        if self.command == "train" and not (config.train.stores or config.dump.folder):
            ours["dump.folder"] = f"dump.folder={quoted(config.hidden_states_folder)}"
        return name, list((ours | {"name": f"name='{name}'"}).values())
