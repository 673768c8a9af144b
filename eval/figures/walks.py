"""What trainings measured on held-out conversations, side by side, with intervals."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data_synthesis.heldout import conversation_id
from ...models.formats.training_folder import head_folder, read_walks
from .metrics import rate_difference, rate_interval
from .report import NONE, table

_GREEDY = ("accepted", "rounds")
# By title what is divided of a `HeldoutCounts`.
_RATES = {
    "Held-out answers, greedy": _GREEDY,
    "Held-out answers, estimated at temperature 1": ("expected", "rows"),
}

_Walk = dict[int, dict[str, dict[str, float]]]  # by draft tokens and sample id the entries of a `HeldoutCounts`
_Counts = dict[str, NDArray[np.float64]]  # by conversation: what was divided by, and what was divided


def walks_tables(runs: dict[str, Path]) -> Iterator[str]:
    """Yield tables of training folders, by the names of their runs, each at its best checkpoint."""
    return tables({name: head_folder(None, folder) for name, folder in runs.items()})


def tables(checkpoints: dict[str, Path], ids: set[str] | None = None) -> Iterator[str]:
    """Yield tables of what was measured of checkpoints, by the names of rows; nothing if it is nothing.

    Of samples with these `ids`, None: of all. Differences from the first are paired by conversation, and need the same
    held-out conversations.
    """
    walks = {name: walk for name, folder in checkpoints.items() if any((walk := _walk(folder, ids)).values())}
    if not walks:
        return
    first, depths = next(iter(walks)), sorted({depth for walk in walks.values() for depth in walk})
    minus = [f"minus {first}"] * (len(walks) > 1)
    head = ["run", "checkpoint", "held out", *(cell for n in depths for cell in (f"{n} draft tokens", *minus))]
    for title, names in _RATES.items():
        counts = {run: {n: _by_conversation(of, *names) for n, of in walk.items()} for run, walk in walks.items()}
        rows = []
        for run, by_depth in counts.items():
            row = [run, checkpoints[run].name, str(len(next(iter(by_depth.values()))))]
            for depth in depths:
                ours, theirs = by_depth.get(depth, {}), counts[first].get(depth, {})
                row.append(_length(ours, depth))
                row += [_difference(ours, theirs, depth) if run != first else NONE] * len(minus)
            rows.append(row)
        yield f"{title}:\n\n{table(head, rows)}"


def by_group(checkpoints: dict[str, Path], groups: dict[str, set[str]], depth: int) -> list[str]:
    """Return a table of greedy acceptance with so many draft tokens for each group of samples; none of one group."""
    if len(groups) < 2:
        return []
    rows, walks = [], [read_walks(folder)[depth] for folder in checkpoints.values()]
    for group, ids in groups.items():
        counts = [_by_conversation({name: of for name, of in walk.items() if name in ids}, *_GREEDY) for walk in walks]
        first, *others = counts
        row = [group, str(len(first)), *(_length(of, depth) for of in counts)]
        rows.append([*row, *(_difference(of, first, depth) for of in others)])
    start, *later = checkpoints
    head = ["source", "held out", *checkpoints, *(f"{run} minus {start}" for run in later)]
    return [f"By source, greedy, {depth} draft tokens:\n\n{table(head, rows)}"]


def is_longer(checkpoint: Path, other: Path, depth: int, ids: set[str] | None = None) -> bool:
    """Return whether greedy acceptance with so many draft tokens is above another checkpoint's beyond chance.

    Of samples with these `ids`, None: of all.
    """
    ours, theirs = (_by_conversation(_walk(folder, ids).get(depth, {}), *_GREEDY) for folder in (checkpoint, other))
    _, bounds = _paired(ours, theirs, depth) or (0.0, None)
    return bounds is not None and bounds[0] > 0


def _walk(checkpoint: Path, ids: set[str] | None) -> _Walk:
    walk = read_walks(checkpoint).items()
    return {length: {name: of[name] for name in of if ids is None or name in ids} for length, of in walk}


def _by_conversation(counts: dict[str, dict[str, float]], gained: str, rounds: str) -> _Counts:
    sums: _Counts = {}
    for sample_id, one in counts.items():
        name = conversation_id(sample_id)
        sums[name] = sums.get(name, 0.0) + np.array([one[rounds], one[gained]])
    return dict(sorted(sums.items()))


def _length(counts: _Counts, depth: int) -> str:
    if not counts:
        return NONE
    columns = np.stack(list(counts.values()))
    rounds, gained = columns.sum(0)
    bounds = rate_interval(columns, depth)
    return f"{1 + gained / max(rounds, 1):.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _difference(ours: _Counts, theirs: _Counts, depth: int) -> str:
    if (paired := _paired(ours, theirs, depth)) is None:
        return NONE
    value, bounds = paired
    return f"{value:+.3f}" + (f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else "")


def _paired(ours: _Counts, theirs: _Counts, depth: int) -> tuple[float, list[float] | None] | None:
    """Return the difference and its interval, if there are enough; None without the same conversations."""
    if not ours or ours.keys() != theirs.keys():
        return None
    return rate_difference(np.stack(list(ours.values())), np.stack(list(theirs.values())), (depth, depth))
