"""A signal ends a dump soon; it loses the batch at work at most, and goes on to the store of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from builders import SMALL_DECODER, Run, conversation_record, conversations_run, copy_parts, save_byte_tokenizer
from commands import Started
from fledge.conf.runtime.artifact import MANIFEST, read_manifest
from fledge.conf.runtime.progress import Progress
from fledge.conf.runtime.signals import Stopped, answered
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.states import record as states
from fledge.data_synthesis.store import writer
from fledge.data_synthesis.store.shard import ImageRecord, Sample, Shard, open_part, shard_entry, write_shard
from fledge.data_synthesis.store.state_format import FLOAT8, StateFormat
from fledge.data_synthesis.store.writer import BackgroundWriter
from servers import free_port

NUM_PROMPTS, BATCH_TOKENS = 48, 600
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ 'a:' + m.content + '<end>' }}{% endgeneration %}{% else %}{{ 'u:' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def slow_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random verifier whose tokens are bytes, large enough that a store of some prompts takes seconds."""
    folder = tmp_path_factory.mktemp("verifier")
    save_byte_tokenizer(folder, TEMPLATE)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SMALL_DECODER, "hidden_size": 256, "intermediate_size": 2048, "num_key_value_heads": 2},
        vocab_size=257,
        max_position_embeddings=4096,
        eos_token_id=256,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, slow_verifier: Path) -> Run:
    """A run whose store is one shard of many batches, not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"id": str(n), "prompt": f"{n} " + "word " * (60 + n)} for n in range(NUM_PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        f"data.sources=[{{path:{folder / 'rows.jsonl'}}}]",
        "synthesize.max_tokens=3",
        "dump.keep_truncated=true",
        "dump.shard_tokens=1000000",
        f"dump.batch_tokens={BATCH_TOKENS}",
        "draft.vocab_size=200",
    ]
    run = Run(folder / "runs", slow_verifier, options=options)
    run("synthesize")
    run("dump")
    return run


@pytest.fixture
def slow(tmp_path: Path, whole: Run) -> Run:
    """The same run before its dump."""
    return copy_parts(whole, Run(tmp_path / "runs", whole.verifier, options=whole.options), "prompts", "conversations")


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("dump", signal.SIGTERM, 75), ("dump", signal.SIGINT, 130), ("run", signal.SIGUSR1, 75)],
)
def test_a_signal_in_the_middle_of_a_shard_loses_the_batch_being_read_and_nothing_else(
    slow, whole, tmp_path, stage, number, code
):
    store = slow.path / "hidden_states"
    dump = Started(slow.command(stage), tmp_path)
    dump.wait(lambda: "for this writer's" in dump.said)
    rate = int(dump.said.rpartition(" tokens/s, ")[0].rpartition(" ")[2])
    time.sleep(6 * BATCH_TOKENS / rate)  # of some 35 batches
    ended, said = dump.stop(number)
    assert ended == code, said
    assert f"dump: {number.name} received: it ends now" in said
    if stage == "run":
        assert f"run: {number.name} received: passed on to `dump`, which ends first" in said
    assert said.index("received") < said.index(f"dump: stopped by {number.name}; the same command goes on")
    assert "Traceback" not in said
    assert not list(store.glob("shard-*"))
    kept = shard_entry(store / "part-00000.safetensors")["samples"]
    assert 0 < kept < NUM_PROMPTS
    assert f"{kept} of {NUM_PROMPTS} samples of shard-00000.safetensors are recorded" in said
    said = f"dump: resuming shard-00000: {kept} of {NUM_PROMPTS} samples are already recorded"
    assert said in slow("dump").stdout
    ours, theirs = (read_manifest(run.path / "hidden_states", "hidden_states") for run in (slow, whole))
    assert (ours["shards"], ours["digest"]) == (theirs["shards"], theirs["digest"]), "checksums included"
    assert not list(store.glob("**/part-*"))


def test_ranks_that_hold_one_verifier_stop_at_the_same_batch(slow, tmp_path):
    store = slow.path / "hidden_states"

    def ranks() -> list[Started]:
        sizes = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        command = slow.command("dump", "verifier.tensor_parallel=true")
        return [Started(command, tmp_path, rank, RANK=str(rank), LOCAL_RANK=str(rank), **sizes) for rank in (0, 1)]

    first, other = ranks()
    first.wait(lambda: "for this writer's" in first.said)
    time.sleep(1)
    code, said = other.stop(signal.SIGTERM)
    assert (code, first.process.wait(timeout=60)) == (75, 75), said + first.said
    assert "dump: SIGTERM received: it ends after the batch that its ranks are reading" in said
    assert "dump: stopped by a signal; the same command goes on" in first.said
    assert 0 < shard_entry(store / "part-00000.safetensors")["samples"] < NUM_PROMPTS
    again = ranks()
    assert [rank.process.wait(timeout=100) for rank in again] == [0, 0], again[0].said
    assert shard_entry(store / "shard-00000.safetensors")["samples"] == NUM_PROMPTS
    assert not list(store.glob("**/part-*"))


@pytest.mark.parametrize(("late", "kept"), [(0, 6), (1, 6), (2, 3), (4, 3), (5, 0)])
def test_an_interruption_keeps_whole_batches_whose_states_have_arrived(monkeypatch, tmp_path, late, kept):
    """Those of a GPU arrive `late` samples after they are computed; here it is interrupted in the third batch of 3."""
    samples = [Sample(f"s/{n}", torch.zeros(4, dtype=torch.int32), torch.ones(4)) for n in range(12)]

    class Engine:
        unlike = [torch.tensor(False)]  # noqa: RUF012

        def read(self, samples, stop):
            for number in range(len(samples)):
                if number % 3 == 0:
                    stop()
                if number == 7:
                    raise KeyboardInterrupt
                yield number, torch.zeros(4, 6), torch.zeros(4, 2)

    def arriving(computed, _num_rows):
        queue = []
        for one in computed:
            queue.append(one)
            if len(queue) > late:
                yield queue.pop(0)
        yield from queue

    monkeypatch.setattr(states, "on_host", arriving)
    recorded: list[int] = []
    form = StateFormat(torch.float32)
    recorder = SimpleNamespace(engine=Engine(), form=form, batch_tokens=8, stop=bool, not_finite=[])
    with pytest.raises(KeyboardInterrupt):
        states._Recorder._record_shard(recorder, samples, Shard.of(samples), recorded, Progress("", 1, ""))
    assert recorded == list(range(kept))


@pytest.mark.parametrize("recorded", [[0, 1], [1]], ids=["whole", "part"])
def test_a_signal_while_a_shard_waits_for_the_writer_loses_none(monkeypatch, tmp_path, recorded):
    written: dict[int, list[str]] = {}

    def write(_folder, number, shard, _scratch):
        if not written:  # another waits, and a third is handed over
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        written[number] = shard.ids

    monkeypatch.setattr(writer, "write_shard", write)

    def record_shards():
        with answered("x"), BackgroundWriter(tmp_path, tmp_path) as out:
            for number in range(9):
                shard = Shard.of([Sample(name, torch.arange(4), torch.ones(4)) for name in "ab"])
                with states._saved(number, shard, out) as kept:
                    kept += recorded

    with pytest.raises(Stopped):
        record_shards()
    assert written == {number: ["ab"[place] for place in recorded] for number in range(3)}


@pytest.mark.parametrize("only_counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8])
def test_a_shard_that_goes_on_from_a_part_is_the_uninterrupted_one(tmp_path, dtype, only_counted):
    generator, form = torch.Generator().manual_seed(0), StateFormat(dtype, only_counted)
    lengths = [5, 3, 9, 4, 7]
    states = [(torch.randn(n, 24, generator=generator), torch.randn(n, 8, generator=generator)) for n in lengths]
    samples = [
        Sample(f"s/{n}", torch.arange(n, dtype=torch.int32), (torch.arange(n) > 1).to(torch.uint8)) for n in lengths
    ]
    samples[2].image_record = ImageRecord("conversations.jsonl", 7, ["digest"])
    whole, first, again = (Shard.of(samples) for _ in range(3))

    def put(shard: Shard, *numbers: int) -> None:
        for number in numbers:
            shard.set_states(number, shard.encode(number, *states[number], form), form)

    put(whole, 2, 4, 0, 3, 1)
    put(first, 2, 4, 0)
    write_shard(tmp_path, 6, replace(first.part([2, 4]), made_with="this"))
    assert open_part(tmp_path, 6, "that") is None
    part = open_part(tmp_path, 6, "this")
    assert part is not None
    assert list(part.image_records) == [0]
    assert again.take(part) == [2, 4]
    put(again, 0, 3, 1)
    (tmp_path / "again").mkdir()
    assert write_shard(tmp_path, 6, whole) == write_shard(tmp_path / "again", 6, again), "checksums included"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_tokenising_keeps_what_the_open_shard_has(slow_verifier, tmp_path, workers):
    records = [conversation_record(f"s/{n}", "word " * 40 + str(n), "so " * 9, "and?", "no " * 9) for n in range(4000)]
    made = conversations_run(tmp_path, VerifierConfig(path=str(slow_verifier)), *records)
    options = [
        "train.hidden_states=online",
        "dump.shard_tokens=100000000",
        f"dump.token_workers={workers}",
        "draft.vocab_size=200",
    ]
    run = Run(tmp_path, slow_verifier, options=options)
    store = made.hidden_states_folder
    dump = Started(run.command("dump"), tmp_path, cold=workers > 0)  # which forks by a server of its own
    dump.wait(lambda: (store / MANIFEST).exists() and "verifier_path" in (store / MANIFEST).read_text())
    time.sleep(1)
    code, said = dump.stop(signal.SIGTERM)
    assert code == 75, said
    assert "dump: SIGTERM received: it ends after the conversation being tokenised" in said
    part = json.loads((store / MANIFEST).read_text())["part"]
    assert 0 < part["taken"] < len(records)
    run("dump")
    run("dump", f"dump.folder={tmp_path / 'whole'}")
    ours, theirs = (read_manifest(folder, "hidden_states") for folder in (store, tmp_path / "whole"))
    assert (ours["shards"], ours["digest"]) == (theirs["shards"], theirs["digest"])
    assert not list(store.glob("part-*"))
