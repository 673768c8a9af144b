"""Which texts say the same: duplicates among prompts, and evaluation questions in them."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from .rows import Prompt, images_of, text_of

RUN = 13  # words; GPT-3's measure of contamination (arXiv:2005.14165, appendix C)

_WINDOW = 8  # words that are looked up first, as few texts have any such window
_STRIDE = RUN - _WINDOW + 1  # between look-ups: every run of RUN words holds a whole window at a multiple of it
_SHINGLE = 5  # characters
_NUM_PERM = 128  # hash functions of a MinHash
_MARGIN = 0.1  # below the threshold, from which on most pairs are compared
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
        self._whole = frozenset(map(canonical, texts))
        long = [words for words in map(_words, self._whole) if len(words) >= RUN]
        self._windows = {window for words in long for window in _runs(words, _WINDOW)}
        self._runs = {run for words in long for run in _runs(words, RUN)}

    def like(self, text: str) -> bool:
        """Return whether a text is like one of the questions."""
        plain = canonical(text)
        if plain in self._whole:
            return True
        words = _words(plain)
        maybe = not self._windows.isdisjoint(_runs(words, _WINDOW, _STRIDE))
        return maybe and not self._runs.isdisjoint(_runs(words, RUN))


class NearDuplicates:
    """Prompts that are taken; a further one is nearly one of them by the Jaccard similarity of runs of 5 characters.

    Those of the user's turns count, among prompts with the same system message. MinHash with locality-sensitive hashing
    finds which to compare; at a threshold of 0.8 it misses 1 of 400 pairs of just that similarity. A prompt takes up to
    6 kB of memory; its text is read again by `read` if it is compared.
    """

    def __init__(self, threshold: float, read: Callable[[int], Prompt]) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ValueError(
                "data.near_duplicates needs the package datasketch, which is not installed: "
                "pip install 'fledge-eagle[near-duplicates]', or set it to null"
            ) from None
        self._threshold, self._read, self._new = threshold, read, partial(MinHash, _NUM_PERM)
        self._lsh = MinHashLSH(threshold - _MARGIN, _NUM_PERM, weights=(0.1, 0.9))

    def add(self, key: int, prompt: Prompt) -> bool:
        """Take a prompt that `read` gives for `key`, unless it is nearly one of those before; return whether it was."""
        shingles, minhash, system = _shingles(prompt), self._new(), canonical(prompt.system or "")
        minhash.update_batch([shingle.encode() for shingle in shingles])
        for other in self._lsh.query(minhash):
            known = self._read(other)
            if canonical(known.system or "") != system:
                continue
            theirs = _shingles(known)
            if len(shingles & theirs) >= self._threshold * len(shingles | theirs):
                return False
        self._lsh.insert(key, minhash)
        return True


def _shingles(prompt: Prompt) -> set[str]:
    texts = [canonical(text) for text in map(text_of, prompt.turns) if text]
    whole = "\n".join([*texts, *(address for turn in prompt.turns for address in images_of(turn))])
    return {whole[at : at + _SHINGLE] for at in range(max(1, len(whole) - _SHINGLE + 1))}


def _words(text: str) -> list[str]:
    """Split a text; in scripts without spaces between words each character is a word."""
    return (_WORD if text.isascii() else _WORD_OR_CHARACTER).findall(text)


def _runs(words: list[str], size: int, stride: int = 1) -> Iterator[str]:
    return (" ".join(words[at : at + size]) for at in range(0, len(words) - size + 1, stride))
