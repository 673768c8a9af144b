"""The doctor command: why a published head loses acceptance, told from its files."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..conf.schema import Config
from ..models.foreign_head import read_foreign_head, read_published
from ..models.import_head import source_folder
from ..models.verifier import VerifierWeights, load_config
from .doctor_rules import Finding, Published, engine_notes, static_findings


@dataclass
class Diagnosis:
    """What was found."""

    findings: list[Finding]
    notes: list[str]  # by engine


def doctor(config: Config) -> None:
    """Print what is wrong with the head at head_import.source; exit code 1 if something is."""
    diagnosis = diagnose(config)
    print(report(diagnosis))
    if diagnosis.findings:
        sys.exit(1)


def diagnose(config: Config) -> Diagnosis:
    """Hold the head's config.json and tensors against its verifier and the rules of the engines.

    Raises:
        ValueError: there is no head to read, or no verifier.
    """
    folder = source_folder(config)
    verifier = load_config(config.verifier)
    embedding = VerifierWeights(config.verifier).embedding()
    numbering = config.head_import.aux_numbering
    values, tensors = read_published(folder)
    published = Published(folder, values, tensors, verifier, embedding, numbering)
    findings = static_findings(published)
    if not findings:
        try:
            read_foreign_head(folder, verifier, numbering)
        except ValueError as error:
            cost = "engines fail to load it, or compute something else"
            findings = [Finding("unreadable", str(error), cost, "see the message")]
    return Diagnosis(findings, engine_notes(published))


def report(diagnosis: Diagnosis) -> str:
    """Write a diagnosis for the terminal."""
    lines = [f"Found in the files: {len(diagnosis.findings) or 'nothing'}"]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines += [f"  {number}. {finding.what}", f"     costs: {finding.cost}", f"     cure:  {finding.cure}"]
    return "\n".join([*lines, "", "Engines, with the head as it is:", *(f"  {note}" for note in diagnosis.notes)])
