"""The dump stage: the verifier reads every conversation once, and its hidden states are recorded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conf.artifact import Artifact, artifact, commit, digest, read_manifest
from ..conf.progress import Progress
from ..conf.schema import Config
from ..models.draft_head import DraftHeadConfig
from ..models.verifier import Verifier, end_token_ids, load_config, load_tokenizer, verifier_identity
from ..models.vocabulary import build_vocabulary, coverage
from .chat import conversation_tokens
from .conversations import FILE, content_digest, read_conversations
from .prompts import is_heldout
from .store import VOCABULARY_FILE, Sample, shard_name, write_shard

COUNTS_FILE = "token_counts.safetensors"


@dataclass
class TokenisedConversation:
    """A conversation before the verifier has read it."""

    id: str
    input_ids: list[int]
    loss_mask: list[int]


def dump(config: Config) -> None:
    """Record aux and last hidden states of runs/<name>/conversations/ into the store, and the draft vocabulary."""
    source = read_manifest(config.conversations_folder, "conversations")
    identity = verifier_identity(config.verifier)
    if source["settings"]["verifier"] != identity:
        raise ValueError(
            f"{config.conversations_folder} was written by the verifier {source['settings']['verifier']['path']} "
            f"(fingerprint {source['settings']['verifier']['fingerprint']}), verifier.path is {identity['path']} "
            f"({identity['fingerprint']}): set the same verifier or synthesize under another name"
        )
    tokenizer = load_tokenizer(config.verifier)
    settings = {
        "verifier": identity,
        "conversations": source["digest"],
        "heldout_share": source["settings"]["heldout_share"],
        "aux_layers": list(DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier)).aux_layers),
        "dtype": config.verifier.dtype.value,
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "chat_template": digest(tokenizer.chat_template),
        "max_length": config.dump.max_length,
        "shard_tokens": config.dump.shard_tokens,
    }
    with artifact(config.hidden_states_folder, "hidden_states", settings, config.overwrite) as target:
        if target.complete and all(_is_there(target.folder, entry) for entry in target.manifest["shards"]):
            print(f"hidden states: {target.folder} is complete")
        else:
            _dump_shards(config, target)
        _write_vocabulary(config, target)


def _dump_shards(config: Config, target: Artifact) -> None:
    verifier = Verifier.load(config.verifier, target.manifest["settings"]["aux_layers"])
    samples, left_out = _tokenise(config, verifier)
    if not samples:
        raise ValueError(
            f"no conversation in {config.conversations_folder} can be used: {left_out['truncated']} have a truncated "
            f"answer, {left_out['too_long']} are longer than dump.max_length={config.dump.max_length}"
        )
    _announce_cost(config, verifier, samples, target.folder)
    plan = list(_plan_shards(samples, config.dump.shard_tokens))
    written = {entry["file"]: entry for entry in target.manifest.get("shards", []) if _is_there(target.folder, entry)}
    progress = Progress("dump", sum(len(sample.input_ids) for sample in samples), "token")
    for number, conversations in enumerate(plan):
        entry = written.get(shard_name(number))
        if entry is None:
            entry = write_shard(target.folder, number, record(verifier, conversations, config.dump.batch_tokens))
            written[entry["file"]] = entry
            target.save(complete=False, shards=[written[name] for name in sorted(written)])
        progress.update(entry["tokens"])
    progress.close()
    shards = [written[shard_name(number)] for number in range(len(plan))]
    _write_token_counts(samples, config, verifier.model.config.get_text_config().vocab_size, target)
    totals = {key: sum(entry[key] for entry in shards) for key in ("samples", "tokens", "counted_tokens", "bytes")}
    target.finish(shards=shards, counts={**totals, **left_out})
    print(
        f"hidden states: {totals['samples']} samples, {totals['tokens']} tokens, {totals['bytes'] / 2**30:.2f} GiB in "
        f"{target.folder}; left out: {left_out['truncated']} with a truncated answer, {left_out['too_long']} too long"
    )


def _tokenise(config: Config, verifier: Verifier) -> tuple[list[TokenisedConversation], dict[str, int]]:
    """Give the usable conversations, ordered by id (the journal's order is that of completion), and those left out."""
    samples, left_out = [], {"truncated": 0, "too_long": 0}
    for conversation in read_conversations(config.conversations_folder):
        if "length" in conversation["finish_reasons"]:
            left_out["truncated"] += 1
            continue
        tokens, mask = conversation_tokens(verifier.tokenizer, conversation["messages"], verifier.end_token_ids)
        if len(tokens) > config.dump.max_length:
            left_out["too_long"] += 1
            continue
        samples.append(TokenisedConversation(conversation["id"], tokens, mask))
    recorded = read_manifest(config.conversations_folder, "conversations")["content"]
    if recorded != content_digest(config.conversations_folder):
        raise ValueError(
            f"{config.conversations_folder / FILE} was changed after it was finished: run `fledge synthesize` again"
        )
    return sorted(samples, key=lambda sample: sample.id), left_out


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _announce_cost(config: Config, verifier: Verifier, samples: list[TokenisedConversation], folder: Path) -> None:
    tokens = sum(len(sample.input_ids) for sample in samples)
    text = verifier.model.config.get_text_config()
    per_token = (len(verifier.aux_layers) + 1) * text.hidden_size * getattr(
        torch, config.verifier.dtype.value
    ).itemsize + 5
    needed, free = tokens * per_token, shutil.disk_usage(folder).free
    print(
        f"dump: {tokens} tokens, {per_token / 1000:.1f} kB each: {needed / 2**30:.2f} GiB, "
        f"{free / 2**30:.0f} GiB are free"
    )
    if needed > free:
        raise ValueError(
            f"the store needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free: "
            "set dump.folder to a larger disk"
        )


def _plan_shards(samples: list[TokenisedConversation], shard_tokens: int) -> Iterator[list[TokenisedConversation]]:
    shard: list[TokenisedConversation] = []
    size = 0
    for sample in samples:
        shard.append(sample)
        size += len(sample.input_ids)
        if size >= shard_tokens:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def record(verifier: Verifier, conversations: list[TokenisedConversation], batch_tokens: int) -> list[Sample]:
    """Run the verifier over conversations, batched by length, and give their samples in the order given."""
    by_length = sorted(range(len(conversations)), key=lambda i: len(conversations[i].input_ids))
    samples: dict[int, Sample] = {}
    while by_length:
        batch = [by_length.pop()]  # the longest left sets the width
        width = len(conversations[batch[0]].input_ids)
        while by_length and (len(batch) + 1) * width <= batch_tokens:
            batch.append(by_length.pop())
        for index, sample in zip(batch, _forward(verifier, [conversations[i] for i in batch]), strict=True):
            samples[index] = sample
    return [samples[i] for i in range(len(conversations))]


def _forward(verifier: Verifier, batch: list[TokenisedConversation]) -> list[Sample]:
    """Run one forward pass, padded on the right: causal attention keeps the padding out of every kept state."""
    lengths = [len(conversation.input_ids) for conversation in batch]
    width = max(lengths)
    padded = [c.input_ids + [0] * (width - n) for c, n in zip(batch, lengths, strict=True)]
    output = verifier.forward(torch.tensor(padded, device=verifier.device), logits_to_keep=1, use_cache=False)
    _check_last_hidden_state(verifier, output.last_hidden_state[:, -1:], output.logits)
    aux, last = output.aux_hidden_states.cpu(), output.last_hidden_state.cpu()
    return [
        Sample(c.id, torch.tensor(c.input_ids), torch.tensor(c.loss_mask), aux[row, :n], last[row, :n])
        for row, (c, n) in enumerate(zip(batch, lengths, strict=True))
    ]


def _check_last_hidden_state(verifier: Verifier, last: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that lm_head on the recorded state ranks tokens as the model does: training builds its targets so."""
    again = verifier.model.get_output_embeddings()(last)
    top = logits.argmax(-1, keepdim=True)
    gap = again.amax(-1, keepdim=True) - again.gather(-1, top)
    if bool((gap > 1e-2 * again.abs().amax()).any()):
        raise ValueError(
            "the verifier's logits are not lm_head on its final normed state: fledge cannot train from this verifier"
        )


def _write_token_counts(
    samples: list[TokenisedConversation], config: Config, vocab_size: int, target: Artifact
) -> None:
    """Count the tokens the verifier produced in the training split: what the draft vocabulary is chosen by."""
    share = target.manifest["settings"]["heldout_share"]
    produced = [
        token
        for sample in samples
        if not is_heldout(sample.id, share)
        for token, mask in zip(sample.input_ids, sample.loss_mask, strict=True)
        if mask
    ]
    counts = torch.bincount(torch.tensor(produced, dtype=torch.int64), minlength=vocab_size)
    _save_tensors({"token_counts": counts}, target.folder / COUNTS_FILE)


def _write_vocabulary(config: Config, target: Artifact) -> None:
    """Write the draft vocabulary of `draft.vocab_size`; changing that option makes nothing but this file anew."""
    counts = load_file(target.folder / COUNTS_FILE)["token_counts"]
    always = end_token_ids(None, load_tokenizer(config.verifier))
    vocabulary = build_vocabulary(counts, config.draft.vocab_size, always)
    path = target.folder / VOCABULARY_FILE
    if not path.is_file() or not torch.equal(load_file(path)["t2d"], vocabulary.t2d):
        _save_tensors({"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}, path)
    share = coverage(counts, vocabulary)
    print(f"draft vocabulary: {len(vocabulary.d2t)} of {len(counts)} tokens, {share:.2%} of what the verifier produced")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    commit(temporary, path)
