"""The compare command: trainings and evaluations side by side, with published figures, and how conditions differ."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import MANIFEST, read_manifest, write_atomic
from ..conf.schema import Config
from ..models.formats.training_folder import checkpoint_steps, head_folder, read_walks
from .figures.metrics import paired_difference
from .figures.plots import ACCENT, MUTED, error_bar, legend_below, name_rows, plotting
from .figures.records import ACCEPTANCE, RECORDS, TRAINED, Record, answered_records
from .figures.report import NONE, drafting, figure, interval, sampling, speedup, table
from .figures.walks import walks_tables

_REPORT, _PLOT = "compare.md", "compare.png"
_EVALUATION, _CHECKPOINTS = "evaluation", "training/checkpoints"  # in a run's folder
_PUBLISHED = Path(__file__).parent / "figures" / "published.json"
_UNKNOWN = "not told"
_PUBLISHED_OF = "Published figures are of Llama 4 Maverick: lay them beside runs of that verifier only."


@dataclass
class Row:
    """One row of the comparison: a run, or a published figure."""

    name: str
    acceptance_length: float | None
    rates: list[float] = field(default_factory=list)  # by position, unconditional
    categories: dict[str, str] = field(default_factory=dict)  # acceptance length and its interval
    conditions: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # acceptance.json of a run, or its part of a modality
    records: list[Record] = field(default_factory=list)
    note: str = ""


def compare(config: Config) -> None:
    """Print `compare.runs` side by side, trained and evaluated, and write that to `compare.folder` if it is set."""
    options = config.compare
    if not options.runs:
        raise ValueError(
            "compare.runs is required: fledge compare RUN..., each a run's folder, its name in runs_dir, or the folder "
            "of an evaluation"
        )
    folders = [find_run(run, config.runs_dir, "compare.runs") for run in options.runs]
    # A run is called by its folder's name, or as in `compare.runs` if two have the same.
    names = [(folder.parent if folder.name == _EVALUATION else folder).resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else run for name, run in zip(names, options.runs, strict=True)]
    named = dict(zip(names, folders, strict=True))
    evaluations = {name: place for name, folder in named.items() if (place := find_evaluation(folder))}
    trainings = {name: folder / "training" for name, folder in named.items() if checkpoint_steps(folder / _CHECKPOINTS)}
    rows = [_row(name, folder) for name, folder in evaluations.items()]
    walked = {name for name, folder in trainings.items() if any(read_walks(head_folder(None, folder)).values())}
    if nothing := [name for name in named if name not in evaluations and name not in walked]:
        raise ValueError(
            f"compare.runs: {', '.join(nothing)} has neither an evaluation nor held-out conversations that training "
            "measured: run `fledge evaluate` first, or leave it out"
        )
    published = published_rows() if options.published and rows else []
    text = "\n\n".join([*walks_tables(trainings), *([comparison(rows, published)] if rows else [])])
    print(text)
    if options.folder:
        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = f"# Acceptance compared\n\n{text}\n"
        if rows:
            _draw(folder / _PLOT, [*rows, *published])
            title = "Left: acceptance length with 95 % intervals; right: acceptance by position, of all rounds"
            text += f"\n![{title}]({_PLOT})\n\n{title}.\n"
        write_atomic(folder / _REPORT, text)
        print(f"\ncomparison: {folder / _REPORT}")


def published_rows() -> list[Row]:
    """Read the published figures, all of NVIDIA's EAGLE-3 head of Llama 4 Maverick."""
    rows = [Row(**row) for row in json.loads(_PUBLISHED.read_text())]
    for row in rows:
        row.categories = {name: figure(float(length)) for name, length in row.categories.items()}
    return rows


def find_run(run: str, runs_dir: str, option: str) -> Path:
    """Return the folder of a run, or of an evaluation: a path, or a name in runs_dir."""
    places = Path(run), Path(runs_dir) / run
    for place in places:
        if any((place / part).exists() for part in (MANIFEST, f"{_EVALUATION}/{MANIFEST}", _CHECKPOINTS)):
            return place
    raise ValueError(
        f"{option}: {run} has neither an evaluation nor a training (looked in {', '.join(map(str, places))}): run "
        "`fledge evaluate` first"
    )


