"""The hidden-state store and what the dump puts into it."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from builders import copy_folder, copy_parts, metrics_of
from fledge.data_synthesis.states.transformers_engine import TransformersEngine, check_first
from fledge.data_synthesis.store.shard import Sample, Shard, write_shard
from fledge.data_synthesis.store.state_format import FLOAT8, StateFormat
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.models.verifier.weights import VerifierWeights
from safetensors.torch import load_file, save_file


def conversations(verifier) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    vocab = verifier.model.config.vocab_size
    return [
        Sample(str(n), torch.randint(0, vocab, (n,), generator=generator), torch.ones(n)) for n in (9, 30, 1, 17, 30, 4)
    ]


def test_recorded_states_equal_output_hidden_states_whatever_the_batching(verifier):
    samples = conversations(verifier)
    seen = set()
    for number, aux, last in TransformersEngine(verifier, 64).read(samples):
        with torch.no_grad():
            states = verifier.model(samples[number].input_ids[None], output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer + 1][0] for layer in verifier.aux_layers], dim=-1)
        torch.testing.assert_close(aux, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, states[-1][0], rtol=1e-4, atol=1e-4)
        seen.add(number)
    assert seen == set(range(len(samples)))


def test_lm_head_on_the_recorded_state_gives_the_models_logits(verifier, verifier_config):
    sample = conversations(verifier)[1]
    ((_, _, last),) = TransformersEngine(verifier, 64).read([sample])
    with torch.no_grad():
        logits = verifier.model(sample.input_ids[None]).logits[0]
    again = last @ VerifierWeights(verifier_config).lm_head().T
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


def test_a_dump_that_would_store_wrong_targets_is_refused_before_it_begins(verifier, verifier_config, tmp_path, capsys):
    tokens = conversations(verifier)[1].input_ids
    check_first(verifier_config, verifier, tokens, StateFormat(torch.bfloat16))
    check_first(verifier_config, verifier, tokens, StateFormat(FLOAT8))
    moved = float(capsys.readouterr().out.split("distribution by ")[1].split(" nats")[0])
    assert 0 < moved < 0.1
    folder = shutil.copytree(verifier_config.path, tmp_path / "verifier")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16, FLOAT8):
        with pytest.raises(ValueError, match="its logits are not its lm_head times the state that is stored"):
            check_first(replace(verifier_config, path=str(folder)), verifier, tokens, StateFormat(dtype))


@pytest.mark.parametrize("lengths", [[300, 290, 280, 150, 149, 148, 20, 19, 3], list(range(1, 200, 3))])
def test_little_padding_is_computed_and_no_document_is_read_twice(verifier, lengths):
    samples = [Sample(str(n), torch.zeros(n, dtype=torch.int32), torch.ones(n)) for n in lengths]
    widths = []
    hook = verifier.model.register_forward_pre_hook(
        lambda _module, _arguments, keywords: widths.append(keywords["input_ids"].shape), with_kwargs=True
    )
    try:
        read = [number for number, _, _ in TransformersEngine(verifier, 600).read(samples)]
    finally:
        hook.remove()
    assert sorted(read) == list(range(len(samples)))
    computed = sum(rows * width for rows, width in widths)
    assert sum(lengths) <= computed <= sum(lengths) / 0.875
    assert all(rows * width <= 600 for rows, width in widths)


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


def test_a_store_of_more_shards_than_files_may_be_open_is_read(finished):
    store = HiddenStateStore(finished.path / "hidden_states")
    opened = len(os.listdir("/proc/self/fd"))
    store.verify()
    samples = [store[index] for index in range(len(store))]
    assert not any(store.not_finite(number) for number in range(len(store.entries)))
    assert len(samples[-1].aux_hidden_states)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_write_shard_leaves_no_temporary_file_and_tells_its_size(tmp_path):
    sample = Sample("a", torch.arange(4), torch.ones(4), torch.randn(4, 6).bfloat16(), torch.randn(4, 2).bfloat16())
    entry = write_shard(tmp_path, 7, Shard.of([sample, sample]))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00007.safetensors"]
    assert entry["samples"] == 2
    assert entry["tokens"] == entry["counted_tokens"] == 8


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of a store, to be damaged."""
    return copy_folder(finished.path / "hidden_states", tmp_path / "hidden_states")


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


def test_training_never_asks_for_the_last_states_that_a_store_of_targets_leaves_out(finished, run):
    copy_parts(finished, run, "conversations")
    for stage in ("dump", "train"):
        run(stage, "dump.last_states=counted")
    states = [load_file(r.path / "hidden_states/shard-00000.safetensors")["last_hidden_state"] for r in (run, finished)]
    assert len(states[0]) < len(states[1])
    assert metrics_of(run) == metrics_of(finished)
    ours, theirs = (load_file(r.path / "training/checkpoints/step-24/model.safetensors") for r in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_is_trained_from_float8_states_as_from_exact_ones(finished, run):
    copy_parts(finished, run, "conversations")
    for stage in ("dump", "train"):
        run(stage, "dump.dtype=float8")
    for record, exact in zip(metrics_of(run), metrics_of(finished), strict=True):
        if "train/loss" in record:
            assert record["train/loss"] == pytest.approx(exact["train/loss"], rel=0.02)
            assert record["train/loss"] != exact["train/loss"]
