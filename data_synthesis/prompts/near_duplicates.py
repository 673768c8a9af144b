"""Which texts say the same: duplicates among prompts, and evaluation questions in them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from .rows import Prompt, images_of, text_of

RUN = 13  # words; GPT-3's measure of contamination (arXiv:2005.14165, appendix C)

_WINDOW = 8  # words that are looked up
_STRIDE = RUN - _WINDOW + 1  # between look-ups: every run of RUN words holds a whole window at a multiple of it
_MARKS = str.maketrans(dict.fromkeys(".,;:!?\"'()[]{}`“”‘’«»–—、。「」", " "))
_UNSPACED = (  # Thai and Lao, Burmese, Khmer; kana; Chinese characters
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def canonical(text: str) -> str:
    """Return a text without what does not change what it asks: case, forms of a character, punctuation, spacing.

    Signs that carry meaning stay ("C" is not "C++", "2 + 3" is not "2 - 3").
    """
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(plain.casefold().translate(_MARKS).split()) or text.strip()


def fingerprint(prompt: Prompt) -> int:
    """Hash what a prompt asks (64 bits): its turns, images included, and the system message."""
    parts = [canonical(prompt.system or "")]
    for turn in prompt.turns:
        parts += [canonical(text_of(turn)), *images_of(turn), ""]
    return hash64("\0".join(parts))


def hash64(text: str) -> int:
    """Hash a text to 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Questions:
    """Texts that must not be trained on: one is like them that says the same, or has a run of 13 words in common."""

    def __init__(self, texts: Iterable[str]) -> None:
        plain = {canonical(text) for text in texts}
        self._whole = frozenset(plain)
        self._words = [_words(text) for text in sorted(plain)]
        self._windows: dict[str, list[tuple[int, int]]] = defaultdict(list)  # where each stands: question, word
        for question, words in enumerate(self._words):
            for at in range(len(words) - _WINDOW + 1 if len(words) >= RUN else 0):
                self._windows[" ".join(words[at : at + _WINDOW])].append((question, at))

    def like(self, text: str) -> bool:
        """Return whether a text is like one of the questions."""
        plain = canonical(text)
        if plain in self._whole:
            return True
        words = _words(plain)
        return any(
            _common_run(words, at, self._words[question], there) >= RUN
            for at in range(0, len(words) - _WINDOW + 1, _STRIDE)
            for question, there in self._windows.get(" ".join(words[at : at + _WINDOW]), ())
        )


def _words(text: str) -> list[str]:
    """Split a text; in scripts without spaces between words each character is a word."""
    return (_WORD if text.isascii() else _WORD_OR_CHARACTER).findall(text)


def _common_run(words: list[str], at: int, others: list[str], there: int) -> int:
    """Return the length of the run of equal words around a position in each of two texts."""
    before, after = 0, 0
    while min(at, there) > before and words[at - before - 1] == others[there - before - 1]:
        before += 1
    while max(at - len(words), there - len(others)) + after < 0 and words[at + after] == others[there + after]:
        after += 1
    return before + after
