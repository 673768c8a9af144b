"""Texts to be looked at: escapes for what a terminal would obey, marks around answers, texts of single tokens."""

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


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Return what each token adds to the text; of tokens that share a character, the last one has it."""
    texts, start, end = list[str](), 0, 0  # tokens[start:end] are the last ones that are written
    for stop in range(1, len(tokens) + 1):
        before, now = (
            str(tokenizer.decode(tokens[start:n], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for n in (end, stop)
        )
        is_torn = now.endswith("\ufffd") and stop < len(tokens)
        texts.append("" if is_torn else now[len(before) :])
        start, end = (start, end) if is_torn else (end, stop)
    return texts


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
