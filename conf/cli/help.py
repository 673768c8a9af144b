"""What `fledge --help` and `fledge COMMAND --help [GROUP]` print."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import get_type_hints

from ..schema import Config
from ..schema.describe import Option, describe, merge_stages
from .commands import COMMANDS, PURPOSES, RUN

_USAGE = """fledge trains EAGLE-3 draft heads for speculative decoding.

usage: fledge COMMAND [option=value ...]

{commands}
  fledge demo                                        every stage on a laptop, in minutes
  fledge run experiment=llama31_8b name=first        a whole run
  fledge train -m {run} train.lr=1e-4,5e-5            a sweep

  fledge COMMAND --help            what it reads and writes, its options, examples
  fledge COMMAND --help GROUP      the options of a group, such as draft, or one option
  fledge COMMAND ... --cfg job     the configuration that a command would use
  eval "$(fledge completion bash)"   completes commands, options and values; zsh too

Every option: docs/reference/options.md. FLEDGE_TRACEBACK=1 shows the traceback of an error.
"""


def usage() -> str:
    """Return what `fledge --help` prints: the commands by purpose."""
    lines = []
    for purpose, commands in PURPOSES.items():
        lines += [f"{purpose}:", *(f"  {name:<11} {command.what}" for name, command in commands.items()), ""]
    return _USAGE.format(commands="\n".join(lines), run=RUN).rstrip()


def command_help(command: str) -> str:
    """Return what `fledge COMMAND --help` prints."""
    page, kinds = COMMANDS[command], {"": Config} | _groups()
    lines = [f"fledge {command} [option=value ...]    {page.what}", ""]
    lines += [f"  reads   {page.reads}", f"  writes  {page.writes}", "", *(f"  {line}" for line in page.examples)]
    for group in page.groups:
        lines += ["", f"{group or 'run'}: {_first_line(kinds[group])}", *_rows(_options(group))]
    others = ", ".join(name for name in kinds if name not in page.groups)
    lines += ["", *_wrapped(f"More groups, each by `fledge {command} --help GROUP`: {others}.")]
    return "\n".join([*lines, "Files of values: experiment=, verifier=, draft=, data=, deepspeed=, cluster=."])


def topic_help(topic: str) -> str:
    """Return the options of a group, or one option; ValueError if there is neither."""
    if options := _options(topic):
        title = [f"{topic}: {_first_line(_groups()[topic])}"] if topic in _groups() else []
        return "\n".join([*title, *_rows(options)])
    names = [*_groups(), *(option.name for option in describe(Config))]
    raise ValueError(f"--help {topic}: it is no group and no option{did_you_mean(topic, names)}")


def did_you_mean(word: str, names: list[str]) -> str:
    """Return a hint at the name that is closest to a word, or "" if none is close."""
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _groups() -> dict[str, type]:
    return {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}  # type: ignore[misc]


def _options(topic: str) -> list[Option]:
    """Return the options of a group, the run's own for "", or one option."""
    options = merge_stages(describe(Config))
    if not topic:
        return [option for option in options if "." not in option.name]
    return [option for option in options if option.name == topic or option.name.startswith((f"{topic}.", f"{topic}["))]


def _first_line(kind: type) -> str:
    return "name and folder" if kind is Config else (kind.__doc__ or "").partition("\n")[0].rstrip(".")


def _rows(options: list[Option]) -> Iterator[str]:
    """Yield a line an option, or a few: name and default, meaning and limits."""
    width = min(max((len(option.name) + len(option.default) for option in options), default=0) + 1, 40)
    for option in options:
        left = option.name + ("" if option.default == "required" else f"={option.default}")
        plain = option.type in ("integer", "number", "text", "true or false") or option.type.endswith("or text")
        parts = ["required"] * (option.default == "required") + [option.type] * (not plain) + [option.limits]
        limits = ", ".join(filter(None, parts))
        lines = _wrapped(option.meaning + f" ({limits})" * bool(limits), width + 4)
        yield f"  {left:<{width}}  {lines[0].lstrip()}" if len(left) <= width else f"  {left}\n{lines[0]}"
        yield from lines[1:]


def _wrapped(text: str, indent: int = 0) -> list[str]:
    columns = min(shutil.get_terminal_size((120, 24)).columns, 120)
    margin = " " * indent
    return textwrap.wrap(
        *(text, max(columns, indent + 40)),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
