"""What each option is, for `--help` and docs/reference/options.md: the comment at it in the schema is its meaning."""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING as ABSENT
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .cluster import STAGES
from .limits import MISSING, Limit

_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any", NoneType: "null"}


@dataclass(frozen=True)
class Option:
    """One option; `limits` is "" if every value of its type is allowed."""

    name: str  # dotted; [] after a list of groups
    type: str
    default: str  # as on the command line; "required" if there is none
    limits: str
    meaning: str


def describe(kind: type, prefix: str = "") -> Iterator[Option]:
    """Yield the options of a group and of the groups in it; `prefix` is the group's name."""
    meanings, hints = _meanings(kind), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        name, hint = f"{prefix}.{field.name}".lstrip("."), hints[field.name]
        if not is_dataclass(hint):
            value = field.default if field.default_factory is ABSENT else field.default_factory()
            type_, limits = _type(hint), "; ".join(dict.fromkeys(_limits(hint)))
            if isinstance(value, Enum) and limits:  # some of its values
                type_, limits = limits, ""
            yield Option(name, type_, _shown(value), limits, meanings.get(field.name, ""))
        for group in (hint, *get_args(hint)):
            if isinstance(group, type) and is_dataclass(group):
                yield from describe(group, name + "[]" * (get_origin(hint) is list))


def merge_stages(options: Iterable[Option]) -> list[Option]:
    """Return options with those that every stage has in `cluster` once, as cluster.STAGE."""
    by_name: dict[str, Option] = {}
    for option in options:
        by_name.setdefault(_merged_name(option.name), option)
    return [replace(option, name=name) for name, option in by_name.items()]


def _merged_name(name: str) -> str:
    group, _, rest = name.partition(".")
    stage, _, option = rest.partition(".")
    return f"cluster.STAGE.{option}" if group == "cluster" and stage in STAGES else name


def _type(hint: Any) -> str:
    inner = get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(member.name for member in hint)
    if get_origin(hint) in (list, dict):
        return "mapping" if get_origin(hint) is dict else f"list of {_type(inner[0])}"
    if hasattr(hint, "__metadata__"):
        return _type(inner[0])
    return "groups" if is_dataclass(hint) else " or ".join(map(_type, inner)) or _TYPES[hint]


def _limits(hint: Any) -> Iterator[str]:
    for part in () if is_dataclass(hint) else get_args(hint):
        yield from _limits(part)
    for limit in getattr(hint, "__metadata__", ()):
        yield from [limit.requirement.removeprefix("be ").removeprefix("lie ")] if isinstance(limit, Limit) else []


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    name = value.name if isinstance(value, Enum) else "required" if value == MISSING else str(value)
    return {"None": "null", "True": "true", "False": "false", "": '""'}.get(name, name)


@cache  # it reads the source of a class
def _meanings(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for owner in filter(is_dataclass, reversed(kind.__mro__)):  # inherited options too
        name, above = "", ""
        for line in inspect.getsource(owner).partition("\n    @")[0].splitlines():  # up to its first property
            code, _, comment = line.partition("# ")
            if not code.strip():
                above = f"{above} {comment}".strip()
            elif field := re.match(r"    (\w+): ", code):
                name, found[field[1]], above = field[1], f"{above} {comment}".strip(), ""
            elif comment:
                found[name] += comment
    return {name: text[:1].upper() + text[1:] for name, text in found.items()}
