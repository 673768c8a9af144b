"""Where metrics go: metrics.jsonl always, and the trackers of `tracking.report_to`, none of which ever stops a run.

| name                           | meaning                                                                     |
|--------------------------------|-----------------------------------------------------------------------------|
| `train/loss`                   | the loss minimised; nats, or what `train.loss` is in                        |
| `train/kl_step_<k>`            | mean KL(verifier, draft) at TTT step k, nats a token                        |
| `train/agreement_step_<k>`     | share of counted rows whose greedy draft token is the verifier's            |
| `train/prefix_agreement_step_<k>` | the same, and so at every step before                                    |
| `train/overlap_step_<k>`       | mean sum_v min(P, q): acceptance at temperature 1                           |
| `train/entropy_step_<k>`       | mean entropy of the verifier over the draft vocabulary: the least cross entropy |
| `train/outside_draft_vocab`    | share of rows whose greedy verifier token cannot be drafted; bounds acceptance |
| `train/lr`                     | learning rate of the step                                                   |
| `train/grad_norm`              | before clipping                                                             |
| `train/epoch`                  | passes over the training samples so far                                     |
| `train/skipped_steps`          | optimizer steps left out so far, because their loss or gradient was not finite |
| `train/tokens_per_s`           | of all ranks, prompts included; held-out batches and checkpoints take no part in the time |
| `train/utilisation`            | operations of the plain algorithm's matrix products (train/metrics/cost.py) over the time and over the rate of square products that this machine had at the start; work avoided counts as done, so it can pass 1 |
| `train/memory_gib`             | most GPU memory torch held since the last log, or the resident size on the CPU; of the fullest rank |
| `train/data_wait_share`        | time spent waiting for batches over the time of the steps; of the rank that waits longest |
| `heldout/acceptance_length_<n>`| greedy, n draft tokens, walked on held-out answers                          |
| `heldout/acceptance_length_t1_<n>` | the estimate at temperature 1 (train/heldout.py)                        |

All but the last two are of the steps since the last log (`train/lr`, `train/grad_norm`: of the last step).
"""  # noqa: E501

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ... import __version__
from ...conf.runtime.artifact import write_atomic
from ...conf.runtime.trackers import open_tracker, warn_left_out
from ...conf.schema import Config, TrackerName, TrackingConfig

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a training folder; a torn last line is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_description(config: Config, inputs: dict[str, str], kernels: dict[str, Any]) -> dict[str, Any]:
    """Return what trackers record of a run: every option, the code, the inputs' digests, the kernels used."""
    options: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    about = {"fledge": __version__, "git": git_state(Path(__file__).parents[2])}
    return {**options, **about, "inputs": inputs, "kernels": kernels}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that a folder is a checkout of and whether files differ from it; None if it is none."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    run = partial(
        subprocess.run, capture_output=True, text=True, check=True, timeout=10, env=outside, stdin=subprocess.DEVNULL
    )
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        top, commit = run([*git, "rev-parse", "--show-toplevel", "HEAD"]).stdout.splitlines()
        if Path(top).resolve() != folder.resolve():
            return None  # installed into an environment inside another project's checkout
        return {"commit": commit, "dirty": bool(run([*git, "status", "--porcelain"]).stdout)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Tracker:
    """Records metrics by optimizer step, in the training folder and with the trackers that `open_tracker` opens.

    Training goes on from `step`; records beyond it, of a start that was killed, are dropped.
    """

    def __init__(
        self, options: TrackingConfig, folder: Path, step: int, run: str, name: str, about: dict[str, Any]
    ) -> None:
        lines = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
        write_atomic(folder / METRICS, "".join(lines))
        self._file = open(folder / METRICS, "a")  # noqa: SIM115
        self._trackers: dict[TrackerName, Any] = {}
        for tracker in options.trackers:
            try:
                self._trackers[tracker] = open_tracker(tracker, options, folder, run, name, about, step)
            except Exception as error:  # whatever is wrong with a tracker, training matters more
                warn_left_out(tracker, error, METRICS)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._each(lambda tracker: tracker.log(metrics, step=step))

    def close(self) -> None:
        """Finish the records."""
        self._file.close()
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # as above
                warn_left_out(name, error, METRICS)
                del self._trackers[name]
