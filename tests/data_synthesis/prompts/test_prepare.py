"""Prepared prompts: filtered, without duplicates and evaluation questions, mixed, the same at every start."""

import json
import os
import random
from collections import Counter
from threading import Thread

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fledge.conf.runtime.artifact import artifact, file_digest, read_manifest
from fledge.conf.schema import Config, DataConfig, MalformedRows, SourceConfig
from fledge.data_synthesis.prompts.near_duplicates import canonical, fingerprint
from fledge.data_synthesis.prompts.prepare import FILE, REFUSALS, prepare_prompts, prompt_settings
from fledge.data_synthesis.prompts.rows import Prompt

SKIP = MalformedRows.skip


def words(seed, count):
    drawn = random.Random(seed)
    return [f"w{drawn.randrange(10**6)}" for _ in range(count)]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(tmp_path, count, name="chats", **fields):
    rows = [{"id": number, "prompt": f"{name} {number}", **fields} for number in range(count)]
    return SourceConfig(path=written(tmp_path / f"{name}.jsonl", rows))


def prepare(tmp_path, *sources, name="run", overwrite=False, **data):
    config = Config(name=name, runs_dir=str(tmp_path / "runs"), overwrite=overwrite)
    config.data = DataConfig(sources=list(sources), **data)
    return prepare_prompts(config)


def ids(prepared, *shard):
    return [prompt.id for prompt in prepared.read(*shard)]


def test_every_row_is_taken_or_counted_with_its_reason(tmp_path):
    question = " ".join(words(0, 20))
    rows = {
        "good": {"turns": ["How do birds fly?", "And bats?"]},
        "duplicate": {"turns": ["how do BIRDS fly", "and bats !"]},
        "too_few_turns": {"turns": ["How do birds fly?"]},
        "too_many_turns": {"turns": ["a", "b", "c", "d"]},
        "too_short": {"turns": ["a", "b"]},
        "too_long": {"turns": ["a" * 200, "b"]},
        "evaluation": {"turns": ["Tell me.", question.upper()]},
        "malformed": {"turns": ["", "b"]},
    }
    written(tmp_path / "question.jsonl", [{"question_id": 81, "category": "stem", "turns": [question, "Why so?"]}])
    source = SourceConfig(path=written(tmp_path / "p.jsonl", [{"id": name, **row} for name, row in rows.items()]))
    exclude = [str(tmp_path / "question.jsonl")]
    bounds = {"min_turns": 2, "max_turns": 3, "min_chars": 5, "max_chars": 190}
    prepared = prepare(tmp_path, source, exclude=exclude, malformed_rows=SKIP, **bounds)
    assert ids(prepared) == ["p/train/good"]
    assert {name: prepared.counts[name] for name in rows if name != "good"} == dict.fromkeys(list(rows)[1:], 1)
    for counts in (prepared.counts, prepared.counts["sources"]["p/train"]):
        assert counts["rows"] == 8 == counts["taken"] + sum(counts[reason] for reason in REFUSALS)


