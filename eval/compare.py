"""The compare command: evaluations side by side, with published figures, and what they do not have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import MANIFEST, read_manifest, write_atomic
from ..conf.schema import Config
from .figures.metrics import paired_difference
from .figures.plots import ACCENT, MUTED, error_bar, legend_below, name_rows, plotting
from .figures.records import ACCEPTANCE, RECORDS, TRAINED, Record, answered_records
from .figures.report import NONE, drafting, figure, interval, sampling, speedup, table

REPORT, PLOT = "compare.md", "compare.png"
PUBLISHED = Path(__file__).parent / "figures" / "published.json"
_UNKNOWN = "not told"
_PUBLISHED_OF = "Published figures are of Llama 4 Maverick: lay them beside runs of that verifier only."


@dataclass
class Row:
    """One row of the comparison: a run, or a published figure."""

    name: str
    acceptance_length: float | None
    rates: list[float] = field(default_factory=list)  # by position, unconditional
    categories: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # acceptance.json of a run
    records: list[Record] = field(default_factory=list)
    note: str = ""


def compare(config: Config) -> None:
    """Print the evaluations of `compare.runs` side by side, and write them to `compare.folder` if it is set.

    Raises:
        ValueError: there is no run, or one has no complete evaluation.
    """
    options = config.compare
    if not options.runs:
        raise ValueError(
            "compare.runs is required: fledge compare RUN..., each a run's folder, its name in runs_dir, or the folder "
            "of an evaluation"
        )
    rows = _named([(run, _evaluation(run, config.runs_dir)) for run in options.runs])
    published = published_rows() if options.published else []
    text = comparison(rows, published)
    print(text)
    if options.folder:
        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        _draw(folder / PLOT, [*rows, *published])
        title = "Left: acceptance length with 95 % intervals; right: acceptance by position, of all rounds"
        write_atomic(folder / REPORT, f"# Acceptance compared\n\n{text}\n\n![{title}]({PLOT})\n\n{title}.\n")
        print(f"\ncomparison: {folder / REPORT}")


def published_rows() -> list[Row]:
    """Read the published figures, all of NVIDIA's EAGLE-3 head of Llama 4 Maverick."""
    return [Row(**row) for row in json.loads(PUBLISHED.read_text())]


def _evaluation(run: str, runs_dir: str) -> Path:
    """Find the evaluation that is meant by a run: a folder that is one or holds one, or a name in runs_dir."""
    places = [Path(run), Path(run) / "evaluation", Path(runs_dir) / run / "evaluation"]
    folder = next((place for place in places if (place / MANIFEST).is_file()), None)
    if folder is None:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise ValueError(f"compare.runs: {run} has no evaluation (looked in {looked}): run `fledge evaluate` first")
    read_manifest(folder, "evaluation")
    if not (folder / ACCEPTANCE).is_file():
        raise ValueError(f"compare.runs: {folder / ACCEPTANCE} is missing: run `fledge evaluate` again")
    return folder


def _named(evaluations: list[tuple[str, Path]]) -> list[Row]:
    """Read evaluations, each called by its run's name, or by `compare.runs` if two have the same."""
    names = [(folder.parent if folder.name == "evaluation" else folder).resolve().name for _, folder in evaluations]
    return [
        _row(name if names.count(name) == 1 else run, folder)
        for (run, folder), name in zip(evaluations, names, strict=True)
    ]


def _row(name: str, folder: Path) -> Row:
    results = json.loads((folder / ACCEPTANCE).read_text())
    return Row(
        name,
        results["acceptance_length"],
        results["acceptance_rate_per_pos"],
        {name: drafters[TRAINED]["acceptance_length"] for name, drafters in results["by_category"].items()},
        {
            "draft tokens": str(results["num_draft_tokens_per_round"]),
            "drafting": drafting(results),
            "temperature": sampling(results),
            "dtype": results["dtype"] or _UNKNOWN,
            "questions": _questions(results),
            "tokens an answer": str(results["max_tokens"]),
            "verifier": results["verifier"].get("fingerprint", _UNKNOWN),
            "template": results["verifier"].get("chat_template", _UNKNOWN),
            "engine": results.get("engine", _UNKNOWN),
            "batch": str(results.get("batch_size", _UNKNOWN)),
        },
        results,
        answered_records(folder) if (folder / RECORDS).is_file() else [],
    )


def _questions(results: dict[str, Any]) -> str:
    """Write the source of the questions and the digest of their texts."""
    source = Path(str(results["questions"])).name
    left_out = f", {len(results['left_out'])} left out" if "left_out" in results else ""
    digest = str(results.get("questions_digest", _UNKNOWN))[:8]
    return f"{results['num_questions']} of {source} ({digest}{left_out})"


