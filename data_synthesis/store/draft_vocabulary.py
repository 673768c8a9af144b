"""The draft vocabulary of hidden-state stores: that of the dump, or one for several stores together."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...models.head.vocabulary import VocabularyMap, build_vocabulary, coverage
from .index import COUNTS_FILE, VOCABULARY_FILE
from .store import HiddenStateStore, load_sidecar, save_tensors


def write_vocabulary(folder: Path, counts: Tensor, size: int | None, always: list[int]) -> None:
    """Write the draft vocabulary as `build_vocabulary` chooses it, if it is not there."""
    vocabulary, path, found = build_vocabulary(counts, size, always), folder / VOCABULARY_FILE, dict[str, Tensor]()
    with suppress(ValueError):
        found = _load(path)
    if not _is_same(found, vocabulary):
        save_tensors(vars(vocabulary), path)
    share = coverage(counts, vocabulary)
    print(f"draft vocabulary: {len(vocabulary.d2t)} of {len(counts)} tokens, {share:.2%} of what the verifier produced")


def choose_vocabulary(
    stores: list[HiddenStateStore], weights: list[float], size: int, vocab_size: int, always: list[int]
) -> VocabularyMap:
    """Return the draft vocabulary: of one store that of its dump, of several that of their counts, added by weight.

    `size` and `vocab_size` are those of the draft vocabulary and of the verifier's; ids in `always` are inside.
    """
    counts = [_token_counts(store, vocab_size) for store in stores]
    if len(stores) > 1:
        weighted = [weight * count.double() for weight, count in zip(weights, counts, strict=True)]
        return build_vocabulary(torch.stack(weighted).sum(0), size, always)
    path = stores[0].folder / VOCABULARY_FILE
    found = _load(path)
    if "d2t" in found and len(found["d2t"]) != size:
        raise ValueError(
            f"draft.vocab_size is {size}, the map {path} has {len(found['d2t'])}: "
            "run `fledge dump` with this option again, only the map is written anew"
        )
    vocabulary = build_vocabulary(counts[0], size, always)
    if not _is_same(found, vocabulary):
        raise ValueError(
            f"{path} does not follow from the token counts beside it: delete it and run `fledge dump` again, "
            "only the map is written anew"
        )
    return vocabulary


def _token_counts(store: HiddenStateStore, vocab_size: int) -> Tensor:
    path = store.folder / COUNTS_FILE
    counts = load_sidecar(store.folder, store.manifest, COUNTS_FILE).get("token_counts")
    if counts is None or counts.shape != (vocab_size,):
        raise ValueError(f"{path} does not count the verifier's {vocab_size} tokens: delete it and `fledge dump` again")
    return counts


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): run `fledge dump` again") from None


def _is_same(found: dict[str, Tensor], vocabulary: VocabularyMap) -> bool:
    tensors = vars(vocabulary)
    same_types = {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in tensors.items()}
    return same_types and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
