"""Errors that a user can cure: one sentence, and exit code 2."""

import difflib
import sys
from dataclasses import fields, is_dataclass
from typing import NoReturn

from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException)  # others are faults of ours


def fail(message: str) -> NoReturn:
    """Print why a command ends, and end it."""
    print(f"fledge: error: {message}", file=sys.stderr)
    sys.exit(2)


def explain(error: BaseException) -> str:
    """Return in one line what is wrong: the dotted name of the option, and what is allowed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _explain_option(cause)
        cause = cause.__cause__
    return " ".join(str(error).split("Config search path")[0].split())


def _explain_option(error: OmegaConfBaseException) -> str:
    option = error.full_key or ""
    text = " ".join((error.msg or str(error)).split("\n")[0].split())
    name = option.rpartition(".")[2]
    if isinstance(error, MissingMandatoryValue) or "missing mandatory value" in text.lower():
        return f"{option} is required: give {option}=... or an experiment that sets it"
    owner = error.object_type
    if owner is not None and is_dataclass(owner) and name not in (allowed := [f.name for f in fields(owner)]):
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {option.removesuffix(name)}{close[0]}? " if close else ""
        return f"{option} is not an option: {hint}allowed are {', '.join(allowed)}"
    return f"{option}: {text}"
