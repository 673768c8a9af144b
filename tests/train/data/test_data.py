"""Training data: what an epoch takes, who gets it, what is cut or refused, and the processes that read it."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders import copy_folder, write_store
from fledge.conf.runtime.artifact import artifact, digest
from fledge.conf.schema import Config, DraftConfig, DumpConfig, Positions, StoreConfig, TooLong, TrainConfig
from fledge.data_synthesis.heldout import conversation_id, is_heldout, sequence_id
from fledge.data_synthesis.store.index import COUNTS_FILE, VOCABULARY_FILE, sidecar_checksums
from fledge.data_synthesis.store.shard import Shard, write_shard
from fledge.data_synthesis.store.state_format import decode, encode_float8
from fledge.data_synthesis.store.store import HiddenStateStore, write_index
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.vocabulary import build_vocabulary
from fledge.models.verifier.config import load_config, special_token_ids
from fledge.train.data.packing import PackStream, Passes, pack
from fledge.train.data.training_data import Batches, Split, TrainingData, answers_end
from fledge.train.engine import learning_rate
from safetensors.torch import load_file, save_file


def test_packs_hold_every_sample_once_and_never_overflow():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    packs = pack(lengths, list(range(500)), 100)
    assert sorted(sample for p in packs for sample in p) == list(range(500))
    assert max(sum(lengths[s] for s in p) for p in packs) <= 100
    assert len(packs) <= 1.05 * sum(lengths) / 100, "best fit leaves little room unused"


def test_a_sample_goes_into_the_fullest_pack_that_holds_it_ties_to_the_first():
    rng = random.Random(1)
    lengths = [rng.randint(1, 40) for _ in range(300)]
    expected: list[list[int]] = []
    for sample, length in enumerate(lengths):
        room = [(64 - sum(lengths[s] for s in p), number) for number, p in enumerate(expected)]
        fitting = [(free, number) for free, number in room if free >= length]
        if not fitting:
            expected.append([])
        expected[min(fitting)[1] if fitting else -1].append(sample)
    assert pack(lengths, list(range(300)), 64) == expected


def test_stream_is_reproducible_from_any_position():
    lengths = [(7 * i) % 40 + 1 for i in range(60)]
    parts = [Passes(list(range(40)), 0.5), Passes(list(range(40, 60)), 2)]
    stream = PackStream(lengths, parts, 64, seed=3)
    whole = [p for epoch in range(4) for p in stream.epoch(epoch)]
    for first in (0, 1, len(stream.epoch(0)), len(stream.epoch(0)) + 5):
        resumed = stream.start_at(first)
        assert [next(resumed) for _ in range(20)] == whole[first : first + 20]
    assert stream.epoch(0) != stream.epoch(1)
    assert PackStream(lengths, parts, 64, seed=4).epoch(0) != stream.epoch(0)


def test_an_epoch_takes_each_sample_as_often_as_its_store_weighs_and_no_other_before_all_were_taken():
    parts = [Passes(list(range(10)), 2.0), Passes(list(range(10, 30)), 0.5), Passes(list(range(30, 37)), 0.6)]
    stream = PackStream([3] * 37, parts, 12, seed=0)
    epochs = [Counter(itertools.chain.from_iterable(stream.epoch(number))) for number in range(10)]
    for first, second in itertools.pairwise(epochs):
        assert [first[sample] for sample in range(10)] == [2] * 10
        assert sum(first[sample] for sample in range(10, 30)) == 10
        assert 4 <= sum(first[sample] for sample in range(30, 37)) <= 5
        halves = [{sample for sample in range(10, 30) if epoch[sample]} for epoch in (first, second)]
        assert len(halves[0]) == 10
        assert len(halves[0] ^ halves[1]) in (20, 2 * len(halves[1] - halves[0]))
    for number in range(0, 10, 2):
        assert [(epochs[number] + epochs[number + 1])[sample] for sample in range(10, 30)] == [1] * 20
    assert [sum(epochs, Counter())[sample] for sample in range(30, 37)] == [6] * 7
    assert sorted(itertools.chain.from_iterable(PackStream([3] * 9, [Passes(list(range(9)))], 12, 0).epoch(5))) == list(
        range(9)
    )


def test_a_long_sample_is_cut_where_its_last_whole_answer_ends():
    assert [answers_end(torch.tensor([0, 1, 1, 0, 1, 1, 1, 0]), budget) for budget in range(1, 8)] == [
        *(0, 0, 3, 3, 3, 3),
        7,
    ]
    assert answers_end(torch.tensor([1, 1, 1, 1]), 3) == 0, "the answer goes on"


@pytest.fixture
def config(finished, verifier_config):
    """Options that train on the finished run's store."""
    return Config(
        name="data",
        verifier=verifier_config,
        draft=DraftConfig(vocab_size=300),
        dump=DumpConfig(folder=str(finished.path / "hidden_states")),
        train=TrainConfig(batch_tokens=256, ttt_steps=3, data_workers=0),
    )


