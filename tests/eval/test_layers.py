"""`fledge layers`: linear heads find the layers that tell what comes, and short trainings decide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from builders import copy_folder, write_store
from commands import run_command
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.eval.layers import _different, rank
from fledge.models.verifier.weights import VerifierWeights


def test_linear_heads_find_the_layers_that_the_logits_depend_on(finished, verifier_config, tmp_path, monkeypatch):
    masks = {f"sample/{n}": "0" * 4 + "1" * 40 for n in range(60)}
    folder = write_store(tmp_path / "store", finished.path / "hidden_states", masks, 0.2)
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = manifest["settings"]["aux_layers"]
    hidden = manifest["settings"]["verifier"]["hidden_size"]
    mix = torch.randn(2, hidden, hidden, generator=torch.Generator().manual_seed(1)) / hidden**0.5
    read = HiddenStateStore.__getitem__

    def of_two_layers(self, index):
        """A sample whose last state at t + 1 is a sum of the first and last aux state at t."""
        sample = read(self, index)
        first, *_, last = sample.aux_hidden_states.unflatten(-1, (len(stored), -1)).unbind(1)
        state = first @ mix[0] + last @ mix[1]
        sample.last_hidden_state = torch.cat([torch.zeros(1, hidden), state[:-1]])
        return sample

    monkeypatch.setattr(HiddenStateStore, "__getitem__", of_two_layers)
    weights = VerifierWeights(verifier_config)
    ranked = rank(HiddenStateStore(folder), weights, stored, 2)
    assert len(ranked) == 3
    assert ranked[0][0] == (stored[0], stored[-1])
    assert ranked[0][1] > ranked[1][1] + 0.2
    alone = dict(rank(HiddenStateStore(folder), weights, stored, 1))
    assert alone[(stored[1],)] == pytest.approx(0, abs=0.1)
    assert all(score < ranked[0][1] for score in alone.values())


def test_sets_next_to_one_that_is_kept_are_passed_over():
    assert _different([(1, 5, 9), (1, 6, 8), (1, 5, 7), (1, 5, 8), (5,), (4,)]) == [(1, 5, 9), (1, 5, 7), (5,)]


def test_the_best_set_is_said_and_written_and_another_start_repeats_nothing(finished, tmp_path):
    run = tmp_path / "runs" / "run"
    copy_folder(finished.path / "conversations", run / "conversations")
    options = ["layers.size=2", "layers.num_sets=2", "layers.steps=2", "layers.conversations=20"]
    command = finished.command("layers", f"runs_dir={tmp_path / 'runs'}", *options)
    first = run_command(command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    written = json.loads((run / "layers" / "layers.json").read_text())
    assert f"draft.aux_layers={written['draft.aux_layers']}" in first.stdout
    assert len(written["trained"]) == 3, "the default's and two"
    assert all((Path(place) / "checkpoints" / "step-2").is_dir() for place in written["trained"].values())
    assert re.search(r"minus 1-\d+-\d+", first.stdout), "the default is what others are compared with"
    sizes = {len(entry["aux_layers"]) for entry in written["ranked"]}
    assert sizes == {2}
    settings = json.loads((run / "layers" / "hidden_states" / "manifest.json").read_text())
    assert settings["settings"]["limit"] == 20
    again = run_command(command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is complete") >= 4
    assert json.loads((run / "layers" / "layers.json").read_text()) == written


def test_a_store_that_holds_nothing_out_is_refused(finished, verifier_config, tmp_path):
    folder = write_store(
        tmp_path / "store", finished.path / "hidden_states", {"sample/1": "0011", "sample/2": "0111"}, 0.0
    )
    with pytest.raises(ValueError, match="holds nothing out, which sets are judged by"):
        rank(HiddenStateStore(folder), VerifierWeights(verifier_config), [1], 1)


def test_candidates_that_are_no_layers_are_refused(finished, tmp_path):
    done = run_command(finished.command("layers", f"runs_dir={tmp_path}", "layers.candidates=[0,99,1]"), cwd=tmp_path)
    assert done.returncode == 2
    assert "layers.candidates must be 3 layers of the verifier or more, 0 to" in done.stderr
