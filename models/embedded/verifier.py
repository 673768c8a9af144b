"""The embedded verifier: a small Llama, trained by tests/tools/make_embedded.py on conversations.jsonl.xz.

They are made up, in the eight categories of MT-Bench. No question opens like one of them or of the prompts.
"""

import json
import lzma
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
CHECKPOINT = _HERE / "checkpoint"  # in bfloat16, with its tokenizer and chat template


def conversations() -> list[list[dict[str, str]]]:
    """Return the 12,000 conversations of its training, each a list of {"role", "content"}."""
    return _read("conversations.jsonl.xz")


def prompts() -> list[dict[str, Any]]:
    """Return 2,000 different prompts {"id", "category", "turns"} of one or two user turns, categories in rotation."""
    return _read("prompts.jsonl.xz")


def questions() -> list[dict[str, Any]]:
    """Return 80 questions {"question_id", "category", "turns"} of two turns each, ten a category."""
    return _read("questions.jsonl.xz")


def _read(name: str) -> list[Any]:
    with lzma.open(_HERE / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
