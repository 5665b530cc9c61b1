"""Records: conversations read from files, each with a name, a domain and the place it came from.

A record that cannot be used is an error with file and line, or is counted in a `Problems` the caller reports.
A damaged file always raises: leaving it out would not be a decision about records.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, cast

from ultrafuser.chat.messages import Conversation
from ultrafuser.data.formats import ProblemKind, RecordError, check_format, to_conversation
from ultrafuser.errors import ConfigError, DataError

AQUA_COT_COLUMNS = ("question", "answer", "rationale")
HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"hub:(?P<name>[^@#:]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")

Entry = tuple[str, object]  # where, and what stands there: a raw record, or the RecordError met in reading it


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

    records = _usable(path, _entries(path), to_record, problems if on_error == "skip" else None)
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


def read_objects(path: Path) -> Iterator[object]:
    """The raw objects of one data file.

    Raises:
        DataError: The file is missing, empty or damaged, or has an unreadable line; says which.
    """
    for source, value in _entries(path):
        if isinstance(value, RecordError):
            raise RecordError(value.kind, f"{source}: {value}")
        yield value


def _entries(path: str | Path) -> Iterator[Entry]:
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        if (match := HUB_ID.fullmatch(path)) is None:
            raise ConfigError(f"{path!r} is no hub data set: write hub:owner/name[:config][@revision][#split]")
        return _not_empty(path, _hub_entries(match))
    path, known = Path(path), ", ".join(READERS)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    files = sorted(child for child in path.iterdir() if _is_data(child)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} is a folder without data files; known endings: {known}")
    if _suffix(files[0]) not in READERS:
        raise DataError(f"{path} has no known ending; known: {known}")
    return (entry for file in files for entry in _not_empty(file, READERS[_suffix(file)](file)))


def _not_empty(name: str | Path, entries: Iterator[Entry]) -> Iterator[Entry]:
    empty = True
    for entry in entries:
        empty = False
        yield entry
    if empty:
        raise DataError(f"{name} is empty: it holds no record")


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and _suffix(path) in READERS


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path) -> str:
    with _open(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecordError("unreadable", f"{path}:{line}: not UTF-8 ({error.reason})") from error


def _lines(path: Path, parse: Callable[[str], object]) -> Iterator[Entry]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = parse(line.decode("utf-8-sig").rstrip("\r\n"))
            except json.JSONDecodeError as error:
                value = RecordError("unreadable", f"not JSON: {error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                value = RecordError("unreadable", f"not UTF-8: {error.reason} at byte {error.start + 1}")
            except RecordError as error:
                value = error
            yield f"{path}:{number}", value


def _json_lines(path: Path) -> Iterator[Entry]:
    return _lines(path, json.loads)


def _json_array(path: Path) -> Iterator[Entry]:
    text = _read_text(path)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):  # JSON lines are often published under the name .json
            yield from _json_lines(path)
            return
        raise RecordError("unreadable", f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    for index, value in enumerate(content if isinstance(content, list) else [content]):
        yield f"{path}[{index}]", value


def _tsv(path: Path) -> Iterator[Entry]:
    return _lines(path, _aqua_cot_row)


def _aqua_cot_row(line: str) -> dict[str, str]:
    cells = [cell.replace("\\n", "\n") for cell in line.split("\t")]
    if len(cells) != len(AQUA_COT_COLUMNS):
        wanted = f"{len(AQUA_COT_COLUMNS)} ({', '.join(AQUA_COT_COLUMNS)})"
        raise RecordError("unreadable", f"{len(cells)} columns between tabs where {wanted} are due")
    return dict(zip(AQUA_COT_COLUMNS, cells, strict=True))


def _csv(path: Path) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        for row in rows:
            source = f"{path}:{rows.line_num}"
            yield source, RecordError("unreadable", "more cells than the header has") if None in row else row
    except csv.Error as error:
        raise RecordError("unreadable", f"{path}:{rows.line_num + 1}: not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'ultrafuser[data]'") from error
    try:
        rows = (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"{path}[{index}]", row
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error


def _hub_entries(hub_id: re.Match[str]) -> Iterator[Entry]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{hub_id[0]}: hub data sets need datasets: pip install 'ultrafuser[data]'") from error
    name, config, revision, split = hub_id.group("name", "config", "revision", "split")
    try:
        rows = load_dataset(name, config, revision=revision, split=split or "train", streaming=True)
        for index, row in enumerate(rows):
            yield f"{hub_id[0]}[{index}]", row
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{hub_id[0]} cannot be read: {reason} (offline? fetch its files and give their path)"
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
    ".tsv": _tsv,
    ".csv": _csv,
}
