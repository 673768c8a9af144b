"""The doctor command: why a published head loses acceptance, by its files and by measurement."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...conf.runtime.artifact import differences
from ...conf.schema import Config, HeadImportConfig, VerifierConfig
from ...models.formats.fields import AUX_IDS, EAGLE, LAYER, vllm_layer_ids
from ...models.formats.plain import LM_HEAD, RECORD, longest_sample, other_dtypes
from ...models.formats.published import assemble_head, read_files
from ...models.formats.published_config import HeadFiles
from ...models.formats.serving_notes import in_longer_contexts
from ...models.head.draft_head import DraftHead
from ...models.import_head import source_folder
from ...models.verifier.config import load_config
from ...models.verifier.weights import VerifierWeights, verifier_identity
from .findings import Finding
from .measure import FAR, STEPS, Measured, Verdict, measure, variants
from .rules import KNOWN_TENSORS, PAIRS, absolute_ids, engine_notes, static_findings


@dataclass
class Diagnosis:
    """What was found."""

    findings: list[Finding]
    notes: list[str]  # by engine
    verdict: Verdict | None = None  # None if nothing was measured
    unmeasured: str = ""  # why, if it was to be measured
    in_longer_contexts: str = ""  # than those of its training, if they are known
    names_layers: bool = True  # whether it is known on which layers the head was trained


def doctor(config: Config) -> None:
    """Print what is wrong with the head at head_import.source.

    Exit code 1 if something is, 2 if nothing was found but the head could not be measured.
    """
    diagnosis = diagnose(config)
    print(report(diagnosis))
    if diagnosis.findings or diagnosis.unmeasured:
        sys.exit(1 if diagnosis.findings else 2)


def diagnose(config: Config) -> Diagnosis:
    """Hold the head against its verifier and the rules of the engines, and measure what its weights were trained for.

    ValueError: there is no head to read, or no verifier.
    """
    folder, weights = source_folder(config.head_import), VerifierWeights(config.verifier)
    embedding = weights.embedding()
    files = read_files(folder, load_config(config.verifier), config.head_import, weights)
    diagnosis = Diagnosis(static_findings(files), engine_notes(files), names_layers=files.names_layers)
    diagnosis.findings += _other_verifier(folder, config.verifier)
    if other_dtypes(files.tensors):
        return diagnosis
    try:
        head = readable_head(files)
    except ValueError as error:
        cost = "engines fail to load it, or compute something else; it cannot be measured"
        diagnosis.findings.append(Finding("unreadable", str(error), cost, "see the message; the other findings first"))
        return diagnosis
    if longest := longest_sample(folder):
        diagnosis.in_longer_contexts = in_longer_contexts(longest, bool(head.config.sliding_window))
    if config.doctor.measure:
        try:
            verdict = measure(config, head, variants(files, head.config), embedding)
        except ValueError as error:
            diagnosis.unmeasured = str(error)
            return diagnosis
        diagnosis.verdict = verdict
        diagnosis.findings = [f for f in diagnosis.findings if not (f.suspects and verdict.settles(f.suspects))]
        diagnosis.notes = engine_notes(files, verdict.aux_layers if files.names_layers else None)
        if verdict.otherwise:
            diagnosis.findings.append(_misconfigured(verdict))
    return diagnosis


def _other_verifier(folder: Path, verifier: VerifierConfig) -> list[Finding]:
    """Return a finding if fledge made the head, for a verifier of other weights or another tokenizer."""
    with suppress(OSError, ValueError, KeyError):  # not fledge's
        recorded = json.loads((folder / RECORD).read_text())["verifier"]
        if changes := differences(recorded, verifier_identity(verifier)):
            what = f"it was made for another verifier than verifier.path={verifier.path} ({'; '.join(changes)})"
            cost = "the further they differ, the less is accepted; what is measured below is with this verifier"
            return [Finding("other_verifier", what, cost, f"`fledge adapt adapt.head={folder}`, or set that verifier")]
    return []


def _misconfigured(verdict: Verdict) -> Finding:
    configured, found = verdict.configured, verdict.candidates
    one_of = "one of " if len(found) > 1 else ""
    write = "" if PAIRS in found[0].variant.changes else f"write {one_of}"
    return Finding(
        "trained_otherwise",
        f"the weights were trained for another form than config.json says: {one_of}{_names(found)}",
        f"{configured.length:.2f} tokens in {STEPS} steps as configured, {found[0].length:.2f} in that form (below)",
        f"{write}{' | '.join(one.variant.cure for one in found)}; then run doctor again",
    )


def report(diagnosis: Diagnosis) -> str:
    """Write a diagnosis for the terminal."""
    lines = [f"Found: {len(diagnosis.findings) or 'nothing'}"]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines += [f"  {number}. {finding.what}", f"     costs: {finding.cost}", f"     cure:  {finding.cure}"]
    lines += ["", "Engines, with the head as it is:", *(f"  {note}" for note in diagnosis.notes), ""]
    lines += [diagnosis.in_longer_contexts, ""] if diagnosis.in_longer_contexts else []
    if diagnosis.verdict is not None:
        lines += _measured(diagnosis.verdict, diagnosis.names_layers)
    else:
        lines.append(f"Not measured: {diagnosis.unmeasured}" if diagnosis.unmeasured else "Not measured.")
    return "\n".join(lines)


def _measured(verdict: Verdict, names_layers: bool) -> list[str]:
    texts, forms = verdict.configured.nats, verdict.measured
    width = max(len(form.variant.name) for form in forms)
    return [
        f"Measured on {sum(map(len, texts))} rows of {len(texts)} greedy answers of the verifier, teacher-forced; what "
        "leaves no choice was corrected first:",
        f"  {'form':<{width}}  first position  tokens in {STEPS} steps  KL, nats a row",
        *(f"  {m.variant.name:<{width}}  {m.first:>14.3f}  {m.length:>17.3f}  {m.loss:>14.3f}" for m in forms),
        _conclusion(verdict, names_layers),
    ]


def _conclusion(verdict: Verdict, names_layers: bool) -> str:
    found, far = _names(verdict.candidates), ""
    if verdict.best_first < FAR:
        far = (
            f" It is far from the verifier in every form tried (first position {verdict.best_first:.2f} at "
            f"best, {FAR} and more is usual): it is weak, or was trained in another form or for another verifier."
        )
    if not names_layers:
        layers = list(verdict.configured.variant.config.aux_layers)
        return (
            f"The layers are unknown: only {layers}, which engines take unasked, one up and one down were tried; the "
            f"nearest of these: {found}.{far}"
        )
    if verdict.otherwise:
        return f"The weights were trained for: {found}.{far}"
    if not verdict.as_configured:
        return f"Nearer to the verifier than as configured, but accepting no more on these texts: {found}.{far}"
    others = verdict.alike[1:]
    if far:
        return f"Of the forms tried, the head as configured is {'among ' if others else ''}the nearest.{far}"
    if others:
        return f"Nothing speaks against the head as configured; these texts do not tell it from: {_names(others)}."
    return "The weights were trained for: as configured."


def _names(measured: list[Measured]) -> str:
    more = f"; and {len(measured) - 4} more" if len(measured) > 4 else ""
    return "; ".join(one.variant.name for one in measured[:4]) + more


def readable_head(files: HeadFiles) -> DraftHead:
    """Return the head with everything corrected whose cure leaves no choice; ValueError: more is wrong."""
    tensors = _corrected_tensors(files)
    values = _corrected_config(files, tensors)
    options = HeadImportConfig(interleaved_rotary=files.options.interleaved_rotary)  # the layers are in the values now
    return assemble_head(replace(files, values=values, tensors=tensors, options=options)).head


def _corrected_tensors(files: HeadFiles) -> dict[str, Tensor]:
    prefix, vocab_size = files.prefix or "model.", files.verifier.vocab_size
    bare = {name.removeprefix(prefix): tensor for name, tensor in files.tensors.items()}
    tensors = {name: tensor for name, tensor in bare.items() if KNOWN_TENSORS.fullmatch(name)}
    if "d2t" not in tensors and "t2d" in tensors:
        inside = tensors["t2d"].bool().nonzero().flatten()
        tensors["d2t"] = inside - torch.arange(len(inside))
    if "d2t" in tensors:
        if absolute_ids(tensors, vocab_size):
            tensors["d2t"] = tensors["d2t"].long() - torch.arange(len(tensors["d2t"]))
        tensors.pop("t2d", None)  # it follows from d2t
        if len(tensors["d2t"]) == vocab_size:
            del tensors["d2t"]
    if LM_HEAD not in tensors and files.weights:  # then trained on the verifier's, or lost
        d2t = tensors.get("d2t")
        ids = torch.arange(vocab_size) if d2t is None else torch.arange(len(d2t)) + d2t
        if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            tensors[LM_HEAD] = files.weights.lm_head()[ids]
    return tensors


def _corrected_config(files: HeadFiles, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers, num_layers = files.aux_layers(), files.verifier.num_hidden_layers
    if not layers or not all(isinstance(k, int) and 0 <= k < num_layers for k in layers):
        layers = files.default_layers()
    layer = {name: value for name, value in files.layer.items() if name not in ("quantization_config", AUX_IDS)}
    layer["num_hidden_layers"] = replace(files, tensors=tensors).layer_counts[1]
    if (rope := layer.get("rope_parameters")) and "rope_theta" in rope:
        layer["rope_theta"] = rope["rope_theta"]
    if files.speculators:
        values = {**files.values, LAYER: layer, AUX_IDS: vllm_layer_ids(layers)}
        values.pop(EAGLE, None)
    else:
        values = {**layer, EAGLE: {**(files.values.get(EAGLE) or {}), AUX_IDS: layers}}
    values.pop("quantization_config", None)
    values["draft_vocab_size"] = len(tensors[LM_HEAD]) if LM_HEAD in tensors else None
    values["fc_norm"] = any(name.startswith("fc_norm.") for name in tensors)
    values["norm_before_fc"] = "input_norm.weight" in tensors
    (values.get(EAGLE) or {}).pop("norm_before_fc", None)
    (values[LAYER] if files.speculators else values)["attention_bias"] = any(n.endswith(".bias") for n in tensors)
    return values
