"""The folder of hidden states: which file belongs to which weights and records, and how much may lie there.

A file is named by a hash of all that decides its content, so one of other weights, another template or another
tokenizer is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn
from ultrafuser.errors import TrainingError
from ultrafuser.train.hidden.file import HiddenFile
from ultrafuser.train.hidden.plan import GB, Plan, Window

logger = logging.getLogger(__name__)

IDENTITY = ("weights", "dtype", "precision", "template", "tokenizer")  # of a specialist; what notices speak of


class HiddenStore:
    """Hidden states of one stage 1 in a folder that other runs may share.

    Args:
        folder: Made if need be.
        budget_bytes: The most that may lie there.
        identities: What decides a specialist's hidden states but for the records, by name: `IDENTITY` as texts.
    """

    def __init__(self, folder: Path, *, budget_bytes: float, identities: Mapping[str, Mapping[str, str]]) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        self.identities = identities
        self._keys: dict[tuple[str, str], str] = {}
        self._orders: dict[tuple[str, str], list[str]] = {}

    def path(self, name: str, window: Window) -> Path:
        """The file of a specialist's hidden states over a window."""
        return self.folder / f"{name}-{window.label}-{self._key(name, window)[:20]}.safetensors"

    def metadata(self, name: str, window: Window) -> dict[str, str]:
        """What the header of that file says it is of."""
        return {**self.identities[name], "key": self._key(name, window)}

    def is_complete(self, name: str, window: Window) -> bool:
        """Whether the file is there and whole; a damaged one is deleted with a notice."""
        path = self.path(name, window)
        if not path.exists():
            return False
        try:
            file = HiddenFile(path)
        except TrainingError as error:
            logger.warning("%s: made anew", error)
            path.unlink(missing_ok=True)
            return False
        file.close()
        return file.metadata.get("key") == self._key(name, window) and file.num_rows == window.num_tokens

    def missing(self, windows: Iterable[Window]) -> dict[str, list[Window]]:
        """The windows whose file is not there, by specialist."""
        windows = list(windows)
        return {name: [w for w in windows if not self.is_complete(name, w)] for name in self.identities}

    def notice_others(self, missing: Mapping[str, Sequence[Window]]) -> None:
        """Say where hidden states of the same name are of something else, and of what."""
        for name, windows in missing.items():
            for window in windows[:1]:
                for path in sorted(self.folder.glob(f"{name}-{window.label}-*.safetensors")):
                    with suppress(TrainingError):
                        file = HiddenFile(path)
                        file.close()
                        mine = self.identities[name]
                        other = [key for key in IDENTITY if file.metadata.get(key) != mine[key]]
                        logger.warning(
                            "the hidden states of %s in %s are of other %s (%s): not used, they are made anew",
                            name,
                            path.name,
                            " and ".join(other) if other else "records",
                            ", ".join(f"{k} {file.metadata.get(k, 'none')[:12]}, not {mine[k][:12]}" for k in other)
                            or "other data, seed or batch",
                        )

    def make_room(self, window_bytes: int, plan: Plan, keep: Iterable[Path]) -> None:
        """Delete files until `window_bytes` more fit the budget: of earlier steps first, then of other runs.

        Raises:
            TrainingError: The disk itself has no such room.
        """
        keep = set(keep)
        self._sweep_partials()
        mine = [self.path(name, window) for window in plan.windows for name in self.identities]
        there = {path: _size(path) for path in self.folder.glob("*.safetensors")}
        rest = sorted(there.keys() - set(mine), key=lambda path: path.stat().st_mtime)
        used = sum(there.values())
        for path in [*(path for path in mine if path in there), *rest]:
            if used + window_bytes <= self.budget_bytes:
                break
            if path in keep:
                continue
            if path in rest:
                logger.warning("deleted hidden states of another run to stay within disk_gb: %s", path.name)
            path.unlink(missing_ok=True)
            used -= there[path]
        if (free := shutil.disk_usage(self.folder).free) < window_bytes:
            raise TrainingError(
                f"the disk of {self.folder} has {free / GB:.3f} GB left, but the next hidden states take "
                f"{window_bytes / GB:.3f} GB: make room, or set a smaller train.stage1_cache.disk_gb. Whole files are "
                "kept; start again to go on"
            )

    def _sweep_partials(self) -> None:
        """Delete what killed processes left behind."""
        for path in self.folder.glob(".*.partial"):
            process = path.name.split(".")[-2]
            if not process.isdigit() or int(process) == os.getpid() or not _is_alive(int(process)):
                path.unlink(missing_ok=True)

    def _key(self, name: str, window: Window) -> str:
        if (name, window.label) not in self._keys:
            digest = hashlib.sha256(json.dumps(sorted(self.identities[name].items())).encode())
            position = self._position(name)
            records = line_up(window.records.values(), position)
            self._orders[name, window.label] = [record.id for record in records]
            for record in records:
                digest.update(repr((record.id, len(record.turns))).encode())
                for turn in record.turns:
                    for ids in (turn.prompts[position], turn.response, (turn.hides_end[position],)):
                        digest.update(array("q", [len(ids), *ids]).tobytes())
            self._keys[name, window.label] = digest.hexdigest()
        return self._keys[name, window.label]

    def order(self, name: str, window: Window) -> list[str]:
        """Ids of a window's records in the order of a specialist's file."""
        self._key(name, window)
        return self._orders[name, window.label]

    def views(self, name: str, window: Window) -> list[EncodedRecord]:
        """The records of a window as one specialist reads them, in the order of its file."""
        position = self._position(name)
        return [view_of(record, position) for record in line_up(window.records.values(), position)]

    def _position(self, name: str) -> int:
        return list(self.identities).index(name)


def line_up(records: Iterable[EncodedRecord], position: int) -> list[EncodedRecord]:
    """Whole records in the order in which `micro_batches` lines up their views at a position.

    No view is made for it: of a stage they would be tens of thousands of tuples.
    """

    def num_columns(record: EncodedRecord) -> int:
        return sum(len(turn.prompts[position]) + len(turn.response) for turn in record.turns)

    return sorted(records, key=lambda record: (num_columns(record), record.id))


def view_of(record: EncodedRecord, position: int) -> EncodedRecord:
    """A record as the specialist at a position reads it: its own prompts alone."""
    turns = tuple(
        EncodedTurn((turn.prompts[position],), turn.response, (turn.hides_end[position],)) for turn in record.turns
    )
    return EncodedRecord(record.id, record.domain, turns)


def check_folder(folder: Path) -> None:
    """Make the folder and write to it once.

    Raises:
        TrainingError: It cannot be made or written; before any weights are read.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise TrainingError(
            f"cannot write hidden states to {folder}: {error.strerror or error}. Choose another "
            "train.stage1_cache.folder"
        ) from error


def hash_vocabulary(tokenizer: Any) -> str:
    """Hash of which token has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _size(path: Path) -> int:
    """Bytes of hidden states; of a file that holds none, all its bytes."""
    try:
        file = HiddenFile(path)
    except TrainingError:
        return path.stat().st_size
    file.close()
    return file.num_bytes


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
