"""The inspect command: what a hidden-state store holds, of which verifier, and whether it is sound."""

from __future__ import annotations

import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..conf.runtime.artifact import differences, read_manifest
from ..conf.runtime.progress import Progress
from ..conf.schema import Config, VerifierConfig
from ..models.verifier.config import load_tokenizer, tokenizer_identity
from .heldout import is_heldout
from .show import marked_text, printable, terminal_mark
from .store.shard import Sample, shard_name
from .store.state_format import decode
from .store.store import TOKENS_FOLDER, HiddenStateStore, left_out
from .tokens.chat_template import Sequence

RECORDED = "recorded"  # verifier.path of this command, unless another is given: the store's own
_SCANNED = 64  # samples whose states are measured
_SHOWN_TOKENS = 400


def inspect_store(config: Config) -> None:
    """Print what the store inspect.store, or the run's, holds; exit with code 1 if states are not finite.

    Raises ValueError if it is no store, or a file (named) is missing, truncated or altered.
    """
    options = config.inspect
    folder = Path(options.store) if options.store else config.hidden_states_folder
    manifest = read_manifest(folder, "hidden_states", unfinished=True)
    _print_facts(_facts(folder, manifest))
    if not manifest["complete"]:
        _print_facts({"not complete": _progress(folder)})
        return
    store = HiddenStateStore(folder, with_states=manifest["settings"].get("states", True))
    _print_facts(_statistics(store))
    wrong = _verify(store) if options.verify else []
    _print_facts({"checksums": "all right" if options.verify else "not compared (inspect --verify)"})
    if store.with_states:
        wrong_of_some, read = _print_states(store)
        of = f"of all {len(store)}" if options.verify else f"of those with {read} tokens that were read"
        wrong = wrong if options.verify else wrong_of_some
        _print_facts({"finite": f"{len(wrong)} samples are not, {of}"})
    _print_sample(config.verifier, options.sample, store)
    if wrong:
        print(f"\nnot finite: {', '.join(wrong[:20])}{' ...' if len(wrong) > 20 else ''}")
        sys.exit(1)


def _verify(store: HiddenStateStore) -> list[str]:
    """Compare all checksums; return the samples whose states are not finite."""
    wrong, progress = list[str](), Progress("checksums", len(store.entries), "shard")
    for number in range(len(store.entries)):
        store.verify(number, len(store.entries))
        if store.with_states:
            wrong += store.not_finite(number)
        progress.update()
    progress.close()
    return wrong


def _print_facts(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:<13} {printable(value)}")


