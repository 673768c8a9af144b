"""Limits of single options: annotations of the fields that `check` compares with the values."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import Enum
from math import inf
from typing import Annotated, Any, get_args, get_origin, get_type_hints

MISSING: Any = "???"  # how OmegaConf writes a value that has to be given; not imported, so that benchmarks run without


@dataclass(frozen=True)
class Limit:
    """A requirement of one option, with the cure that follows the value in the message."""

    requirement: str
    holds: Callable[[Any], bool]
    cure: str = ""
    shown: Callable[[Any], Any] = lambda value: value.name if isinstance(value, Enum) else repr(value)


def at_least(low: float, purpose: str = "", cure: str = "") -> Limit:
    """Return the limit of a number that must be finite and not below `low`."""
    return Limit(f"be at least {low}{purpose}", lambda value: low <= value < inf, cure)


def between(low: float, high: float) -> Limit:
    """Return the limit of a number in a closed range."""
    return Limit(f"lie between {low} and {high}", lambda value: low <= value <= high)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, Limit("be above 0 and finite", lambda value: 0 < value < inf)]
NonNegativeFloat = Annotated[float, Limit("be at least 0 and finite", lambda value: 0 <= value < inf)]
PositiveShare = Annotated[float, Limit("be above 0 and at most 1", lambda value: 0 < value <= 1)]
Share = Annotated[float, between(0.0, 1.0)]
Temperature = Annotated[float, between(0.0, 10.0)]
Kernels = Annotated[bool | str, Limit("be auto, true or false", lambda value: value in (True, False, "auto"))]
BaseUrl = Annotated[
    str,
    Limit(
        "be a base URL such as http://localhost:8000/v1, without a key (read from OPENAI_API_KEY)",
        lambda url: url.startswith(("http://", "https://")) and "@" not in url,
        shown=lambda url: url.rpartition("@")[2],
    ),
]


def require(holds: Any, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not holds:
        raise ValueError(message)


def check(value: Any, hint: Any = None, name: str = "") -> None:
    """Check a value, and all within it, against its type hint's limits; ValueError names option, value and cure."""
    if value is None:
        return
    if is_dataclass(value):
        for option, its_hint in get_type_hints(type(value), include_extras=True).items():
            check(getattr(value, option), its_hint, f"{name}.{option}".lstrip("."))
    elif get_origin(hint) is list:
        for number, item in enumerate(value):
            check(item, get_args(hint)[0], f"{name}[{number}]")
    elif get_origin(hint) is not dict:
        for part in get_args(hint):  # of a union, or what is annotated
            check(value, part, name)
    for limit in getattr(hint, "__metadata__", ()):
        require(limit.holds(value), f"{name} must {limit.requirement}, got {limit.shown(value)}{limit.cure}")
