"""Rows of chat data become prompts, whatever their form and wherever they stand."""

import json

import datasets
import fledge.data_synthesis.prompts.sources as sources
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from fledge.conf.schema import SourceConfig
from fledge.data_synthesis.heldout import conversation_id, is_heldout, sequence_id
from fledge.data_synthesis.prompts.rows import prompt_of, read_prompt
from fledge.data_synthesis.prompts.sources import dataset_rows, read_rows, split_names

ULTRACHAT = {"prompt": "a?", "prompt_id": "f0e3", "messages": [
    {"content": "a?", "role": "user"}, {"content": "x", "role": "assistant"}, {"content": "b?", "role": "user"},
]}  # fmt: skip
MAGPIE = {"uuid": "77", "instruction": "c?", "response": "y", "task_category": "Math",
    "conversations": [{"from": "human", "value": "c?"}, {"from": "gpt", "value": "y"}],
}  # fmt: skip
PARTS = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "images/1.png"}}]


def said(*messages, **names):
    """Messages of OpenAI's form, from texts such as "user: hello"."""
    pairs = (message.split(": ", 1) for message in messages)
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **names}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_hub_form(folder, **splits):
    """A dataset as the hub has it: Parquet files by split, in parts, and a README.md that names them."""
    (folder / "data").mkdir(parents=True)
    names = []
    for split, rows in splits.items():
        for part in range(2):
            table = pa.Table.from_pylist(rows[part * len(rows) // 2 : (part + 1) * len(rows) // 2])
            pq.write_table(table, folder / f"data/{split}-{part:05d}-of-00002.parquet")
        names.append(f"  - split: {split}\n    path: data/{split}-*\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(names) + "---\n"
    )
    return str(folder)


def rows_in(path):
    """Read a source whose rows are all sound; the place of one that is not is in the error."""
    for place, row in read_rows(SourceConfig(path=str(path))):
        if isinstance(row, ValueError):
            raise ValueError(f"{place} {row}")
        yield row


def turns_in(path, **changes):
    return [prompt_of(row, "s", n).turns for n, (_, row) in enumerate(read_rows(SourceConfig(path=path, **changes)))]


@pytest.mark.parametrize(
    ("row", "turns", "name"),
    [
        (ULTRACHAT, ("a?", "b?"), "f0e3"),
        (MAGPIE, ("c?",), "77"),
        ({"prompt": "d?"}, ("d?",), 3),
        ({"turns": ["e?", "f?"], "question_id": 5}, ("e?", "f?"), 5),
        ({"prompt": ["e?", "f?"]}, ("e?", "f?"), 3),
        ({"prompt": [{"role": "user", "content": "g?"}]}, ("g?",), 3),
        (said("user: h?", "assistant: ", id=0), ("h?",), 0),
        ({"messages": [{"role": "user", "content": PARTS}]}, (PARTS,), 3),
        ({"conversation": [{"role": "user", "content": "i?"}], "conversation_id": "w"}, ("i?",), "w"),
    ],
)
def test_the_usual_forms_are_read_with_the_ids_they_bring(row, turns, name):
    prompt = prompt_of(row, "chats/train", 3)
    assert (prompt.turns, prompt.id, prompt.source) == (turns, f"chats/train/{name}", "chats/train")


def test_a_system_message_stands_first_or_in_a_field_of_its_own():
    assert prompt_of(said("system: Be short.", "user: a?"), "s", 0).system == "Be short."
    assert prompt_of({"prompt": "a?", "system": "Be short."}, "s", 0).system == "Be short."
    assert prompt_of(said("system: ", "user: a?"), "s", 0).system is None


def test_a_system_message_of_text_parts_is_their_text():
    parts = [{"type": "text", "text": "Be short."}, {"type": "text", "text": "Be kind.", "image_url": None}]
    rows = [{"messages": [{"role": "system", "content": parts}, {"role": "user", "content": "a?"}]}]
    rows += [{"prompt": "a?", "system": parts}, {"prompt": "a?", "system": "Be short.\nBe kind."}]
    assert [prompt_of(row, "s", 0).system for row in rows] == ["Be short.\nBe kind."] * 3
    assert prompt_of({"prompt": "a?", "system": [{"type": "text", "text": " "}]}, "s", 0).system is None


def test_the_empty_fields_that_parquet_adds_to_content_parts_are_dropped(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": PARTS}]}]), tmp_path / "p.parquet")
    assert turns_in(str(tmp_path / "p.parquet")) == [(PARTS,)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "must be an object, got list"),
        ({"text": "a", "label": 1}, "has the fields text, label; one of messages, .*, turns, prompt is required"),
        ({"messages": "hello"}, "must have a list in messages that is not empty, got 'hello'"),
        ({"messages": [{"text": "hi"}]}, "message 1 must have 'role' and 'content', or 'from' and 'value'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        (said("user: a?", "assistant: b", "user:  "), "message 3 is an empty user turn"),
        ({"prompt": " "}, "turn 1 is an empty user turn"),
        (said("assistant: hi", "user: a?"), "starts with the assistant"),
        (said("user: a?", "user: b?"), "roles out of order: message 2 is the user's, as is the one before"),
        (said("user: a?", "assistant: b", "assistant: c"), "roles out of order: message 3 is the assistant's"),
        (said("user: a?", "system: b"), "a system message at message 2"),
        (said("system: b"), "has no user turn"),
        (said("narrator: a"), "message 1 has the role 'narrator'; user, human, .* are known"),
        (said("user: a?", "tool: 5"), "message 2 is of a tool: tool turns are not supported"),
        ({"turns": [["a"]]}, "turn 1 part 1 has a form that is not known"),
        ({"turns": [[{"type": "image", "image": "x.png"}]]}, "turn 1 part 1 has a form that is not known"),
        ({"turns": [[{"type": "image_url", "image_url": "x.png"}]]}, "turn 1 part 1 has a form that is not known"),
        ({"turns": [7]}, "turn 1 must be a text or a list of content parts, got int"),
        ({"prompt": "a?", "system": ["b"]}, "must have a text as system message, got list"),
        (
            {"prompt": "a?", "system": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "a text as system .*, got list",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(row, "s", 0)


def test_files_and_folders_of_every_kind_give_the_same_prompts(tmp_path):
    rows = [ULTRACHAT | {"prompt_id": str(number)} for number in range(7)]
    (tmp_path / "data.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder/1.jsonl", rows[:3])
    written(tmp_path / "folder/2.jsonl", rows[3:])
    places = [
        written(tmp_path / "data.jsonl", rows),
        *(str(tmp_path / n) for n in ("data.json", "data.parquet", "folder")),
    ]
    for place in places:
        found = [prompt_of(row, "s", None) for _, row in read_rows(SourceConfig(path=place))]
        assert [prompt.id for prompt in found] == [f"s/{number}" for number in range(7)], place
        assert {prompt.turns for prompt in found} == {("a?", "b?")}, place


def test_json_is_read_rightly_wherever_a_chunk_ends(tmp_path, monkeypatch):
    rows = [{"prompt": 'a]},\n\\"é€𝄞'}, {"prompt": "", "n": [1.5e3, None, {}]}, {"prompt": "x" * 99}]
    path = tmp_path / "p.json"
    for text in (json.dumps(rows), " \n" + json.dumps(rows, indent=3) + "\n", "\n".join(map(json.dumps, rows)) + "\n"):
        path.write_text(text)
        for size in (1, 2, 7, 1 << 20):
            monkeypatch.setattr(sources, "_CHUNK", size)
            assert list(rows_in(path)) == rows


def test_a_dataset_of_the_hub_form_is_read_split_by_split_mapped_or_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    rows = [MAGPIE | {"uuid": str(number)} for number in range(40)]
    path = in_hub_form(tmp_path / "magpie", train=rows, test=rows[:6])
    assert sorted(split_names(path)) == ["test", "train"]
    mapped = [row["uuid"] for _, row in dataset_rows(SourceConfig(path=path))]
    assert mapped == [row["uuid"] for _, row in read_rows(SourceConfig(path=path))] == [row["uuid"] for row in rows]
    assert len(turns_in(path, split="test")) == 6
    streamed = [[row["uuid"] for _, row in read_rows(SourceConfig(path=path, streaming=True), s)] for s in (1, 1, 2)]
    assert streamed[0] == streamed[1] != streamed[2] != mapped
    assert all(sorted(names) == sorted(mapped) for names in streamed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"p.jsonl line 3 is malformed JSON"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', r"p.jsonl line 1 is not valid UTF-8"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": ', r"p.json is malformed JSON after item 1"),
        ("p.json", b'[{"prompt": "a"}', r"p.json is malformed JSON after item 1"),
        ("p.json", b'[{"prompt": "\xff"}]', r"p.json is not valid UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, r"p.jsonl line 2 is nested too deeply"),
        ("p.json", b'[{"prompt": "a"}, ' + b"[" * 100_000, r"p.json is nested too deeply in item 2"),
        ("p.parquet", b"PAR1", r"p.parquet cannot be read: "),
        ("p.csv", b"prompt\na\n", r"p.csv must be of .json, .jsonl, .parquet, one kind in a folder, got .csv"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(rows_in(tmp_path / name))


def test_invalid_utf8_in_parquet_costs_its_row_alone(tmp_path):
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    rows = list(read_rows(SourceConfig(path=str(tmp_path / "p.parquet"))))
    assert [rows[0][1], rows[2][1]] == [{"prompt": "a"}, {"prompt": "c"}]
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        prompt_of(rows[1][1], "s", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "nope"}, r"has no split 'nope'; it has .*train"),
        ({"revision": "main"}, r"revision must be null for what is on this machine"),
        ({"subset": "nope"}, r"cannot be read: .*nope"),
    ],
)
def test_options_that_a_folder_does_not_have_are_refused(tmp_path, changes, message):
    path = in_hub_form(tmp_path / "m", train=[MAGPIE] * 2)
    with pytest.raises(ValueError, match=message):
        turns_in(path, **changes)


def test_files_that_would_be_left_out_of_a_folder_unnoticed_are_named(tmp_path):
    for name in ("a.jsonl", "train.jsonl"):
        written(tmp_path / name, [MAGPIE])
    with pytest.raises(ValueError, match=r"a\.jsonl is of none of the splits"):
        turns_in(str(tmp_path))


def test_a_source_that_does_not_exist_is_named(tmp_path):
    for path in ("missing.jsonl", str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ValueError, match=r"missing.* does not exist"):
            turns_in(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered", "Magpie-Llama-3.1-Pro-300K-Filtered/train"),
        ("data/v1.2/chats.2024.jsonl", "chats.2024/train"),
        ("data/chats.2024/", "chats.2024/train"),
        ("embedded", "embedded/train"),
    ],
)
def test_a_source_is_called_by_the_last_part_of_its_path_without_the_kind_of_file(path, name):
    assert sources.source_name(SourceConfig(path=path)) == name


def test_a_message_of_both_forms_is_read_from_the_fields_that_are_filled():
    empty = dict.fromkeys(("role", "content", "from", "value"))
    sharegpt = [empty | {"from": "human", "value": "a?"}, empty | {"from": "gpt", "value": "b"}]
    openai = [empty | {"role": "user", "content": "a?"}]
    for messages in (sharegpt, openai):
        assert prompt_of({"conversations": messages}, "s", 0).turns == ("a?",)


def test_a_hub_that_cannot_be_had_is_one_sentence(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^nobody/nothing is not here and not a dataset of the hub that can be had: "):
        turns_in("nobody/nothing")


@pytest.mark.parametrize("name", ["x##2", "x##2-", "x##2--", "x##٢", "x##²", "##7", "x##", "x##a", "a##2/b", "x#2"])
def test_no_id_of_a_row_is_that_of_a_further_sequence(name):
    prompt = prompt_of({"id": name, "prompt": "a?"}, "s/train", 0)
    assert conversation_id(prompt.id) == prompt.id
    assert conversation_id(sequence_id(prompt.id, 2)) == prompt.id
    assert prompt.id.startswith(f"s/train/{name}")


def test_different_ids_stay_different():
    names = ["x##2", "x##2-", "x##2--", "x##", "x##-", "x"]
    assert len({prompt_of({"id": name, "prompt": "a?"}, "s", 0).id for name in names}) == len(names)


def test_every_sequence_of_a_held_out_conversation_is_held_out():
    ids = [f"source/train/{number}" for number in range(500)]
    for share in (0.02, 0.5):
        assert all(
            is_heldout(sequence_id(name, n), share) == is_heldout(name, share) for name in ids for n in range(12)
        )


def test_the_held_out_split_depends_on_the_id_alone():
    ids = [f"source/train/{i}" for i in range(5000)]
    share = sum(is_heldout(i, 0.1) for i in ids) / len(ids)
    assert 0.08 < share < 0.12
    assert all(is_heldout(i, 0.2) for i in ids if is_heldout(i, 0.1))


TOOL = {"type": "function", "function": {"name": "f"}}
BESIDE = [
    ({"image": "coco/1.jpg"}, "images"),
    ({"images": ["1.jpg"]}, "images"),
    ({"image": {"bytes": "x", "path": None}}, "images"),
    ({"videos": ["1.mp4"]}, "videos"),
    ({"audio": {"array": [0.5], "sampling_rate": 16000}}, "audio"),
    ({"tools": [TOOL]}, "tools"),
    ({"functions": json.dumps([TOOL])}, "tools"),
    ({"documents": [{"title": "t", "text": "It rained."}]}, "documents"),
    ({"context": "It rained."}, "documents"),
    ({"input": "It rained."}, "input"),
    ({"history": [["Hi.", "Hello."]]}, "history"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
]


def read_all(path):
    return [read_prompt(row, "s", n, local=True)[0].turns for n, (_, row) in enumerate(read_rows(SourceConfig(path)))]


def in_files(folder, row):
    """A row as JSON lines and as Parquet."""
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    return written(folder / "rows.jsonl", [row]), str(folder / "rows.parquet")


@pytest.mark.parametrize(("beside", "what"), BESIDE, ids=[f"{next(iter(b))} {n}" for n, (b, _) in enumerate(BESIDE)])
def test_a_row_whose_question_rests_on_a_column_is_refused_whoever_reads_it(tmp_path, beside, what):
    for path in in_files(tmp_path, {**said("user: What is it?", "assistant: x"), **beside}):
        with pytest.raises(ValueError, match=rf"^has {what} beside its messages \(in '{next(iter(beside))}'\)"):
            read_all(path)


def test_what_stands_beside_one_message_and_placeholders_are_refused_too():
    asked = {"role": "user", "content": "What is it?", "images": ["1.jpg"]}
    with pytest.raises(ValueError, match=r"^has images beside its messages"):
        read_prompt({"messages": [asked]}, "s", 0, local=True)
    for kind, text in (
        ("image", "<image>\nWhat is it?"),
        ("image", "<image> <image> \r\nWhat are they?"),
        ("audio", "What is it?\n <audio>\n"),
        ("video", "What are they?\n<video>\n<video>"),
    ):
        said = f"^begins or ends a message with the placeholder <{kind}>, but fledge reads no {kind} for it"
        with pytest.raises(ValueError, match=said):
            read_prompt({"prompt": text, "file_name": "1.jpg"}, "s", 0, local=True)


def test_columns_that_bring_nothing_new_are_no_hindrance(tmp_path):
    empty = {"images": [], "image": None, "tools": "[]", "audio": {"path": None}, "context": " ", "input": ""}
    repeated = {"context": "It rained.", "documents": "It rained. Why?", "system_prompt": "Be short."}
    for row in (
        {**said("user: It rained. Why?"), **empty},
        {**said("system: Be short.", "user: It rained. Why?"), **repeated},
        said("user: It rained. Why?", "assistant: x") | {"knowledge": "rain", "reward": 0.5, "instruction": "Why?"},
    ):
        for path in in_files(tmp_path, row):
            assert read_all(path) == [("It rained. Why?",)]
    for row in (ULTRACHAT, MAGPIE, {"prompt": "What does <image> mean, and <video></video>?"}):
        assert read_prompt(row, "s", 0, local=True)[0].turns
    differ = "Explain the difference between <audio> and <video>"
    for html in ("<video>\n<source src=a>\n</video> is not shown.", "Is <audio> HTML?", differ, "<image> is HTML?"):
        assert read_prompt({"prompt": html}, "s", 0, local=True)[0].turns == (html,)


def test_a_system_prompt_by_another_name_is_read_and_two_that_differ_are_refused():
    for name in ("system_prompt", "system_message"):
        assert prompt_of({"prompt": "a?", name: "Be short."}, "s", 0).system == "Be short."
    with pytest.raises(ValueError, match="has system messages that differ"):
        prompt_of(said("system: Be long.", "user: a?", system="Be short."), "s", 0)


def saved_to_disk(folder):
    rows = datasets.Dataset.from_list([said("user: a?")])
    rows.save_to_disk(str(folder / "one"))
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(folder / "splits"))
    feather.write_feather(rows.data.table, folder / "rows.feather")
    return folder / "one", folder / "splits", next((folder / "one").glob("*.arrow")), folder / "rows.feather"


def test_arrow_of_any_kind_is_named_with_its_cure(tmp_path):
    for path in map(str, saved_to_disk(tmp_path)):
        for read in (lambda path=path: list(rows_in(path)), lambda path=path: split_names(path)):
            with pytest.raises(ValueError, match=rf"{path} holds Arrow files, .*load_from_disk and write it with to_"):
                read()
