"""Prompts for the verifier: the user's side of a row of chat data, in any of the usual forms."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ...conf.runtime.artifact import digest
from ...conf.runtime.journal import json_line
from ..heldout import escaped
from .addresses import check_foreign

Content = str | list[dict[str, Any]]  # a text, or OpenAI's content parts

FIELDS = ("messages", "conversations", "conversation", "turns", "prompt")  # the first of them that a row has is read
ID_FIELDS = ("prompt_id", "uuid", "id", "question_id", "conversation_id")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
LOGGED_FIELDS = ("prompt_token_ids", "token_ids")  # of an answer that was logged: vLLM's names
# Columns, of a row or of a user's message, that the question rests on: what they bring, for the message.
BESIDE = {
    **dict.fromkeys(("image", "images", "image_path", "image_url", "image_urls", "pictures", "pixel_values"), "images"),
    **dict.fromkeys(("video", "videos", "video_path"), "videos"),
    **dict.fromkeys(("audio", "audios", "audio_path", "speech"), "audio"),
    **dict.fromkeys(("tools", "tool_list", "functions", "function_list", "tool_calls", "function_call"), "tools"),
    **dict.fromkeys(("documents", "document", "context", "contexts", "passage", "passages"), "documents"),
    **dict.fromkeys(("file", "files", "attachment", "attachments"), "files"),
    **{name: name for name in ("input", "history", "chat_template_kwargs", "response_format")},
}

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}

# What stands in a text for an image next to it: as other tools write it, in lines before or after the question.
_PLACEHOLDER = re.compile(
    r"\A\s*<(image|video|audio)>(?:\s*<\1>)*\s*?$(?!.*</\1>)|^[^\S\n]*(?:<(image|video|audio)>\s*)+\Z",
    re.DOTALL | re.MULTILINE,
)

_SPEED_BENCH = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # in a row of nvidia/SPEED-Bench without a text


@dataclass(frozen=True)
class Prompt:
    """The user's side of a conversation."""

    id: str  # source/split/original id
    source: str
    turns: tuple[Content, ...]
    system: str | None = None
    logged: tuple[list[int], list[int]] | None = None  # the tokens read and written when it was answered, if known

    def as_json(self) -> dict[str, Any]:
        """Return the form that it is stored in."""
        return {name: value for name, value in vars(self).items() if name != "logged" or value}


def text_of(content: Content) -> str:
    """Return the text of a message, without its images."""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def are_text_parts(content: Any) -> bool:
    """Return whether a content is a list of parts that are all text."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )


def images_of(content: Content) -> list[str]:
    """Return the addresses of a message's images."""
    return [] if isinstance(content, str) else [part["image_url"]["url"] for part in content if "image_url" in part]


def read_prompt(
    row: Any, source: str, number: int | None, local: bool, hosts: bool = False, logged: bool = False
) -> tuple[Prompt, bytes]:
    """Read a row as `prompt_of` does, all of it or none; return the prompt and its line.

    With `logged` it keeps the tokens of an answer that the row brings.
    Images may be files here if the row is this machine's own (`local`), and at its network's hosts with `hosts`.
    Raises ValueError for what is wrong with the row, or not read of it, to be put after its place.
    """
    try:
        prompt = prompt_of(row, source, number)
        texts = [text_of(turn) for turn in prompt.turns if not images_of(turn)]
        check_beside(row, [*texts, prompt.system or ""])
        for address in chain(*map(images_of, prompt.turns)):
            check_foreign(address, local, hosts)
        prompt = replace(prompt, logged=_logged(row, prompt.turns) if logged else None)
        return prompt, json_line(prompt.as_json())
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ValueError(f"is not valid UTF-8: {error}") from None


def check_beside(row: dict[str, Any], texts: list[str], read: Collection[str] = ()) -> None:
    """Raise ValueError, to be put after the row's place, if its question rests on more than what the user says.

    A column brings nothing if it is `read`, or repeats some of the row's `texts`.
    """
    for place in (row, *_user_messages(row)):
        for name in sorted(BESIDE.keys() & place.keys() - set(read)):
            value = place[name]
            if not _is_empty(value) and not (isinstance(value, str) and any(value.strip() in text for text in texts)):
                raise ValueError(
                    f"has {BESIDE[name]} beside its messages (in {name!r}), which are not read: write them into the "
                    "messages, or remove the field if the question needs none"
                )
    if any(_SPEED_BENCH in text for text in texts):
        raise ValueError(
            "is a placeholder of SPEED-Bench, whose texts are other datasets': fetch them by examples/specdec_bench of "
            "NVIDIA's Model-Optimizer, `python prepare_data.py --config qualitative --output_dir data`, and give the "
            "Parquet file that it writes"
        )
    if mark := next(filter(None, map(_PLACEHOLDER.search, texts)), None):
        kind = mark[1] or mark[2]
        raise ValueError(f"begins or ends a message with the placeholder <{kind}>, but fledge reads no {kind} for it")


def _user_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = next((row[name] for name in FIELDS if row.get(name) is not None), None)
    messages = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return [message for message in messages if _ROLES.get(str(_either(message, "role", "from"))) != "assistant"]


def _is_empty(value: Any) -> bool:
    """Return whether a column brings nothing, as Parquet and JSON fill what is not there."""
    if isinstance(value, list | dict):
        return all(map(_is_empty, value.values() if isinstance(value, dict) else value))
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", "None"))


