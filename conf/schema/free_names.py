"""Options whose names the schema cannot know, as in `verifier.chat_template_kwargs={enable_thinking: true}`."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import get_origin, get_type_hints

from . import Config


def with_free_names(overrides: list[str]) -> list[str]:
    """Return overrides such that Hydra adds what the schema does not name, where it may be named freely."""
    free = tuple(f"{name}{end}" for name in _free_options(Config) for end in "=.")
    return [f"++{override}" if override.startswith(free) else override for override in overrides]


def _free_options(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the options that are dictionaries of any names."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _free_options(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif get_origin(hint) is dict:
            yield prefix + name


def quoted(text: object) -> str:
    """Write a text as the value of an override, whatever is in it."""
    return "'" + str(text).replace("'", "\\'") + "'"
