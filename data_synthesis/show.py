"""Texts as a terminal shows them: escapes for what it would obey, marks around what the verifier wrote."""

import os
import re
import sys
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .tokens.chat_template import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal might obey


def printable(text: str) -> str:
    """Write control characters as escapes, so that a terminal shows a text instead of obeying it."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def terminal_mark() -> Callable[[str], str]:
    """Return what marks a text: a colour on a terminal, brackets elsewhere."""
    return ("\x1b[32m{}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "⟦{}⟧").format


def marked_text(tokenizer: PreTrainedTokenizerBase, sequence: Sequence, mark: Callable[[str], str]) -> str:
    """Decode a sequence with its answers marked, images by number and size; no character is torn between two runs."""

    def decoded(start: int, end: int | None) -> str:
        tokens = sequence.token_ids[start:end]
        return printable(str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)))

    images = [
        (*image.span, f"[image {n}: {len(range(*image.span))} tokens]") for n, image in enumerate(sequence.images, 1)
    ]
    text, place = "", 0
    for start, end, label in sorted([*images, *((start, end, "") for start, end in sequence.answers)]):
        text += decoded(place, start) + (label or mark(decoded(start, end)))
        place = end
    return text + decoded(place, None)
