"""What `fledge preview` prints of a conversation."""

import json
import sys

import pytest
from builders import conversation_record as record
from builders import conversations_run
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.preview import find_conversation, marked_text, preview, printable
from fledge.data_synthesis.tokens.chat_template import Sequence, join_turns, template_turns
from fledge.models.verifier.config import load_end_token_ids, load_tokenizer

FIRST = record("s/train/1", "Add 2.", "It is 5.", "And größer 👍🏽?", "日本 e\u0301 👍🏽!")
SECOND = record("s/train/2", "Bye.", "Bye now", last="length")


@pytest.fixture
def config(tmp_path, verifier_config):
    return conversations_run(tmp_path, verifier_config, FIRST, SECOND)


def printed(config, capsys) -> list[str]:
    preview(config)
    return capsys.readouterr().out.splitlines()


def test_the_first_conversation_is_shown_with_what_the_verifier_wrote_marked(config, capsys):
    lines = printed(config, capsys)
    facts = dict(line.split(maxsplit=1) for line in lines[:5])
    assert facts == {
        "conversation": "s/train/1",
        "source": "s",
        "answers": "stop, stop",
        "usage": "5 prompt tokens, 7 completion tokens",
        "split": "training",
    }
    assert lines[5] == "tokens from  the chat template"
    tokenizer = load_tokenizer(config.verifier)
    text, eos = "\n".join(lines), tokenizer.eos_token
    assert f"⟦It is 5.{eos}⟧" in text
    assert f"⟦日本 e\u0301 👍🏽!{eos}⟧" in text, "characters of several tokens are whole"
    assert text.count("⟦") == 2
    assert text.count(tokenizer.bos_token) == 1
    (sequence,) = join_turns(
        template_turns(tokenizer, FIRST["messages"], load_end_token_ids(config.verifier, tokenizer))
    )
    counted = sum(end - start for start, end in sequence.answers)
    assert lines[-1] == f"1 sequence, {len(sequence.token_ids)} tokens, {counted} of them written by the verifier"


def test_recorded_tokens_are_shown_sequence_by_sequence(tmp_path, verifier_config, capsys):
    tokenizer = load_tokenizer(verifier_config)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    parts = [encode(text) for text in ("Add 2.", "It is 5.", "And?", "No.")]
    sequences = [
        {"token_ids": before + said, "answers": [[len(before), len(before) + len(said)]]}
        for before, said in (parts[:2], parts[2:])
    ]
    config = conversations_run(tmp_path, verifier_config, record("x", "a", "b", "c", "d", sequences=sequences))
    lines = printed(config, capsys)
    assert "tokens from  the backend" in lines
    assert [line for line in lines if "⟦" in line] == ["Add 2.⟦It is 5.⟧", "And?⟦No.⟧"]
    assert [line.split(":")[0] for line in lines if line.startswith("sequence ")] == [
        "sequence 1 of 2",
        "sequence 2 of 2",
    ]


def test_a_terminal_shows_colours_unless_it_is_asked_not_to(config, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    eos = load_tokenizer(config.verifier).eos_token
    text = "\n".join(printed(config, capsys))
    assert f"\x1b[32mIt is 5.{eos}\x1b[0m" in text
    assert "⟦" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"⟦It is 5.{eos}⟧" in "\n".join(printed(config, capsys))


def test_a_truncated_answer_is_shown_and_said_to_be_left_out_if_it_is(config, capsys):
    config.preview.id = "s/train/2"
    config.dump.keep_truncated = False
    lines = printed(config, capsys)
    assert "answers      length" in lines
    assert any(line.endswith("⟦Bye now⟧") for line in lines)
    assert lines[-1] == "trained on without the truncated answer: 0 tokens, 0 of them written by the verifier"
    config.dump.keep_truncated = True
    assert printed(config, capsys)[-1].startswith("1 sequence, ")


def test_what_dump_would_leave_out_is_said_with_the_cause(tmp_path, verifier_config, capsys):
    sequences = [{"token_ids": [5] * size, "answers": [[size - 2, size]]} for size in (4, 9, 5)]
    several = record("a", "a", "b", "c", "d", "e", "f", sequences=sequences)
    picture = record("b", "a", "b", sequences=sequences[:1])
    picture["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    config = conversations_run(tmp_path, verifier_config, several, picture)
    assert printed(config, capsys)[-1] == "3 sequences, 18 tokens, 6 of them written by the verifier"
    config.dump.max_length = 8
    assert printed(config, capsys)[-1] == "dump leaves out sequence 2: its 9 tokens are more than dump.max_length=8"
    sequences[1]["answers"] = [[2, 4], [7, 9]]
    config = conversations_run(
        tmp_path / "2", verifier_config, record("a", "a", "b", "c", "d", sequences=sequences[1:2])
    )
    config.dump.max_length = 8
    assert printed(config, capsys)[-1] == (
        "dump cuts sequence 1 to 4 tokens, 2 of them written by the verifier: its 9 tokens are more than "
        "dump.max_length=8"
    )
    config = conversations_run(tmp_path / "3", verifier_config, picture)
    assert printed(config, capsys)[-1] == "dump leaves it out: it has images, which the verifier does not take"


def test_conversations_that_are_still_written_are_shown_up_to_the_last_whole_line(tmp_path, verifier_config, capsys):
    config = conversations_run(tmp_path, verifier_config, FIRST, SECOND, finished=False)
    path = config.conversations_folder / "conversations.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(record("s/train/3", "a", "b"))[:-9])
    assert printed(config, capsys)[0] == "conversation s/train/1"
    with pytest.raises(ValueError, match="holds no conversation 's/train/3'"):
        find_conversation(path.parent, "s/train/3")
    path.write_text("{")
    with pytest.raises(ValueError, match="holds no conversation yet"):
        find_conversation(path.parent, None)


def test_what_cannot_be_shown_is_said_in_one_sentence(config, tmp_path):
    config.preview.id = "s/train/9"
    with pytest.raises(ValueError, match=r"preview\.id: .* holds no conversation 's/train/9'"):
        preview(config)
    config.verifier = VerifierConfig(path=config.verifier.path, chat_template_kwargs={"mood": "calm"})
    config.preview.id = None
    with pytest.raises(ValueError, match=r"another tokenizer or chat template .*\(chat_template: "):
        preview(config)
    config.name = "none"
    with pytest.raises(ValueError, match="run `fledge synthesize` first"):
        preview(config)


def test_a_terminal_obeys_nothing_that_a_conversation_says(verifier_config):
    assert printable("a\x1b[2J\rb\n\tc\x9b") == "a\\x1b[2J\\x0db\n\tc\\x9b"
    tokenizer = load_tokenizer(verifier_config)
    sequence = Sequence(tokenizer.encode("\x1b[31mred", add_special_tokens=False), [])
    assert marked_text(tokenizer, sequence, str).endswith("\\x1b[31mred")


def test_the_command_prints_it(finished):
    lines = finished("preview").stdout.splitlines()
    assert lines[0].startswith("conversation embedded/")
    assert sum("⟦" in line for line in lines) >= 1
    assert "holds no conversation 'x'" in finished("preview", "preview.id=x", code=2).stderr
