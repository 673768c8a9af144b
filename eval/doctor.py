"""The doctor command: why a published head loses acceptance, from its files and from a short measurement."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from ..conf.schema import Config
from ..models.foreign_head import read_published
from ..models.import_head import source_folder
from ..models.verifier import VerifierWeights, load_config
from .doctor_measure import STEPS, Measured, Variant, measure, readable_head, variants
from .doctor_rules import Finding, Published, engine_notes, static_findings

MARGIN = 0.02  # by which another variant must be longer to be believed


@dataclass
class Diagnosis:
    """What was found."""

    findings: list[Finding]
    notes: list[str]  # by engine
    measured: list[Measured] = field(default_factory=list)  # the head as configured first; empty: not readable

    @property
    def trained_for(self) -> Variant | None:
        """The variant for which the weights were trained, None where nothing could be measured."""
        if not self.measured:
            return None
        configured, best = self.measured[0], max(self.measured, key=lambda measured: measured.length)
        return best.variant if best.better_than(configured, MARGIN) else configured.variant

    @property
    def healthy(self) -> bool:
        """Whether nothing was found, and no other variant is better."""
        return not self.findings and bool(self.measured) and self.trained_for is self.measured[0].variant


def doctor(config: Config) -> None:
    """Print what is wrong with the head at head_import.source; exit code 1 if something is."""
    diagnosis = diagnose(config)
    print(report(diagnosis))
    if not diagnosis.healthy:
        sys.exit(1)


def diagnose(config: Config) -> Diagnosis:
    """Examine the head's files, and measure the head if it can be put together.

    Raises:
        ValueError: there is no head to read, or no verifier.
    """
    folder = source_folder(config)
    verifier = load_config(config.verifier)
    weights = VerifierWeights(config.verifier)
    embedding = weights.embedding()
    values, tensors = read_published(folder)
    published = Published(folder, values, tensors, verifier, embedding, config.head_import.aux_numbering)
    diagnosis = Diagnosis(static_findings(published), engine_notes(published))
    try:
        head = readable_head(published, weights.lm_head())
    except ValueError as error:
        cost = "engines fail to load it, or compute something else; it could not be measured"
        cure = "see the message; the other findings first"
        diagnosis.findings.append(Finding("unreadable", str(error), cost, cure))
        return diagnosis
    diagnosis.measured = measure(config, head, variants(head.config, published), embedding)
    return diagnosis


def report(diagnosis: Diagnosis) -> str:
    """Write a diagnosis for the terminal."""
    lines = [f"Found in the files: {len(diagnosis.findings) or 'nothing'}"]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines += [f"  {number}. {finding.what}", f"     costs: {finding.cost}", f"     cure:  {finding.cure}"]
    lines += ["", "Engines, with the head as it is:", *(f"  {note}" for note in diagnosis.notes)]
    best = diagnosis.trained_for
    if best is None:
        return "\n".join([*lines, "", "Not measured: the head could not be put together."])
    configured = diagnosis.measured[0]
    lines += [
        "",
        f"Measured on {len(configured.hits)} rows of the verifier's own greedy answers, teacher-forced; what leaves no "
        "choice was corrected first:",
        f"  {'variant':<28} {'first position':>14} {f'length, {STEPS} steps':>16}",
    ]
    lines += [f"  {m.variant.name:<28} {m.first:>14.3f} {m.length:>16.3f}" for m in diagnosis.measured]
    if best is configured.variant:
        verdict = f"The weights were trained for: {best.name} (nothing is better by more than {MARGIN} and chance)."
    else:
        verdict = f"The weights were trained for: {best.name}. Cure: write {best.cure}; then run doctor again."
    return "\n".join([*lines, "", verdict])