def comparison(runs: list[Row], published: list[Row]) -> str:
    """Write the tables: acceptance, categories, conditions; then what is not alike, and where figures are from."""
    rows = [*runs, *published]
    categories = list(dict.fromkeys(name for row in rows for name in row.categories))
    names = list(dict.fromkeys(name for row in rows for name in row.conditions))
    conditions = [[row.name, *(row.conditions.get(name, _UNKNOWN) for name in names)] for row in rows]
    by_category = [[row.name, *(figure(row.categories.get(name)) for name in categories)] for row in rows]
    parts = [
        _acceptance(runs, published),
        table(["run", *categories], by_category),
        table(["run", *names], conditions),
        "\n".join(
            [*condition_mismatches(runs), "Tokens/s and speed-up are of the machine that a run was evaluated on."]
        ),
        "\n".join([*(f"{row.name}: {row.note}." for row in published), *([_PUBLISHED_OF] if published else [])]),
    ]
    return "\n\n".join(part for part in parts if part)


def _modalities(row: Row) -> list[Row]:
    """Return rows of text and of images, for a run whose questions have images."""
    parts = {name: drafters[TRAINED] for name, drafters in row.results.get("by_modality", {}).items()}
    return [
        Row(f"{row.name}, {name}", part["acceptance_length"], part["acceptance_rate_per_pos"], results=part)
        for name, part in parts.items()
    ]


def _acceptance(runs: list[Row], published: list[Row]) -> str:
    rows = [*(part for run in runs for part in (run, *_modalities(run))), *published]
    positions = range(max(len(row.rates) for row in rows))
    several = len(runs) > 1
    lines = [
        [
            row.name,
            figure(row.acceptance_length),
            interval(row.results) or NONE,
            *([_difference(row, runs[0])] if several else []),
            *(figure(row.rates[i]) if i < len(row.rates) else NONE for i in positions),
            figure(row.results.get("tokens_per_s"), 0),
            speedup(row.results, of_all=any(row is run for run in runs)),
        ]
        for row in rows
    ]
    difference = [f"minus {runs[0].name}"] if several else []
    head = ["run", "acceptance length", "95 % interval", *difference, *(f"position {i + 1}" for i in positions)]
    return table([*head, "tokens/s", "speed-up"], lines)


def _difference(row: Row, first: Row) -> str:
    """Write the difference from the first run on the same questions, with its interval; a dash for other questions."""
    ours, theirs = (_by_turns(one.records) for one in (row, first))
    if row is first or not ours or ours.keys() != theirs.keys():
        return NONE
    if any(len(ours[key]["answers"]) != len(theirs[key]["answers"]) for key in ours):  # one was left out half-way
        return NONE
    pairs = [ours[key] for key in ours], [theirs[key] for key in ours]
    difference, bounds = paired_difference(*pairs, TRAINED, (len(row.rates), len(first.rates)))
    return f"{difference:+.2f}" + (f" [{bounds[0]:+.2f}, {bounds[1]:+.2f}]" if bounds else "")


def _by_turns(records: list[Record]) -> dict[str, Record]:
    """Return records by their turns, wherever the questions came from."""
    return {json.dumps([record["turns"], record.get("images", 0)]): record for record in records}


def condition_mismatches(runs: list[Row]) -> list[str]:
    """Return a sentence for each run whose conditions are not those of the first."""
    first, lines = runs[0], []
    for row in runs[1:]:
        differing = [name for name in first.conditions if row.conditions[name] != first.conditions[name]]
        if differing:
            what = "; ".join(f"{name} {row.conditions[name]} ({first.conditions[name]})" for name in differing)
            lines.append(f"Not alike: {row.name} differs from {first.name} in {what}.")
    return lines


def _draw(path: Path, rows: list[Row]) -> None:
    known = [row for row in rows if row.acceptance_length is not None]
    with plotting() as plt:
        canvas, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        for number, row in enumerate(known):
            place = len(known) - 1 - number
            run_color = ACCENT if number == 0 else plt.get_cmap("tab10")(number % 10)
            style = {"color": run_color if row.results else MUTED, "marker": "osD^v"[number // 10 % 5]}
            left.plot(row.acceptance_length, place, linestyle="", **style)
            error_bar(left, place, row.results.get("acceptance_length_interval"), style["color"])
            if row.rates:
                line = "-" if row.results else ":"
                name = f" {row.name}"  # matplotlib leaves a name that begins with "_" out of a legend
                right.plot(range(1, len(row.rates) + 1), row.rates, line, label=name, **style)
        left.set(xlabel="acceptance length", ylim=(-0.5, len(known) - 0.5))
        name_rows(left, [row.name for row in known[::-1]])
        ticks = range(1, max(len(row.rates) for row in known) + 1)
        right.set(xlabel="draft position", ylabel="rounds that accepted it, share", ylim=(0, 1), xticks=ticks)
        legend_below(right)
        canvas.savefig(path)
        plt.close(canvas)
