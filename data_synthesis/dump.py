"""The dump stage: conversations become tokens, and the verifier reads them once to record its hidden states.

The store of tokens (tokens.py) fixes which samples go into which shard. Any number of writers, ranks or tasks of a job
array, then record the shards with states: writer i of n takes shards i, i + n, ... A shard is there as soon as its file
has its name, so that writers need to know nothing of each other; the one that finds all of them completes the store.
The whole batches that a writer had of a shard when a signal or an error of the verifier stopped it stand beside it as a
part, which the next start takes in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..conf.runtime.artifact import Artifact, artifact, digest, read_manifest
from ..conf.runtime.rank_info import find_place
from ..conf.schema import Config, DumpEngine, HiddenStates
from ..models.head.vocabulary import build_vocabulary, coverage
from ..models.verifier.config import special_token_ids
from ..models.verifier.weights import check_identity
from .states.record import write_states
from .store.shard import CURE, shard_entry, shard_name
from .store.store import (
    COUNTS_FILE,
    TOKENS_FOLDER,
    VOCABULARY_FILE,
    HiddenStateStore,
    checksums_beside,
    load_beside,
    save_tensors,
    write_index,
)
from .tokens.tokenise import all_there, left_out, totals, write_tokens
from .verifier_check import check_verifier

# Settings that only a store with states has.
_OF_STATES = ("engine", "vllm_options", "verifier_dtype", "aux_layers", "state_dtype", "last_states")
_OF_PLACEMENT = re.compile(r"parallel|memory|max_|cpu_offload|distributed|eager|cudagraph")  # options of vLLM's


def dump(config: Config) -> None:
    """Record runs/<name>/conversations/ into the store: tokens, the states offline training needs, draft vocabulary."""
    source = read_manifest(config.conversations_folder, "conversations")
    check_identity(
        source["settings"]["verifier"],
        config.verifier,
        str(config.conversations_folder),
        "synthesize under another name",
    )
    head, always = check_verifier(config), special_token_ids(config.verifier)
    of_tokens = {
        "verifier": source["settings"]["verifier"],
        "conversations": source["digest"],
        "heldout_share": source["settings"]["heldout_share"],
        "max_length": config.dump.max_length,
        "max_images": config.dump.max_images,
        "keep_truncated": config.dump.keep_truncated,
        "shard_tokens": config.dump.shard_tokens,
        **({"local_images": True} if config.data.local_images else {}),
    }
    of_states = {
        "engine": config.dump.engine.value,
        "verifier_dtype": config.verifier.dtype.value,
        "aux_layers": list(head.aux_layers),
        **({"vllm_options": _telling(config.dump.vllm_options)} if config.dump.engine is DumpEngine.vllm else {}),
        "state_dtype": (config.dump.dtype or config.verifier.dtype).value,
        "last_states": config.dump.last_states.value,
    }
    tokens_only = {**of_tokens, "states": False}
    if config.train.hidden_states is HiddenStates.offline:
        _dump_states(config, {**of_tokens, **of_states}, tokens_only, always)
    elif found := _store_with_states(config.hidden_states_folder, of_tokens):
        with artifact(config.hidden_states_folder, "hidden_states", found, wait=True) as target:
            print(f"hidden states: {target.folder} is complete, and holds the states too")
            _write_vocabulary(config, target.folder, _counts(target), always)
    else:
        with artifact(config.hidden_states_folder, "hidden_states", tokens_only, config.overwrite, wait=True) as target:
            write_tokens(config, target)
            _write_vocabulary(config, target.folder, _counts(target), always)
            _tell(config, target)


def _telling(vllm_options: dict[str, Any]) -> dict[str, Any]:
    """Give those of vLLM's options that may change what it computes."""
    return {name: value for name, value in vllm_options.items() if not _OF_PLACEMENT.search(name)}


def _store_with_states(folder: Path, of_tokens: dict[str, Any]) -> dict[str, Any] | None:
    """Give the settings of a complete store with states that holds these tokens; None: none."""
    try:
        manifest = HiddenStateStore(folder).manifest
    except ValueError:
        return None
    settings: dict[str, Any] = manifest["settings"]
    same = {name: value for name, value in settings.items() if name not in _OF_STATES} == of_tokens
    return settings if same else None


