"""What doctor finds in a head's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, why it costs acceptance, and what to do about it."""

    code: str
    what: str
    cost: str
    cure: str
    suspects: str = ""  # AUX, ...: only a suspicion, which a measurement can settle


def findings_of(*rows: tuple[Any, ...]) -> Iterator[Finding]:
    """Return the findings of a table: of each row whose first entry is true, the others."""
    return (Finding(*row) for applies, *row in rows if applies)
