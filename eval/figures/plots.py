"""The plots of an evaluation and of a comparison."""

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .metrics import question_lengths
from .records import TRAINED, Record

INK, MUTED, ACCENT = "#222222", "#9a9a9a", "#2563a8"
_TITLES = {
    "training.png": "Loss, agreement and held-out acceptance by optimizer step (training/metrics.jsonl)",
    "positions.png": "Acceptance by position, of all rounds; points: of the rounds that accepted the position before",
    "categories.png": "Acceptance length by category with 95 % intervals over its questions; dotted: all questions",
    "questions.png": "Acceptance length of single questions; dotted: all rounds of all questions",
}


class Plot(NamedTuple):
    """A plot that was drawn."""

    name: str  # of its file
    title: str
    svg: str  # the same, as an element of a page


@contextmanager
def plotting() -> Iterator[Any]:
    """Return matplotlib's pyplot in fledge's style, for files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK}
    # Names are the user's: a dollar sign in one is no formula.
    style |= {"text.parse_math": False, "svg.fonttype": "none", "axes.titlesize": "medium", "savefig.bbox": "tight"}
    with plt.rc_context({**style, "font.size": 10, "figure.dpi": 120}):
        yield plt


def legend_below(axes: Any) -> None:
    """Name the curves below the axes, however many there are; a picture grows with what hangs from its axes."""
    curves, names = axes.get_legend_handles_labels()
    if curves:
        away = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.0}  # below ticks and axis label
        axes.legend(curves, [_wrapped(name, 60) for name in names], frameon=False, fontsize=8, **away)


def _wrapped(name: str, width: int) -> str:
    return textwrap.fill(name, width, break_on_hyphens=False)


def name_rows(axes: Any, names: list[str]) -> None:
    """Name the rows of a plot, from the first at the bottom, and make its figure high enough for them."""
    labels = [_wrapped(name, 48) for name in names]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    lines = 1 + max(name.count("\n") for name in labels)
    axes.figure.set_figheight(0.9 + max(0.34, 0.22 * lines) * max(3, len(labels)))


def error_bar(axes: Any, place: float, bounds: list[float] | None, color: str = INK) -> None:
    """Draw a 95 % interval over a horizontal bar or point, if there is one."""
    if bounds:
        axes.plot(bounds, [place, place], color=color, linewidth=1, marker="|", markersize=6)


def draw(folder: Path, results: dict[str, Any], records: list[Record], metrics: list[dict[str, Any]]) -> list[Plot]:
    """Draw the plots of an evaluation into files, and return them."""
    drawn = []
    with plotting() as plt:
        plots = {"training.png": _training(plt, metrics)} if any("train/loss" in one for one in metrics) else {}
        plots |= {"positions.png": _positions(plt, results), "categories.png": _categories(plt, results)}
        plots["questions.png"] = _questions(plt, results, records)
        for name, figure in plots.items():
            figure.savefig(folder / name)
            drawn.append(Plot(name, _TITLES[name], _svg(plt, figure, name)))
            plt.close(figure)
    return drawn


def _svg(plt: Any, figure: Any, name: str) -> str:
    """Return a figure as an SVG element, with text as text; ids that nothing refers to would stand in a page twice."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.canvas.print_figure(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' id="[\w.]+_\d+"', "", svg)


def _training(plt: Any, metrics: list[dict[str, Any]]) -> Any:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4))
    trained = [record for record in metrics if "train/loss" in record]
    agreement = sorted((name for name in trained[0] if name.startswith("train/agreement_step_")), key=_number)
    heldout = sorted({name for record in metrics for name in record if name.startswith("heldout/")})
    heldout.sort(key=_number)

    def plot(axes: Any, name: str, **style: Any) -> None:
        values = [(record["step"], record[name]) for record in metrics if name in record]
        axes.plot(*zip(*values, strict=True), **style)

    plot(left, "train/loss", color=ACCENT)
    left.set(xlabel="optimizer step", ylabel="loss, nats", title="Loss", ylim=(0, None))
    for step, name in enumerate(agreement):
        label = f"TTT step {step}" if step in (0, len(agreement) - 1) else None
        plot(middle, name, color=ACCENT, alpha=1 - 0.75 * step / max(1, len(agreement) - 1), label=label)
    middle.set(xlabel="optimizer step", title="Agreement with the verifier's greedy token", ylim=(0, 1))
    legend_below(middle)
    numbers = sorted({_number(name) for name in heldout})
    for name in heldout:
        number, estimated = _number(name), "_t1_" in name
        label = f"{number} draft token{'s' * (number != 1)}, {'temperature 1, estimated' if estimated else 'greedy'}"
        color = plt.get_cmap("viridis")(0.9 * numbers.index(number) / max(1, len(numbers) - 1))
        plot(right, name, label=label, linestyle=":" if estimated else "-", marker="o", markersize=3, color=color)
    right.set(xlabel="optimizer step", title="Held-out acceptance length", ylim=(1, None if heldout else 2))
    legend_below(right)
    return figure


def _number(name: str) -> int:
    """Return the number that the name of a metric ends with."""
    return int(name.rpartition("_")[2])


def _positions(plt: Any, results: dict[str, Any]) -> Any:
    positions = range(1, len(results["acceptance_rate_per_pos"]) + 1)
    figure, axes = plt.subplots(figsize=(max(5, 1 + 0.4 * len(positions)), 3.2))
    drafters = {TRAINED: results, **results["baselines"]}
    width = 0.8 / len(drafters)
    for number, (name, counts) in enumerate(drafters.items()):
        places = [position + (number - (len(drafters) - 1) / 2) * width for position in positions]
        shade = {"color": MUTED if number else ACCENT, "alpha": 1 - 0.3 * max(0, number - 1)}
        bars = axes.bar(places, counts["acceptance_rate_per_pos"], width, label=name, **shade)
        if number == 0:
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
            conditional = counts["conditional_acceptance_rate_per_pos"]
            axes.plot(places, conditional, "o", color=INK, markersize=4, label=f"{name}, given the one before")
    axes.set(xlabel="draft position", ylabel="rounds that accepted it, share", ylim=(0, 1.05), xticks=positions)
    legend_below(axes)
    return figure


def _categories(plt: Any, results: dict[str, Any]) -> Any:
    categories = {name: drafters[TRAINED] for name, drafters in reversed(results["by_category"].items())}
    lengths = [counts["acceptance_length"] for counts in categories.values()]
    figure, axes = plt.subplots(figsize=(5.5, 4))
    axes.barh(range(len(lengths)), lengths, color=ACCENT, alpha=0.8)
    name_rows(axes, [f"{name}  {length:.2f}" for name, length in zip(categories, lengths, strict=True)])
    for place, counts in enumerate(categories.values()):
        error_bar(axes, place, counts["acceptance_length_interval"])
    axes.axvline(results["acceptance_length"], color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel="acceptance length", xlim=(1, max(1, len(results["acceptance_rate_per_pos"])) + 1))
    return figure


def _questions(plt: Any, results: dict[str, Any], records: list[Record]) -> Any:
    depth = max(1, len(results["acceptance_rate_per_pos"]))
    figure, axes = plt.subplots(figsize=(5, 2.8))
    axes.hist(question_lengths(records, TRAINED, depth), bins=24, range=(1, depth + 1), color=ACCENT)
    axes.axvline(results["acceptance_length"], color=INK, linewidth=1, linestyle=":")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="acceptance length of a question", ylabel="questions", xlim=(1, depth + 1))
    return figure