def changed(config: Config, *stores: Path | StoreConfig, **options) -> Config:
    listed = [store if isinstance(store, StoreConfig) else StoreConfig(str(store)) for store in stores]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, stores=listed, **options))


def opened(config: Config, *rank: int) -> TrainingData:
    head = DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier))
    return TrainingData(config.train, config.verifier, config.hidden_states_folder, head, *rank)


def test_long_training_samples_are_cut_or_dropped_and_counted_and_held_out_ones_are_whole(finished, tmp_path):
    like, long = finished.path / "hidden_states", "0" * 20 + "1" * 10 + "0" * 10 + "1" * 40
    masks = {f"long/{n}": long for n in range(12)} | {"short": "0011", "one answer": "0" * 20 + "1" * 40}
    held = [name for name in masks if is_heldout(name, 0.3)]
    assert 0 < len(held) < 12
    assert not {"short", "one answer"} & set(held)
    store = HiddenStateStore(write_store(tmp_path / "store", like, masks, share=0.3))
    for too_long, cut, dropped in ((TooLong.cut, 12 - len(held), 1), (TooLong.drop, 0, 13 - len(held))):
        split = Split.of([store], 40, too_long)
        assert (split.num_cut, split.num_dropped) == (cut, dropped)
        assert f"{cut} longer than a pack cut after an answer, {dropped} dropped" in str(split)
        assert {split.lengths[sample] for sample in split.heldout} == {80}
        assert Counter(split.lengths[sample] for sample in split.train[0]) == Counter(
            {4: 1} | ({30: cut} if cut else {})
        )
    assert Split.of([store], 80, TooLong.drop).num_dropped == 0
    split = Split.of([store], 40, TooLong.cut)
    batch = Batches([store], split.lengths, 3)[split.train[0][:1] + split.heldout[:1]]
    whole = store[split.train[0][0]]
    assert batch.lengths == [30, 80]
    assert torch.equal(batch.aux_hidden_states[:30], whole.aux_hidden_states[:30])
    assert batch.loss_mask[:30].tolist() == [False] * 20 + [True] * 10


def test_what_one_store_holds_out_no_store_trains_on(finished, tmp_path):
    like, masks = finished.path / "hidden_states", {f"sample/{n}": "0" * 9 + "1" * 5 for n in range(60)}
    shares = (0.1, 0.4)
    stores = [
        HiddenStateStore(write_store(tmp_path / str(share), like, masks, share, seed))
        for seed, share in enumerate(shares)
    ]
    split = Split.of(stores, 100, TooLong.cut)
    ids = [store_id for store in stores for store_id in store.ids]
    held = {name for name in masks if is_heldout(name, 0.4)}
    assert [{ids[number] for number in train} for train in split.train] == [masks.keys() - held] * 2
    assert sorted(ids[number] for number in split.heldout) == sorted(held), "each once"
    few = sum(is_heldout(name, 0.1) for name in masks)
    assert 0 < few < len(held)
    assert f"{len(held) - few} left out as another store holds them out" in str(split)


