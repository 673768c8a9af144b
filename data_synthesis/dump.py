"""The dump stage: conversations become tokens, and the verifier reads them once to record its hidden states."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conf.artifact import Artifact, artifact, commit, read_manifest, sync
from ..conf.progress import Progress
from ..conf.schema import Config, HiddenStates
from ..models.draft_head import DraftHeadConfig
from ..models.verifier import Verifier, check_identity, load_config, special_token_ids
from ..models.vocabulary import build_vocabulary, check_vocabulary_size, coverage
from .chat import NoExactSpanError, Sequence, has_images
from .conversations import FILE, content_digest, read_conversations
from .record import record
from .sequences import SequenceReader, leading_answers, num_whole_answers
from .split import is_heldout, sequence_id
from .store import COUNTS_FILE, VOCABULARY_FILE, Sample, shard_name, write_shard

_STATES = ("verifier_dtype", "aux_layers")  # settings that only a store with states has


def dump(config: Config) -> None:
    """Record runs/<name>/conversations/ into the store: tokens, the states offline training needs, draft vocabulary."""
    source = read_manifest(config.conversations_folder, "conversations")
    check_identity(
        source["settings"]["verifier"],
        config.verifier,
        str(config.conversations_folder),
        "synthesize under another name",
    )
    head = DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier))
    always = special_token_ids(config.verifier)
    check_vocabulary_size(head.draft_vocab_size, head.vocab_size, len(always))
    settings = {
        "verifier": source["settings"]["verifier"],
        "verifier_dtype": config.verifier.dtype.value,
        "conversations": source["digest"],
        "heldout_share": source["settings"]["heldout_share"],
        "aux_layers": list(head.aux_layers),
        "max_length": config.dump.max_length,
        "keep_truncated": config.dump.keep_truncated,
        "shard_tokens": config.dump.shard_tokens,
    }
    folder, note = config.hidden_states_folder, ""
    if config.train.hidden_states is HiddenStates.online:
        tokens_only = {name: value for name, value in settings.items() if name not in _STATES}
        full = _store_with_states(folder, tokens_only)
        settings, note = (full, ", and holds the states too") if full else ({**tokens_only, "states": False}, "")
    with artifact(folder, "hidden_states", settings, config.overwrite) as target:
        present = all(_is_there(target.folder, entry) for entry in target.manifest.get("shards", []))
        if target.complete and present and (target.folder / COUNTS_FILE).is_file():
            print(f"hidden states: {target.folder} is complete{note}")
            _write_vocabulary(config, target, always)
        else:
            _dump_shards(config, target, always)


def _store_with_states(folder: Path, tokens_only: dict[str, Any]) -> dict[str, Any] | None:
    """Give the settings of a finished store with states that agrees with the settings of one without; None: none."""
    try:
        manifest = read_manifest(folder, "hidden_states")
    except ValueError:
        return None
    settings: dict[str, Any] = manifest["settings"]
    same = settings.get("states", True) and {n: v for n, v in settings.items() if n not in _STATES} == tokens_only
    return settings if same and all(_is_there(folder, entry) for entry in manifest["shards"]) else None


def _dump_shards(config: Config, target: Artifact, always: list[int]) -> None:
    samples, counts = _tokenise(config)
    if not samples:
        raise ValueError(f"no conversation in {config.conversations_folder} can be used: {_left_out(config, counts)}")
    plan = list(_plan_shards(samples, config.dump.shard_tokens))
    written = {entry["file"]: entry for entry in target.manifest.get("shards", []) if _is_there(target.folder, entry)}
    _announce_cost(config, target, samples, sum(entry["bytes"] for entry in written.values()))
    with_states = target.manifest["settings"].get("states", True) and len(written) < len(plan)
    verifier = Verifier.load(config.verifier, target.manifest["settings"]["aux_layers"]) if with_states else None
    progress = Progress("dump", sum(len(sample.input_ids) for sample in samples), "token")
    for number, shard in enumerate(plan):
        entry = written.get(shard_name(number))
        if entry is None:
            recorded = record(verifier, shard, config.dump.batch_tokens) if verifier else shard
            entry = write_shard(target.folder, number, recorded)
            written[entry["file"]] = entry
            target.save(
                complete=False, verifier_path=config.verifier.path, shards=[written[name] for name in sorted(written)]
            )
        progress.update(entry["tokens"])
    progress.close()
    shards = [written[shard_name(number)] for number in range(len(plan))]
    _write_token_counts(samples, target)
    _write_vocabulary(config, target, always)
    totals = {key: sum(entry[key] for entry in shards) for key in ("samples", "tokens", "counted_tokens", "bytes")}
    target.finish(shards=shards, counts={**totals, **counts})
    print(
        f"hidden states: {counts['conversations']} conversations in {totals['samples']} sequences, {totals['tokens']} "
        f"tokens, {totals['bytes'] / 2**30:.2f} GiB in {target.folder}; left out: {_left_out(config, counts)}"
    )


def _left_out(config: Config, counts: dict[str, int]) -> str:
    images = f", {counts['images']} conversations with images, which cannot be dumped yet" if counts["images"] else ""
    return (
        f"{counts['truncated_answers']} truncated answers, {counts['truncated']} conversations without any other, "
        f"{counts['too_long']} sequences longer than dump.max_length={config.dump.max_length}, "
        f"{counts['template']} conversations without an exact loss mask{images}"
    )


def _tokenise(config: Config) -> tuple[list[Sample], dict[str, int]]:
    """Give the usable sequences, ordered by id (the journal's order is that of completion), and the counts of all."""
    manifest = read_manifest(config.conversations_folder, "conversations")
    reader = SequenceReader(config.verifier)
    samples: list[Sample] = []
    counts = dict.fromkeys(("conversations", "truncated_answers", "truncated", "too_long", "template", "images"), 0)
    progress = Progress("tokens", manifest["counts"]["conversations"], "conversation")
    for conversation in read_conversations(config.conversations_folder):
        progress.update()
        if has_images(conversation["messages"]):
            counts["images"] += 1
            continue
        try:
            sequences = reader.read(conversation)
        except NoExactSpanError as error:
            if not counts["template"]:
                print(f"dump: {conversation['id']} is left out: {error}")
            counts["template"] += 1
            continue
        reasons = conversation["finish_reasons"]
        whole = len(reasons) if config.dump.keep_truncated else num_whole_answers(reasons)
        sequences = leading_answers(sequences, whole)
        counts["truncated_answers"] += len(reasons) - whole
        counts["truncated"] += not sequences
        fitting = [n for n, sequence in enumerate(sequences) if len(sequence.token_ids) <= config.dump.max_length]
        counts["too_long"] += len(sequences) - len(fitting)
        counts["conversations"] += bool(fitting)
        samples += [_sample(sequence_id(conversation["id"], n), sequences[n]) for n in fitting]
    progress.close()
    if manifest["content"] != content_digest(config.conversations_folder):
        raise ValueError(
            f"{config.conversations_folder / FILE} was changed after it was finished: run `fledge synthesize` again"
        )
    return sorted(samples, key=lambda sample: sample.id), counts


def _sample(name: str, sequence: Sequence) -> Sample:
    loss_mask = torch.zeros(len(sequence.token_ids), dtype=torch.uint8)
    for start, end in sequence.answers:
        loss_mask[start:end] = 1
    return Sample(name, torch.tensor(sequence.token_ids, dtype=torch.int32), loss_mask)


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _announce_cost(config: Config, target: Artifact, samples: list[Sample], written: int) -> None:
    """Print what the store needs, and refuse what the disk cannot hold beside the `written` bytes."""
    settings, folder = target.manifest["settings"], target.folder
    tokens = sum(len(sample.input_ids) for sample in samples)
    values = (len(settings["aux_layers"]) + 1) * settings["verifier"]["hidden_size"] if "aux_layers" in settings else 0
    per_token = values * getattr(torch, config.verifier.dtype.value).itemsize + 5
    needed, free = max(0, tokens * per_token - written), shutil.disk_usage(folder).free
    print(
        f"dump: {tokens} tokens, {per_token / 1000:.3g} kB each: {needed / 2**30:.2f} GiB to write, "
        f"{free / 2**30:.0f} GiB are free"
    )
    if needed > free:
        raise ValueError(
            f"the store needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free: "
            "set dump.folder to a larger disk"
        )


def _plan_shards(samples: list[Sample], shard_tokens: int) -> Iterator[list[Sample]]:
    shard: list[Sample] = []
    size = 0
    for sample in samples:
        shard.append(sample)
        size += len(sample.input_ids)
        if size >= shard_tokens:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_token_counts(samples: list[Sample], target: Artifact) -> None:
    """Count the tokens the verifier produced in the training split: what the draft vocabulary is chosen by."""
    settings = target.manifest["settings"]
    counts = torch.zeros(settings["verifier"]["vocab_size"], dtype=torch.int64)
    for sample in samples:
        if not is_heldout(sample.id, settings["heldout_share"]):
            produced = sample.input_ids[sample.loss_mask.bool()].long()
            counts.index_add_(0, produced, torch.ones_like(produced))
    _save_tensors({"token_counts": counts}, target.folder / COUNTS_FILE)


def _write_vocabulary(config: Config, target: Artifact, always: list[int]) -> None:
    """Write the draft vocabulary of `draft.vocab_size`; changing that option makes nothing but this file anew.

    Args:
        always: ids that it holds whatever their count.
    """
    counts = load_file(target.folder / COUNTS_FILE)["token_counts"]
    vocabulary = build_vocabulary(counts, config.draft.vocab_size, always)
    path = target.folder / VOCABULARY_FILE
    if not path.is_file() or not torch.equal(load_file(path)["t2d"], vocabulary.t2d):
        _save_tensors({"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}, path)
    share = coverage(counts, vocabulary)
    print(f"draft vocabulary: {len(vocabulary.d2t)} of {len(counts)} tokens, {share:.2%} of what the verifier produced")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    sync(temporary)
    commit(temporary, path)
