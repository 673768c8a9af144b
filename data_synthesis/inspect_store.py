"""The inspect command: what a hidden-state store holds, of which verifier, and whether it is sound."""

import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..conf.runtime.artifact import differences, read_manifest
from ..conf.runtime.progress import Progress
from ..conf.schema import Config, VerifierConfig
from ..models.verifier.config import load_tokenizer, tokenizer_identity
from .show import marked_text, printable, terminal_mark
from .store.index import TOKENS_FOLDER, StoreIndex, left_out, spread
from .store.mapped_shard import AUX_STATES, LAST_STATES, TOKENS, MappedShard, rows_of, shard_name
from .tokens.chat_template import Sequence

RECORDED = "recorded"  # verifier.path of this command, unless another is given: the store's own
_SCANNED = 64  # samples whose states are measured
_SHOWN_TOKENS = 400
_BITS = np.arange(128)  # of float8_e4m3fn without its sign: 4 of the exponent and 3 of the fraction, the last is NaN
_POSITIVE = np.ldexp((_BITS % 8) + 8.0 * (_BITS >= 8), np.maximum(_BITS // 8, 1) - 10)
_POSITIVE[-1] = np.nan
_FLOAT8 = np.concatenate([_POSITIVE, -_POSITIVE]).astype(np.float32)


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
    store = StoreIndex(folder, with_states=manifest["settings"].get("states", True))
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


def _verify(index: StoreIndex) -> list[str]:
    """Compare all checksums; return the samples whose states are not finite."""
    from .store.store import HiddenStateStore  # imports torch, which takes longer than what is shown without

    store = HiddenStateStore(index.folder, index.with_states)
    wrong = list[str]()
    with Progress("checksums", len(store.entries), "shard") as progress:
        for number in range(len(store.entries)):
            store.verify(number, len(store.entries))
            wrong += store.not_finite(number) if store.with_states else []
            progress.update()
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
    adapter = f" with {name}" if (name := manifest.get("verifier_adapter")) else ""
    return {
        "store": str(folder),
        "verifier": f"{manifest.get('verifier_path')}{adapter}: {verifier['num_layers']} layers, width "
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


def _statistics(store: StoreIndex) -> dict[str, str]:
    counts, settings, lengths = store.manifest["counts"], store.manifest["settings"], sorted(store.lengths)
    images = sum(map(bool, store.num_images))
    return {
        "size": f"{counts['bytes'] / 2**30:.3f} GiB in {len(store.entries)} shards, "
        f"{counts['bytes'] / counts['tokens'] / 1000:.3g} kB a token",
        "samples": f"{len(store)} of {counts['conversations']} conversations, {len(store.heldout_ids)} held out, "
        f"{images} with images",
        "tokens": f"{counts['tokens']}, of which the verifier wrote {counts['counted_tokens']} "
        f"({counts['counted_tokens'] / counts['tokens']:.1%})",
        "length": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, "
        f"mean {statistics.fmean(lengths):.1f}, 95 % up to {lengths[int(0.95 * (len(lengths) - 1))]}",
        "left out": left_out(counts, settings["max_length"]),
    }


def _print_states(store: StoreIndex) -> tuple[list[str], int]:
    """Print the size of some samples' states, layer by layer; return those not finite, and the others' tokens."""
    layers = store.manifest["settings"]["aux_layers"]
    squares, largest, rows = np.zeros((3, len(layers) + 1))
    wrong, read = list[str](), 0
    for index in spread(len(store), _SCANNED):
        shard, number, _ = store.place(index)
        states = _by_layer(shard, number, len(layers))
        if not all(np.isfinite(part).all() for part in states):
            wrong.append(store.ids[index])
            continue
        read += store.lengths[index]
        squares += [np.square(part, dtype=np.float64).mean(-1).sum() for part in states]
        largest = np.maximum(largest, [np.abs(part).max(initial=0) for part in states])
        rows += [len(part) for part in states]
    sizes = np.sqrt(squares / rows.clip(min=1))
    for name, size, most in zip([*(f"layer {layer}" for layer in layers), "last state"], sizes, largest, strict=True):
        print(f"{name:<13} root mean square {size:.3g}, largest {most:.3g}")
    return wrong, read


def _by_layer(shard: MappedShard, number: int, num_layers: int) -> list[np.ndarray]:
    """Return a sample's states of each aux layer and the last ones that are kept [T, H], in float32."""
    aux = np.split(_decoded(shard, *AUX_STATES, number), num_layers, axis=-1)
    last = _decoded(shard, *LAST_STATES, number)
    return [*aux, last[np.abs(last).max(-1) > 0] if np.isfinite(last).all() else last]


def _decoded(shard: MappedShard, name: str, scale: str, number: int) -> np.ndarray:
    """Return states as `state_format.decode` does, without torch: as float32."""
    rows = slice(*rows_of(shard.arrays, name, number))
    values = shard.arrays[name][rows]
    if values.dtype == np.int16:  # bfloat16
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if scale not in shard.arrays:
        return values.astype(np.float32)
    scales = shard.arrays[scale][rows]
    return _FLOAT8[values] * scales.repeat(values.shape[1] // scales.shape[1], axis=1)


def _print_sample(verifier: VerifierConfig, name: str | None, store: StoreIndex) -> None:
    """Print a sample as text, what the verifier wrote marked; or that its tokenizer is not at hand."""
    if name is not None and name not in store.ids:
        raise ValueError(f"inspect.sample: {store.folder} holds no sample {name!r}: without it the first is shown")
    index = store.ids.index(name) if name is not None else 0
    shown, (shard, _, place) = printable(store.ids[index]), store.place(index)
    token_ids, loss_mask = (shard.arrays[kind][place] for kind in TOKENS)
    if verifier.path == RECORDED:
        path, revision = store.manifest["verifier_path"], store.manifest.get("verifier_revision")
        verifier = VerifierConfig(path, revision, chat_template_kwargs=verifier.chat_template_kwargs)
    try:
        tokenizer, changes = _tokenizer(verifier, store.manifest["settings"]["verifier"])
    except ValueError as error:
        print(f"\nsample {shown} is not decoded: {error}")
        return
    if changes:
        print(f"the tokenizer of {verifier.path} is another than the store's ({'; '.join(changes)})")
    end = len(token_ids) if name is not None else _SHOWN_TOKENS
    print(f"\nsample {shown}, {len(token_ids)} tokens\n")
    sequence = Sequence(token_ids[:end].tolist(), _runs(loss_mask[:end]))
    rest = len(token_ids[end:])
    more = f" ... and {rest} tokens (inspect.sample={store.ids[index]} shows all)" if rest else ""
    print(marked_text(tokenizer, sequence, terminal_mark()) + more)


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


def _runs(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the spans [start, end) in which a mask is 1."""
    borders = np.flatnonzero(np.diff(loss_mask.astype(int), prepend=0, append=0)).tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))
