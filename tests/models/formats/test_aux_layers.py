"""The aux layers of published heads: read as numbered, asked for, or refused."""

import pytest
import torch
from builders import make_head
from fledge.conf.schema import (
    AuxNumbering,
    Config,
    HeadImportConfig,
    validate,
)
from fledge.models.formats.published import read_published_head
from fledge.models.formats.speculators import save_speculators
from published_heads import ABSENT, IDS, SHAPE, VERIFIER, published, refused


@pytest.mark.parametrize(
    ("nested", "top", "numbering", "layers"),
    [
        ([1, 3, 4], None, None, (1, 3, 4)),
        ([1, 3, 4], [2, 4, 5], None, (1, 3, 4)),
        ([1, 3, 4], [1, 3, 4], None, (1, 3, 4)),
        ([4, 1, 3], [5, 2, 4], None, (1, 3, 4)),
        (None, [1, 3, 4], AuxNumbering.zero_based, (1, 3, 4)),
        (None, [1, 3, 4], AuxNumbering.vllm, (0, 2, 3)),
    ],
)
def test_aux_ids_are_read_as_numbered(tmp_path, nested, top, numbering, layers):
    theirs = published(tmp_path)
    theirs.change_config(
        eagle_config={"eagle_aux_hidden_state_layer_ids": nested}, eagle_aux_hidden_state_layer_ids=top
    )
    options = HeadImportConfig(aux_numbering=numbering)
    assert read_published_head(theirs.folder, SHAPE, options).head.config.aux_layers == layers


@pytest.mark.parametrize(
    ("nested", "top", "numbering", "words"),
    [
        (None, [1, 3, 4], None, "head_import.aux_numbering=zero_based .* =vllm"),
        ([1, 3, 4], [2, 4, 6], None, "not the same layers"),
        ([1, 3, 4], [0, 2, 3], None, "not the same layers"),
        ([1, 3, 4], None, AuxNumbering.vllm, "leaves nothing open"),
        ([1, 3, 8], None, None, "0 to 7"),
        ([1, 3, 3], None, None, "different ones"),
        (None, [0, 3, 4], AuxNumbering.vllm, r"\[-1, 2, 3\]"),
        (["a"], None, None, "list of integers"),
        ([1, 3], None, None, r"fc.weight has shape \[32, 96\], \[32, 64\] is required"),
    ],
)
def test_aux_ids_that_cannot_be_right_are_refused(tmp_path, nested, top, numbering, words):
    theirs = published(tmp_path)
    theirs.change_config(
        eagle_config={"eagle_aux_hidden_state_layer_ids": nested}, eagle_aux_hidden_state_layer_ids=top
    )
    with pytest.raises(ValueError, match=words):
        read_published_head(theirs.folder, SHAPE, HeadImportConfig(aux_numbering=numbering))


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("ids", [ABSENT, None, []])
def test_layers_that_config_json_does_not_name_are_asked_for(tmp_path, speculators, ids):
    theirs = published(tmp_path)
    head = make_head(fc_norm=False, norm_output=False, aux_layers=(0, 2, 6))
    if speculators:
        save_speculators(theirs.folder, head, {}, torch.bfloat16, VERIFIER, 3)
    theirs.change_config(**{IDS: ids, "eagle_config": {}})
    refused(theirs, r"does not say which layers.*head_import\.aux_layers=\[.*engines take \[1, 3, 4\] unasked")
    read = read_published_head(theirs.folder, SHAPE, HeadImportConfig(aux_layers=[6, 0, 2]))
    assert read.head.config.aux_layers == (0, 2, 6)
    with pytest.raises(ValueError, match="different ones from 0 to 7"):
        read_published_head(theirs.folder, SHAPE, HeadImportConfig(aux_layers=[0, 2, 8]))


def test_layers_are_not_taken_from_the_option_where_config_json_names_them(tmp_path):
    with pytest.raises(ValueError, match=r"head_import\.aux_layers is \[0, 2, 6\].*leaves nothing open"):
        read_published_head(published(tmp_path).folder, SHAPE, HeadImportConfig(aux_layers=[0, 2, 6]))


@pytest.mark.parametrize("layers", [[], [1, 1, 3], [-1, 3, 4]])
def test_the_option_must_name_different_layers(layers):
    with pytest.raises(ValueError, match=r"head_import\.aux_layers must be different layers"):
        validate(Config(name="x", head_import=HeadImportConfig(aux_layers=layers)))