def test_a_limit_takes_the_samples_of_a_lower_one_too_and_holds_out_the_same(finished, tmp_path):
    like, masks = finished.path / "hidden_states", {f"sample/{n}": "0" * 9 + "1" * 5 for n in range(60)}
    stores = [HiddenStateStore(write_store(tmp_path / str(seed), like, masks, 0.2, seed)) for seed in range(2)]
    whole = Split.of(stores, 100, TooLong.cut)
    some, more = (Split.of(stores, 100, TooLong.cut, [limit, None]) for limit in (5, 20))
    assert [len(split.train[0]) for split in (some, more)] == [5, 20]
    assert set(some.train[0]) < set(more.train[0]) < set(whole.train[0])
    assert some.train[0] == sorted(some.train[0]) != whole.train[0][:5], "not those that were answered first"
    assert whole.train[1] == some.train[1], "of the other store all"
    assert whole.heldout == some.heldout == more.heldout
    assert Split.of(stores, 100, TooLong.cut, [1000, 1000]) == whole


def test_the_vocabulary_of_several_stores_is_chosen_by_their_weighted_counts(finished, config, tmp_path):
    like = finished.path / "hidden_states"
    other = write_store(tmp_path / "other", like, {f"sample/{n}": "0" + "1" * 99 for n in range(20)})
    counts = [load_file(folder / "token_counts.safetensors")["token_counts"] for folder in (like, other)]
    always = special_token_ids(config.verifier)
    vocabularies = []
    for weights in ((1.0, 0.5), (1.0, 50.0)):
        stores = [StoreConfig(str(folder), weight) for folder, weight in zip((like, other), weights, strict=True)]
        data = opened(changed(config, *stores))
        mixed = sum(round(10 * weight) * count for weight, count in zip(weights, counts, strict=True))
        assert torch.equal(data.vocabulary.t2d, build_vocabulary(mixed, 300, always).t2d)
        assert data.vocabulary.t2d[always].all()
        assert [entry["weight"] for entry in data.settings] == list(weights)
        assert len({entry["digest"] for entry in data.settings}) == 2
        vocabularies.append(data.vocabulary.t2d)
    assert not torch.equal(*vocabularies)
    own = load_file(like / VOCABULARY_FILE)["t2d"]
    assert torch.equal(opened(config).vocabulary.t2d, own)


@pytest.fixture
def copied(finished, config, tmp_path):
    """Options that train on a copy of the finished run's store."""
    folder = copy_folder(finished.path / "hidden_states", tmp_path / "copy")
    return dataclasses.replace(config, dump=DumpConfig(folder=str(folder)))


def test_a_vocabulary_map_that_does_not_follow_from_the_store_is_refused(copied):
    folder = Path(copied.dump.folder)
    path, counts = folder / VOCABULARY_FILE, folder / "token_counts.safetensors"
    right, counted = load_file(path), load_file(counts)["token_counts"]
    foreign = build_vocabulary(counted.roll(1), 300, special_token_ids(copied.verifier))
    shifted = right["d2t"].clone()
    shifted[-1] += 1
    wrong = {
        "of other counts": {"d2t": foreign.d2t, "t2d": foreign.t2d},
        "d2t and t2d differ": {**right, "d2t": shifted},
        "another vocabulary": {**right, "t2d": right["t2d"][:-1]},
        "half of it": {"d2t": right["d2t"]},
    }
    for tensors in wrong.values():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(
            ValueError, match=r"vocab_map\.safetensors does not follow from the token counts .*delete it"
        ):
            _ = opened(copied).vocabulary
    save_file(right, path)
    assert torch.equal(opened(copied).vocabulary.d2t, right["d2t"])
    with pytest.raises(ValueError, match=r"draft\.vocab_size is 200, the map .* has 300: run `fledge dump`"):
        _ = opened(dataclasses.replace(copied, draft=DraftConfig(vocab_size=200))).vocabulary
    save_file({"token_counts": counted[:-1].clone()}, counts)
    with pytest.raises(ValueError, match=r"token_counts\.safetensors does not have the checksum of the manifest"):
        _ = opened(copied).vocabulary