def prompt_of(row: Any, source: str, number: int | None) -> Prompt:
    """Read a row: OpenAI `messages`, ShareGPT `conversations`, `turns` (MT-Bench), or a `prompt`.

    The source's own answers are not looked at, so an empty one does not matter; nor does an answer at the end.

    Args:
        row: an object, or the ValueError that says why there is none.
        number: the id of a row that has none; None if rows come in no fixed order: a hash of what it says.

    Raises:
        ValueError: what is wrong with the row, to be put after its place: "has no user turn".
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {type(row).__name__}")
    field = next((name for name in FIELDS if row.get(name) is not None), None)
    if field is None:
        names = ", ".join(map(str, row)) or "(none)"
        raise ValueError(f"has the fields {names}; one of {', '.join(FIELDS)} is required")
    value = row[field]
    if field == "prompt" and isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"must have a list in {field} that is not empty, got {str(value)[:40]!r}")
    if field in ("turns", "prompt") and not isinstance(value[0], dict):
        turns, system = [content_of(turn, f"turn {n}") for n, turn in enumerate(value, 1)], None
    else:
        turns, system = _user_side(value)
    systems = list(filter(None, (system, *(_system(row.get(name)) for name in SYSTEM_FIELDS))))
    if len(set(map(str.strip, systems))) > 1:
        raise ValueError("has system messages that differ, in its messages or fields: leave one")
    system = systems[0] if systems else None
    original = next((row[name] for name in ID_FIELDS if row.get(name) is not None), number)
    if original is None:
        original = digest([turns, system])
    return Prompt(escaped(f"{source}/{original}"), source, tuple(turns), system)


def _logged(row: dict[str, Any], turns: Collection[Content]) -> tuple[list[int], list[int]] | None:
    """Return the tokens of a row's logged answer: those read before it, and its own; None if it has none."""
    read, written = (row.get(name) for name in LOGGED_FIELDS)
    if not written:
        return None
    for tokens in (read, written):
        if not isinstance(tokens, list) or {*map(type, tokens)} != {int} or min(tokens) < 0:
            raise ValueError(
                f"must have lists of token ids, not empty, in both of {' and '.join(LOGGED_FIELDS)}, or no "
                f"{LOGGED_FIELDS[1]}"
            )
    if any(map(images_of, turns)):
        raise ValueError(
            f"has images, whose tokens in {LOGGED_FIELDS[0]} cannot be told: remove {LOGGED_FIELDS[1]}, or set "
            "data.logged_answers=false"
        )
    assert read
    return read, written


def _user_side(messages: list[Any]) -> tuple[list[Content], str | None]:
    """Return the user turns and the system message of a conversation, whose roles must be in order."""
    turns: list[Content] = []
    system, expected = None, "user"
    for number, message in enumerate(messages, 1):
        role = _role(message, number)
        content = _either(message, "content", "value")
        if role == "system" and number == 1:
            system = _system(content)
        elif role == "system":
            raise ValueError(f"has a system message at message {number}: it may only be the first")
        elif role != expected and not turns:
            raise ValueError("starts with the assistant: the first message must be the user's")
        elif role != expected:
            raise ValueError(f"has roles out of order: message {number} is the {role}'s, as is the one before")
        elif role == "user":
            turns.append(content_of(content, f"message {number}"))
            expected = "assistant"
        else:
            expected = "user"
    if not turns:
        raise ValueError("has no user turn")
    return turns, system


def _either(message: dict[str, Any], name: str, other: str) -> Any:
    """Return the one of two fields that is filled: Parquet gives both to messages of mixed forms."""
    return message.get(other) if message.get(name) is None else message[name]


def _role(message: Any, number: int) -> str:
    name = _either(message, "role", "from") if isinstance(message, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"message {number} must have 'role' and 'content', or 'from' and 'value'")
    if name in ("tool", "function"):
        raise ValueError(f"message {number} is of a {name}: tool turns are not supported")
    if name not in _ROLES:
        raise ValueError(f"message {number} has the role {name!r}; {', '.join(_ROLES)} are known")
    return _ROLES[name]


def _system(content: Any) -> str | None:
    content = text_of(content) if are_text_parts(content) else content
    if content is not None and not isinstance(content, str):
        raise ValueError(f"must have a text as system message, got {type(content).__name__}")
    return content if content and content.strip() else None


def content_of(content: Any, place: str) -> Content:
    """Check what a user says, and return it without the empty fields that Parquet adds to parts."""
    if content is None:
        raise ValueError(f"{place} has no content")
    if isinstance(content, list):
        content = [_part(part, f"{place} part {number}") for number, part in enumerate(content, 1)]
    elif not isinstance(content, str):
        raise ValueError(f"{place} must be a text or a list of content parts, got {type(content).__name__}")
    if not text_of(content).strip() and not images_of(content):
        raise ValueError(f"{place} is an empty user turn")
    return content


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, dict):
        part = {key: value for key, value in part.items() if value is not None}
        kind, image = part.get("type"), part.get("image_url")
        if kind == "text" and isinstance(part.get("text"), str) and image is None:
            return part
        if kind == "image_url" and isinstance(image, dict) and isinstance(image.get("url"), str) and "text" not in part:
            return part
    raise ValueError(
        f'{place} has a form that is not known: {{"type": "text", "text": ...}} or '
        f'{{"type": "image_url", "image_url": {{"url": ...}}}} is required, got {str(part)[:60]!r}'
    )
