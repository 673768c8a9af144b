"""fledge from Python: the public names, and the notebook from top to bottom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fledge
import matplotlib
import matplotlib.pyplot as plt
import pytest
from commands import popen
from fledge.conf.runtime import launch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "look_at_a_head.ipynb"


def test_importing_fledge_loads_none_of_its_parts():
    code = "import sys, fledge; print(*sys.modules); assert set(fledge.__all__) <= set(dir(fledge))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"torch", "hydra", "numpy"} & set(loaded)
    assert [name for name in loaded if name.startswith("fledge.")] == []


def test_names_that_are_not_there_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'fledge' has no attribute 'loadhead'"):
        fledge.loadhead  # noqa: B018


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], "train.lrr is not an option: did you mean train.lr?"),
        (["train.lr=-1"], "train.lr must be above 0"),
        (["experiment=nope"], "Could not find 'experiment/nope'"),
        (["train.loss=nope"], "train.loss"),
    ],
)
def test_a_wrong_option_is_a_value_error_with_the_commands_message(overrides, message):
    with pytest.raises(ValueError, match=message):
        fledge.load_config("name=x", "verifier.path=v", *overrides)


def test_a_runs_configuration_is_read_from_its_file_with_overrides_on_top(finished):
    file = finished.path / "training" / "config.yaml"
    config = fledge.load_config("train.lr=5e-5", "verifier.chat_template_kwargs={date: today}", file=file)
    assert (config.run_folder, config.train.lr) == (finished.path, 5e-5)
    assert config.verifier.chat_template_kwargs == {"date": "today"}
    assert fledge.load_config(*finished.arguments()) == fledge.load_config(file=file)
    with pytest.raises(ValueError, match=r"train\.lr must be above 0"):
        fledge.load_config("train.lr=0", file=file)


def test_a_run_from_python_is_the_command_and_says_which_stage_failed(run, monkeypatch, capfd):
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=popen))
    config = fledge.load_config(*run.arguments())
    config.data.sources[0].limit, config.data.sources[0].path = 8, str(run.folder / "nothing.jsonl")
    with pytest.raises(RuntimeError, match=r"^fledge\.run ended with exit code 2; called again, it goes on there$"):
        fledge.run(config)
    assert "nothing.jsonl" in capfd.readouterr().err


def test_a_finished_run_is_skipped_and_its_results_are_returned(finished, monkeypatch, capfd):
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=popen))
    config = fledge.load_config(*finished.arguments())
    weights = (finished.path / "exports" / "plain" / "model.safetensors").stat().st_mtime_ns
    assert fledge.run(config) == finished.path
    assert "run run is complete" in capfd.readouterr().out
    assert (finished.path / "exports" / "plain" / "model.safetensors").stat().st_mtime_ns == weights
    assert fledge.evaluate(config) == json.loads((finished.path / "evaluation" / "acceptance.json").read_text())


def test_the_notebook_runs_from_top_to_bottom(finished, monkeypatch, capsys):
    monkeypatch.setattr(plt, "show", lambda: None)
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert names["RUN"] == "runs/demo"
            names["RUN"] = str(finished.path)
    out = capsys.readouterr().out
    assert f"{names['sample'].id}\n" in out
    masked = "".join(text for text, mask in zip(names["texts"], names["sample"].loss_mask, strict=True) if mask)
    assert masked
    assert masked.split("<|end|>")[0] + "<|end|>" in out
    assert "the verifier's own answer, token for token: True" in out
    bars = names["axes"].patches
    assert len(bars) == names["answer"]["output_tokens"]
    drafts = [bar for bar in bars if bar.get_height() >= 1]
    assert sum(names["rounds"]["accepted"]) - len(drafts) in range(names["depth"]), "those after the answer's end"
    plt.close(names["figure"])