def _facts(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    settings = manifest["settings"]
    verifier = settings["verifier"]
    states = "none: tokens for online training"
    if settings.get("states", True):
        layers = ", ".join(map(str, settings["aux_layers"]))
        states = (
            f"{settings['state_dtype']}, of decoder layers {layers} (0-based) and the last, normed, at "
            f"{settings['last_states']} positions; computed in {settings['verifier_dtype']} by {settings['engine']}"
        )
    return {
        "store": str(folder),
        "verifier": f"{manifest.get('verifier_path')}: {verifier['num_layers']} layers, width "
        f"{verifier['hidden_size']}, {verifier['vocab_size']} tokens, fingerprint {verifier['fingerprint']}",
        "tokenizer": f"{verifier['tokenizer']}, chat template {verifier['chat_template']}",
        "states": states,
    }


def _progress(folder: Path) -> str:
    """Return how far an unfinished store is."""
    try:
        plan = read_manifest(folder / TOKENS_FOLDER, "hidden_states")["shards"]
    except ValueError:
        return "the conversations are being tokenised; `fledge dump` goes on"
    there = sum((folder / shard_name(number)).is_file() for number in range(len(plan)))
    writers = len(list(folder.glob("writer-*")))
    return f"{there} of {len(plan)} shards are there, {writers} writers at work or stopped; `fledge dump` goes on"


def _statistics(store: HiddenStateStore) -> dict[str, str]:
    counts, settings, lengths = store.manifest["counts"], store.manifest["settings"], sorted(store.lengths)
    heldout = sum(is_heldout(name, settings["heldout_share"]) for name in store.ids)
    images = sum(map(bool, store.num_images))
    return {
        "size": f"{counts['bytes'] / 2**30:.3f} GiB in {len(store.entries)} shards, "
        f"{counts['bytes'] / counts['tokens'] / 1000:.3g} kB a token",
        "samples": f"{len(store)} of {counts['conversations']} conversations, {heldout} held out, {images} with images",
        "tokens": f"{counts['tokens']}, of which the verifier wrote {counts['counted_tokens']} "
        f"({counts['counted_tokens'] / counts['tokens']:.1%})",
        "length": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, "
        f"mean {statistics.fmean(lengths):.1f}, 95 % up to {lengths[int(0.95 * (len(lengths) - 1))]}",
        "left out": left_out(counts, settings["max_length"]),
    }


def _print_states(store: HiddenStateStore) -> tuple[list[str], int]:
    """Print the size of some samples' states, layer by layer; return those not finite, and the others' tokens."""
    layers = store.manifest["settings"]["aux_layers"]
    squares, largest = torch.zeros(len(layers) + 1, dtype=torch.float64), torch.zeros(len(layers) + 1)
    rows = torch.zeros(len(layers) + 1, dtype=torch.int64)
    wrong, read = list[str](), 0
    for index in sorted({number * len(store) // _SCANNED for number in range(_SCANNED)}):  # from all over the store
        sample = store[index]
        states = _by_layer(sample, len(layers))
        if not all(part.isfinite().all() for part in states):
            wrong.append(sample.id)
            continue
        read += len(sample.input_ids)
        for number, part in enumerate(states):
            squares[number] += part.double().square().mean(-1).sum()
            largest[number] = max(largest[number], part.abs().max()) if len(part) else largest[number]
            rows[number] += len(part)
    sizes = (squares / rows.clamp(min=1)).sqrt()
    for name, size, most in zip([*(f"layer {layer}" for layer in layers), "last state"], sizes, largest, strict=True):
        print(f"{name:<13} root mean square {size:.3g}, largest {most:.3g}")
    return wrong, read


def _by_layer(sample: Sample, num_layers: int) -> list[Tensor]:
    """Return the states of each aux layer and the last ones [T, H], in float32, without last ones that are not kept."""
    assert sample.aux_hidden_states is not None
    assert sample.last_hidden_state is not None
    aux = decode(sample.aux_hidden_states, sample.aux_scale, torch.float32).unflatten(-1, (num_layers, -1))
    last = decode(sample.last_hidden_state, sample.last_scale, torch.float32)
    return [*aux.unbind(1), last[last.abs().amax(-1) > 0] if last.isfinite().all() else last]


def _print_sample(verifier: VerifierConfig, name: str | None, store: HiddenStateStore) -> None:
    """Print a sample as text, what the verifier wrote marked; or that its tokenizer is not at hand."""
    if name is not None and name not in store.ids:
        raise ValueError(f"inspect.sample: {store.folder} holds no sample {name!r}: without it the first is shown")
    sample = store[store.ids.index(name) if name is not None else 0]
    if verifier.path == RECORDED:
        path, revision = store.manifest["verifier_path"], store.manifest.get("verifier_revision")
        verifier = VerifierConfig(path, revision, chat_template_kwargs=verifier.chat_template_kwargs)
    try:
        tokenizer, changes = _tokenizer(verifier, store.manifest["settings"]["verifier"])
    except ValueError as error:
        print(f"\nsample {printable(sample.id)} is not decoded: {error}")
        return
    if changes:
        print(f"the tokenizer of {verifier.path} is another than the store's ({'; '.join(changes)})")
    shown = slice(None if name is not None else _SHOWN_TOKENS)
    tokens = sample.input_ids[shown].tolist()
    rest = len(sample.input_ids) - len(tokens)
    print(f"\nsample {printable(sample.id)}, {len(sample.input_ids)} tokens\n")
    text = marked_text(tokenizer, Sequence(tokens, _runs(sample.loss_mask[shown])), terminal_mark())
    print(text + (f" ... and {rest} tokens (inspect.sample={sample.id} shows all)" if rest else ""))


def _tokenizer(verifier: VerifierConfig, recorded: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load a verifier's tokenizer, and tell how it differs from the recorded one."""
    with suppress(ValueError):  # the file alone, if that is the recorded one: AutoTokenizer takes seconds to import
        tokenizer = load_tokenizer(verifier, PreTrainedTokenizerFast)
        own = tokenizer_identity(tokenizer)
        if own.items() <= recorded.items():
            return tokenizer, []
    tokenizer = load_tokenizer(verifier)
    own = tokenizer_identity(tokenizer)
    return tokenizer, differences({name: recorded[name] for name in own}, own)


def _runs(loss_mask: Tensor) -> list[tuple[int, int]]:
    """Return the spans [start, end) in which a mask is 1."""
    edge = loss_mask.new_zeros(1)
    borders = torch.cat([edge, loss_mask, edge]).int().diff().nonzero().squeeze(1).tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))
