"""Heads that the speculators library's own code makes and unrolls: fledge imports them and gives their logits.

Run by `make test-serving`.
"""

import json
from pathlib import Path

import pytest
import torch
from builders import Run
from fledge.conf.schema import VerifierConfig
from fledge.models.formats.plain import load_head
from fledge.models.verifier.config import load_config
from fledge.models.verifier.weights import VerifierWeights
from fledge.train.loss.rows import PackedBatch
from fledge.train.loss.unroll import unroll
from safetensors.torch import load_file
from serving import in_vllms_environment

pytestmark = pytest.mark.serving
LENGTHS, TTT_STEPS = [41, 14], 4
HEADS = {
    "its defaults": {},
    "three layers": {"num_layers": 3},
    "Qwen3 layers": {"num_layers": 2, "draft_arch": "qwen3"},
    "a norm for each aux state": {"norm_before_fc": False, "fc_norm": True, "norm_before_residual": False},
    "the last layer among four": {"target_layer_ids": [2, 4, 5, 8]},
    "a window": {"sliding_window": 16},
    "a window in one of two layers": {"num_layers": 2, "sliding_window": 16, "full_attention_indices": [1]},
}
TOLERANCE = 2e-5  # of logits that spread by about 1: the norms of the library are in float32


def make_theirs(folder: Path, verifier: VerifierConfig, options: dict[str, object]) -> dict[str, torch.Tensor]:
    """Let the library make, save and unroll a head; return what it drew and its logits."""
    request = {
        "verifier": verifier.path,
        "folder": str(folder),
        "vocab_size": load_config(verifier).vocab_size,
        "draft_vocab_size": 300,
        "lengths": LENGTHS,
        "ttt_steps": TTT_STEPS,
        "options": options,
    }
    asked = folder.with_suffix(".json")
    asked.write_text(json.dumps(request))
    answer, log = in_vllms_environment("speculators_unroll.py", asked)
    assert answer is not None, log[-6000:]
    return load_file(answer["unroll"])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_the_librarys_classes_imports_and_gives_its_logits_at_every_step(tmp_path, verifier_config, name):
    theirs = make_theirs(tmp_path / "theirs", verifier_config, HEADS[name])
    run = Run(tmp_path / "runs", Path(verifier_config.path))
    run("import", f"head_import.source={tmp_path / 'theirs'}")
    head, _ = load_head(run.path / "imports" / "theirs")
    if name == "its defaults":
        config = head.config
        assert (config.norm_before_fc, config.fc_norm, config.norm_output, config.norm_before_residual) == (
            True, False, True, True,
        )  # fmt: skip
        assert (config.sliding_window, config.window_layers, config.aux_layers) == (2048, (0,), (1, 3, 4))

    position = torch.cat([torch.arange(length) for length in LENGTHS])
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    every = torch.ones_like(position, dtype=torch.bool)
    ids, states = theirs["input_ids"], theirs["hidden_states"]
    batch = PackedBatch(ids, every, document, position, states, torch.zeros(len(ids), 1), LENGTHS, ["long", "short"])
    rows = batch.useful_rows(TTT_STEPS)
    with torch.no_grad():
        unrolled = unroll(head, batch, rows, VerifierWeights(verifier_config).embedding())
        ours = [head.lm_head(normed) for normed in unrolled]
    window = head.config.sliding_window or len(ids)
    for step, logits in enumerate(ours):
        at = rows.rows[rows.steps[step]]
        apart = (logits - theirs[f"logits.{step}"][at - document[at]]).abs().amax(-1)
        # At later steps the library counts a window from the row, engines and fledge from the row's position.
        as_served = position[at] + step < window if step else torch.ones_like(at, dtype=torch.bool)
        print(f"{name}, step {step}: {logits.std():.2f} spread, {apart[as_served].max():.1e} apart, of {len(at)} rows "
              f"{int((~as_served).sum())} with keys beyond the window")  # fmt: skip
        assert apart[as_served].max() < TOLERANCE
        assert as_served.all() or apart[~as_served].min() > 10 * TOLERANCE, "the library counts as engines do now"
