"""A function of one's own that changes rows, or leaves them out: redaction, recency, fields of a log."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fledge.conf.schema import Config, DataConfig, MalformedRows, SourceConfig
from fledge.data_synthesis.prompts.prepare import prepare_prompts


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(tmp_path, source, name="run"):
    return prepare_prompts(Config(name=name, runs_dir=str(tmp_path / "runs"), data=DataConfig(sources=[source])))


def test_a_function_of_ones_own_changes_rows_and_leaves_some_out(tmp_path, monkeypatch):
    (tmp_path / "log_rows.py").write_text(
        "def recent(row):\n"
        "    if row['at'] < 3:\n"
        "        return None\n"
        "    return {'id': row['id'], 'prompt': row['text'].replace('ada@example.org', 'EMAIL')}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"id": n, "at": n, "text": f"Mail ada@example.org of case {n}."} for n in range(8)]
    path = written(tmp_path / "log.jsonl", rows)
    source = SourceConfig(path=path, row_function="log_rows.recent")
    prepared = prepare(tmp_path, source)
    texts = {prompt.id: prompt.turns for prompt in prepared.read()}
    assert texts == {f"log/train/{n}": (f"Mail EMAIL of case {n}.",) for n in range(3, 8)}
    assert (prepared.counts["rows"], prepared.counts["row_function"], prepared.counts["taken"]) == (8, 3, 5)
    with pytest.raises(ValueError, match="row_function"):  # other prompts under the same name
        prepare(tmp_path, SourceConfig(path=path))
    written(tmp_path / "log.jsonl", [*rows, {"id": 9, "text": "a"}])
    with pytest.raises(ValueError, match=r"log.jsonl line 9 makes row_function fail with KeyError: 'at'"):
        prepare(tmp_path, source, name="other")


def test_a_function_that_cannot_be_loaded_is_named(tmp_path):
    path = written(tmp_path / "log.jsonl", [{"prompt": "a"}])
    for name in ("no_such_module.recent", "json.nothing", "json"):
        with pytest.raises(ValueError, match=rf"row_function {name} cannot be loaded .*MODULE.FUNCTION is required"):
            prepare(tmp_path, SourceConfig(path=path, row_function=name))


def test_it_is_given_all_columns_and_what_it_cannot_read_is_malformed(tmp_path, monkeypatch):
    (tmp_path / "log_columns.py").write_text("def wanted(row):\n    return row if row['at'] + 0 > 1 else None\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "log.parquet"
    table = {"at": [1, 2, 3, None], "prompt": list("abcd"), "token_ids": [[1]] * 4, "prompt_token_ids": [[2, 3]] * 4}
    pq.write_table(pa.table(table), path)
    config = Config(name="run", runs_dir=str(tmp_path / "runs"))
    config.data = DataConfig(
        sources=[SourceConfig(path=str(path), row_function="log_columns.wanted")], malformed_rows=MalformedRows.skip
    )
    prepared = prepare_prompts(config)
    assert {prompt.turns: prompt.logged for prompt in prepared.read()} == {("b",): [[2, 3], [1]], ("c",): [[2, 3], [1]]}
    assert (prepared.counts["row_function"], prepared.counts["malformed"]) == (1, 1)
