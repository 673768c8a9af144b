"""Several writers make one store, whatever kills them: every sample once, every checksum right."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import conversation_record, conversations_run, recorded_sequence
from commands import popen, run_command
from fledge.conf.runtime.artifact import Artifact, read_manifest
from fledge.conf.schema import Config, HiddenStates, LastStates, StateDtype
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.store.shard import Sample, Shard, shard_entry
from fledge.data_synthesis.store.state_format import decode, target_positions
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.data_synthesis.store.writer import BackgroundWriter
from fledge.data_synthesis.tokens.tokenise import Tokeniser

KILLS = int(os.environ.get("FLEDGE_DUMP_KILLS", "2"))
START = "import pickle, sys; from fledge.data_synthesis.dump import dump; dump(pickle.load(open(sys.argv[1], 'rb')))"


def records(num: int = 120, longest: int = 60) -> list[dict]:
    """Conversations with recorded tokens, every fifth of two sequences."""
    chance, made = random.Random(0), []
    for number in range(num):
        sequences = []
        for _ in range(1 + (number % 5 == 0)):
            length = chance.randint(3, longest)
            start = chance.randint(1, length - 2)
            tokens = [chance.randrange(500) for _ in range(length)]
            sequences.append(recorded_sequence(tokens, (start, length)))
        made.append(conversation_record(f"s/{number}", *["u", "a"] * len(sequences), sequences=sequences))
    return made


@pytest.fixture
def config(tmp_path, verifier_config) -> Config:
    config = conversations_run(tmp_path, verifier_config, *records())
    config.train.hidden_states = HiddenStates.offline
    config.dump.shard_tokens, config.dump.batch_tokens = 100, 128
    return config


def into(config: Config, folder: Path, **options: object) -> Config:
    """The same run with another store."""
    return replace(config, dump=replace(config.dump, folder=str(folder), **options))


def samples(folder: Path) -> dict[str, Sample]:
    store = HiddenStateStore(folder)
    store.verify()
    assert len(store) == len(set(store.ids)) == store.manifest["counts"]["samples"]
    return {sample.id: sample for sample in (store[index] for index in range(len(store)))}


def assert_same_samples(folder: Path, other: Path) -> None:
    """Compare what two stores hold, and that nothing unfinished is left in the first."""
    ours, theirs = samples(folder), samples(other)
    assert list(ours) == list(theirs)
    for name, sample in ours.items():
        for of in ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"):
            assert torch.equal(getattr(sample, of), getattr(theirs[name], of)), (name, of)
    manifests = [read_manifest(f, "hidden_states") for f in (folder, other)]
    assert manifests[0]["shards"] == manifests[1]["shards"]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.startswith("writer-")]


def start(config: Config, folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = folder / f"config-{config.dump.writer}-of-{config.dump.num_writers}.pickle"
    path.write_bytes(pickle.dumps(config))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-c", START, str(path)]
    return popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


def test_writers_one_after_another_make_the_store_that_one_makes(config, tmp_path, capsys):
    dump(into(config, tmp_path / "alone"))
    num_shards = len(read_manifest(tmp_path / "alone", "hidden_states")["shards"])
    assert num_shards > 10
    capsys.readouterr()
    for writer in (2, 0):
        dump(into(config, tmp_path / "three", writer=writer, num_writers=3))
        assert "the writer that ends last completes them" in capsys.readouterr().out
        with pytest.raises(ValueError, match="is not complete: run `fledge dump` again"):
            HiddenStateStore(tmp_path / "three")
    dump(into(config, tmp_path / "three", writer=1, num_writers=3))
    assert_same_samples(tmp_path / "three", tmp_path / "alone")
    dump(into(config, tmp_path / "three", writer=1, num_writers=3))
    assert "is complete" in capsys.readouterr().out


def test_two_writers_killed_at_any_moment_lose_and_double_nothing(config, tmp_path):
    dump(into(config, tmp_path / "alone"))
    together = tmp_path / "together"
    chance = random.Random(1)
    shards_before = -1
    for _ in range(KILLS):
        running = [start(into(config, together, writer=writer, num_writers=2), tmp_path) for writer in (0, 1)]
        there = len(list(together.glob("shard-*")))
        while all(process.poll() is None for process in running) and len(list(together.glob("shard-*"))) == there:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        for process in chance.sample(running, 2):
            process.send_signal(signal.SIGKILL)
            time.sleep(chance.random() * 0.01)
        for process in running:
            process.communicate()
        shards_before = there
    num_shards = len(read_manifest(tmp_path / "alone", "hidden_states")["shards"])
    assert 0 <= shards_before < num_shards, "the last kill must have found something left to do"
    running = [start(into(config, together, writer=writer, num_writers=2), tmp_path) for writer in (0, 1)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert_same_samples(together, tmp_path / "alone")


def test_ranks_of_a_launcher_are_writers(config, tmp_path):
    dump(into(config, tmp_path / "alone"))
    shutil.copytree(tmp_path / "alone" / "tokens", tmp_path / "ranks" / "tokens")
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(into(config, tmp_path / "ranks")))
    (tmp_path / "start.py").write_text(START)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    shutil.rmtree(tmp_path / "ranks")
    done = subprocess.run(
        [*launcher, str(tmp_path / "start.py"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("for this writer's") == 2
    assert_same_samples(tmp_path / "ranks", tmp_path / "alone")


def test_a_writer_that_is_at_work_is_not_started_again(config, tmp_path):
    store = tmp_path / "store"
    process = start(into(config, store, writer=1, num_writers=2), tmp_path)
    while not (store / "writer-00001" / ".lock").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match=r"writer 1 of .*store is at work in another process"):
            dump(into(config, store, writer=1, num_writers=2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_shard_that_is_lost_is_recorded_again_and_nothing_else(config, tmp_path):
    store = tmp_path / "store"
    dump(into(config, store))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.glob("shard-*")}
    (store / "shard-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00003\.safetensors is missing: run `fledge dump` again"):
        HiddenStateStore(store)
    dump(into(config, store))
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.glob("shard-*")}
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}
    assert [name for name in before if before[name][0] != after[name][0]] == ["shard-00003.safetensors"]


def test_a_part_goes_as_soon_as_its_shard_is_written(tmp_path):
    shard = Shard.of([Sample(name, torch.arange(4), torch.ones(4)) for name in "ab"])
    with BackgroundWriter(tmp_path, tmp_path) as writer:
        writer.put(3, shard.part([1]))
        writer.put(3, shard)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00003.safetensors"]


def test_batches_from_the_first_with_other_logits_on_are_not_kept(config, tmp_path, monkeypatch):
    sizes: list[int] = []

    def unlike(_verifier, last, _logits):
        sizes.append(len(last))
        return torch.tensor(len(sizes) > 3)

    monkeypatch.setattr("fledge.data_synthesis.states.transformers_engine._unlike_logits", unlike)
    monkeypatch.setattr("fledge.data_synthesis.states.record._estimate_time", lambda *_: None)
    with pytest.raises(ValueError, match="cannot train from this verifier"):
        dump(into(config, tmp_path / "store", shard_tokens=100_000))
    assert shard_entry(tmp_path / "store" / "part-00000.safetensors")["samples"] == sum(sizes[:3])
    assert len(sizes) == 4, "it ends there"


@pytest.mark.parametrize("last_states", LastStates)
def test_a_float8_store_is_smaller_and_holds_the_states_to_a_sixteenth(config, tmp_path, last_states):
    dump(into(config, tmp_path / "exact"))
    dump(into(config, tmp_path / "float8", dtype=StateDtype.float8, last_states=last_states))
    exact, small = samples(tmp_path / "exact"), samples(tmp_path / "float8")
    sizes = [read_manifest(tmp_path / n, "hidden_states")["counts"]["bytes"] for n in ("float8", "exact")]
    assert sizes[0] < 0.45 * sizes[1]
    for name, sample in exact.items():
        for kind, layers in (("aux_hidden_states", 3), ("last_hidden_state", 1)):
            states = getattr(sample, kind)
            again = decode(
                getattr(small[name], kind), getattr(small[name], f"{kind.split('_')[0]}_scale"), torch.float32
            )
            if kind == "last_hidden_state" and last_states is LastStates.counted:
                states = states * target_positions(sample.loss_mask)[:, None]
            largest = states.unflatten(-1, (layers, -1)).abs().amax(-1, keepdim=True)
            allowed = torch.maximum(states.abs() / 16, largest.expand(-1, -1, 64).flatten(-2) * 2**-17)
            assert ((again - states).abs() <= allowed).all()


def test_only_last_states_that_are_targets_are_kept_if_asked_for(config, tmp_path):
    dump(into(config, tmp_path / "all"))
    dump(into(config, tmp_path / "targets", last_states=LastStates.counted))
    everything, targets = samples(tmp_path / "all"), samples(tmp_path / "targets")
    for name, sample in everything.items():
        kept = sample.loss_mask.bool() & torch.cat([sample.loss_mask[1:], torch.zeros(1)]).bool()
        assert torch.equal(targets[name].aux_hidden_states, sample.aux_hidden_states)
        assert torch.equal(targets[name].last_hidden_state, sample.last_hidden_state * kept[:, None])
    sizes = [read_manifest(tmp_path / n, "hidden_states")["counts"]["bytes"] for n in ("targets", "all")]
    assert sizes[0] < sizes[1]


def test_what_is_announced_is_what_is_written(config, tmp_path, capsys):
    for dtype in (StateDtype.float32, StateDtype.float8):
        store = tmp_path / dtype.name
        dump(into(config, store, dtype=dtype))
        announced = float(capsys.readouterr().out.split(" kB each")[0].rpartition(" ")[2]) * 1000
        written = read_manifest(store, "hidden_states")["counts"]
        assert written["bytes"] / written["tokens"] == pytest.approx(announced, rel=0.05)  # headers of small shards


def test_a_full_disk_is_told_with_the_file_and_the_dump_goes_on_after_it(config, tmp_path):
    store, small = tmp_path / "store", 30_000
    whole = into(config, tmp_path / "whole")
    dump(whole)
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(into(config, store)))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({small}, {small}))"
    assert any(entry["bytes"] > small for entry in read_manifest(tmp_path / "whole", "hidden_states")["shards"])
    done = run_command([sys.executable, "-c", f"{limit}; {START}", str(path)])
    assert done.returncode != 0
    assert f"{store}" in done.stderr
    assert "cannot be written" in done.stderr
    dump(into(config, store))
    assert_same_samples(store, tmp_path / "whole")


@pytest.fixture
def spoken(tmp_path, verifier_config) -> Config:
    """A run whose conversations have no recorded tokens."""
    words = ["red", "blue", "an apple", "it is five", "seven days"]
    made = [conversation_record(f"t/{n}", f"Say {words[n % 5]} {n}.", f"{words[n % 5]}.") for n in range(150)]
    config = conversations_run(tmp_path, verifier_config, *made)
    config.dump.shard_tokens = 200
    return config


def test_processes_tokenise_as_one_does(spoken, tmp_path):
    for workers in (0, 2):
        dump(into(spoken, tmp_path / str(workers), token_workers=workers))
    one, two = (HiddenStateStore(tmp_path / str(workers), with_states=False) for workers in (0, 2))
    assert one.ids == two.ids
    assert one.manifest["shards"] == two.manifest["shards"]
    assert one.manifest["digest"] == two.manifest["digest"]


@pytest.mark.parametrize(("note_every_s", "kept"), [(0.0, 2), (60.0, 0)])
def test_tokenising_goes_on_after_the_shards_that_a_kill_has_left(spoken, tmp_path, monkeypatch, note_every_s, kept):
    noting = f"from fledge.data_synthesis.tokens import tokenise; tokenise._NOTE_EVERY_S = {note_every_s}; "
    monkeypatch.setattr(sys.modules[__name__], "START", noting + START)
    dump(into(spoken, tmp_path / "whole"))
    whole = read_manifest(tmp_path / "whole", "hidden_states")
    process = start(into(spoken, tmp_path / "killed", token_workers=2), tmp_path)
    while len(list((tmp_path / "killed").glob("shard-*"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path.name: path.stat().st_ino for path in (tmp_path / "killed").glob("shard-*")}
    assert len(left) < len(whole["shards"])
    dump(into(spoken, tmp_path / "killed"))
    again = read_manifest(tmp_path / "killed", "hidden_states")
    assert (again["shards"], again["counts"]) == (whole["shards"], whole["counts"])
    assert sum(left[p.name] == p.stat().st_ino for p in (tmp_path / "killed").glob("shard-*") if p.name in left) >= kept


def test_not_every_shard_of_tokens_has_the_manifest_written_again(spoken, tmp_path, monkeypatch):
    saved = []
    save = Artifact.save
    monkeypatch.setattr(Artifact, "save", lambda self, **fields: (saved.append(fields), save(self, **fields)))
    dump(into(spoken, tmp_path / "store"))
    assert len(read_manifest(tmp_path / "store", "hidden_states")["shards"]) > 5
    assert sum("taken" in fields for fields in saved) == 1, "at the end"


def test_files_beside_the_shards_that_are_lost_are_made_again_without_the_verifier(config, tmp_path, monkeypatch):
    store = tmp_path / "store"
    dump(into(config, store))
    monkeypatch.setattr("fledge.data_synthesis.states.record.Verifier", None)
    for name in ("index.safetensors", "token_counts.safetensors"):
        before = (store / name).read_bytes()
        (store / name).unlink()
        dump(into(config, store))
        assert (store / name).read_bytes() == before
    samples(store)


def test_a_token_that_was_altered_on_the_disk_is_not_read_by_the_verifier(config, tmp_path):
    store = tmp_path / "store"
    dump(into(config, store, writer=0, num_writers=2))
    shard = store / "tokens" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens/shard-00001\.safetensors: \w+ does not have its checksum.*delete"):
        dump(into(config, store, writer=1, num_writers=2))
    shard.unlink()
    dump(into(config, store, writer=1, num_writers=2))
    samples(store)


def test_a_killed_tokenising_process_is_told_and_not_waited_for(spoken, tmp_path, monkeypatch):
    def killed(self, place):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Tokeniser, "__call__", killed)
    with pytest.raises(ValueError, match=r"a process of dump\.token_workers=2 was killed"):
        dump(into(spoken, tmp_path / "store", token_workers=2))
    monkeypatch.undo()
    dump(into(spoken, tmp_path / "store", token_workers=2))


@pytest.mark.parametrize("error", [ValueError("of the thread"), MemoryError("of the thread")])
def test_whatever_stops_the_writing_thread_reaches_the_caller(tmp_path, monkeypatch, error):
    def failing(*_):
        raise error

    monkeypatch.setattr("fledge.data_synthesis.store.writer.write_shard", failing)
    shard = Shard.of([Sample("a", torch.arange(4), torch.ones(4))])

    def write_four():
        with BackgroundWriter(tmp_path, tmp_path) as writer:
            for number in range(4):
                writer.put(number, shard)

    with pytest.raises(type(error), match="of the thread"):
        write_four()


def test_a_shard_without_a_single_target_is_stored(tmp_path, verifier_config):
    lines = [conversation_record(f"s/{n}", "u", "a", sequences=[recorded_sequence([5, 6, 2], (2, 3))]) for n in (0, 1)]
    config = conversations_run(tmp_path, verifier_config, *lines)
    config.train.hidden_states = HiddenStates.offline
    dump(into(config, tmp_path / "store", last_states=LastStates.counted, dtype=StateDtype.float8))
    assert all(not sample.last_scale.any() for sample in samples(tmp_path / "store").values())


def test_shards_of_another_store_are_not_taken_for_its_own(config, tmp_path):
    one, other = into(config, tmp_path / "one", num_writers=2), into(config, tmp_path / "other")
    dump(one)
    other.draft.aux_layers = [0, 1, 2]
    dump(other)
    stray = tmp_path / "one" / "shard-00001.safetensors"
    shutil.copy(tmp_path / "other" / stray.name, stray)
    one.draft.aux_layers = None
    with pytest.raises(ValueError, match=rf"{stray} holds other samples or states than this store's: delete the file"):
        dump(replace(one, dump=replace(one.dump, writer=1)))
    stray.unlink()
    dump(replace(one, dump=replace(one.dump, writer=1)))
    samples(tmp_path / "one")


def test_states_that_are_not_finite_as_they_are_stored_are_named(config, tmp_path, monkeypatch, capsys):
    def too_large(self, given, *stop):
        for number, aux, last in read(self, given, *stop):
            yield number, (aux.fill_(7e4) if given[number].id == "s/7" else aux), last

    read = TransformersEngine.read
    monkeypatch.setattr(TransformersEngine, "read", too_large)
    dump(into(config, tmp_path / "wide"))
    assert "not finite" not in capsys.readouterr().out
    dump(into(config, tmp_path / "narrow", dtype=StateDtype.float16))
    said = capsys.readouterr().out
    assert "dump: s/7 has states that are not finite as torch.float16" in said
    assert "dump: 1 samples have states that are not finite" in said
