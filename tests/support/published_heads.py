"""Heads as other projects publish them, damaged or not, a verifier that they fit, and what the doctor finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import make_head, matrices
from fledge.eval.doctor.rules import engine_notes, static_findings
from fledge.models.formats.plain import save_head
from fledge.models.formats.published import read_files, read_published_head
from fledge.models.formats.published_config import HeadFiles
from fledge.models.formats.speculators import save_speculators
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

SHAPE = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=120,
    num_hidden_layers=8, max_position_embeddings=256,
)  # fmt: skip
VERIFIER = {"name_or_path": "some/verifier", "architectures": ["LlamaForCausalLM"]}


@dataclass
class Published:
    """A head in a folder of its own, as some project publishes it; files can be changed in place."""

    folder: Path

    def change_config(self, **changes: object) -> None:
        change_config(self.folder, **changes)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def change_tensors(self, **changes: object) -> None:
        change_tensors(self.folder, {name.replace("__", "."): value for name, value in changes.items()})


ABSENT = object()
IDS = "eagle_aux_hidden_state_layer_ids"


def published(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Published:
    """A head as NVIDIA, SpecForge and EAGLE publish them: few fields, ids in eagle_config, fledge's files absent."""
    folder = tmp_path / "published"
    folder.mkdir()
    head = make_head(**({"fc_norm": False, "norm_output": False} | changes))
    save_head(folder, head, {}, dtype)
    (folder / "fledge.json").unlink()
    theirs = Published(folder)
    ours_only = ("rope_parameters", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    theirs.change_config(
        **dict.fromkeys(ours_only, ABSENT),
        eagle_aux_hidden_state_layer_ids=ABSENT,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True,
                      "use_last_layernorm": True, "use_mtp_layernorm": False},
    )  # fmt: skip
    return theirs


def rounded(head, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype).float() for name, tensor in head.state_dict().items()}


def assert_same_head(read, head, dtype: torch.dtype) -> None:
    assert read.config == head.config
    expected, found = rounded(head, dtype), read.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(read.d2t, head.d2t)
    assert torch.equal(read.t2d, head.t2d)


def refused(theirs: Published, words: str) -> str:
    with pytest.raises(ValueError, match=words) as error:
        read_published_head(theirs.folder, SHAPE)
    return str(error.value)


# -- damaged in one way or another, and what the doctor finds in their files -------------------------------------------

EMBEDDING, _ = matrices()


def head_in(folder: Path, speculators: bool = False, **changes: Any) -> Path:
    if speculators:
        save_speculators(folder, make_head(**changes), {}, torch.bfloat16, VERIFIER, 3)
    else:
        save_head(folder, make_head(**changes), {}, torch.bfloat16)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, changes: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not ABSENT}, folder / "model.safetensors")


def as_published(folder: Path) -> HeadFiles:
    return read_files(folder, SHAPE, weights=SimpleNamespace(embedding=lambda: EMBEDDING))


def codes(folder: Path) -> list[str]:
    findings = static_findings(as_published(folder))
    assert engine_notes(as_published(folder))
    assert all(finding.what and finding.cost and finding.cure for finding in findings)
    return [finding.code for finding in findings]