def find_evaluation(folder: Path) -> Path | None:
    """Return the evaluation that a folder is or holds, None if it holds none."""
    folder = folder if (folder / MANIFEST).is_file() else folder / _EVALUATION
    if not (folder / MANIFEST).is_file():
        return None
    read_manifest(folder, "evaluation")
    if not (folder / ACCEPTANCE).is_file():
        raise ValueError(f"{folder / ACCEPTANCE} is missing: run `fledge evaluate` again")
    return folder


def _row(name: str, folder: Path) -> Row:
    results = json.loads((folder / ACCEPTANCE).read_text())
    conditions = {
        "draft tokens": results["num_draft_tokens_per_round"],
        "drafting": drafting(results),
        "temperature": sampling(results),
        "dtype": results["dtype"] or _UNKNOWN,
        "questions": _questions(results),
        "tokens an answer": results["max_tokens"],
        "verifier": results["verifier"].get("fingerprint", _UNKNOWN),
        "template": results["verifier"].get("chat_template", _UNKNOWN),
        "engine": results.get("engine", _UNKNOWN),
        "batch": results.get("batch_size", _UNKNOWN),
    }
    return Row(
        name,
        results["acceptance_length"],
        results["acceptance_rate_per_pos"],
        {name: _length(drafters[TRAINED]) for name, drafters in results["by_category"].items()},
        {name: str(value) for name, value in conditions.items()},
        results,
        answered_records(folder) if (folder / RECORDS).is_file() else [],
    )


def _questions(results: dict[str, Any]) -> str:
    """Write how many questions there are, where they are from, and the digest of their texts."""
    source = Path(str(results["questions"])).name
    left_out = f", {len(results['left_out'])} left out" if "left_out" in results else ""
    digest = str(results.get("questions_digest", _UNKNOWN))[:8]
    return f"{results['num_questions']} of {source} ({digest}{left_out})"


def comparison(runs: list[Row], published: list[Row]) -> str:
    """Write the tables: acceptance, categories, conditions; then how runs differ, and where figures are from."""
    rows = [*runs, *published]
    names = list(dict.fromkeys(name for row in rows for name in row.conditions))
    parts = [
        _acceptance(runs, published),
        _categories(runs, published),
        table(["run", *names], [[row.name, *(row.conditions.get(name, _UNKNOWN) for name in names)] for row in rows]),
        "\n".join([*_mismatches(runs), "Tokens/s and speed-up are of the machine that a run was evaluated on."]),
        "\n".join([*(f"{row.name}: {row.note}." for row in published), *([_PUBLISHED_OF] if published else [])]),
    ]
    return "\n\n".join(part for part in parts if part)


def _acceptance(runs: list[Row], published: list[Row]) -> str:
    several, first = len(runs) > 1, runs[0]
    rows = [*(part for run in runs for part in (run, *_modalities(run))), *published]
    positions = range(max(len(row.rates) for row in rows))
    difference = [f"minus {first.name}"] if several else []
    head = ["run", "acceptance length", "95 % interval", *difference, *(f"position {i + 1}" for i in positions)]
    lines = []
    for row in rows:
        length = [row.name, figure(row.acceptance_length), interval(row.results) or NONE]
        rates = [figure(row.rates[i]) if i < len(row.rates) else NONE for i in positions]
        of_all = any(row is run for run in runs)
        speed = [figure(row.results.get("tokens_per_s"), 0), speedup(row.results, of_all)]
        lines.append([*length, *([_difference(row, first)] if several else []), *rates, *speed])
    return table([*head, "tokens/s", "speed-up"], lines)


