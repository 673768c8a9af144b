"""The figures of an evaluation in W&B: added to the summary of the run whose head it measured.

| name                                  | meaning                                                                |
|---------------------------------------|------------------------------------------------------------------------|
| `evaluation/acceptance_length`        | over all rounds; `_low` and `_high` bound its 95 % interval            |
| `evaluation/macro_acceptance_length`  | mean over questions                                                    |
| `evaluation/acceptance_position_<i>`  | share of rounds that accepted draft token i, from 1; unconditional     |
| `evaluation/acceptance_length_<name>` | of the questions of a category                                         |
| `evaluation/tokens_per_s`             | with drafts; `evaluation/speedup`: over the verifier alone, with       |
|                                       | `_low` and `_high`                                                     |
| `evaluation/condition_<name>`         | what the figures depend on: draft tokens, drafting, temperature, ...   |
"""

from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import MANIFEST, digest, read_manifest
from ...conf.runtime.trackers import open_tracker, warn_left_out
from ...conf.schema import Config, TrackerName
from .records import TRAINED

_FIGURES = ("acceptance_length", "macro_acceptance_length", "tokens_per_s", "speedup")
_CONDITIONS = (
    *("num_draft_tokens_per_round", "drafting", "tree_depth", "tree_top_k", "temperature", "top_p", "top_k"),
    *("draft_sampling", "dtype", "engine", "batch_size", "questions", "num_questions", "max_tokens"),
)


def track(config: Config, source: Path | None, settings: dict[str, Any], folder: Path, results: dict[str, Any]) -> None:
    """Add an evaluation to the summary of its W&B run; whatever is wrong with W&B costs a warning, and nothing else.

    The run is that of the training which made the head at `source`; of a head made elsewhere one that the settings of
    the evaluation name. `folder` is where W&B keeps its files.
    """
    if TrackerName.wandb not in config.tracking.trackers:
        return
    try:
        run = _run_id(config.training_folder, source) or digest(settings)
        tracker = open_tracker(TrackerName.wandb, config.tracking, folder, run, config.name)
        tracker.tracker.summary.update(figures(results))
        tracker.finish()
    except Exception as error:
        warn_left_out(TrackerName.wandb, error, "acceptance.json")


def _run_id(training: Path, source: Path | None) -> str | None:
    """Return the id of the W&B run that trained a head; None of one that this run did not train, or without W&B."""
    if source is None or not source.resolve().is_relative_to(training.resolve()) or not (training / MANIFEST).is_file():
        return None
    return read_manifest(training, "training", unfinished=True).get("wandb_run")


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of acceptance.json by the names above; those that are not known are left out."""
    values = {name: results[name] for name in _FIGURES}
    for name in ("acceptance_length", "speedup"):
        values[f"{name}_low"], values[f"{name}_high"] = results.get(f"{name}_interval") or (None, None)
    for position, rate in enumerate(results["acceptance_rate_per_pos"], 1):
        values[f"acceptance_position_{position}"] = rate
    for name, drafters in results["by_category"].items():
        values[f"acceptance_length_{name}"] = drafters[TRAINED]["acceptance_length"]
    values |= {f"condition_{name}": results.get(name) for name in _CONDITIONS}
    return {f"evaluation/{name}": value for name, value in values.items() if value is not None}
