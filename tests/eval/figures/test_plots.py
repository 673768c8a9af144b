"""Every picture can be read: of few curves and many, with short names and long ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation, question_record
from fledge.conf.cli import main
from fledge.eval.figures.plots import draw
from fledge.eval.figures.records import answered_records
from fledge.eval.figures.report import write_report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LONG = "llama4_maverick_fp8-ultrachat_magpie-lr5e-5-a-sweep-whose-names-say-everything-that-was-set"


@pytest.fixture
def figures(monkeypatch) -> Iterator[dict[str, Figure]]:
    """Give the figures that are written, by file name; a warning of the plotting library is an error."""
    written: dict[str, Figure] = {}
    save = Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        written[Path(path).name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's
        yield written


def assert_legible(figure: Figure) -> None:
    """Check that no legend lies on axes, and no text on a legend or another text."""
    FigureCanvasAgg(figure).draw()
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    for legend in legends:
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), axes.get_title()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += axes.texts
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    boxes += [("legend", legend.get_window_extent()) for legend in legends]
    for (one, box), (other, beside) in combinations(boxes, 2):
        assert not box.overlaps(beside), (one, other)


def names(figure: Figure) -> list[str]:
    """Give what the legends name, lines put together."""
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return [text.get_text().replace("\n", "").strip() for legend in legends for text in legend.get_texts()]


def metrics(heldout: int, ttt_steps: int) -> list[dict[str, Any]]:
    """Give the records of a training with so many held-out curves and draft steps."""
    curves = [f"heldout/acceptance_length_{'t1_' if i % 2 else ''}{i // 2 + 1}" for i in range(heldout)]
    steps = [f"train/agreement_step_{k}" for k in range(ttt_steps)]
    records: list[dict[str, Any]] = []
    for step in range(0, 400, 50):
        gain = 1 - 1 / (1 + step / 60)
        agreed = {name: gain * (1 - 0.05 * k) for k, name in enumerate(steps)}
        records.append({"step": step, "train/loss": 18 - 15 * gain, **agreed})
        if curves:
            records.append({"step": step, **{name: 1 + gain * (1 + i / 4) for i, name in enumerate(curves)}})
    return records


# The report that came in was of a demo: four curves. Others: none, one, eight, fourteen.
@pytest.mark.parametrize(("heldout", "ttt_steps"), [(0, 0), (1, 1), (4, 7), (8, 7), (14, 14)])
def test_no_legend_of_training_lies_over_axes_at_any_number_of_curves(figures, tmp_path, heldout, ttt_steps):
    results = evaluation(tmp_path / "run", [question_record([2, 1], name=f"q/{i}") for i in range(4)])
    draw(tmp_path, results, answered_records(tmp_path / "run" / "evaluation"), metrics(heldout, ttt_steps))
    training = figures["training.png"]
    assert_legible(training)
    assert sum("draft token" in name for name in names(training)) == heldout
    shades = [line.get_alpha() for line in training.axes[1].lines]
    assert shades == sorted(shades, reverse=True), "from the first step, dark, to the last"


@pytest.mark.parametrize("number", [1, 4, 14, 57])
def test_an_evaluation_is_legible_at_any_number_of_categories_and_positions(figures, tmp_path, number):
    depth = min(number, 16)
    records = [
        question_record([i % (depth + 1), depth], name=f"q/{i}", category=f"{LONG} {i % number}", drafted=depth)
        for i in range(4 * number)
    ]
    evaluation(tmp_path / "run", records, num_draft_tokens=depth)
    write_report(tmp_path / "run" / "evaluation", tmp_path / "run" / "training")
    assert figures.keys() == {"positions.png", "categories.png", "questions.png"}
    for figure in figures.values():
        assert_legible(figure)


@pytest.mark.parametrize("number", [1, 2, 8, 14])
def test_a_comparison_is_legible_and_names_every_run(figures, tmp_path, number):
    runs = [f"{'_run' if i % 2 else LONG}{i}" for i in range(number)]
    for run in runs:
        evaluation(tmp_path / run, [question_record([2, 1], name=f"q/{i}") for i in range(4)])
    main(["compare", *runs, f"runs_dir={tmp_path}", f"compare.folder={tmp_path}"])
    assert_legible(figures["compare.png"])
    assert names(figures["compare.png"]) == [*runs, "vLLM, Maverick, text"]
    looks = [(line.get_color(), line.get_marker()) for line in figures["compare.png"].axes[1].lines[:number]]
    assert len(set(looks)) == number


@pytest.mark.parametrize("name", ["costs $5_$10", "$\\frac$", "_hidden", "50 % {of} ^ all"])
def test_a_name_is_drawn_as_it_stands(figures, tmp_path, name):
    run = tmp_path / "run"
    evaluation(run, [question_record([2, 1], name=f"q/{i}", category=name) for i in range(4)])
    write_report(run / "evaluation", run / "training")
    (label,) = figures["categories.png"].axes[0].get_yticklabels()
    assert label.get_text().startswith(name)
    assert name in json.loads((run / "evaluation" / "acceptance.json").read_text())["by_category"]