def test_stores_that_cannot_be_trained_on_together_are_named_with_the_difference(config, copied):
    folder = Path(copied.dump.folder)
    mixed = changed(config, Path(config.dump.folder), folder)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())

    def write(**changes):
        manifest.write_text(json.dumps({**content, **changes}))

    settings = content["settings"]
    write(settings={**settings, "aux_layers": [0, 1, 2]})
    with pytest.raises(ValueError, match=rf"draft\.aux_layers is .*{folder} holds layers \[0, 1, 2\]"):
        opened(mixed)
    for of in ("fingerprint", "tokenizer", "chat_template"):
        write(settings={**settings, "verifier": {**settings["verifier"], of: "0"}})
        with pytest.raises(ValueError, match=rf"{folder} belongs to another verifier .*{of}: 0 -> .*dump anew"):
            opened(mixed)
    write(complete=False)
    with pytest.raises(ValueError, match=rf"{folder} is not complete: run `fledge dump` again"):
        opened(mixed)
    write(settings={**settings, "heldout_share": 1.0})
    with pytest.raises(ValueError, match=r"holds no training sample, its \d+ are held out \(data\.heldout_share=1\.0"):
        opened(copied)
    write()
    with pytest.raises(ValueError, match=r"train\.batch_tokens=4 holds no training sample .* raise it"):
        opened(changed(config, batch_tokens=4))
    with pytest.raises(ValueError, match=rf"train\.stores: weight 0\.001 takes none of the \d+ .*{folder}"):
        opened(changed(config, StoreConfig(str(folder), 0.001)))
    assert opened(mixed).packs_per_epoch == pytest.approx(2 * opened(config).packs_per_epoch, abs=1)