def test_an_image_at_a_host_of_this_network_is_refused_before_anything_is_answered(tmp_path):
    parts = [{"type": "text", "text": "a?"}, {"type": "image_url", "image_url": {"url": "http://10.0.0.5/a.png"}}]
    source = SourceConfig(path=written(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": parts}]}]))
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1 refers to 'http://10\.0\.0\.5/a\.png': its host is in"):
        prepare(tmp_path, source)
    assert prepare(tmp_path, source, local_images=True).count == 1


def test_shards_are_disjoint_and_together_all(tmp_path):
    prepared = prepare(tmp_path, prompts(tmp_path, 1000))
    parts = [ids(prepared, shard, 7) for shard in range(7)]
    together = [name for part in parts for name in part]
    assert sorted(together) == sorted(ids(prepared))
    assert len(set(together)) == prepared.count == 1000
    assert parts[3] == ids(prepared)[3::7]


def test_any_first_part_of_the_file_is_a_fair_sample_of_all_sources(tmp_path):
    prepared = prepare(tmp_path, prompts(tmp_path, 3000, "many"), prompts(tmp_path, 1000, "few"))
    first = Counter(name.split("/")[0] for name in ids(prepared)[:1000])
    assert 200 < first["few"] < 300


def test_what_a_limit_takes_depends_on_seed_and_ids_but_not_on_the_order_of_rows(tmp_path):
    rows = [{"id": number, "prompt": f"say {number}"} for number in range(500)]
    source = SourceConfig(path=written(tmp_path / "p.jsonl", rows), limit=50)
    forward = prepare(tmp_path, source, name="forward")
    written(tmp_path / "p.jsonl", rows[::-1])
    backward = prepare(tmp_path, source, name="backward")
    assert ids(backward) == ids(forward)
    assert backward.digest == forward.digest
    assert forward.counts["over_limit"] == 450
    assert set(ids(prepare(tmp_path, source, name="other", seed=1))) != set(ids(forward))
    more = prepare(tmp_path, SourceConfig(path=source.path, limit=80), name="more")
    assert ids(more)[:50] == ids(forward)


def test_a_limit_is_shared_out_by_weight_and_what_a_source_lacks_is_said(tmp_path, capsys):
    some, few = prompts(tmp_path, 300, "some"), prompts(tmp_path, 10, "few")
    few.weight = 0.5
    prepared = prepare(tmp_path, some, few, limit=100)
    assert [prepared.counts["sources"][name]["taken"] for name in ("some/train", "few/train")] == [67, 10]
    assert "few/train gives 10 of the 33 asked of it" in capsys.readouterr().out


def test_the_first_of_two_that_say_the_same_stays(tmp_path):
    one = SourceConfig(
        path=written(tmp_path / "one.jsonl", [{"id": "b", "prompt": "Hi!"}, {"id": "a", "prompt": "hi"}])
    )
    two = SourceConfig(path=written(tmp_path / "two.jsonl", [{"id": "c", "prompt": "HI"}, {"id": "d", "prompt": "Ho"}]))
    assert sorted(ids(prepare(tmp_path, one, two))) == ["one/train/b", "two/train/d"]
    assert prepare(tmp_path, one, two, name="all", deduplicate=False).count == 4


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_later_row_of_an_id_that_asks_something_else_gets_an_id_of_its_own(tmp_path, deduplicate):
    rows = [{"id": 1, "prompt": text} for text in ("a", "b", "a", "b", "c")] + [
        {"prompt": "d"},
        {"id": 5, "prompt": "e"},
    ]
    source = SourceConfig(path=written(tmp_path / "p.jsonl", rows))
    prepared = prepare(tmp_path, source, deduplicate=deduplicate)
    named = {prompt.turns[0]: prompt.id for prompt in prepared.read()}
    assert [named["a"], named["d"]] == ["p/train/1", "p/train/5"]
    for text, number in (("b", 1), ("c", 1), ("e", 5)):
        assert named[text] == f"p/train/{number}-{fingerprint(Prompt('', '', (text,))):016x}"
    assert [prepared.counts[name] for name in ("taken", "malformed", "duplicate")] == [5, 0, 2]
    written(tmp_path / "p.jsonl", [*rows, {"id": 6, "prompt": "f"}])
    more = prepare(tmp_path, source, name="more", deduplicate=deduplicate)
    assert set(ids(prepared)) < set(ids(more)), "ids do not depend on other rows"


def test_an_id_that_a_lengthened_one_equals_is_lengthened_too(tmp_path):
    b = f"1-{fingerprint(Prompt('', '', ('b',))):016x}"
    rows = [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": b, "prompt": "c"}]
    prepared = prepare(tmp_path, SourceConfig(path=written(tmp_path / "p.jsonl", rows)))
    assert len(set(ids(prepared))) == 3


def test_what_a_limit_leaves_of_one_source_another_may_give(tmp_path):
    both = [SourceConfig(path=prompts(tmp_path, 1000).path, name=name) for name in ("a", "b")]
    both[0].limit = 10
    prepared = prepare(tmp_path, *both)
    counts = prepared.counts["sources"]
    assert [counts[name]["taken"] for name in ("a/train", "b/train")] == [10, 990]
    assert (counts["a/train"]["over_limit"], counts["b/train"]["duplicate"]) == (990, 10)
    assert len({prompt.turns for prompt in prepared.read()}) == 1000


def test_a_stream_gives_what_a_limit_left_of_the_source_before(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    (tmp_path / "stream").mkdir()
    pq.write_table(
        pa.Table.from_pylist([{"prompt": f"chats {number}"} for number in range(100)]),
        tmp_path / "stream/train.parquet",
    )
    before = prompts(tmp_path, 100)
    before.limit = 10
    stream = SourceConfig(path=str(tmp_path / "stream"), streaming=True, limit=95)
    prepared = prepare(tmp_path, before, stream)
    assert prepared.counts["sources"]["stream/train"]["taken"] == 90


def test_questions_of_every_split_of_a_folder_are_left_out(tmp_path):
    (tmp_path / "exam").mkdir()
    for split in ("train", "test"):
        table = pa.Table.from_pylist([{"prompt": [f"The {split} one?", "And?"], "prompt_id": 1, "category": "stem"}])
        pq.write_table(table, tmp_path / f"exam/{split}.parquet")
    source = SourceConfig(
        path=written(tmp_path / "p.jsonl", [{"prompt": f"The {n} one"} for n in ("train", "test", "x")])
    )
    assert ids(prepare(tmp_path, source, exclude=[str(tmp_path / "exam")])) == ["p/train/2"]


def test_questions_of_gsm8k_and_cnn_dailymail_are_left_out_of_a_configuration_of_the_hub_too(tmp_path, monkeypatch):
    rows = [{"prompt": f"The {name} one"} for name in ("question", "article", "hub", "x")]
    source = SourceConfig(path=written(tmp_path / "p.jsonl", rows))
    exams = [written(tmp_path / "gsm8k:main.jsonl", [{"question": "The question one?", "answer": "The x one"}])]
    exams.append(str(tmp_path / "cnn.parquet"))
    table = [{"prompt": None, "article": "The article one.", "highlights": "The x one", "id": "1"}]
    pq.write_table(pa.Table.from_pylist(table), exams[1])
    asked = []

    def load_dataset(path, subset, **options):
        asked.append((path, subset, options["split"]))
        return datasets.Dataset.from_list([{"question": "The hub one?", "answer": "The x one"}])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, subset: [f"{subset} of {path}"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ids(prepare(tmp_path, source, exclude=[*exams, "openai/gsm8k:main"])) == ["p/train/3"]
    assert asked == [("openai/gsm8k", "main", "main of openai/gsm8k")]


def test_a_complete_artifact_is_not_read_again_and_a_changed_file_is_refused_by_name(tmp_path, capsys):
    source = prompts(tmp_path, 20)
    first = prepare(tmp_path, source)
    stamp = (first.folder / FILE).stat().st_mtime_ns
    again = prepare(tmp_path, source)
    assert again == first
    assert (first.folder / FILE).stat().st_mtime_ns == stamp
    assert "is complete" in capsys.readouterr().out
    prompts(tmp_path, 21)
    with pytest.raises(ValueError, match=r"made with other settings \(sources.chats/train.content: "):
        prepare(tmp_path, source)
    assert prepare(tmp_path, source, overwrite=True).count == 21


@pytest.mark.parametrize("left", [True, False], ids=["with the prompts", "after the prompts"])
def test_a_start_that_was_killed_while_it_cleared_old_prompts_is_gone_on_with(tmp_path, left):
    source = prompts(tmp_path, 20)
    first = prepare(tmp_path, source)
    manifest = first.folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": None, "complete": False}))
    if not left:
        (first.folder / FILE).unlink()
    assert prepare(tmp_path, source) == first


def test_a_complete_artifact_needs_its_files_no_more_but_they_must_be_the_same_where_they_are(tmp_path):
    source, exam = prompts(tmp_path, 20), prompts(tmp_path, 1, "exam").path
    first = prepare(tmp_path, source, exclude=[exam])
    for file in (source.path, exam):
        os.rename(file, f"{file}.moved")
    assert prepare(tmp_path, source, exclude=[exam]) == first
    with pytest.raises(ValueError, match=r"chats.jsonl does not exist"):
        prepare(tmp_path, source, exclude=[exam], seed=1, overwrite=True)
    assert prepare(tmp_path, source, exclude=[exam]) == first, "what cannot be made again is not cleared"
    with pytest.raises(ValueError, match=r"chats.jsonl does not exist"):
        prepare(tmp_path, source, exclude=[exam], name="other")
    with pytest.raises(ValueError, match=r"other.jsonl does not exist"):
        prepare(tmp_path, source, exclude=[exam, str(tmp_path / "other.jsonl")])
    (first.folder / FILE).write_text("")
    with pytest.raises(ValueError, match=r"does not exist"):
        prepare(tmp_path, source, exclude=[exam])


def test_a_complete_artifact_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data = DataConfig(sources=[SourceConfig(path="nobody/chats")], exclude=["nobody/questions"])
    config = Config(name="run", runs_dir=str(tmp_path), data=data)
    with pytest.raises(ValueError, match=r"nobody/questions is not here"):
        prepare_prompts(config)
    with artifact(config.prompts_folder, "prompts", prompt_settings(data)) as target:
        written(
            target.folder / FILE, [{"id": "chats/train/1", "source": "chats/train", "turns": ["a"], "system": None}]
        )
        target.finish(counts={"taken": 1}, content=file_digest(target.folder / FILE))
    assert ids(prepare_prompts(config)) == ["chats/train/1"]


def test_the_held_out_share_does_not_change_the_prompts(tmp_path):
    source = prompts(tmp_path, 20)
    assert prepare(tmp_path, source, heldout_share=0.5) == prepare(tmp_path, source, heldout_share=0.1)


def test_a_file_that_was_damaged_or_half_written_is_made_anew(tmp_path):
    source = prompts(tmp_path, 20)
    first = prepare(tmp_path, source)
    whole = (first.folder / FILE).read_bytes()
    (first.folder / FILE).write_bytes(whole[:-9])
    assert prepare(tmp_path, source) == first
    manifest = first.folder / "manifest.json"
    manifest.write_text(json.dumps({**read_manifest(first.folder, "prompts"), "complete": False}))
    (first.folder / FILE).unlink()
    assert prepare(tmp_path, source) == first
    assert (first.folder / FILE).read_bytes() == whole


def test_data_that_were_refused_may_be_corrected_under_the_same_name(tmp_path):
    source = SourceConfig(path=written(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    with pytest.raises(
        ValueError, match=r"p.jsonl line 2 has the fields text; .*; correct it, or .*malformed_rows=skip"
    ):
        prepare(tmp_path, source)
    written(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert prepare(tmp_path, source).count == 2


def test_of_preparations_started_together_one_does_the_work_and_the_others_wait(tmp_path, capsys):
    source, results = prompts(tmp_path, 3000), []
    tasks = [Thread(target=lambda: results.append(prepare(tmp_path, source))) for _ in range(4)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    said = capsys.readouterr().out
    assert results == [results[0]] * 4
    assert said.count("prompts: 3000 in") == 1
    assert said.count("is complete") == 3
    assert said.count("waiting for it") <= 3


def test_a_stream_is_read_until_it_has_given_its_share_of_different_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    (tmp_path / "stream").mkdir()
    rows = [{"prompt": f"Say {number % 100}."} for number in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "stream/train.parquet")
    stream = SourceConfig(path=str(tmp_path / "stream"), streaming=True, limit=60)
    before = SourceConfig(path=written(tmp_path / "p.jsonl", [{"prompt": f"say {number}"} for number in range(30)]))
    prepared = prepare(tmp_path, before, stream)
    counts = prepared.counts["sources"]["stream/train"]
    assert counts["taken"] == 60 < counts["rows"] < 400
    assert counts["duplicate"] == counts["rows"] - 60
    assert len({canonical(prompt.turns[0]) for prompt in prepared.read()}) == 90
    assert prepare(tmp_path, before, stream, name="again").digest == prepared.digest
    assert all(len(name) > len("stream/train/") + 8 for name in ids(prepared) if "stream" in name), (
        "ids of what they say"
    )


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        ("[" * 100_000, {}, r"p.jsonl line 1 is nested too deeply; correct it, or .*malformed_rows=skip"),
        ("", {}, r"p.jsonl holds no row"),
        ('{"prompt": "a"}\n', {"min_chars": 9}, r"yield no prompt: of 1 rows 1 too_short left out"),
        ('{"prompt": "\\ud800"}\n', {}, r"p.jsonl line 1 is not valid UTF-8: .*malformed_rows=skip"),
    ],
)
def test_sources_without_a_prompt_are_refused(tmp_path, content, data, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, SourceConfig(path=str(tmp_path / "p.jsonl")), **data)


def test_configurations_without_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.sources is required"):
        prepare(tmp_path)
    source = prompts(tmp_path, 2)
    with pytest.raises(ValueError, match=r"two are called 'chats/train'"):
        prepare(tmp_path, source, source)
    source.streaming = True
    with pytest.raises(ValueError, match=r"streaming must be false for files"):
        prepare(tmp_path, source)
    written(tmp_path / "q.jsonl", [{"task": "a?"}])
    with pytest.raises(ValueError, match=r"data.exclude: .*q.jsonl line 1 has the fields task"):
        prepare(tmp_path, prompts(tmp_path, 2), exclude=[str(tmp_path / "q.jsonl")])


def test_embedded_prompts_are_all_different(tmp_path):
    prepared = prepare(tmp_path, SourceConfig(path="embedded", limit=2000))
    assert prepared.count == 2000


def test_columns_that_are_not_read_are_named_once_by_every_reader(tmp_path, capsys):
    rows = [{"id": n, "prompt": f"say {n}", "score": n, "topic": "x"} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    sources = [SourceConfig(p) for p in (written(tmp_path / "lines.jsonl", rows), str(tmp_path / "table.parquet"))]
    prepared = prepare(tmp_path, *sources, SourceConfig(path="embedded", limit=3), deduplicate=False)
    said = capsys.readouterr().out
    for name in ("lines/train", "table/train"):
        assert said.count(f"prompts: {name} has columns that are not read: score, topic\n") == 1
    assert "embedded/train has columns" not in said
    not_read = read_manifest(prepared.folder, "prompts")["not_read"]
    assert not_read == {"lines/train": ["score", "topic"], "table/train": ["score", "topic"], "embedded/train": []}


def test_rows_with_something_beside_them_stop_or_are_counted(tmp_path):
    rows = [{"prompt": "a?"}, {"prompt": "b?", "images": ["1.png"]}, {"prompt": "c?", "tools": [{"name": "f"}]}]
    source = SourceConfig(path=written(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2 has images beside its messages .*malformed_rows=skip"):
        prepare(tmp_path, source, name="stopped")
    counts = prepare(tmp_path, source, malformed_rows=SKIP).counts
    assert (counts["taken"], counts["malformed"]) == (1, 2)


def test_prompts_are_lines_to_every_reader(tmp_path):
    texts = ["one\u2028two", "one\u2029two", "one\x85two", "one\x1e\x0c\x0btwo"]
    source = SourceConfig(path=written(tmp_path / "p.jsonl", [{"prompt": text} for text in texts]))
    prepared = prepare(tmp_path, source, deduplicate=False)
    lines = (prepared.folder / FILE).read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["turns"][0] for line in lines) == sorted(texts)
    assert sorted(prompt.turns[0] for prompt in prepared.read()) == sorted(texts)
