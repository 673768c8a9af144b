"""The report of an evaluation: tables for the terminal and report.md, and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ACCEPTANCE = "acceptance.json"
_INK, _MUTED, _ACCENT = "#222222", "#9a9a9a", "#2563a8"


def write_report(folder: Path, training_folder: Path) -> dict[str, Any]:
    """Write report.md and its plots beside acceptance.json, and give what that file holds."""
    results = json.loads((folder / ACCEPTANCE).read_text())
    metrics_file = training_folder / "metrics.jsonl"
    lines = metrics_file.read_text().splitlines() if metrics_file.is_file() else []
    metrics = [json.loads(line) for line in lines if line.endswith("}")]
    plots = _draw(folder, results, metrics)
    header = (
        f"# Acceptance length {results['acceptance_length']:.2f}\n\n"
        f"{results['num_questions']} questions ({results['questions']}), {results['num_draft_tokens_per_round']} draft "
        f"tokens a round, {results['drafting']} drafting, temperature {results['temperature']:g}, "
        f"{results['dtype']}; at most {results['max_tokens']} tokens an answer. {results['definition']}.\n\n"
    )
    images = "\n\n".join(f"![{title}]({name})" for name, title in plots)
    (folder / "report.md").write_text(header + "\n\n".join(_tables(results)) + "\n\n" + images + "\n")
    return results


def print_table(results: dict[str, Any]) -> None:
    """Print the tables of an evaluation."""
    print()
    print("\n\n".join(_tables(results)))
    print()


def _tables(results: dict[str, Any]) -> list[str]:
    positions = range(results["num_draft_tokens_per_round"])
    drafters = {"trained head": results, **results["baselines"]}
    head = ["drafter", "acceptance length", *(f"position {i + 1}" for i in positions), "tokens/s", "rounds"]
    rows = [
        [
            name,
            f"{counts['acceptance_length']:.2f}",
            *(f"{rate:.2f}" for rate in counts["acceptance_rate_per_pos"]),
            f"{counts['tokens_per_s']:.0f}" if counts["tokens_per_s"] else "-",
            str(counts["num_drafts"]),
        ]
        for name, counts in drafters.items()
    ]
    rows.append(
        ["verifier alone", "1.00", *("-" for _ in positions), f"{results['verifier_alone_tokens_per_s']:.0f}", "-"]
    )
    categories = [
        [category, *(f"{counts[name]['acceptance_length']:.2f}" for name in drafters)]
        for category, counts in results["by_category"].items()
    ]
    facts = [_faithfulness(results), *_heldout(results)]
    return [_table(head, rows), _table(["category", *drafters], categories), "\n".join(facts)]


def _faithfulness(results: dict[str, Any]) -> str:
    if results["temperature"]:
        return (
            f"Answers are sampled at temperature {results['temperature']:g} (seed {results['seed']}), with and without "
            "drafts; rejection sampling keeps the verifier's distribution, and no two need be equal."
        )
    lossless = results["lossless"]
    return (
        f"{lossless['equal_to_verifier']} of {lossless['decoded_answers']} answers equal the verifier's own, "
        "token for token."
    )


def _heldout(results: dict[str, Any]) -> list[str]:
    """Lay what training told of held-out conversations beside what decoding them gave, where both are known."""
    heldout = results["heldout"]
    told = heldout.get("estimated_acceptance_length_t1" if results["temperature"] else "walked_acceptance_length")
    if not heldout["decoded"] or not told:
        return []
    decoded = f"{heldout['decoded']['acceptance_length']:.2f}"
    if results["temperature"]:
        estimate = f"{told:.2f} estimated in training (temperature 1, over greedy answers)"
        both = f"{estimate}, {decoded} sampled at temperature {results['temperature']:g}"
    else:
        both = f"{told:.2f} walked in training, {decoded} decoded"
    return [f"Held-out conversations: acceptance length {both} ({heldout['num_conversations']} conversations)."]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table that also reads well on a terminal."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _draw(folder: Path, results: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Draw the plots and give their file names and titles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "text.color": _INK, "axes.labelcolor": _INK}
    with plt.rc_context({**style, "font.size": 10, "figure.dpi": 120, "savefig.bbox": "tight"}):
        plots = []
        if any("train/loss" in record for record in metrics):
            plots.append(("training.png", "Loss and agreement by step", _training(plt, metrics)))
        plots.append(("positions.png", "Acceptance by position", _positions(plt, results)))
        plots.append(("categories.png", "Acceptance length by category", _categories(plt, results)))
        for name, _, figure in plots:
            figure.savefig(folder / name)
            plt.close(figure)
    return [(name, title) for name, title, _ in plots]


def _training(plt: Any, metrics: list[dict[str, Any]]) -> Any:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4))
    trained = [record for record in metrics if "train/loss" in record]
    heldout = [record for record in metrics if any(name.startswith("heldout/") for name in record)]
    left.plot([r["step"] for r in trained], [r["train/loss"] for r in trained], color=_ACCENT)
    left.set(xlabel="optimizer step", ylabel="loss, nats", title="Loss", ylim=(0, None))
    steps = sorted(name for name in trained[0] if name.startswith("train/agreement_step_"))
    for number, name in enumerate(steps):
        shade = 1 - 0.75 * number / max(1, len(steps) - 1)
        label = f"TTT step {number}" if number in (0, len(steps) - 1) else None
        middle.plot([r["step"] for r in trained], [r[name] for r in trained], color=_ACCENT, alpha=shade, label=label)
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
    drafters = {"trained head": results, **results["baselines"]}
    width = 0.8 / len(drafters)
    for number, (name, counts) in enumerate(drafters.items()):
        rates = counts["acceptance_rate_per_pos"]
        places = [i + 1 + (number - (len(drafters) - 1) / 2) * width for i in range(len(rates))]
        bars = axes.bar(
            places,
            rates,
            width,
            label=name,
            color=_ACCENT if number == 0 else _MUTED,
            alpha=1 - 0.3 * max(0, number - 1),
        )
        if number == 0:
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set(
        xlabel="draft position", ylabel="rounds that accepted it, share", ylim=(0, 1), xticks=range(1, len(rates) + 1)
    )
    axes.legend(frameon=False)
    return figure


def _categories(plt: Any, results: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    names = list(results["by_category"])[::-1]
    values = [results["by_category"][name]["trained head"]["acceptance_length"] for name in names]
    bars = axes.barh(names, values, color=_ACCENT)
    axes.bar_label(bars, fmt="%.2f", padding=-26, fontsize=8, color="white")
    axes.axvline(results["acceptance_length"], color=_INK, linewidth=1, linestyle=":")
    axes.set(xlabel="acceptance length (dotted: all questions)", xlim=(1, results["num_draft_tokens_per_round"] + 1))
    return figure
