"""The import command: a published head becomes a checkpoint."""

import pytest
import torch
from builders import make_head
from fledge.conf.schema import (
    HeadImportConfig,
)
from fledge.models.formats.plain import load_head
from fledge.models.formats.published import read_published_head
from fledge.models.import_head import import_head
from fledge.models.verifier.weights import VerifierWeights
from published_heads import ABSENT, SHAPE, assert_same_head, published, refused, rounded
from safetensors.torch import save_file


def test_a_head_that_declares_the_verifiers_lm_head_is_given_it(tmp_path, config):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(lm_head__weight=ABSENT)
    theirs.change_config(draft_vocab_size=None)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    head, _ = load_head(config.run_folder / "imports" / "published")
    assert torch.equal(head.lm_head.weight, VerifierWeights(config.verifier).lm_head())


@pytest.mark.parametrize("size", [None, 120])
def test_a_head_that_reuses_the_verifiers_lm_head_by_name_is_given_it(tmp_path, config, size):
    theirs = published(tmp_path, draft_vocab_size=None)
    theirs.change_tensors(lm_head__weight=ABSENT)
    theirs.change_config(draft_vocab_size=size, reuse_target_lm_head=True, additional_fc=False)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    head, _ = load_head(config.run_folder / "imports" / "published")
    assert torch.equal(head.lm_head.weight, VerifierWeights(config.verifier).lm_head())


def test_the_verifiers_lm_head_is_offered_as_a_cure_to_a_full_vocabulary_only(tmp_path):
    theirs = published(tmp_path)
    theirs.change_tensors(lm_head__weight=ABSENT)
    assert "draft_vocab_size: null" not in refused(theirs, "fetch the head's complete checkpoint")
    theirs.change_config(draft_vocab_size=120)
    refused(theirs, "fetch the head's complete checkpoint, or, .* by draft_vocab_size: null")


def test_q_and_k_for_pairs_of_neighbours_are_reordered(tmp_path, config):
    head = make_head(fc_norm=False, norm_output=False)
    theirs = published(tmp_path)
    pairs = torch.arange(16).view(2, 8).T.flatten()  # 0, 8, 1, 9 ...: dimension i and its partner side by side
    tensors = theirs.tensors()
    for name in ("midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight"):
        tensors[name] = tensors[name].view(-1, 16, 64)[:, pairs].flatten(0, 1)
    save_file(tensors, theirs.folder / "model.safetensors")
    assert not torch.equal(
        read_published_head(theirs.folder, SHAPE).head.layers[0].self_attn.q_proj.weight,
        rounded(head, torch.bfloat16)["layers.0.self_attn.q_proj.weight"],
    )
    config.head_import = HeadImportConfig(source=str(theirs.folder), interleaved_rotary=True)
    import_head(config)
    assert_same_head(load_head(config.run_folder / "imports" / "published")[0], head, torch.bfloat16)


def test_a_narrower_head_without_an_embedding_is_refused(tmp_path):
    theirs = published(tmp_path, hidden_size=24, own_embedding=True)
    theirs.change_tensors(embed_tokens__weight=ABSENT)
    refused(theirs, "embed_tokens.weight is missing, the verifier's has rows of 32")


def test_importing_again_is_skipped_and_another_head_needs_overwrite(tmp_path, config, capsys):
    theirs = published(tmp_path)
    config.head_import.source = str(theirs.folder)
    import_head(config)
    import_head(config)
    assert "is complete" in capsys.readouterr().out
    theirs.change_tensors(norm__weight=torch.ones(32))
    with pytest.raises(ValueError, match="overwrite=true"):
        import_head(config)
    config.overwrite = True
    import_head(config)
    assert torch.equal(load_head(config.run_folder / "imports" / "published")[0].norm.weight, torch.ones(32))


def test_import_asks_for_a_folder_of_a_published_head(tmp_path, config):
    with pytest.raises(ValueError, match=r"head_import\.source is required"):
        import_head(config)
    config.head_import.source = "some/head"
    with pytest.raises(ValueError, match="hf download"):
        import_head(config)
    config.head_import.source = str(published(tmp_path).folder)
    import_head(config)
    config.head_import.source = str(config.run_folder / "imports" / "published")
    with pytest.raises(ValueError, match="was imported already"):
        import_head(config)
