"""What an export has written, counted as it is written: what its card and the terminal tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ultrafuser.synthesis.dataset.records import Split, SynthesisRecord
from ultrafuser.synthesis.node import content_key

Form = Literal["messages", "ultrachat"]
CARD = "README.md"


@dataclass
class ExportSummary:
    """What was written.

    Attributes:
        files: Number of records by file name, in the order written.
        relations: Records by (domain, relation of the instruction).
        origins: Records by (endpoint, model of the answer).
        instruction_origins: The same by the model of the instruction.
        wanted: Records that each domain is to have when it is complete.
        languages: In order of appearance.
        checksum: Over the ids of all records in order: equal exports have equal ones.
    """

    folder: Path
    form: Form
    files: dict[str, int] = field(default_factory=dict)
    splits: Counter[tuple[str, Split]] = field(default_factory=Counter)
    relations: Counter[tuple[str, str]] = field(default_factory=Counter)
    origins: Counter[tuple[str, str]] = field(default_factory=Counter)
    instruction_origins: Counter[tuple[str, str]] = field(default_factory=Counter)
    wanted: dict[str, int] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    checksum: str = ""

    @property
    def num_records(self) -> int:
        """Of all domains."""
        return self.splits.total()

    def add(self, record: SynthesisRecord, split: Split) -> None:
        """Count a record."""
        self.splits[record.domain, split] += 1
        self.relations[record.domain, record.relation] += 1
        self.origins[record.response.endpoint, record.response.model] += 1
        self.instruction_origins[record.instruction.endpoint, record.instruction.model] += 1
        self.checksum = content_key(self.checksum, record.id)

    def text(self) -> str:
        """In a few lines."""
        lines = [f"{number:>9,}  {self.folder / name}" for name, number in self.files.items()]
        return "\n".join([*lines, f"{self.num_records:>9,}  records in all; the card: {self.folder / CARD}"])
