"""The held-out split, by id alone, and the ids of the sequences that one conversation gives."""

import hashlib
import re
from collections.abc import Callable
from typing import TypeVar

from ..conf.runtime.artifact import digest

T = TypeVar("T")

_MARK = "##"  # between a conversation's id and the number of a further sequence
_LIKE_A_FURTHER_ONE = re.compile(rf"{_MARK}\d+-*\Z")


def escaped(name: str) -> str:
    """Return an id that is that of no further sequence: "x##3" becomes "x##3-", and "x##3-" in turn "x##3--"."""
    return f"{name}-" if _LIKE_A_FURTHER_ONE.search(name) else name


def sequence_id(conversation_id: str, number: int) -> str:
    """Return the id of a conversation's n-th training sequence (from 0): the first has the conversation's own."""
    return f"{conversation_id}{_MARK}{number + 1}" if number else conversation_id


def conversation_id(sequence: str) -> str:
    """Return the id of the conversation that a sequence is of."""
    head, mark, number = sequence.rpartition(_MARK)
    return head if mark and number.isdecimal() else sequence


def is_heldout(sample_id: str, share: float) -> bool:
    """Return whether a sample is held out: by its conversation's id, so by nothing that can change."""
    key = conversation_id(sample_id).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < share


def limited(items: list[T], limit: int | None, name: Callable[[T], str]) -> list[T]:
    """Return as many items as `limit` says, in their order: by their ids, so that a higher limit has these, too."""
    if limit is None:
        return items
    chosen = sorted(range(len(items)), key=lambda place: heldout_order(name(items[place])))[:limit]
    return [items[place] for place in sorted(chosen)]


def heldout_order(sample_id: str) -> tuple[str, str]:
    """Return the key by which held-out samples are ordered: if only some are used, everyone takes the same."""
    return digest(conversation_id(sample_id)), sample_id
