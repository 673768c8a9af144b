"""The plots of an evaluation and of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .metrics import Record, question_lengths
from .results import TRAINED

INK, MUTED, ACCENT = "#222222", "#9a9a9a", "#2563a8"


@contextmanager
def plotting() -> Iterator[Any]:
    """Give matplotlib's pyplot in fledge's style, for files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context({**style, "font.size": 10, "figure.dpi": 120, "savefig.bbox": "tight"}):
        yield plt


def draw(
    folder: Path, results: dict[str, Any], records: list[Record], metrics: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Draw the plots of an evaluation and give their file names and titles."""
    with plotting() as plt:
        plots = []
        if any("train/loss" in record for record in metrics):
            title = "Loss, agreement and held-out acceptance by optimizer step (training/metrics.jsonl)"
            plots.append(("training.png", title, _training(plt, metrics)))
        title = "Acceptance by position, of all rounds; points: of the rounds that accepted the position before"
        plots.append(("positions.png", title, _positions(plt, results)))
        title = "Acceptance length by category with 95 % intervals over its questions; dotted: all questions"
        plots.append(("categories.png", title, _categories(plt, results)))
        depth = len(results["acceptance_rate_per_pos"])
        title = "Acceptance length of single questions; dotted: all rounds of all questions"
        plots.append(("questions.png", title, _questions(plt, results, question_lengths(records, TRAINED, depth))))
        for name, _, figure in plots:
            figure.savefig(folder / name)
            plt.close(figure)
    return [(name, title) for name, title, _ in plots]


def _training(plt: Any, metrics: list[dict[str, Any]]) -> Any:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4))
    trained = [record for record in metrics if "train/loss" in record]
    heldout = [record for record in metrics if any(name.startswith("heldout/") for name in record)]
    left.plot([r["step"] for r in trained], [r["train/loss"] for r in trained], color=ACCENT)
    left.set(xlabel="optimizer step", ylabel="loss, nats", title="Loss", ylim=(0, None))
    steps = sorted(name for name in trained[0] if name.startswith("train/agreement_step_"))
    for number, name in enumerate(steps):
        shade = 1 - 0.75 * number / max(1, len(steps) - 1)
        label = f"TTT step {number}" if number in (0, len(steps) - 1) else None
        middle.plot([r["step"] for r in trained], [r[name] for r in trained], color=ACCENT, alpha=shade, label=label)
    middle.set(xlabel="optimizer step", title="Agreement with the verifier's greedy token", ylim=(0, 1))
    middle.legend(frameon=False, loc="lower right")
    for name in sorted({name for record in heldout for name in record if name.startswith("heldout/")}):
        values = [(r["step"], r[name]) for r in heldout if name in r]
        estimated = "_t1_" in name
        label = f"{name.rpartition('_')[2]} draft tokens" + (", temperature 1, estimated" if estimated else ", greedy")
        right.plot(
            *zip(*values, strict=True), linestyle=":" if estimated else "-", marker="o", markersize=3, label=label
        )
    right.set(xlabel="optimizer step", title="Held-out acceptance length", ylim=(1, None))
    right.legend(frameon=False, loc="lower right")
    return figure


def _positions(plt: Any, results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(5, 3.2))
    drafters = {TRAINED: results, **results["baselines"]}
    width = 0.8 / len(drafters)
    for number, (name, counts) in enumerate(drafters.items()):
        rates = counts["acceptance_rate_per_pos"]
        places = [i + 1 + (number - (len(drafters) - 1) / 2) * width for i in range(len(rates))]
        shade = {"color": ACCENT if number == 0 else MUTED, "alpha": 1 - 0.3 * max(0, number - 1)}
        bars = axes.bar(places, rates, width, label=name, **shade)
        if number == 0:
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
            given = counts["conditional_acceptance_rate_per_pos"]
            axes.plot(places, given, "o", color=INK, markersize=4, label=f"{name}, given the one before")
    axes.set(
        xlabel="draft position",
        ylabel="rounds that accepted it, share",
        ylim=(0, 1.05),
        xticks=range(1, len(rates) + 1),
    )
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def _categories(plt: Any, results: dict[str, Any]) -> Any:
    of = {name: drafters[TRAINED] for name, drafters in reversed(results["by_category"].items())}
    figure, axes = plt.subplots(figsize=(5.5, 0.8 + 0.32 * max(3, len(of))))
    labels = [f"{name}  {counts['acceptance_length']:.2f}" for name, counts in of.items()]
    axes.barh(labels, [counts["acceptance_length"] for counts in of.values()], color=ACCENT, alpha=0.8)
    for place, counts in enumerate(of.values()):
        error_bar(axes, place, counts["acceptance_length_interval"])
    axes.axvline(results["acceptance_length"], color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel="acceptance length", xlim=(1, len(results["acceptance_rate_per_pos"]) + 1))
    return figure


def error_bar(axes: Any, place: float, bounds: list[float] | None, color: str = INK) -> None:
    """Lay a 95 % interval over a horizontal bar or point, where there is one."""
    if bounds:
        axes.plot(bounds, [place, place], color=color, linewidth=1, marker="|", markersize=6)


def _questions(plt: Any, results: dict[str, Any], lengths: list[float]) -> Any:
    figure, axes = plt.subplots(figsize=(5, 2.8))
    most = len(results["acceptance_rate_per_pos"]) + 1
    axes.hist(lengths, bins=24, range=(1, most), color=ACCENT)
    axes.axvline(results["acceptance_length"], color=INK, linewidth=1, linestyle=":")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="acceptance length of a question", ylabel="questions", xlim=(1, most))
    return figure
