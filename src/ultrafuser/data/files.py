"""Data files: the raw objects of JSON, CSV, TSV and Parquet files, folders and hub data sets, each with its place.

An unreadable line is handed on as a `RecordError`, so the reader decides whether to stop; a damaged file raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ultrafuser.data.formats import RecordError
from ultrafuser.errors import ConfigError, DataError

AQUA_COT_COLUMNS = ("question", "answer", "rationale")
HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"hub:(?P<name>[^@#:]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")

Entry = tuple[str, object]  # where, and what stands there: a raw record, or the RecordError met in reading it


def read_objects(path: Path) -> Iterator[object]:
    """The raw objects of one data file.

    Raises:
        DataError: The file is missing, empty or damaged, or has an unreadable line; says which.
    """
    for source, value in read_entries(path):
        if isinstance(value, RecordError):
            raise RecordError(value.kind, f"{source}: {value}")
        yield value


def read_entries(path: str | Path) -> Iterator[Entry]:
    """What stands in a file, in the files of a folder, or in a hub data set, each with the place it came from.

    Raises:
        ConfigError: A hub id that is none.
        DataError: The path is missing (at once), or a file is empty or damaged.
    """
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