def equal(ours, theirs) -> bool:
    """Compare two batches, or their useful rows."""

    def same(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return equal(a, b) if dataclasses.is_dataclass(a) else a == b

    names = [f.name for f in dataclasses.fields(ours) if f.name not in ("steps", "from_previous")]
    return all(same(getattr(ours, name), getattr(theirs, name)) for name in names)


def test_processes_read_the_same_batches_in_the_same_order_and_leave_signals_and_random_numbers_alone(config):
    alone = list(itertools.islice(opened(config).batches(0), 25))
    before = torch.get_rng_state(), random.getstate()
    with opened(changed(config, data_workers=2), 1, 2) as data:
        ours = data.batches(5)
        got = [next(ours) for _ in range(4)]
        readers = multiprocessing.active_children()
        assert len(readers) == 2
        for reader, name in itertools.product(readers, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
            os.kill(reader.pid, name)
        got += [next(ours) for _ in range(6)]
        assert all(equal(batch, alone[6 + 2 * n]) for n, batch in enumerate(got))
        heldout = [list(d.heldout_batches(4)) for d in (data, opened(config, 1, 2))]
        assert all(equal(*pair) for pair in zip(*heldout, strict=True))
        assert heldout[0][0].useful_rows(4) is heldout[0][0].useful
        started = time.monotonic()
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 4, "ended when asked, not when given up"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(("ranks", "limit"), [(1, 256), (2, 256), (3, 5)])
def test_ranks_share_out_the_held_out_samples_that_evaluation_decodes_first(config, ranks, limit):
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, heldout_samples=limit, batch_tokens=200)
    )
    shares = [[b.sample_ids for b in opened(config, rank, ranks).heldout_batches(3)] for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "ZeRO-3 asks for as many forwards of every rank"
    [store] = opened(config).stores
    everything = [name for name in store.ids if is_heldout(name, store.manifest["settings"]["heldout_share"])]
    expected = set(sorted(everything, key=digest)[:limit])
    assert {name for share in shares for ids in share for name in ids} == expected
    assert 1 < len(expected) <= limit


@pytest.mark.parametrize("limit", [1, 3, 256])
def test_held_out_conversations_are_taken_with_all_their_sequences_and_trained_on_with_none(
    finished, config, tmp_path, limit
):
    names = [f"sample/{n}" for n in range(40)]
    masks = {sequence_id(name, n): "0" * 5 + "1" * 5 for name in names for n in range(3)}
    folder = write_store(tmp_path / "store", finished.path / "hidden_states", masks, 0.2)
    held = sorted(filter(lambda name: is_heldout(name, 0.2), names), key=digest)
    assert 3 < len(held) < 20
    data = opened(changed(config, folder, heldout_samples=limit))
    ids = data.stores[0].ids
    chosen = [conversation_id(ids[sample]) for sample in data.heldout]
    assert chosen == [name for name in held[:limit] for _ in range(3)]
    trained = {conversation_id(ids[sample]) for samples in data.split.train for sample in samples}
    assert trained == set(names) - set(held)


def test_each_store_has_its_own_share_of_the_held_out_conversations(finished, config, tmp_path):
    like, mask = finished.path / "hidden_states", "0" * 5 + "1" * 5
    large = write_store(tmp_path / "large", like, {f"large/{n}": mask for n in range(400)}, 0.5)
    small = write_store(tmp_path / "small", like, {f"small/{n}": mask for n in range(10)}, 0.5)
    stores = [StoreConfig(str(small)), StoreConfig(str(large))]
    train = dataclasses.replace(config.train, stores=stores, heldout_samples=3)
    few, many = opened(dataclasses.replace(config, train=train)).heldout_ids
    assert [len(few), len(many)] == [3, 3]
    assert all(name.startswith("small/") for name in few)


def test_a_store_of_joined_samples_must_hold_out_what_another_does(finished, config, tmp_path):
    like, mask = finished.path / "hidden_states", "0" * 5 + "1" * 5
    folders = [
        write_store(tmp_path / n, like, {f"{n}/{i}": mask for i in range(40)}, s) for n, s in (("a", 0.1), ("b", 0.3))
    ]
    manifest = folders[0] / "manifest.json"
    train = dataclasses.replace(config.train, stores=[StoreConfig(str(folder)) for folder in folders])
    opened(dataclasses.replace(config, train=train))
    manifest.write_text(manifest.read_text().replace('"heldout_share"', '"join_length": 64, "heldout_share"'))
    with pytest.raises(ValueError, match=r"a has joined samples .*heldout_share=0.3"):
        opened(dataclasses.replace(config, train=train))


def test_a_pickled_store_maps_its_shards_anew_and_what_is_wrong_is_said_by_the_trainer(copied):
    with opened(changed(copied, data_workers=1)) as data:
        sample, again = (store[3] for store in (data.stores[0], pickle.loads(pickle.dumps(data.stores[0]))))
        assert torch.equal(sample.last_hidden_state, again.last_hidden_state)
        data.stores = [pickle.loads(pickle.dumps(data.stores[0]))]  # as it arrives where processes are not forked
        for path in Path(copied.dump.folder).glob("shard-*"):
            path.unlink()
        with pytest.raises(ValueError, match=r"^\S+/shard-\d+\.safetensors is missing: run `fledge dump` again$"):
            next(data.batches(0))


def test_batches_of_tokens_alone_have_no_states(finished, tmp_path):
    masks = {"a": "0011", "b": "01101", "c": "011"}
    folder = write_store(tmp_path / "s", finished.path / "hidden_states", masks, states=False)
    store = HiddenStateStore(folder, with_states=False)
    batch = Batches([store], store.lengths, 3)[[0, 2]].to(torch.device("cpu"), torch.bfloat16, 3)
    assert batch.aux_hidden_states is None
    assert batch.last_hidden_state is None
    assert batch.loss_mask.tolist() == [False, False, True, True, False, True, True]


def test_all_positions_are_trained_on_and_answers_alone_held_out(config, copied, tmp_path):
    with opened(dataclasses.replace(config, train=dataclasses.replace(config.train, positions=Positions.all))) as data:
        batch = next(iter(data.batches(0)))
        assert batch.loss_mask.all()
        rows = batch.useful_rows(2)
        assert len(rows.rows) == sum(length - 2 for length in batch.lengths), "all but the last two of a document"
        heldout = list(data.heldout_batches(2))
        assert not any(batch.loss_mask.all() for batch in heldout)
    with opened(config) as data:
        assert [batch.loss_mask.tolist() for batch in data.heldout_batches(2)] == [
            b.loss_mask.tolist() for b in heldout
        ]
    manifest = Path(copied.dump.folder) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "settings": {**content["settings"], "last_states": "counted"}}))
    opened(copied)
    with pytest.raises(ValueError, match=r"train\.positions=all needs .* dump anew with dump\.last_states=all"):
        opened(dataclasses.replace(copied, train=dataclasses.replace(copied.train, positions=Positions.all)))


