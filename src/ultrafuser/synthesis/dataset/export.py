"""The data set: one file per domain, split and format, with a card, as a folder that is there whole or not at all.

Rows come one by one from the store and go to the disk in batches, so an export takes the same memory for any number of
records. `datasets.load_dataset(folder)` reads it by its card; `data.records.read_records` reads each of its files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from ultrafuser.errors import ConfigError, DataError
from ultrafuser.files import put_in_place, write_text_atomically
from ultrafuser.synthesis.dataset.card import write_card
from ultrafuser.synthesis.dataset.records import (
    Split,
    TopicSplit,
    as_messages,
    as_ultrachat,
    read_synthesis,
)
from ultrafuser.synthesis.dataset.summary import CARD, ExportSummary, Form
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store

FileFormat = Literal["jsonl", "parquet"]
FORMATS: tuple[FileFormat, ...] = ("jsonl", "parquet")
MARK = "export.json"  # a folder that has it is an export of ours and may be replaced
ROW_GROUP = 2000


def export(
    store: Store,
    recipe: SynthesisRecipe,
    folder: Path,
    *,
    formats: Sequence[str] = FORMATS,
    form: Form = "messages",
) -> ExportSummary:
    """Write the data set.

    Args:
        store: Of the synthesis.
        recipe: Its recipe.
        folder: Where to; an earlier export there is replaced when the new one is complete.
        formats: Of the files.
        form: Of a record: our messages with topics, lineage and origin, or UltraChat's own id and data.

    Raises:
        ConfigError: No format, or an unknown one.
        DataError: There is nothing to write, the folder holds something else, or the disk is full; then what was
            there is untouched.
    """
    if wrong := sorted(set(formats) - set(FORMATS)) or ([] if formats else ["none"]):
        raise ConfigError(f"formats of an export: {wrong[0]} is not one; choose from {', '.join(FORMATS)}")
    chosen = [file_format for file_format in FORMATS if file_format in formats]
    _check_target(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "data").mkdir(parents=True)
        summary = _write_all(store, recipe, partial, chosen, form)
        summary.folder = folder
        if not summary.num_records:
            raise DataError(f"synthesis {recipe.name} has no answer that was kept yet: nothing to export")
        write_card(partial / CARD, store, recipe, summary)
        mark = {"name": recipe.name, "records": summary.num_records, "files": summary.files, "ids": summary.checksum}
        write_text_atomically(json.dumps(mark, indent=1) + "\n", partial / MARK)
        put_in_place(partial, folder)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}. Free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: give a folder for the data set")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise DataError(f"{folder} holds something that is no export (no {MARK}): choose another folder or empty it")


def _write_all(
    store: Store, recipe: SynthesisRecipe, folder: Path, formats: Sequence[FileFormat], form: Form
) -> ExportSummary:
    summary = ExportSummary(folder, form)
    split = TopicSplit(store, recipe)
    for name, config in recipe.domains.items():
        settings = load_domain(name, config).settings
        summary.wanted[name], language = settings.records, settings.language
        if language not in summary.languages:
            summary.languages.append(language)
        with ExitStack() as stack:
            writers: dict[tuple[Split, FileFormat], _Writer] = {}
            for record in read_synthesis(store, name, language=language):
                side = split.side(record)
                row = as_messages(record, recipe) if form == "messages" else as_ultrachat(record)
                for file_format in formats:
                    if (side, file_format) not in writers:
                        path = folder / data_file(name, side, file_format)
                        writers[side, file_format] = stack.enter_context(_open(path, file_format, form))
                    writers[side, file_format].add(row)
                summary.add(record, side)
        for side, file_format in sorted(writers):
            summary.files[data_file(name, side, file_format)] = summary.splits[name, side]
    return summary


def data_file(domain: str, split: Split, file_format: FileFormat) -> str:
    """Where a domain's records of a split lie in the folder."""
    return f"data/{domain}-{split}.{file_format}"


class _Writer(Protocol):
    """A file to which rows are added."""

    def add(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="\n")

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, form: Form) -> None:
        import pyarrow.parquet as parquet

        self._schema = _schema(form)
        self._writer: Any = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


@contextmanager
def _open(path: Path, file_format: FileFormat, form: Form) -> Iterator[_Writer]:
    writer: _Writer = _JsonLines(path) if file_format == "jsonl" else _Parquet(path, form)
    try:
        yield writer
    finally:
        writer.close()


def _schema(form: Form) -> Any:
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    if form == "ultrachat":
        return pa.schema([("id", text), ("data", texts)])
    message = pa.struct([("role", text), ("content", text)])
    plain = ("domain", "meta_topic", "sub_topic", "fine_topic", "relation")
    origin = ("model", "endpoint", "instruction_model", "licence", "language")
    return pa.schema(
        [
            ("id", text),
            ("messages", pa.list_(message)),
            *((name, text) for name in plain),
            ("lineage", texts),
            *((name, text) for name in origin),
        ]
    )