def _categories(runs: list[Row], published: list[Row]) -> str:
    rows, first = [*runs, *published], runs[0]
    names = list(dict.fromkeys(name for row in rows for name in row.categories))
    lines = [[row.name, *(row.categories.get(name, NONE) for name in names)] for row in rows]
    for row in runs[1:]:
        differences = [_difference(row, first, name) for name in names]
        if any(difference != NONE for difference in differences):
            lines.append([f"{row.name} minus {first.name}", *differences])
    return table(["run", *names], lines)


def _length(counts: dict[str, Any]) -> str:
    return f"{figure(counts['acceptance_length'])} {interval(counts)}".rstrip()


def _modalities(run: Row) -> list[Row]:
    """Return rows of text and of images, for a run whose questions have images."""
    rows = []
    for name, drafters in run.results.get("by_modality", {}).items():
        part = drafters[TRAINED]
        lengths = part["acceptance_length"], part["acceptance_rate_per_pos"]
        rows.append(Row(f"{run.name}, {name}", *lengths, results=part))
    return rows


def _difference(row: Row, first: Row, category: str | None = None) -> str:
    """Write the difference from the first run on the same questions, with its interval; a dash for other questions."""
    parts = ([r for r in one.records if category in (None, r["category"])] for one in (row, first))
    ours, theirs = map(_by_question, parts)
    if row is first or not ours or ours.keys() != theirs.keys():
        return NONE
    pairs = list(ours.values()), [theirs[key] for key in ours]
    if any(len(our["answers"]) != len(their["answers"]) for our, their in zip(*pairs, strict=True)):
        return NONE  # one was left out half-way
    difference, bounds = paired_difference(*pairs, TRAINED, (len(row.rates), len(first.rates)))
    return f"{difference:+.2f}" + (f" [{bounds[0]:+.2f}, {bounds[1]:+.2f}]" if bounds else "")


def _by_question(records: list[Record]) -> dict[str, Record]:
    """Return records by what was asked, wherever the questions came from; those that ask the same are numbered."""
    asked, number = dict[str, Record](), Counter[str]()
    for record in sorted(records, key=lambda one: str(one["id"])):
        question = json.dumps([record["turns"], record.get("images", 0)])
        number[question] += 1
        asked[f"{question} {number[question]}"] = record
    return asked


def _mismatches(runs: list[Row]) -> list[str]:
    """Return a sentence for each run whose conditions are not those of the first."""
    first, lines = runs[0], []
    for row in runs[1:]:
        pairs = {name: (row.conditions[name], value) for name, value in first.conditions.items()}
        differing = "; ".join(f"{name} {own} ({other})" for name, (own, other) in pairs.items() if own != other)
        if differing:
            lines.append(f"Not alike: {row.name} differs from {first.name} in {differing}.")
    return lines


def _draw(path: Path, rows: list[Row]) -> None:
    known = [row for row in rows if row.acceptance_length is not None]
    with plotting() as plt:
        canvas, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        for number, row in enumerate(known):
            place = len(known) - 1 - number
            color = plt.get_cmap("tab10")(number % 10) if number else ACCENT
            line = {"color": color if row.results else MUTED, "marker": "osD^v"[number // 10 % 5]}
            left.plot(row.acceptance_length, place, linestyle="", **line)
            error_bar(left, place, row.results.get("acceptance_length_interval"), line["color"])
            if row.rates:
                line |= {"linestyle": "-" if row.results else ":"}
                name = f" {row.name}"  # matplotlib leaves a name that begins with "_" out of a legend
                right.plot(range(1, len(row.rates) + 1), row.rates, label=name, **line)
        left.set(xlabel="acceptance length", ylim=(-0.5, len(known) - 0.5))
        name_rows(left, [row.name for row in known[::-1]])
        ticks = range(1, max(len(row.rates) for row in known) + 1)
        right.set(xlabel="draft position", ylabel="rounds that accepted it, share", ylim=(0, 1), xticks=ticks)
        legend_below(right)
        canvas.savefig(path)
        plt.close(canvas)
