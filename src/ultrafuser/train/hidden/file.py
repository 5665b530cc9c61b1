"""One file of last hidden states: a safetensors file with one tensor, written piece by piece, whole or not at all.

Written and read by hand, since the library would hold all of a file in memory: here a piece is written as it is made,
and a record is read as it is needed.

Shapes: R rows (response tokens), H hidden size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Shaped
from torch import Tensor

from ultrafuser.errors import TrainingError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSOR = "hidden"


class HiddenWriter:
    """Writes one file under a temporary name and renames it when every row is there.

    Used as a context: leaving it with an error, or before all rows are there, leaves nothing behind.

    Args:
        path: The file.
        num_rows: R.
        metadata: Texts for the header.
    """

    def __init__(self, path: Path, *, num_rows: int, metadata: Mapping[str, str]) -> None:
        self.path, self.num_rows, self.metadata = path, num_rows, dict(metadata)
        self.partial = partial_path(path, os.getpid())
        self._file = self.partial.open("wb")
        self._written = 0
        self._kind: tuple[torch.dtype, int] | None = None

    def append(self, rows: Shaped[Tensor, "R H"]) -> None:
        """Write the next rows."""
        kind = rows.dtype, int(rows.shape[1])
        if self._kind is None:
            self._kind = kind
            self._file.write(_header(self.num_rows, rows.shape[1], rows.dtype, self.metadata))
        assert kind == self._kind, "all rows of a specialist are of one kind"
        flat = rows.detach().cpu().contiguous().flatten()
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._written += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert self._written == self.num_rows, f"{self._written} of {self.num_rows} rows were written"
                self._file.flush()
                os.fsync(self._file.fileno())
                self.partial.rename(self.path)
        finally:
            try:
                self._file.close()
            finally:
                self.partial.unlink(missing_ok=True)


class HiddenFile:
    """A whole file, open for reading.

    Args:
        path: The file.

    Raises:
        TrainingError: It is none, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise TrainingError(
                f"cannot read hidden states from {path}: {error.strerror or error}. Start again: what is missing is "
                "made anew"
            ) from error
        try:
            length = struct.unpack("<Q", self._file.read(8))[0]
            size = os.fstat(self._file.fileno()).st_size
            if length > size:
                raise ValueError("its header is cut off")
            header: dict[str, Any] = json.loads(self._file.read(length))
            tensor = header[TENSOR]
            self.dtype, (self.num_rows, self.width) = DTYPES[tensor["dtype"]], tensor["shape"]
            self.metadata: dict[str, str] = header["__metadata__"]
            self._start = 8 + length
            self._row_bytes = self.width * self.dtype.itemsize
            if size != self._start + self.num_rows * self._row_bytes:
                raise ValueError(f"it has {size} bytes, not {self._start + self.num_rows * self._row_bytes}")
        except (struct.error, ValueError, KeyError, TypeError) as error:
            self.close()
            raise TrainingError(f"{path} holds no whole hidden states ({error}): delete it and start again") from error

    def rows(self, start: int, stop: int) -> Shaped[Tensor, "R H"]:
        """Rows `start` to `stop`, copied from the file."""
        wanted = (stop - start) * self._row_bytes
        data = bytearray(os.pread(self._file.fileno(), wanted, self._start + start * self._row_bytes))
        if len(data) != wanted:
            raise TrainingError(f"{self.path} was cut off while it was read: start again, and it is made anew")
        return torch.frombuffer(data, dtype=self.dtype).view(stop - start, self.width)

    @property
    def num_bytes(self) -> int:
        """Bytes of the hidden states, without the header."""
        return int(self.num_rows * self._row_bytes)

    def close(self) -> None:
        """Close the file; whoever deleted it meanwhile frees its place on the disk now."""
        self._file.close()


def partial_path(path: Path, process: int) -> Path:
    """Where a process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{process}.partial")


def _header(num_rows: int, width: int, dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    """Length and JSON as the safetensors format wants them, padded to 8 bytes."""
    shape = [num_rows, width]
    tensor = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, math.prod(shape) * dtype.itemsize]}
    text = json.dumps({"__metadata__": dict(metadata), TENSOR: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
