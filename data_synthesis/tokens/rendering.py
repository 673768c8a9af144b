"""A conversation as the verifier's own chat template writes it."""

from collections import abc
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]  # role and content: a text, or OpenAI content parts; an answer's reasoning_content too


class NoExactSpanError(ValueError):
    """What the verifier wrote cannot be told exactly in a conversation's tokens."""


def render_text(
    tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Return a conversation as the chat template writes it."""
    return str(apply_template(tokenizer, messages, add_generation_prompt=add_generation_prompt, tokenize=False))


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message], **options: Any) -> Any:
    """Return a conversation as text or, with `tokenize`, as tokens."""
    with refusals():
        return tokenizer.apply_chat_template(fit_content(tokenizer, messages), return_dict=False, **options)


@contextmanager
def refusals() -> abc.Iterator[None]:
    """Raise NoExactSpanError if the chat template refuses a conversation, or content parts in place of a text."""
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise NoExactSpanError(f"the chat template refuses the conversation ({error})") from None


def fit_content(tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message]) -> list[Message]:
    """Return messages with their contents in the form that the chat template takes.

    Parts that are all text become a text if it takes a text (joined by line breaks, as vLLM joins them), and a text
    becomes a part if it takes parts alone.
    """
    template, tokens = str(tokenizer.get_chat_template()), tokenizer.special_tokens_map
    named = tuple((name, token) for name, token in tokens.items() if isinstance(token, str))
    return [m | {"content": _fitted(m["content"], _content_form(template, named, m["role"]))} for m in messages]


def _fitted(content: Any, form: str) -> Any:
    if form == "parts" and isinstance(content, str):
        return [{"type": "text", "text": content}]
    joins = form == "text" and isinstance(content, list) and all(part["type"] == "text" for part in content)
    return "\n".join(part["text"] for part in content) if joins else content


@lru_cache(maxsize=64)
def _content_form(template: str, tokens: tuple[tuple[str, str], ...], role: str) -> str:
    """Return the form in which a template takes a role's content, found by rendering: text, parts, or either."""
    one, other, user = "FirstPart", "OtherPart", {"role": "user", "content": "a"}
    render: Any = render_jinja_template

    def written(content: Any) -> str | None:
        message = {"role": role, "content": content}
        conversation = {"assistant": [user, message], "system": [message, user]}.get(role, [message])
        try:
            return str(render([conversation], chat_template=template, **dict(tokens))[0][0])
        except (TemplateError, TypeError):
            return None

    parts = [{"type": "text", "text": text} for text in (one, other)]
    text, part, both = written(one), written(parts[:1]), written(parts) or ""
    if text is not None and one in text:
        return "either" if part == text and one in both and other in both else "text"
    return "parts" if part is not None and one in part else "either"
