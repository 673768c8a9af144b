"""The draft vocabulary of hidden-state stores: that of the dump, or one for several stores together."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...models.head.vocabulary import VocabularyMap, build_vocabulary
from .store import COUNTS_FILE, VOCABULARY_FILE, HiddenStateStore, load_beside


def choose_vocabulary(
    stores: list[HiddenStateStore], weights: list[float], size: int, vocab_size: int, always: list[int]
) -> VocabularyMap:
    """Give the draft vocabulary: of one store that of its dump, of several that of their counts, added by weight.

    Args:
        size, vocab_size: tokens of the draft vocabulary and of the verifier's.
        always: ids that are inside whatever their count.
    """
    counts = [_token_counts(store, vocab_size) for store in stores]
    if len(stores) == 1:
        return _load_vocabulary(stores[0], counts[0], size, always)
    weighted = [weight * count.double() for weight, count in zip(weights, counts, strict=True)]
    return build_vocabulary(torch.stack(weighted).sum(0), size, always)


def _token_counts(store: HiddenStateStore, vocab_size: int) -> Tensor:
    path = store.folder / COUNTS_FILE
    counts = load_beside(store.folder, store.manifest, COUNTS_FILE).get("token_counts")
    if counts is None or counts.shape != (vocab_size,):
        raise ValueError(f"{path} does not count the verifier's {vocab_size} tokens: delete it and `fledge dump` again")
    return counts


def _load_vocabulary(store: HiddenStateStore, counts: Tensor, size: int, always: list[int]) -> VocabularyMap:
    """Read the draft vocabulary that was chosen when a store was dumped; refuse one that was not."""
    path = store.folder / VOCABULARY_FILE
    tensors = _load(path)
    found = [tensors.get("d2t"), tensors.get("t2d")]
    if found[0] is not None and len(found[0]) != size:
        raise ValueError(
            f"draft.vocab_size is {size}, the map {path} has {len(found[0])}: "
            "run `fledge dump` with this option again, only the map is written anew"
        )
    right = build_vocabulary(counts, size, always)
    for tensor, expected in zip(found, [right.d2t, right.t2d], strict=True):
        if tensor is None or tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            raise ValueError(
                f"{path} does not follow from the token counts beside it: delete it and run `fledge dump` again, "
                "only the map is written anew"
            )
    return right


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): run `fledge dump` again") from None
