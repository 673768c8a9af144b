"""The hidden-state store and what the dump puts into it."""

import shutil

import pytest
import torch
from fledge.data_synthesis.record import record
from fledge.data_synthesis.shard import Sample, Shard, write_shard
from fledge.data_synthesis.store import HiddenStateStore
from fledge.models.verifier import VerifierWeights


def conversations(verifier) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    vocab = verifier.model.config.vocab_size
    return [
        Sample(str(n), torch.randint(0, vocab, (n,), generator=generator), torch.ones(n)) for n in (9, 30, 1, 17, 30, 4)
    ]


def test_recorded_states_equal_output_hidden_states_whatever_the_batching(verifier):
    for conversation, sample in zip(
        conversations(verifier), record(verifier, conversations(verifier), 64), strict=True
    ):
        ids = conversation.input_ids[None]
        with torch.no_grad():
            states = verifier.model(ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer + 1][0] for layer in verifier.aux_layers], dim=-1)
        torch.testing.assert_close(sample.aux_hidden_states, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.last_hidden_state, states[-1][0], rtol=1e-4, atol=1e-4)
        assert sample.id == conversation.id


def test_lm_head_on_the_recorded_state_gives_the_models_logits(verifier, verifier_config):
    conversation = conversations(verifier)[1]
    sample = record(verifier, [conversation], 64)[0]
    with torch.no_grad():
        logits = verifier.model(conversation.input_ids[None]).logits[0]
    again = sample.last_hidden_state @ VerifierWeights(verifier_config).lm_head().T
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


def test_samples_read_back_as_they_were_written(finished):
    store = HiddenStateStore(finished.path / "hidden_states")
    store.verify()
    manifest = store.manifest
    assert len(manifest["shards"]) > 1
    assert len(store) == manifest["counts"]["samples"] == len(set(store.ids))
    assert sum(store.lengths) == manifest["counts"]["tokens"]
    for index in range(len(store)):
        sample = store[index]
        assert len(sample.input_ids) == len(sample.loss_mask) == len(sample.aux_hidden_states) == store.lengths[index]
        assert sample.aux_hidden_states.shape[1] == 3 * manifest["settings"]["verifier"]["hidden_size"]
        assert sample.loss_mask.any()


def test_write_shard_leaves_no_temporary_file_and_tells_its_size(tmp_path):
    sample = Sample("a", torch.arange(4), torch.ones(4), torch.randn(4, 6).bfloat16(), torch.randn(4, 2).bfloat16())
    entry = write_shard(tmp_path, 7, Shard.of([sample, sample]))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00007.safetensors"]
    assert entry["samples"] == 2
    assert entry["tokens"] == entry["counted_tokens"] == 8


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of a store, to be damaged."""
    folder = tmp_path / "hidden_states"
    shutil.copytree(finished.path / "hidden_states", folder)
    return folder


def test_a_flipped_bit_a_truncated_and_a_missing_shard_are_named(broken):
    shard = broken / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: loss_mask does not have its checksum"):
        HiddenStateStore(broken).verify()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors has \d+ bytes"):
        HiddenStateStore(broken)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        HiddenStateStore(broken)
