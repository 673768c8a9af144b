"""Tokens and loss masks of conversations."""

import pytest
from fledge.data_synthesis.chat import check_messages, conversation_tokens, prompt_tokens


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def produced(tokenizer, tokens, mask) -> list[str]:
    """Decode each run of masked tokens."""
    runs, current = [], []
    for token, inside in zip([*tokens, 0], [*mask, 0], strict=True):
        if inside:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_mask_covers_answer_and_end_of_turn_and_nothing_else(verifier):
    tokenizer, end = verifier.tokenizer, verifier.end_token_ids
    tokens, mask = conversation_tokens(tokenizer, turns("Add 2 and 3.", "It is 5."), end)
    assert produced(tokenizer, tokens, mask) == ["It is 5." + tokenizer.eos_token]
    prompt = prompt_tokens(tokenizer, turns("Add 2 and 3."))
    assert mask[: len(prompt)] == [0] * len(prompt)
    assert mask[len(prompt)] == 1, "the first token of the answer is the verifier's"


def test_every_turn_of_a_conversation_is_masked_as_it_was_produced(verifier):
    tokenizer, end = verifier.tokenizer, verifier.end_token_ids
    messages = [
        {"role": "system", "content": "Be short."},
        *turns("Hello.", "Hi!", "And now?", "Still hi.", "Bye.", "Bye!"),
    ]
    tokens, mask = conversation_tokens(tokenizer, messages, end)
    assert produced(tokenizer, tokens, mask) == [text + tokenizer.eos_token for text in ("Hi!", "Still hi.", "Bye!")]


def with_template(tokenizer, template):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_what_a_template_writes_after_the_end_of_turn_is_not_masked(verifier):
    eos = verifier.tokenizer.eos_token
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}" + eos + "\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(verifier.tokenizer, template)
    tokens, mask = conversation_tokens(tokenizer, turns("a?", "b.", "c?", "d."), verifier.end_token_ids)
    assert produced(tokenizer, tokens, mask) == ["b." + eos, "d." + eos]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_turn_shown(verifier):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else 'forgotten' }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(verifier.tokenizer, template)
    with pytest.raises(ValueError, match=r"turn 2 \('thoughts"):
        conversation_tokens(tokenizer, turns("a?", "thoughts and words", "c?", "d."), verifier.end_token_ids)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "list"),
        ([{"role": "user"}], "content"),
        (turns("a?", "b.", "c?"), "roles"),
        ([{"role": "assistant", "content": "x"}], "roles"),
        (turns("", "b."), "empty"),
        (turns("a?", "b."), None),
    ],
)
def test_malformed_messages_are_named(messages, problem):
    found = check_messages(messages)
    assert (found is None) if problem is None else (found is not None and problem in found)