def _dump_states(config: Config, settings: dict[str, Any], of_tokens: dict[str, Any], always: list[int]) -> None:
    """Record this writer's shards with states, and complete the store where no other shard is missing."""
    folder = config.hidden_states_folder
    with artifact(folder, "hidden_states", settings, config.overwrite, wait=True) as target:
        if target.complete and all_there(folder, target.manifest["shards"]):
            print(f"hidden states: {folder} is complete")
            _write_vocabulary(config, folder, _counts(target), always)
            return
        target.save(complete=False, verifier_path=config.verifier.path, verifier_revision=config.verifier.revision)
    with artifact(folder / TOKENS_FOLDER, "hidden_states", of_tokens, overwrite=True, wait=True) as tokens:
        write_tokens(config, tokens)
    plan = HiddenStateStore(folder / TOKENS_FOLDER, with_states=False)
    write_states(config, settings, plan, _missing(folder, len(plan.entries)))
    if config.verifier.tensor_parallel and find_place(os.environ).rank:
        return  # the first rank has written
    with artifact(folder, "hidden_states", settings, wait=True) as target:
        _complete(config, target, plan, always)


def _missing(folder: Path, num_shards: int) -> list[int]:
    """Give the shards that are not there: one gets its name when it is whole and durable."""
    return [number for number in range(num_shards) if not (folder / shard_name(number)).is_file()]


def _complete(config: Config, target: Artifact, plan: HiddenStateStore, always: list[int]) -> None:
    """Merge what the writers have left, where nothing is missing."""
    folder = target.folder
    if missing := _missing(folder, len(plan.entries)):
        done = len(plan.entries) - len(missing)
        print(
            f"hidden states: {done} of {len(plan.entries)} shards are there; the writer that ends last completes them"
        )
        return
    for part in folder.glob("part-*"):  # of writers that were interrupted, and have gone on
        part.unlink()
    shards = [shard_entry(folder / entry["file"]) for entry in plan.entries]
    for shard, planned in zip(shards, plan.entries, strict=True):
        same = all(shard[name] == planned[name] for name in ("samples", "tokens", "counted_tokens"))
        if not same or shard["made_with"] != digest(target.manifest["settings"]):
            raise ValueError(f"{folder / shard['file']} holds other samples or states than this store's: {CURE}")
    counted = load_beside(plan.folder, plan.manifest, COUNTS_FILE)
    save_tensors(counted, folder / COUNTS_FILE)
    write_index(folder, shards)
    _write_vocabulary(config, folder, counted["token_counts"], always)
    counts = {**plan.manifest["counts"], **totals(shards), "samples_with_images": sum(map(bool, plan.num_images))}
    about = {"counts": counts, "image_positions": "embedding of the placeholder token"}
    target.finish(shards=shards, files=checksums_beside(folder), **about)
    _tell(config, target)


def _tell(config: Config, target: Artifact) -> None:
    counts = target.manifest["counts"]
    without = left_out(counts, config.dump.max_length)
    print(
        f"hidden states: {counts['conversations']} conversations in {counts['samples']} sequences, {counts['tokens']} "
        f"tokens, {counts['bytes'] / 2**30:.2f} GiB in {target.folder}; left out: {without}"
    )


def _holds(path: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Say whether a file is there and has these tensors."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return False
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def _counts(target: Artifact) -> torch.Tensor:
    return load_beside(target.folder, target.manifest, COUNTS_FILE)["token_counts"]


def _write_vocabulary(config: Config, folder: Path, counts: torch.Tensor, always: list[int]) -> None:
    """Write the draft vocabulary of `draft.vocab_size`; changing that option makes nothing but this file anew.

    Args:
        counts: how often the verifier produced each of its tokens.
        always: ids that it holds whatever their count.
    """
    vocabulary = build_vocabulary(counts, config.draft.vocab_size, always)
    made = {"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}
    if not _holds(folder / VOCABULARY_FILE, made):
        save_tensors(made, folder / VOCABULARY_FILE)
    share = coverage(counts, vocabulary)
    print(f"draft vocabulary: {len(vocabulary.d2t)} of {len(counts)} tokens, {share:.2%} of what the verifier produced")
