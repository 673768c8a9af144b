"""Online training: the verifier beside the trainer gives what a dump would have recorded, and no state is written."""

import json

import pytest
import torch
from builders import Run, as_if_killed_after, assert_same_record, copy_parts, metrics_of
from fledge.conf.schema import Config, DraftConfig, DumpConfig, HiddenStates, TrainConfig, VerifierConfig
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.models.formats.training_folder import checkpoint_steps, head_folder
from fledge.train.data.online import OnlineStates
from fledge.train.data.training_data import Batches
from safetensors import safe_open
from safetensors.torch import load_file

ONLINE = "train.hidden_states=online"


@pytest.fixture(scope="module")
def online(finished, tmp_path_factory) -> Run:
    """The finished run, its training made online from a store of tokens."""
    run = copy_parts(finished, Run(tmp_path_factory.mktemp("online"), finished.verifier), "conversations")
    for stage in ("dump", "train", "evaluate", "export"):
        run(stage, ONLINE, "evaluate.baselines=false", "evaluate.heldout_prompts=4")
    return run


def assert_same_curve(ours: Run, theirs: Run) -> None:
    """Not bit for bit: other documents share a forward pass than in the dump, so float32 sums change their order."""
    for record, other in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        assert_same_record(record, other)
    walks, others = (run.path / "training/checkpoints/step-24/heldout_walks.json" for run in (ours, theirs))
    for num, by_id in json.loads(others.read_text()).items():
        for name, walked in json.loads(walks.read_text())[num].items():
            assert walked.pop("by_position") == by_id[name].pop("by_position")  # lists, which approx does not take
            assert walked == pytest.approx(by_id[name], rel=1e-5)


def test_no_file_of_an_online_run_holds_a_hidden_state_and_its_tokens_are_the_dumps(online, finished):
    shards = sorted((online.path / "hidden_states").glob("shard-*.safetensors"))
    for shard in shards:
        tokens, full = load_file(shard), load_file(finished.path / "hidden_states" / shard.name)
        assert tokens.keys() == {"input_ids", "loss_mask", "sample_offsets"}
        assert all(torch.equal(tokens[name], full[name]) for name in tokens)
    for name in ("vocab_map", "token_counts"):
        ours, theirs = (load_file(run.path / "hidden_states" / f"{name}.safetensors") for run in (online, finished))
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    stores = [HiddenStateStore(run.path / "hidden_states", with_states=False) for run in (online, finished)]
    assert stores[0].ids == stores[1].ids
    assert stores[0].manifest["settings"]["states"] is False
    num_tokens = sum(stores[0].lengths)
    for path in online.path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            assert not any("hidden_state" in name for name in tensors.keys())  # noqa: SIM118
    assert sum(shard.stat().st_size for shard in shards) < 16 * num_tokens


def test_online_training_gives_the_curve_and_the_walks_of_offline(online, finished):
    assert_same_curve(online, finished)


def test_a_head_trained_online_is_evaluated_and_exported(online):
    results = json.loads((online.path / "evaluation" / "acceptance.json").read_text())
    assert results["acceptance_length"] > 1.2
    assert results["lossless"]["equal_to_verifier"] == results["lossless"]["decoded_answers"]
    exported = load_file(online.path / "exports" / "plain" / "model.safetensors")
    trained = load_file(head_folder("best", online.path / "training") / "model.safetensors")
    assert torch.equal(exported["fc.weight"], trained["fc.weight"].bfloat16())


def test_two_processes_at_zero_3_give_the_curve_of_offline_and_leave_a_stores_states_unread(
    finished, tmp_path, verifier_config, capsys
):
    options = ["deepspeed.zero_stage=3", "train.verify_checksums=false", "train.packs_per_step=2"]
    offline = copy_parts(finished, Run(tmp_path / "offline", finished.verifier), "conversations", "hidden_states")
    offline("train", *options)
    online = copy_parts(finished, Run(tmp_path / "online", finished.verifier), "conversations", "hidden_states")
    for shard in (online.path / "hidden_states").glob("shard-*.safetensors"):
        spoil_states(shard)
    dump(dump_config(online, verifier_config, HiddenStates.online))
    assert "is complete, and holds the states too" in capsys.readouterr().out
    online("train", ONLINE, *options, processes=2)
    assert_same_curve(online, offline)


def dump_config(run: Run, verifier: VerifierConfig, states: HiddenStates) -> Config:
    """What `Run.arguments` says to the dump stage."""
    return Config(
        run.name,
        str(run.folder),
        verifier=verifier,
        draft=DraftConfig(vocab_size=300),
        dump=DumpConfig(max_length=1024, shard_tokens=500, keep_truncated=False),
        train=TrainConfig(hidden_states=states),
    )


def spoil_states(shard) -> None:
    """Overwrite the hidden states of a shard with noise, in place."""
    content = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in ("aux_hidden_states", "last_hidden_state"):
        first, last = header[name]["data_offsets"]
        content[start + first : start + last] = b"\x55" * (last - first)
    shard.write_bytes(content)


def test_an_online_run_resumed_equals_the_uninterrupted_one_bit_for_bit(online, tmp_path):
    resumed = copy_parts(online, Run(tmp_path, online.verifier), "conversations", "hidden_states", "training")
    as_if_killed_after(resumed, 9)
    assert "going on from step 9" in resumed("train", ONLINE).stdout
    assert checkpoint_steps(resumed.path / "training" / "checkpoints") == [9, 18, 24]
    weights, again = (
        load_file(run.path / "training/checkpoints/step-24/model.safetensors") for run in (online, resumed)
    )
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_batch_is_filled_in_its_own_order_whatever_fits_into_a_forward(finished, verifier):
    store = HiddenStateStore(finished.path / "hidden_states")
    samples = sorted(range(len(store)), key=lambda i: store.lengths[i] % 7)[:9]
    recorded = Batches([store], store.lengths, 3)[samples]
    tokens = Batches([HiddenStateStore(store.folder, with_states=False)], store.lengths, 3)[samples]
    assert tokens.aux_hidden_states is None
    for batch_tokens in (1, 100, 100_000):
        filled = OnlineStates(verifier, batch_tokens, torch.float32).fill(tokens)
        for state, expected in zip(filled.states, recorded.states, strict=True):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    rounded = OnlineStates(verifier, 100, torch.bfloat16).fill(tokens)
    assert rounded.states[0].dtype == rounded.states[1].dtype == torch.bfloat16


def test_a_store_of_tokens_is_refused_where_states_are_needed(online, tmp_path, verifier_config):
    with pytest.raises(ValueError, match=r"holds tokens without hidden states: train with train\.hidden_states=online"):
        HiddenStateStore(online.path / "hidden_states")
    run = copy_parts(online, Run(tmp_path, online.verifier), "conversations", "hidden_states")
    assert "fledge: error: " + str(run.path / "hidden_states") + " holds tokens" in run("train", code=2).stderr
    with pytest.raises(ValueError, match=r"made with other settings \(aux_layers: None -> \[1, 3, 4\].*states: False"):
        dump(dump_config(run, verifier_config, HiddenStates.offline))
