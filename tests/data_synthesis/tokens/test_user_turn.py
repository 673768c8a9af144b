"""What stands before a user's turn, and what ends it, by rendering."""

import pytest
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.data_synthesis.tokens.user_turn import find_user_turn
from template_shapes import SHAPES, Shape, headers

HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Blue."}]


@pytest.mark.parametrize("history", [[], HISTORY], ids=["first", "later"])
@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("mistral")])
def test_a_users_turn_is_what_stands_between_its_header_and_its_end(name, history):
    tokenizer = SHAPES[name].tokenizer()
    turn = find_user_turn(tokenizer, history, [tokenizer.convert_tokens_to_ids(SHAPES[name].end)])
    said = "Two words: Yes, no. 12 34"
    tokens = prompt_tokens(tokenizer, [*history, {"role": "user", "content": said}])
    words = tokenizer.encode(said, add_special_tokens=False)
    assert tokens[: len(turn.header) + len(words) + 1] == [*turn.header, *words, turn.end]
    assert turn.end in turn.marks
    assert not turn.marks & set(words)


def test_what_no_history_changes_is_found_once(monkeypatch):
    tokenizer, reads = SHAPES["chatml"].tokenizer(), []
    added = type(tokenizer).added_tokens_decoder
    monkeypatch.setattr(
        type(tokenizer), "added_tokens_decoder", property(lambda self: reads.append(1) or added.fget(self))
    )
    for history in ([], HISTORY, HISTORY * 2):
        find_user_turn(tokenizer, history, [tokenizer.eos_token_id])
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (SHAPES["mistral"].template, r"ends it with '\[/INST\]', which is no token of its own"),
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "writes nothing before it"),
        (headers("<", ">", "\\n"), "ends it with '<assistant>', which is no token of its own"),
        ("<|im_start|>{{ messages[-1].content | upper }}<|end|>", "writes 'WHAT IS THIS' where it begins"),
        ("<|im_start|>Hear! {{ messages[-1].content }} {{ messages[-1].content }}<|end|>", "ends it with"),
    ],
)
def test_a_template_without_a_users_turn_of_its_own_is_refused(template, problem):
    tokenizer = Shape(template, "<|end|>", ("<|im_start|>",)).tokenizer()
    with pytest.raises(ValueError, match=rf"^data.sources self: the chat template .*: it {problem}"):
        find_user_turn(tokenizer, [], [tokenizer.eos_token_id])
