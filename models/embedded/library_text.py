"""Real text that every Python installation carries: docstring lines and sentences of the language reference."""

from __future__ import annotations

import importlib
import re
from functools import lru_cache
from types import ModuleType

_CODE_FUNCTIONS: tuple[str, ...] = (
    "os.path.join", "os.path.exists", "os.path.basename", "os.path.dirname", "os.listdir", "shutil.copy", "shutil.move",
    "random.choice", "random.shuffle", "random.randint", "textwrap.fill", "textwrap.indent", "glob.glob",
    "copy.deepcopy", "copy.copy", "fnmatch.fnmatch", "heapq.heappush", "heapq.heappop", "bisect.bisect_left",
    "inspect.getsource", "re.findall", "re.escape",
)  # fmt: skip

_MATH_FUNCTIONS: tuple[str, ...] = (
    "math.sqrt", "math.ceil", "math.floor", "math.gcd", "math.isqrt", "math.radians", "math.degrees", "math.sin",
    "math.cos", "math.exp", "math.prod", "statistics.mean", "statistics.median", "statistics.mode", "statistics.stdev",
    "statistics.variance",
)  # fmt: skip

_TOPICS: tuple[str, ...] = (
    "break", "class", "continue", "del", "for", "function", "global", "if", "lambda", "raise", "return", "try", "yield",
    "integers", "lists", "numbers", "comparisons", "booleans", "typesseq", "context-managers",
)  # fmt: skip
_MOST_SENTENCES = 24


def _module(name: str) -> ModuleType | None:
    """Import module `name`, or give None where this installation lacks it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _first_sentence(text: str, longest: int) -> str | None:
    """Give the first sentence of `text` as one plain ASCII line, or None if it is no sentence of `longest` letters."""
    flat = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", flat)[0].rstrip(".:")
    plain = sentence.isascii() and not re.search(r"[<>{}|\\*`_]|\(\)|--|::|e\.g|[Ss]ection|version|following", sentence)
    return f"{sentence}." if plain and 20 <= len(sentence) <= longest and " " in sentence else None


def _described(functions: tuple[str, ...]) -> dict[str, str]:
    """Map those dotted `functions` that exist and carry a usable docstring to its first sentence."""
    found: dict[str, str] = {}
    for dotted in functions:
        module_name, _, name = dotted.rpartition(".")
        text = getattr(getattr(_module(module_name), name, None), "__doc__", None)
        sentence = _first_sentence(text, 110) if text else None
        if sentence:
            found[dotted] = sentence
    return found


@lru_cache(maxsize=1)
def code_functions() -> dict[str, str]:
    """Map standard-library functions to the first sentence of their docstrings; empty where docstrings are stripped."""
    return _described(_CODE_FUNCTIONS)


@lru_cache(maxsize=1)
def math_functions() -> dict[str, str]:
    """Map functions of `math` and `statistics` to the first sentence of their docstrings; may be empty."""
    return _described(_MATH_FUNCTIONS)


def _sentences(text: str) -> list[str]:
    """Give the plain sentences of 40 to 100 letters in a help topic's prose."""
    prose = [part for part in text.split("\n\n") if part and not part.startswith((" ", "*", "-", "+"))]
    parts = (part for block in prose for part in re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(block.split())))
    plain = (re.sub(r'["*]', "", part) for part in parts if part.endswith("."))
    return [part for part in plain if 40 <= len(part) <= 100 and _first_sentence(part, 100) == part]


@lru_cache(maxsize=1)
def topic_sentences() -> tuple[str, ...]:
    """Give up to two sentences of the language reference for each of a few topics, 24 in all; may be empty."""
    topics: dict[str, str] = getattr(_module("pydoc_data.topics"), "topics", {})
    sentences = dict.fromkeys(line for key in _TOPICS for line in _sentences(topics.get(key, ""))[:2])
    return tuple(sentences)[:_MOST_SENTENCES]
