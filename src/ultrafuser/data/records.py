"""Records: conversations read from files, each with a name, a domain and the place it came from.

A record that cannot be used is an error with file and line, or is counted in a `Problems` the caller reports.
A damaged file always raises: leaving it out would not be a decision about records.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, cast

from ultrafuser.chat.messages import Conversation
from ultrafuser.data.files import Entry, read_entries
from ultrafuser.data.formats import ProblemKind, RecordError, check_format, to_conversation
from ultrafuser.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation to learn from.

    Attributes:
        id: Hash of the messages alone, so equal conversations have one id in every file and domain.
        source: "path:line" or "path[index]".
    """

    id: str
    messages: Conversation
    domain: str
    source: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one record cannot be used; the message opens with its source."""

    kind: ProblemKind
    message: str


@dataclass(slots=True)
class Problems:
    """What was skipped: every problem counted by kind, the first ones of each kind kept."""

    max_examples: int = 3
    counts: Counter[ProblemKind] = field(default_factory=Counter)
    examples: list[Problem] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Records skipped."""
        return self.counts.total()

    def add(self, problem: Problem) -> None:
        """Count a problem; keep it while its kind has fewer than `max_examples`."""
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= self.max_examples:
            self.examples.append(problem)

    def summary(self) -> str:
        """The counts in one line, most frequent first, such as "4 no response, 1 malformed"."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common()) or "none"


def content_id(messages: Conversation) -> str:
    """Name a conversation by its content: blake2b (16 bytes, in hex) of its canonical JSON."""
    canonical = json.dumps([message.to_dict() for message in messages], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def read_records(
    path: str | Path,
    *,
    domain: str | None = None,
    domain_field: str | None = None,
    file_format: str = "auto",
    limit: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    problems: Problems | None = None,
) -> Iterator[Record]:
    """Read the records of a file, a folder or a hub data set, in order.

    Args:
        path: JSON lines, a JSON array, Parquet, CSV, or AQuA-CoT's TSV (text may end in .gz); a folder of such files,
            read in sorted order; or "hub:owner/name", optionally ":config", "@revision" and "#split" after it.
        domain: The domain of every record; or else
        domain_field: the field of each raw record that names its domain.
        file_format: The format of the raw records: a name in `formats.FORMATS`, or "auto" to recognise each.
        limit: Stop after this many records; what follows is not looked at.
        on_error: "raise" at the first record that cannot be used, or "skip" it and note it in `problems`.
        problems: Takes what is skipped; needed with "skip", so that nothing is left out unseen.

    Raises:
        ConfigError: The options do not fit together; at once, before anything is read.
        DataError: The path is missing (at once), a file is empty or damaged, or no record of it can be used.
        RecordError: A record cannot be used and `on_error` is "raise"; says where.
    """
    if (domain is None) == (domain_field is None) or not (domain or domain_field):
        raise ConfigError(f"{path}: name its domain, or the field that holds it: exactly one, and not empty")
    if on_error == "skip" and problems is None:
        raise ConfigError("on_error='skip' needs problems=Problems(), so that what is skipped can be reported")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}: leave it out to read everything")
    check_format(file_format)

    def to_record(entry: Entry) -> Record:
        source, value = entry
        try:
            if isinstance(value, RecordError):
                raise value
            messages = to_conversation(value, file_format=file_format)
            name = domain or _domain_in(value, cast(str, domain_field))
            return Record(content_id(messages), messages, name, source)
        except RecordError as error:
            raise RecordError(error.kind, f"{source}: {error}") from error

    records = _usable(path, read_entries(path), to_record, problems if on_error == "skip" else None)
    return islice(records, limit)


def _usable(
    path: str | Path, entries: Iterator[Entry], to_record: Callable[[Entry], Record], problems: Problems | None
) -> Iterator[Record]:
    num_records, skipped = 0, Problems()
    for entry in entries:
        try:
            record = to_record(entry)
        except RecordError as error:
            if problems is None:
                raise
            for noted in (problems, skipped):
                noted.add(Problem(error.kind, str(error)))
        else:
            num_records += 1
            yield record
    if not num_records:
        first = skipped.examples[0].message
        raise DataError(f"{path}: nothing to train on: every record was skipped ({skipped.summary()}). First: {first}")


def _domain_in(raw: object, domain_field: str) -> str:
    name = cast(dict[str, object], raw).get(domain_field)
    if not isinstance(name, str) or not name.strip():
        raise RecordError("no domain", f"field {domain_field!r} must name the domain, but is {name!r:.80}")
    return name.strip()