def test_learning_rate_warms_up_linearly_and_falls_to_its_floor():
    options = TrainConfig(lr=1.0, warmup_share=0.1, min_lr_share=0.2)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.2, abs=1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_stores_of_several_formats_are_mixed_without_a_change_of_any_state_all_layers_or_some(finished, tmp_path):
    store = HiddenStateStore(finished.path / "hidden_states")
    samples = [store[index] for index in range(4)]
    small = [dataclasses.replace(sample, id=f"small/{sample.id}") for sample in samples[2:]]
    for sample in small:
        sample.aux_hidden_states, sample.aux_scale = encode_float8(sample.aux_hidden_states, 3)
        sample.last_hidden_state, sample.last_scale = encode_float8(sample.last_hidden_state, 1)
    like = finished.path / "hidden_states"
    stores = []
    for name, part in (("exact", samples[:2]), ("small", small)):
        folder = tmp_path / name
        with artifact(folder, "hidden_states", store.manifest["settings"]) as target:
            entries = [write_shard(folder, 0, Shard.of(part))]
            write_index(folder, entries)
            shutil.copy(like / COUNTS_FILE, folder)
            target.finish(shards=entries, files=sidecar_checksums(folder))
        stores.append(HiddenStateStore(folder))
    lengths = [length for each in stores for length in each.lengths]
    mixed = Batches(stores, lengths, 3)[[0, 2, 1, 3]].to(torch.device("cpu"), torch.float32, 3)
    for place, (number, start) in enumerate(zip([0, 2, 1, 3], itertools.accumulate([0, *mixed.lengths]), strict=False)):
        here = slice(start, start + mixed.lengths[place])
        sample = [*samples[:2], *small][number]
        aux = decode(sample.aux_hidden_states, sample.aux_scale, torch.float32)
        assert torch.equal(mixed.aux_hidden_states[here], aux)
        assert torch.equal(
            mixed.last_hidden_state[here], decode(sample.last_hidden_state, sample.last_scale, aux.dtype)
        )
    hidden = mixed.last_hidden_state.shape[-1]
    layers = store.manifest["settings"]["aux_layers"]
    for places in ([2, 0], [1], [0, 1, 2]):
        for each in stores:
            each.read_layers([layers[place] for place in places])
        some = Batches(stores, lengths, 3)[[0, 2, 1, 3]].to(torch.device("cpu"), torch.float32, 3)
        chosen = [mixed.aux_hidden_states[:, place * hidden : (place + 1) * hidden] for place in places]
        assert torch.equal(some.aux_hidden_states, torch.cat(chosen, 1))
        assert torch.equal(some.last_hidden_state, mixed.last_hidden_state)
    with pytest.raises(
        ValueError, match=r"draft\.aux_layers is \[9\], .*exact holds layers .*: set some of these or dump"
    ):
        stores[0].read_layers([9])
