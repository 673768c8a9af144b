"""From conversations to the sequences of a store: what is taken, what is left out, and that both are counted."""

import shutil

import pytest
from builders import conversation_record as record
from builders import conversations_run
from builders import recorded_sequence as sequence
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.data_synthesis.tokens import tokenise
from fledge.eval.questions.question import load_heldout
from fledge.models.verifier.config import load_tokenizer

A, B, C, EOT, U = 11, 12, 13, 2, 14  # tokens


@pytest.fixture
def run_of(tmp_path, verifier_config):
    """Give a function that writes conversations and gives the configuration of their run."""
    return lambda *records: conversations_run(tmp_path, verifier_config, *records)


def stored(config):
    store = HiddenStateStore(config.hidden_states_folder, with_states=False)
    return {s.id: (s.input_ids.tolist(), s.loss_mask.tolist()) for s in (store[i] for i in range(len(store)))}


def counts(config):
    return read_manifest(config.hidden_states_folder, "hidden_states")["counts"]


TWO = (sequence([U, A, EOT], (1, 3)), sequence([U, B, EOT, U, C, EOT], (4, 6)))


def test_recorded_tokens_are_stored_as_they_are_a_sample_a_sequence(run_of):
    config = run_of(record("two", "u", "a", "v", "c", sequences=TWO), record("one", "u", "a", sequences=TWO[:1]))
    dump(config)
    assert stored(config) == {
        "one": ([U, A, EOT], [0, 1, 1]),
        "two": ([U, A, EOT], [0, 1, 1]),
        "two##2": ([U, B, EOT, U, C, EOT], [0, 0, 0, 0, 1, 1]),
    }
    assert (counts(config)["conversations"], counts(config)["samples"]) == (2, 3)


def test_joined_samples_are_as_long_as_said_and_leave_held_out_ones_alone(run_of, monkeypatch):
    monkeypatch.setattr(tokenise, "is_heldout", lambda name, _: name == "d")
    one, two = TWO
    single = (record(name, "u", "a", sequences=[one]) for name in "abcdef")
    config = run_of(*single, record("g", "u", "a", "v", "c", sequences=[one, two]))
    config.dump.join_length = 6
    dump(config)
    joined = ([U, A, EOT] * 2, [0, 1, 1] * 2)
    assert stored(config) == {
        "a": joined,
        "c": joined,  # with e: the held-out one between them takes no room
        "d": ([U, A, EOT], [0, 1, 1]),
        "f": joined,
        "g##2": ([U, B, EOT, U, C, EOT], [0, 0, 0, 0, 1, 1]),
    }
    assert (counts(config)["conversations"], counts(config)["samples"]) == (7, 5)
    config.dump.join_length = 10**6
    with pytest.raises(
        ValueError, match=r"dump\.join_length must be at most the verifier's context of \d+ tokens, got 1000000"
    ):
        dump(config)


def test_conversations_without_recorded_tokens_are_told_by_the_template(run_of, verifier_config):
    config = run_of(record("plain", "Add 2.", "It is 5.", "And 3?", "It is 8."))
    dump(config)
    ((tokens, mask),) = stored(config).values()
    tokenizer = load_tokenizer(verifier_config)
    written = tokenizer.decode([token for token, inside in zip(tokens, mask, strict=True) if inside])
    assert written == f"It is 5.{tokenizer.eos_token}It is 8.{tokenizer.eos_token}"


APPENDED = sequence([U, A, EOT, U, C], (1, 3), (4, 5))


@pytest.mark.parametrize(
    ("recorded", "whole", "cut"),
    [
        ([APPENDED], {"x": ([U, A, EOT], [0, 1, 1])}, {"x": ([U, A, EOT, U, C], [0, 1, 1, 0, 1])}),
        (
            [TWO[0], sequence([U, B, EOT, U, C], (4, 5))],
            {"x": ([U, A, EOT], [0, 1, 1])},
            {"x": ([U, A, EOT], [0, 1, 1]), "x##2": ([U, B, EOT, U, C], [0, 0, 0, 0, 1])},
        ),
    ],
)
def test_a_truncated_answer_is_trained_on_unless_it_is_to_be_left_out(run_of, recorded, whole, cut, capsys):
    config = run_of(record("x", "u", "a", "v", "c", sequences=recorded, last="length"))
    config.dump.keep_truncated = False
    dump(config)
    assert "leaves out 1 answers that synthesize.max_tokens cut" in capsys.readouterr().out
    assert stored(config) == whole
    assert (counts(config)["truncated_answers"], counts(config)["truncated"]) == (1, 0)
    config.dump.keep_truncated = True
    with pytest.raises(ValueError, match="keep_truncated: False -> True"):
        dump(config)
    config.overwrite = True
    dump(config)
    assert stored(config) == cut
    assert counts(config)["truncated_answers"] == 0
    assert "leaves out" not in capsys.readouterr().out


def test_a_truncated_answer_told_by_the_template_has_no_end_of_turn(run_of, verifier_config):
    config = run_of(record("x", "Add 2.", "It is", last="length"))
    dump(config)
    ((tokens, mask),) = stored(config).values()
    tokenizer = load_tokenizer(verifier_config)
    assert tokenizer.decode([token for token, inside in zip(tokens, mask, strict=True) if inside]) == "It is"


