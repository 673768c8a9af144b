"""The report of an evaluation: tables for the terminal and report.md, plots, and report.html."""

import json
from pathlib import Path
from typing import Any

from ...conf.schema import DraftSampling
from .plots import draw
from .records import ACCEPTANCE, TRAINED, Part, answered_records

NONE = "-"
REPORT_HTML = "report.html"
_MOST_LEFT_OUT = 20  # questions that are named


def write_report(folder: Path, training_folder: Path, head: Path | None = None) -> dict[str, Any]:
    """Write report.md, its plots and report.html next to acceptance.json, and return what that file holds.

    The training's curves are shown if the head is one of its own, or, of a server, nobody said which.
    """
    from .html_report import write_html  # imports transformers, which `compare` does without

    results = json.loads((folder / ACCEPTANCE).read_text())
    metrics_file = training_folder / "metrics.jsonl"
    is_own = head is None or head.resolve().is_relative_to(training_folder.resolve())
    lines = metrics_file.read_text().splitlines() if is_own and metrics_file.is_file() else []
    metrics = [json.loads(line) for line in lines if line.endswith("}")]
    records = answered_records(folder)
    plots = draw(folder, results, records, metrics)
    title = f"Acceptance length {figure(results['acceptance_length'])} {interval(results)}".rstrip()
    conditions = f"{_conditions(results)}. {results['definition']}."
    write_html(folder / REPORT_HTML, results, records, [title, conditions, *_tables(results)], plots)
    parts = [
        f"# {title}",
        conditions,
        *_markdown(results),
        *(f"![{plot.title}]({plot.name})\n\n{plot.title}." for plot in plots),
        "Counted in `questions.jsonl` (every answer, round by round where it was decoded in this process) and summed "
        "in `acceptance.json`.",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return results


def print_table(results: dict[str, Any]) -> None:
    """Print the tables of an evaluation."""
    print("", "\n\n".join(_markdown(results)), "", sep="\n")


def figure(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Write a figure; a dash if there is none."""
    return NONE if value is None else f"{value:.{digits}f}{unit}"


def interval(counts: dict[str, Any], name: str = "acceptance_length_interval") -> str:
    """Write a 95 % interval as [low, high]; nothing if there is none."""
    bounds = counts.get(name)
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""


def speedup(counts: dict[str, Any], of_all: bool = True) -> str:
    """Write a speed-up and its 95 % interval; a dash if there is no interval, unless it is of all questions."""
    bounds = interval(counts, "speedup_interval")
    return f"{figure(counts.get('speedup'), unit='x')} {bounds}".rstrip() if bounds or of_all else NONE


def drafting(results: dict[str, Any]) -> str:
    """Write the form of drafts: a chain, or a tree and its shape."""
    tree = results["drafting"] != "chain"
    return f"tree of depth {results['tree_depth']}, top {results['tree_top_k']}" if tree else "chain"


def sampling(results: dict[str, Any]) -> str:
    """Write the temperature, and what else shapes the samples if it is above 0."""
    if not results["temperature"]:
        return "0"
    parts = [f"{results['temperature']:g}"]
    parts += [f"top-p {results['top_p']:g}"] if results.get("top_p", 1.0) < 1 else []
    parts += [f"top-k {results['top_k']}"] if results.get("top_k") else []
    parts += [f"drafts {results['draft_sampling']}"] if "draft_sampling" in results else []
    return ", ".join(parts)


def _conditions(results: dict[str, Any]) -> str:
    """Write what a figure depends on besides verifier and head."""
    return (
        f"{results['num_questions']} questions ({results['questions']}), {results['num_draft_tokens_per_round']} draft "
        f"tokens a round ({drafting(results)}), temperature {sampling(results)}, "
        f"{results['dtype'] or results['engine'] + ' (dtype not told)'}, batches of "
        f"{results.get('batch_size', 1)}; at most {results['max_tokens']} tokens an answer, by the verifier's own chat "
        f"template ({results['verifier'].get('chat_template', 'not recorded')})"
    )


def _markdown(results: dict[str, Any]) -> list[str]:
    return [part if isinstance(part, str) else table(*part) for part in _tables(results)]


def _tables(results: dict[str, Any]) -> list[Part]:
    positions = range(len(results["acceptance_rate_per_pos"]))
    drafters = {TRAINED: results, **results["baselines"]}
    head = ["drafter", "acceptance length", "95 % interval", *(f"position {i + 1}" for i in positions)]
    rows = []
    for name, counts in drafters.items():
        rates = map(figure, counts["acceptance_rate_per_pos"])
        speed = [figure(counts["tokens_per_s"], 0), speedup(counts), str(counts["num_drafts"])]
        rows.append([name, figure(counts["acceptance_length"]), interval(counts) or NONE, *rates, *speed])
    conditional = map(figure, results["conditional_acceptance_rate_per_pos"])
    rows.insert(1, [f"{TRAINED}, conditional", NONE, NONE, *conditional, NONE, NONE, NONE])
    alone = figure(results["verifier_alone_tokens_per_s"], 0)
    if alone != NONE:
        rows.append(["verifier alone", "1.00", NONE, *(NONE for _ in positions), alone, "1.00x", NONE])
    parts = [("category", results["by_category"]), ("questions with", results.get("by_modality", {}))]
    macro = (
        f"Acceptance length is over all rounds (micro); the mean over questions (macro) is "
        f"{figure(results['macro_acceptance_length'])}. Intervals, of speed-ups too: other questions of the same kind, "
        "by bootstrap over questions."
    )
    return [
        ([*head, "tokens/s", "speed-up", "rounds"], rows),
        *(_parts_table(title, part, list(results["baselines"])) for title, part in parts if part),
        "\n".join([macro, *_faithfulness(results), *_heldout(results), *_left_out(results)]),
    ]


def _parts_table(title: str, parts: dict[str, Any], baselines: list[str]) -> Part:
    """Return what was measured on each part of the questions."""
    rows = []
    for name, drafters in parts.items():
        trained, *others = (drafters[drafter] for drafter in (TRAINED, *baselines))
        lengths = [figure(counts["acceptance_length"]) for counts in (trained, *others)]
        rates = ", ".join(map(figure, trained["acceptance_rate_per_pos"]))
        rows.append([name, lengths[0], interval(trained) or NONE, speedup(trained, of_all=False), *lengths[1:], rates])
    return [title, TRAINED, "95 % interval", "speed-up", *baselines, "by position"], rows


def _faithfulness(results: dict[str, Any]) -> list[str]:
    """Write how many answers speculation was seen to leave unchanged."""
    lines = []
    if results["temperature"]:
        how = {
            DraftSampling.sampled.value: "drafts are drawn too, and no two answers need be equal",
            DraftSampling.greedy.value: "drafts change no answer",
        }.get(results.get("draft_sampling", ""), "how drafts are chosen is the server's")
        lines.append(f"Sampled at temperature {results['temperature']:g} (seed {results['seed']}): {how}.")
    if "lossless" in results:
        equal, decoded = (results["lossless"][name] for name in ("equal_to_verifier", "decoded_answers"))
        lines.append(f"{equal} of {decoded} answers equal the verifier's own, token for token.")
    elif "model" in results:
        lines.append(
            f"Answered by {results['engine']}: whether drafts changed an answer was not looked at; seconds include the "
            "reading of prompts."
        )
    return lines


def _heldout(results: dict[str, Any]) -> list[str]:
    """Write the acceptance length of held-out conversations in training and in decoding, if both are known."""
    heldout, temperature = results["heldout"], results["temperature"]
    in_training = heldout.get("estimated_acceptance_length_t1" if temperature else "walked_acceptance_length")
    if not heldout["decoded"] or not in_training:
        return []
    decoded = f"{heldout['decoded']['acceptance_length']:.2f}"
    if temperature:
        estimate = f"{in_training:.2f} estimated in training (temperature 1, over greedy answers)"
        both = f"{estimate}, {decoded} sampled at temperature {temperature:g}"
    else:
        both = f"{in_training:.2f} walked in training, {decoded} decoded"
    return [f"Held-out conversations: acceptance length {both} ({heldout['num_conversations']} conversations)."]


def _left_out(results: dict[str, Any]) -> list[str]:
    """Write the questions that could not be asked, or not to their end."""
    lines = [f"Left out: {name}, from {reason}." for name, reason in results.get("left_out", {}).items()]
    more = len(lines) - _MOST_LEFT_OUT
    return [*lines[:_MOST_LEFT_OUT], *([f"Left out: {more} more, as acceptance.json tells."] if more > 0 else [])]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table that also reads well on a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])
