"""The dump stage: the verifier reads every conversation once, and its hidden states are recorded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conf.artifact import Artifact, artifact, commit, read_manifest, sync
from ..conf.progress import Progress
from ..conf.schema import Config
from ..models.draft_head import DraftHeadConfig
from ..models.verifier import Verifier, check_identity, load_config, logit_transform, special_token_ids
from ..models.vocabulary import build_vocabulary, check_vocabulary_size, coverage
from .chat import conversation_tokens
from .conversations import FILE, content_digest, read_conversations
from .prompts import is_heldout
from .store import VOCABULARY_FILE, Sample, shard_name, write_shard

COUNTS_FILE = "token_counts.safetensors"


@dataclass
class TokenisedConversation:
    """A conversation before the verifier has read it."""

    id: str
    input_ids: torch.Tensor  # int32 [T]
    loss_mask: torch.Tensor  # uint8 [T]


def dump(config: Config) -> None:
    """Record aux and last hidden states of runs/<name>/conversations/ into the store, and the draft vocabulary."""
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
        "shard_tokens": config.dump.shard_tokens,
    }
    with artifact(config.hidden_states_folder, "hidden_states", settings, config.overwrite) as target:
        present = all(_is_there(target.folder, entry) for entry in target.manifest.get("shards", []))
        if target.complete and present and (target.folder / COUNTS_FILE).is_file():
            print(f"hidden states: {target.folder} is complete")
            _write_vocabulary(config, target, always)
        else:
            _dump_shards(config, target, always)


def _dump_shards(config: Config, target: Artifact, always: list[int]) -> None:
    verifier = Verifier.load(config.verifier, target.manifest["settings"]["aux_layers"])
    samples, left_out = _tokenise(config, verifier)
    if not samples:
        raise ValueError(
            f"no conversation in {config.conversations_folder} can be used: {left_out['truncated']} have a truncated "
            f"answer, {left_out['too_long']} are longer than dump.max_length={config.dump.max_length}, "
            f"{left_out['template']} have no exact loss mask"
        )
    plan = list(_plan_shards(samples, config.dump.shard_tokens))
    written = {entry["file"]: entry for entry in target.manifest.get("shards", []) if _is_there(target.folder, entry)}
    _announce_cost(config, verifier, samples, sum(entry["bytes"] for entry in written.values()), target.folder)
    progress = Progress("dump", sum(len(sample.input_ids) for sample in samples), "token")
    for number, conversations in enumerate(plan):
        entry = written.get(shard_name(number))
        if entry is None:
            entry = write_shard(target.folder, number, record(verifier, conversations, config.dump.batch_tokens))
            written[entry["file"]] = entry
            target.save(
                complete=False, verifier_path=config.verifier.path, shards=[written[name] for name in sorted(written)]
            )
        progress.update(entry["tokens"])
    progress.close()
    shards = [written[shard_name(number)] for number in range(len(plan))]
    _write_token_counts(samples, verifier.model.config.get_text_config().vocab_size, target)
    _write_vocabulary(config, target, always)
    totals = {key: sum(entry[key] for entry in shards) for key in ("samples", "tokens", "counted_tokens", "bytes")}
    target.finish(shards=shards, counts={**totals, **left_out})
    print(
        f"hidden states: {totals['samples']} samples, {totals['tokens']} tokens, {totals['bytes'] / 2**30:.2f} GiB in "
        f"{target.folder}; left out: {left_out['truncated']} with a truncated answer, {left_out['too_long']} too long, "
        f"{left_out['template']} without an exact loss mask"
    )


def _tokenise(config: Config, verifier: Verifier) -> tuple[list[TokenisedConversation], dict[str, int]]:
    """Give the usable conversations, ordered by id (the journal's order is that of completion), and those left out."""
    samples, left_out = [], {"truncated": 0, "too_long": 0, "template": 0}
    for conversation in read_conversations(config.conversations_folder):
        if "length" in conversation["finish_reasons"]:
            left_out["truncated"] += 1
            continue
        try:
            tokens, mask = conversation_tokens(verifier.tokenizer, conversation["messages"], verifier.end_token_ids)
        except ValueError:  # an answer that merges with the template around it; the template itself was checked
            left_out["template"] += 1
            continue
        if len(tokens) > config.dump.max_length:
            left_out["too_long"] += 1
            continue
        ids, loss_mask = torch.tensor(tokens, dtype=torch.int32), torch.tensor(mask, dtype=torch.uint8)
        samples.append(TokenisedConversation(conversation["id"], ids, loss_mask))
    recorded = read_manifest(config.conversations_folder, "conversations")["content"]
    if recorded != content_digest(config.conversations_folder):
        raise ValueError(
            f"{config.conversations_folder / FILE} was changed after it was finished: run `fledge synthesize` again"
        )
    return sorted(samples, key=lambda sample: sample.id), left_out


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _announce_cost(
    config: Config, verifier: Verifier, samples: list[TokenisedConversation], written: int, folder: Path
) -> None:
    """Print what the store needs, and refuse what the disk cannot hold beside the `written` bytes."""
    tokens = sum(len(sample.input_ids) for sample in samples)
    values = (len(verifier.aux_layers) + 1) * verifier.model.config.get_text_config().hidden_size
    per_token = values * getattr(torch, config.verifier.dtype.value).itemsize + 5
    needed, free = max(0, tokens * per_token - written), shutil.disk_usage(folder).free
    print(
        f"dump: {tokens} tokens, {per_token / 1000:.1f} kB each: {needed / 2**30:.2f} GiB to write, "
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
    padded = torch.nn.utils.rnn.pad_sequence([c.input_ids.long() for c in batch], batch_first=True)
    output = verifier.forward(padded.to(verifier.device), logits_to_keep=1, use_cache=False)
    _check_last_hidden_state(verifier, output.last_hidden_state[:, -1:], output.logits)
    aux, last = output.aux_hidden_states.cpu(), output.last_hidden_state.cpu()
    return [
        Sample(c.id, c.input_ids, c.loss_mask, aux[row, :n], last[row, :n])
        for row, (c, n) in enumerate(zip(batch, lengths, strict=True))
    ]


def _check_last_hidden_state(verifier: Verifier, last: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that lm_head on the recorded state gives the model's logits: training builds its targets so."""
    weight = verifier.model.get_output_embeddings().weight.to(last.device).float()
    again = logit_transform(verifier.model.config.get_text_config()).apply_(last.float() @ weight.T)
    if not logits.isfinite().all() or (again - logits.float()).abs().amax() > 2e-2 * logits.float().abs().amax():
        raise ValueError(
            "the verifier's logits are not lm_head times its final normed state, nor that scaled or capped as "
            "fledge knows it: it cannot train from this verifier"
        )


def _write_token_counts(samples: list[TokenisedConversation], vocab_size: int, target: Artifact) -> None:
    """Count the tokens the verifier produced in the training split: what the draft vocabulary is chosen by."""
    share = target.manifest["settings"]["heldout_share"]
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sample in samples:
        if not is_heldout(sample.id, share):
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