def test_what_is_left_out_is_counted_by_cause(run_of, verifier_config, capsys):
    eos = load_tokenizer(verifier_config).eos_token
    picture = record("picture", "u", "a", sequences=TWO[:1])
    picture["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    config = run_of(
        record("good", "u", "a", sequences=TWO[:1]),
        record("half", "u", "a", "v", "c", sequences=TWO),
        record("cut", "u", "a", sequences=[sequence([U, A], (1, 2))], last="length"),
        record("marker", "u", f"a {eos} b"),
        picture,
    )
    config.dump.max_length, config.dump.keep_truncated = 4, False
    dump(config)
    assert stored(config).keys() == {"good", "half"}
    named = ("conversations", "truncated_answers", "truncated", "too_long", "cut_answers", "template", "images")
    assert {name: counts(config)[name] for name in named} == dict(zip(named, (2, 1, 1, 1, 0, 1, 1), strict=True))
    out = capsys.readouterr().out
    assert "dump: marker is left out: answer 1" in out
    assert "dump: picture is left out: it has images, which the verifier does not take" in out
    assert "1 conversations whose images cannot be read" in out
    assert "1 sequences of which no answer ends within dump.max_length=4, 0 answers beyond it of others" in out
    config.data.local_images = True
    with pytest.raises(ValueError, match="local_images: None -> True"):
        dump(config)


def test_a_sequence_that_is_too_long_keeps_the_answers_that_end_within(run_of, capsys):
    three = sequence([U, A, EOT, U, B, EOT, U, C, EOT], (1, 3), (4, 6), (7, 9))
    config = run_of(record("x", "u", "a", "v", "b", "w", "c", sequences=[three]))
    found = {}
    for config.dump.max_length in (9, 8, 6, 5, 3):
        config.overwrite = True
        dump(config)
        found[config.dump.max_length] = (*stored(config)["x"], counts(config)["cut_answers"])
    masks = ([0, 1, 1], [0, 1, 1] * 2, [0, 1, 1] * 3)
    of = {cut: (three["token_ids"][: len(mask)], mask, cut) for cut, mask in zip((2, 1, 0), masks, strict=True)}
    assert found == {9: of[0], 8: of[1], 6: of[1], 5: of[2], 3: of[2]}
    assert counts(config)["too_long"] == 0
    assert (
        "0 sequences of which no answer ends within dump.max_length=3, 2 answers beyond it" in capsys.readouterr().out
    )
    config.dump.max_length = 2
    with pytest.raises(ValueError, match=r"1 sequences of which no answer ends within dump\.max_length=2, 0 answers"):
        dump(config)


def test_a_store_of_nothing_is_refused_with_the_causes(run_of):
    config = run_of(record("cut", "u", "a", sequences=[sequence([U, A], (1, 2))], last="length"))
    config.dump.keep_truncated = False
    with pytest.raises(ValueError, match="can be used: 1 truncated answers, 1 conversations without any other"):
        dump(config)


@pytest.mark.parametrize(
    ("sequences", "problem"),
    [
        ([sequence([U, 9999], (1, 2))], "ids of the verifier's vocabulary"),
        ([sequence([U, A], (1, 3))], "within 2 tokens"),
        ([sequence([U, A, B], (1, 2), (2, 3))], "hold 2 answers and messages 1"),
    ],
)
def test_recorded_tokens_that_cannot_be_are_named_with_their_conversation(run_of, sequences, problem):
    config = run_of(record("good", "u", "a", sequences=TWO[:1]), record("s/train/7", "u", "a", sequences=sequences))
    with pytest.raises(ValueError, match=f"conversation s/train/7: .*{problem}"):
        dump(config)


def test_a_template_without_exact_masks_stops_the_dump_of_what_it_has_to_tell(tmp_path, tiny_verifier_folder):
    folder = shutil.copytree(tiny_verifier_folder, tmp_path / "verifier")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("generation -%}", "if true -%}").replace("{%- endgeneration", "{%- endif")
        + "{% if add_generation_prompt %}THINK{% endif %}"
    )
    config = conversations_run(tmp_path, VerifierConfig(path=str(folder)), record("x", "u", "a"))
    with pytest.raises(ValueError, match=r"verifier\.path has a chat template that does not tell what"):
        dump(config)
    config = conversations_run(
        tmp_path / "2", VerifierConfig(path=str(folder)), record("x", "u", "a", sequences=TWO[:1])
    )
    dump(config)
    assert stored(config) == {"x": ([U, A, EOT], [0, 1, 1])}


def test_held_out_questions_end_at_the_last_whole_answer(run_of):
    picture = record("picture", "u", "a")
    picture["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    config = run_of(record("x", "u", "a", "v", "c", last="length"), record("cut", "u", "a", last="length"), picture)
    (question,) = load_heldout(
        config.conversations_folder, {"heldout_share": 1.0, "synthesize": {"max_tokens": 9}}, limit=9
    )
    assert (question.id, question.turns, question.answers) == ("x", ("u",), ("a",))
