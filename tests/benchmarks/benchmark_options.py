"""Options of the benchmarks: `name=value` arguments onto a dataclass, read with nothing but Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse_options(
    arguments: Sequence[str],
    defaults: T,
    presets: Mapping[str, Mapping[str, Any]] = {},
    choices: Mapping[str, Sequence[str]] = {},
) -> T:
    """Read arguments, in order, onto a dataclass of options; `preset=name` sets several.

    Raises:
        ValueError: an unknown option, or a value it cannot have.
    """
    values = dataclasses.asdict(defaults)  # type: ignore[call-overload]
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "preset" and text in presets:
            values.update(presets[text])
            continue
        allowed = list(presets) if name == "preset" else choices.get(name)
        if name not in values and allowed is None:
            raise ValueError(f"unknown option {argument!r}: options are name=value of preset, {', '.join(values)}")
        if allowed is not None and text not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {text!r}")
        try:
            values[name] = _value(text, type(values[name]))
        except ValueError:
            raise ValueError(f"{name} must be of type {type(values[name]).__name__}, got {text!r}") from None
    return type(defaults)(**values)


def _value(text: str, kind: type) -> Any:
    if kind is bool and text not in ("true", "false"):
        raise ValueError(text)
    return text == "true" if kind is bool else kind(text)
