"""The dump stage: conversations become tokens, and the verifier reads them once to record its hidden states.

The store of tokens (tokens/tokenise.py) fixes which samples go into which shard. Any number of writers, ranks or tasks
of a job array, then record the shards with states: writer i of n takes shards i, i + n, ... A shard is there as soon as
its file has its name, so that writers need to know nothing of each other; the one that finds all of them completes the
store. The whole batches that a writer had of a shard when a signal or an error of the verifier stopped it are kept as a
part, which the next start takes in.
"""

import os
import re
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import Artifact, artifact, digest, read_manifest
from ..conf.runtime.rank_info import read_rank_info
from ..conf.schema import Config, DumpEngine, HiddenStates, require
from ..models.verifier.config import special_token_ids
from ..models.verifier.weights import check_identity
from .states.record import write_states
from .states.verifier_check import check_verifier
from .store.draft_vocabulary import write_vocabulary
from .store.index import COUNTS_FILE, TOKENS_FOLDER, is_intact, left_out, sidecar_checksums, totals
from .store.mapped_shard import CURE, shard_entry, shard_name
from .store.store import HiddenStateStore, load_sidecar, save_tensors, write_index
from .tokens.tokenise import write_tokens

# Settings that only a store with states has.
_OF_STATES = ("engine", "vllm_options", "verifier_dtype", "aux_layers", "state_dtype", "last_states")
_OF_PLACEMENT = re.compile(r"parallel|memory|max_|cpu_offload|distributed|eager|cudagraph")  # options of vLLM's


def dump(config: Config) -> None:
    """Record runs/<name>/conversations/ into the store: tokens, the states offline training needs, draft vocabulary."""
    source, folder = read_manifest(config.conversations_folder, "conversations"), config.hidden_states_folder
    verifier, cure = source["settings"]["verifier"], "synthesize under another name"
    check_identity(verifier, config.verifier, str(config.conversations_folder), cure)
    head, always = check_verifier(config.verifier, config.draft), special_token_ids(config.verifier)
    options = config.dump
    require(
        (options.join_length or 0) <= head.max_position_embeddings,
        f"dump.join_length must be at most the verifier's context of {head.max_position_embeddings} tokens, got "
        f"{options.join_length}",
    )
    of_tokens = {
        "verifier": verifier,
        "conversations": source["digest"],
        "heldout_share": source["settings"]["heldout_share"],
        "max_length": options.max_length,
        "max_images": options.max_images,
        "keep_truncated": options.keep_truncated,
        "shard_tokens": options.shard_tokens,
        **({"local_images": True} if config.data.local_images else {}),
        **{name: value for name in ("limit", "join_length") if (value := getattr(options, name))},
    }
    of_states = {
        "engine": options.engine.value,
        "verifier_dtype": config.verifier.dtype.value,
        "aux_layers": list(head.aux_layers),
        **({"vllm_options": _result_affecting(options.vllm_options)} if options.engine is DumpEngine.vllm else {}),
        "state_dtype": (options.dtype or config.verifier.dtype).value,
        "last_states": options.last_states.value,
    }
    tokens_only = {**of_tokens, "states": False}
    if config.train.hidden_states is HiddenStates.offline:
        _dump_states(config, {**of_tokens, **of_states}, tokens_only, always)
    elif found := _store_with_states(folder, of_tokens):
        with artifact(folder, "hidden_states", found, wait=True) as target:
            print(f"hidden states: {target.folder} is complete, and holds the states too")
            _write_vocabulary(config, target, always, folder)
    else:
        with artifact(folder, "hidden_states", tokens_only, config.overwrite, wait=True) as target:
            write_tokens(config, target)
            _write_vocabulary(config, target, always, folder)
            _print_counts(config, target)


def _result_affecting(vllm_options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in vllm_options.items() if not _OF_PLACEMENT.search(name)}


def _store_with_states(folder: Path, of_tokens: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a complete store with states that holds these tokens; None: none."""
    try:
        settings: dict[str, Any] = HiddenStateStore(folder).manifest["settings"]
    except ValueError:
        return None
    same = {name: value for name, value in settings.items() if name not in _OF_STATES} == of_tokens
    return settings if same else None


def _dump_states(config: Config, settings: dict[str, Any], of_tokens: dict[str, Any], always: list[int]) -> None:
    """Record this writer's shards with states, and complete the store if no other shard is missing."""
    folder = config.hidden_states_folder
    with artifact(folder, "hidden_states", settings, config.overwrite, wait=True) as target:
        if target.complete and is_intact(folder, target.manifest["shards"]):
            print(f"hidden states: {folder} is complete")
            _write_vocabulary(config, target, always, folder)
            return
        target.save(complete=False, **config.verifier.origin)
    with artifact(folder / TOKENS_FOLDER, "hidden_states", of_tokens, overwrite=True, wait=True) as tokens:
        write_tokens(config, tokens)
    plan = HiddenStateStore(folder / TOKENS_FOLDER, with_states=False)
    write_states(config, settings, plan, _missing(folder, len(plan.entries)))
    if config.verifier.tensor_parallel and read_rank_info(os.environ).rank:
        return  # the first rank has written
    with artifact(folder, "hidden_states", settings, wait=True) as target:
        _complete(config, target, plan, always)


def _missing(folder: Path, num_shards: int) -> list[int]:
    """Return the shards that are not there: one gets its name when it is whole and durable."""
    return [number for number in range(num_shards) if not (folder / shard_name(number)).is_file()]


def _complete(config: Config, target: Artifact, plan: HiddenStateStore, always: list[int]) -> None:
    """Merge what the writers have left, if nothing is missing."""
    folder, num_shards = target.folder, len(plan.entries)
    if missing := _missing(folder, num_shards):
        there = f"{num_shards - len(missing)} of {num_shards} shards are there"
        print(f"hidden states: {there}; the writer that ends last completes them")
        return
    for part in folder.glob("part-*"):  # of writers that were interrupted, and have gone on
        part.unlink()
    shards = [shard_entry(folder / entry["file"]) for entry in plan.entries]
    for shard, planned in zip(shards, plan.entries, strict=True):
        same = all(shard[name] == planned[name] for name in ("samples", "tokens", "counted_tokens"))
        if not same or shard["made_with"] != digest(target.manifest["settings"]):
            raise ValueError(f"{folder / shard['file']} holds other samples or states than this store's: {CURE}")
    save_tensors(load_sidecar(plan.folder, plan.manifest, COUNTS_FILE), folder / COUNTS_FILE)
    write_index(folder, shards)
    counts = {**plan.manifest["counts"], **totals(shards), "samples_with_images": sum(map(bool, plan.num_images))}
    about = {"counts": counts, "image_positions": "embedding of the placeholder token"}
    _write_vocabulary(config, plan, always, folder)
    target.finish(shards=shards, files=sidecar_checksums(folder), **about)
    _print_counts(config, target)


def _write_vocabulary(config: Config, counted: Artifact | HiddenStateStore, always: list[int], folder: Path) -> None:
    counts = load_sidecar(counted.folder, counted.manifest, COUNTS_FILE)["token_counts"]
    write_vocabulary(folder, counts, config.draft.vocab_size, always)


def _print_counts(config: Config, target: Artifact) -> None:
    counts = target.manifest["counts"]
    print(
        f"hidden states: {counts['conversations']} conversations in {counts['samples']} sequences, {counts['tokens']} "
        f"tokens, {counts['bytes'] / 2**30:.2f} GiB in {target.folder}; left out: "
        f"{left_out(counts, config.dump.max_length)}"
    )
