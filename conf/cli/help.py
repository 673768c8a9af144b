"""What `fledge --help` and `fledge COMMAND --help [GROUP]` print."""

import difflib
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import get_type_hints

from ..schema import Config
from ..schema.describe import Option, describe, merge_stages

Table = dict[str, tuple[str, str]]  # command -> (function, what it does)


@dataclass(frozen=True)
class Page:
    """What the help of one command says beside its options."""

    reads: str
    writes: str
    groups: tuple[str, ...]  # whose options it explains; "": the run's own
    examples: tuple[str, str]


_PURPOSES = {
    "whole runs": ("demo", "run", "submit", "status"),
    "stages of a run": ("synthesize", "dump", "train", "evaluate", "export"),
    "heads made elsewhere": ("import", "doctor"),
    "look": ("plan", "preview", "inspect", "compare"),
}
_RUN = "experiment=llama31_8b name=first"
_TORCHRUN = f"torchrun --nproc-per-node 8 -m fledge.train {_RUN}"
_STAGES = "prompts/, conversations/, hidden_states/, training/, evaluation/, exports/ in runs/NAME/"
_SOURCES = "the verifier; the prompts of data.sources"
_CHECKPOINT = "the best checkpoint of runs/NAME/training/; the verifier"
PAGES = {
    "synthesize": Page(
        _SOURCES,
        "runs/NAME/prompts/, runs/NAME/conversations/",
        ("", "synthesize", "data"),
        (f"fledge synthesize {_RUN}", f"fledge synthesize {_RUN} 'synthesize.endpoints=[http://HOST:8000/v1]'"),
    ),
    "dump": Page(
        "runs/NAME/conversations/; the verifier",
        "runs/NAME/hidden_states/",
        ("", "dump", "verifier"),
        (f"fledge dump {_RUN}", f"fledge dump {_RUN} dump.engine=vllm"),
    ),
    "train": Page(
        "runs/NAME/hidden_states/, or train.stores",
        "runs/NAME/training/: checkpoints, metrics.jsonl",
        ("", "train", "deepspeed", "tracking"),
        (_TORCHRUN, f"fledge train -m {_RUN} train.lr=1e-4,5e-5"),
    ),
    "evaluate": Page(
        _CHECKPOINT,
        "runs/NAME/evaluation/: acceptance.json, report.md",
        ("", "evaluate"),
        (f"fledge evaluate {_RUN}", f"fledge evaluate {_RUN} evaluate.num_draft_tokens=5"),
    ),
    "export": Page(
        "the best checkpoint of runs/NAME/training/",
        "runs/NAME/exports/FORMAT/",
        ("", "export"),
        (f"fledge export {_RUN}", f"fledge export {_RUN} overwrite=true"),
    ),
    "import": Page(
        "head_import.source, a published head",
        "runs/NAME/imports/FOLDER/",
        ("", "head_import", "verifier"),
        (f"fledge import {_RUN} head_import.source=FOLDER", "fledge import --help verifier"),
    ),
    "doctor": Page(
        "head_import.source, a published head or an export",
        "nothing; prints what costs acceptance, and the cure",
        ("", "doctor", "head_import"),
        (
            f"fledge doctor {_RUN} head_import.source=FOLDER",
            f"fledge doctor {_RUN} head_import.source=runs/first/exports/plain",
        ),
    ),
    "preview": Page(
        "runs/NAME/conversations/, or preview.file; the verifier's chat template",
        "nothing; prints tokens and loss mask",
        ("", "preview"),
        (f"fledge preview {_RUN}", "fledge preview --help synthesize"),
    ),
    "inspect": Page(
        "a store of hidden states",
        "nothing; exit code 2 if the store is not sound",
        ("inspect",),
        ("fledge inspect runs/first/hidden_states", "fledge inspect runs/first/hidden_states --verify"),
    ),
    "compare": Page(
        "runs/NAME/evaluation/ of each run",
        "nothing; prints them side by side",
        ("compare",),
        ("fledge compare runs/first", "fledge compare runs/first runs/second"),
    ),
    "plan": Page(
        "the verifier's config.json",
        "nothing; prints tokens, disk and GPU memory",
        ("", "plan"),
        (f"fledge plan {_RUN}", f"fledge plan {_RUN} plan.gpu=h200"),
    ),
    "run": Page(_SOURCES, _STAGES, ("",), (f"fledge run {_RUN}", f"fledge run {_RUN} train.num_processes=8")),
    "submit": Page(
        _SOURCES,
        "jobs/, then what every stage writes, in runs/NAME/",
        ("", "submit", "cluster"),
        (f"fledge submit {_RUN} cluster=slurm_gpu --dry-run", f"fledge submit {_RUN} cluster=slurm_gpu"),
    ),
    "status": Page(
        "runs/NAME/",
        "nothing; prints stages, jobs, progress and logs",
        ("status",),
        ("fledge status first", "fledge status runs/first"),
    ),
    "demo": Page(
        "what comes with fledge", _STAGES, ("",), ("fledge demo", "fledge demo train.loss=lk_lambda name=demo2")
    ),
}

_USAGE = """fledge trains EAGLE-3 draft heads for speculative decoding.

usage: fledge COMMAND [option=value ...]

{commands}
  fledge demo                                        every stage on a laptop, in minutes
  fledge run experiment=llama31_8b name=first        a whole run
  fledge train -m {run} train.lr=1e-4,5e-5            a sweep
  {torchrun}

  fledge COMMAND --help            what it reads and writes, its options, examples
  fledge COMMAND --help GROUP      the options of a group, such as draft, or one option
  fledge COMMAND ... --cfg job     the configuration that a command would use
  eval "$(fledge completion bash)"   completes commands, options and values; zsh too

Every option: docs/reference/options.md. FLEDGE_TRACEBACK=1 shows the traceback of an error.
"""


def usage(commands: Table) -> str:
    """Return what `fledge --help` prints: the commands by purpose."""
    lines = []
    for purpose, names in _PURPOSES.items():
        lines += [f"{purpose}:", *(f"  {name:<11} {commands[name][1]}" for name in names), ""]
    return _USAGE.format(commands="\n".join(lines), run=_RUN, torchrun=_TORCHRUN).rstrip()


def command_help(command: str, what: str) -> str:
    """Return what `fledge COMMAND --help` prints."""
    page, kinds = PAGES[command], {"": Config} | _groups()
    lines = [f"fledge {command} [option=value ...]    {what}", ""]
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
