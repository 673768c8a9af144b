"""What `fledge inspect` tells of a store."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from builders import conversation_record, conversations_run, copy_folder, recorded_sequence
from commands import run_command
from fledge.conf.cli import overrides_of
from fledge.conf.schema import Config, HiddenStates, InspectConfig, LastStates, StateDtype
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.inspect_store import _decoded, inspect_store
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.store.index import StoreIndex, sidecar_checksums
from fledge.data_synthesis.store.mapped_shard import MappedShard
from fledge.data_synthesis.store.shard import Sample, Shard, write_shard
from fledge.data_synthesis.store.state_format import FLOAT8, decode
from fledge.data_synthesis.store.store import HiddenStateStore, write_index
from fledge.models.verifier.config import load_tokenizer


@pytest.fixture
def config(tmp_path, verifier_config) -> Config:
    """A run with a store of two conversations, of 5 and 9 tokens."""
    tokens = [20, 21, 22, 2, 23, 24, 25, 26, 2]
    config = conversations_run(
        tmp_path,
        verifier_config,
        conversation_record("a", "u", "b", sequences=[recorded_sequence(tokens[:5], (2, 5))]),
        conversation_record("b", "u", "b", "v", "c", sequences=[recorded_sequence(tokens, (2, 4), (6, 9))]),
    )
    config.train.hidden_states = HiddenStates.offline
    dump(config)
    return config


def inspected(config: Config, capsys, **options: object) -> dict[str, str]:
    """The printed facts by name, and the rest under "text"."""
    capsys.readouterr()
    inspect_store(replace(config, inspect=InspectConfig(**options)))
    lines = capsys.readouterr().out.splitlines()
    facts = [line for line in lines[: lines.index("")] if line] if "" in lines else lines
    return {line[:13].strip(): line[13:].strip() for line in facts} | {"text": "\n".join(lines)}


def test_a_store_tells_what_it_is_of(config, capsys, verifier_config):
    facts = inspected(config, capsys)
    store = HiddenStateStore(config.hidden_states_folder)
    verifier = store.manifest["settings"]["verifier"]
    assert facts["store"] == str(config.hidden_states_folder)
    assert facts["verifier"].startswith(f"{verifier_config.path}: 8 layers, width 64, 600 tokens")
    assert verifier["fingerprint"] in facts["verifier"]
    assert facts["states"].startswith("float32, of decoder layers 1, 3, 4 (0-based) and the last, normed, at all")
    assert facts["samples"] == "2 of 2 conversations, 0 held out, 0 with images"
    assert facts["tokens"] == "14, of which the verifier wrote 8 (57.1%)"
    assert facts["length"].startswith("5 to 9, median 9, mean 7.0")
    assert facts["checksums"].startswith("not compared")
    aux = torch.cat([store[n].aux_hidden_states for n in (0, 1)]).unflatten(-1, (3, -1))[:, 1]
    size, largest = aux.square().mean().sqrt(), aux.abs().max()
    assert facts["layer 3"] == f"root mean square {size:.3g}, largest {largest:.3g}"
    assert facts["finite"] == "0 samples are not, of those with 14 tokens that were read"


def test_a_sample_is_shown_as_text_with_what_the_verifier_wrote_marked(config, capsys, verifier_config):
    text = inspected(config, capsys, sample="b")["text"]
    tokenizer = load_tokenizer(verifier_config)
    parts = [tokenizer.decode(tokens) for tokens in ([20, 21], [22, 2], [23, 24], [25, 26, 2])]
    assert "sample b, 9 tokens" in text
    assert text.endswith(f"{parts[0]}⟦{parts[1]}⟧{parts[2]}⟦{parts[3]}⟧")
    with pytest.raises(ValueError, match=r"inspect\.sample: .* holds no sample 'c'"):
        inspected(config, capsys, sample="c")


def test_a_store_is_read_without_its_verifier_at_hand(config, capsys, tmp_path):
    moved = shutil.copytree(config.hidden_states_folder, tmp_path / "elsewhere")
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "verifier_path": str(tmp_path / "gone")}))
    config.verifier = replace(config.verifier, path="recorded")
    text = inspected(config, capsys, store=str(moved))["text"]
    assert "sample a is not decoded: verifier.path" in text


def test_verify_reads_everything_and_names_what_was_altered(config, capsys):
    assert inspected(config, capsys, verify=True)["checksums"] == "all right"
    shard = config.hidden_states_folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    for place, what in ((len(whole) - 1, "loss_mask"), (len(whole) // 2, "aux_hidden_states"), (100, "the header")):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"shard-00000\.safetensors: {what} does not have its checksum"):
            inspected(config, capsys, verify=True)
    shard.write_bytes(whole)
    index = config.hidden_states_folder / "index.safetensors"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"index\.safetensors does not have the checksum"):
        inspected(config, capsys)


@pytest.mark.parametrize("dtype", [StateDtype.float32, StateDtype.bfloat16, StateDtype.float8])
def test_states_that_are_not_finite_are_found_and_named(config, capsys, dtype, tmp_path, monkeypatch):
    config.dump.dtype, config.dump.folder = dtype, str(tmp_path / "store")
    dump(config)
    folder = config.hidden_states_folder
    store = HiddenStateStore(folder)
    samples = [store[index] for index in range(2)]
    bad = samples[1]
    if dtype is StateDtype.float8:
        bad.aux_scale = bad.aux_scale.clone()
        bad.aux_scale[3, 1] = torch.nan
        for sample in samples:
            sample.aux_hidden_states = sample.aux_hidden_states.view(torch.float8_e4m3fn)
            sample.last_hidden_state = sample.last_hidden_state.view(torch.float8_e4m3fn)
    else:
        bad.aux_hidden_states = bad.aux_hidden_states.clone()
        bad.aux_hidden_states[3, 70] = torch.inf
    del store
    entry = write_shard(folder, 0, Shard.of(samples))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_index(folder, [entry])
    manifest |= {"shards": [entry], "files": sidecar_checksums(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stopped:
        inspected(config, capsys)
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not finite: b"
    monkeypatch.setattr("fledge.data_synthesis.inspect_store._SCANNED", 1)
    assert inspected(config, capsys)["finite"].startswith("0 samples are not, of those with 5 tokens")
    read = []
    place = StoreIndex.place
    monkeypatch.setattr(StoreIndex, "place", lambda self, n: (read.append(n), place(self, n))[1])
    with pytest.raises(SystemExit):
        inspected(config, capsys, verify=True)
    out = capsys.readouterr().out
    assert "finite        1 samples are not, of all 2" in out
    assert out.splitlines()[-1] == "not finite: b"
    assert read == [0, 0], "measured, and shown: the others are not decoded"


@pytest.mark.parametrize("dtype", [StateDtype.float16, StateDtype.float8])
def test_last_states_that_are_kept_where_they_count_are_looked_at_too(config, capsys, dtype, tmp_path, monkeypatch):
    def too_large(self, given, *stop):
        for number, aux, last in read(self, given):
            yield number, aux, (last.fill_(torch.inf) if given[number].id == "b" else last)

    read = TransformersEngine.read
    monkeypatch.setattr(TransformersEngine, "read", too_large)
    config.dump.dtype, config.dump.folder = dtype, str(tmp_path / "store")
    config.dump.last_states = LastStates.counted
    dump(config)
    with pytest.raises(SystemExit):
        inspected(config, capsys, verify=True)
    assert capsys.readouterr().out.splitlines()[-1] == "not finite: b"


def test_an_unfinished_store_tells_how_far_it_is(config, capsys, tmp_path):
    config.dump.folder, config.dump.num_writers, config.dump.shard_tokens = str(tmp_path / "store"), 2, 5
    dump(config)
    facts = inspected(config, capsys)
    assert facts["not complete"] == "1 of 2 shards are there, 0 writers at work or stopped; `fledge dump` goes on"


def test_a_store_of_tokens_has_no_states_to_show(config, capsys):
    facts = inspected(config, capsys, store=str(config.hidden_states_folder / "tokens"), verify=True)
    assert facts["states"] == "none: tokens for online training"
    assert facts["checksums"] == "all right"


def test_a_store_is_shown_without_torch_which_takes_longer_to_import_than_all_else(config):
    script = (
        "import sys; from fledge.conf.cli import main; main(['inspect', sys.argv[1]]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(config.hidden_states_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # a forked one has torch already
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["False"]), done.stderr
    assert "⟦" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FLOAT8])
def test_states_are_decoded_without_torch_as_with_it(tmp_path, dtype):
    values = torch.randn(32, 32) if dtype is not FLOAT8 else torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    states, scale = values.to(dtype).reshape(8, -1), torch.rand(8, 4) if dtype is FLOAT8 else None
    sample = Sample("a", torch.arange(8), torch.ones(8), states, states, scale, scale)
    shard = MappedShard(tmp_path / "shard-00000.safetensors", write_shard(tmp_path, 0, Shard.of([sample])))
    decoded = torch.from_numpy(_decoded(shard, "aux_hidden_states", "aux_scale", 0))
    torch.testing.assert_close(decoded, decode(states, scale, torch.float32), rtol=0, atol=0, equal_nan=True)


def test_the_folder_and_the_flag_are_written_as_other_commands_write_them():
    assert overrides_of("inspect", ["a folder/it's", "--verify"]) == [
        "name=inspect",
        "verifier.path=recorded",
        r"inspect.store='a folder/it\'s'",
        "inspect.verify=true",
    ]
    assert overrides_of("inspect", ["experiment=demo", "name=demo"]) == ["experiment=demo", "name=demo"]
    assert overrides_of("inspect", ["--verify", "runs/x"])[2:] == ["inspect.verify=true", "inspect.store='runs/x'"]
    assert overrides_of("inspect", ["--cfg", "job", "runs/x"])[2:] == ["--cfg", "job", "inspect.store='runs/x'"]


def test_a_store_that_is_being_cleared_is_told(config, capsys):
    manifest = config.hidden_states_folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": None, "complete": False}))
    with pytest.raises(ValueError, match="is being cleared, or that was killed: run `fledge dump` again"):
        inspected(config, capsys)


def test_the_command_takes_a_folder_with_blanks(finished, tmp_path):
    folder = copy_folder(finished.path / "hidden_states", tmp_path / "a folder, it's")
    done = finished("inspect", code=0)
    assert "float32, of decoder layers 1, 3, 4" in done.stdout
    said = run_command([sys.executable, "-m", "fledge", "inspect", str(folder), "--verify"])
    assert said.returncode == 0, said.stderr
    assert "checksums     all right" in said.stdout
    assert "⟦" in said.stdout
