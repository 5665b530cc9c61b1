"""Our own kernels, in C (`native.c` and what it includes), compiled by this machine's C compiler at first use.

That takes a second or two; the library is kept in the user's cache folder, under a name made of the source, the options
and the processor. Where there is no compiler, no such processor, or what was compiled computes something else, torch's
own operations do the same more slowly. The environment variable ULTRAFUSER_KERNEL=0 leaves the kernels out.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # of weights
_SOURCES = [Path(__file__).with_name(name) for name in ("native.c", "between.h", "products.h", "numbers.h")]
_OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("gcc", "cc", "clang")
_TIMEOUT = 60.0  # seconds
_LOG = logging.getLogger(__name__)


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def _wholes(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_long) for name in names]


class Ranks(ctypes.Structure):
    """`struct ranks` of the source."""

    _fields_ = _wholes("first", "count")


class Up(ctypes.Structure):
    """`struct up` of the source."""

    _fields_ = [*_pointers("weight", "own"), *_wholes("first_out", "num_out", "first_rank", "num_ranks")]


MOST_UPS = 3


class Matrix(ctypes.Structure):
    """`struct matrix` of the source."""

    _fields_ = [
        *_pointers("weight", "units", "bias", "down", "scales"),
        ("ups", Up * MOST_UPS),
        *_wholes("members", "num_in", "num_out", "num_ranks", "num_ups"),
        ("kind", ctypes.c_int),
        ("adapter_kind", ctypes.c_int),
    ]


class Attention(ctypes.Structure):
    """`struct attention` of the source."""

    _fields_ = [
        *_pointers("qkv", "norm_q", "norm_k", "cosines", "sines", "keys", "values", "rows", "starts", "y", "scores"),
        *_wholes("num_members", "num_choices", "num_new", "num_heads", "num_kv_heads", "size", "length", "window"),
        *_wholes("norm_members"),
        ("kind", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    """`struct layer` of the source."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *_pointers("norm_in", "norm_mlp", "norm_q", "norm_k"),
    ]


class Pass(ctypes.Structure):
    """`struct pass` of the source."""

    _fields_ = [
        *_pointers("layers", "norm_out", "keys", "values", "x", "y", "wide", "narrow", "told", "room", "own"),
        *_pointers("rounded", "shares"),
        ("attention", Attention),
        *_wholes("num_layers", "hidden_size", "norm_members", "num_rounded", "num_shares"),
        ("eps", ctypes.c_float),
    ]


class Kernels(NamedTuple):
    """The functions of the library, or why there are none.

    Attributes:
        has_pairs: Whether the processor multiplies bf16 numbers, and rows that meet bf16 weights are rounded to bf16.
        reason: Why there are none.
    """

    few_rows: Any = None
    multiply_pairs: Any = None
    add_norm: Any = None
    silu_mul: Any = None
    run: Any = None
    has_pairs: bool = False
    reason: str = ""


class MissingError(Exception):
    """Why there are no kernels, in words that end a sentence."""


@cache
def kernels() -> Kernels:
    """The kernels; compiles them where that was not done yet."""
    try:
        found = _bound(_loaded())
        check_product(found.few_rows)
    except MissingError as error:
        _LOG.info("a few rows are multiplied by torch's own kernels: %s", error)
        return Kernels(reason=str(error))
    return found


def in_large_pages(buffer: Tensor) -> Tensor:
    """A new buffer that nothing was written to: where Linux allows it, it will lie in pages of 2 MiB.

    Reading weights from start to end then stumbles less often over where they are in memory (some 6% of a pass).
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and buffer.device.type == "cpu" and buffer.numel():
        start = buffer.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        stop = buffer.data_ptr() + buffer.numel() * buffer.element_size()
        _madvise()(start, stop - start, advice)  # where it is refused, nothing is lost
    return buffer


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def check_product(few_rows: Any) -> None:
    """Compare with torch, so that a compiler's fault costs time and no answers.

    Raises:
        MissingError: The products of a type of weights are others.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype, kind in KINDS.items():
        for num_rows, num_in, num_out in ((1, 24, 8), (3, 13, 6), (7, 40, 9)):
            x = torch.randn((2, num_rows, num_in), generator=generator)
            weight = torch.randn((2, num_out, num_in), generator=generator).mul_(9).to(dtype)
            units = torch.rand((2, num_out), generator=generator) if dtype == torch.int8 else torch.ones(2, num_out)
            if dtype == torch.bfloat16:  # rows may be rounded
                x = x.to(dtype).float()
            y = torch.empty((2, num_rows, num_out))
            room = torch.empty(num_rows * num_in, dtype=torch.bfloat16)
            pointers = (x.data_ptr(), weight.data_ptr(), units.data_ptr(), y.data_ptr())
            few_rows(*pointers, 2, num_rows, num_in, num_out, kind, 1, room.data_ptr())
            # In double precision, which is what autocast leaves alone.
            expected = torch.bmm(x.double(), weight.double().transpose(1, 2)) * units[:, None]
            if not torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-3):
                raise MissingError(f"what the compiler made of it multiplies {dtype} wrongly")


def _loaded() -> Any:
    if os.environ.get("ULTRAFUSER_KERNEL") == "0":
        raise MissingError("ULTRAFUSER_KERNEL=0 leaves it out")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise MissingError(f"it is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise MissingError("the processor has no AVX2")
    try:
        before, name = _openmp_libraries(), f"native-{_fingerprint()}.so"
    except OSError as error:
        raise MissingError(f"what this process and its processor are cannot be read: {error}") from error
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ultrafuser"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / name).exists():
            _compile(folder / name)
        library = ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError) as error:  # no home, not to be written to, or nothing may be loaded from there
        _LOG.info("the cache folder cannot be used: %s", error)
        library = _load_for_now(name)
    if more := _openmp_libraries() - before:
        raise MissingError(f"its threads would be others than torch's: {', '.join(sorted(more))}")
    return library


def _load_for_now(name: str) -> Any:
    """A library that goes with this process."""
    try:
        with tempfile.TemporaryDirectory() as place:
            _compile(Path(place, name))
            return ctypes.CDLL(str(Path(place, name)))
    except OSError as error:
        raise MissingError(f"the compiled library cannot be kept or loaded: {error}") from error


def _compile(file: Path) -> None:
    """Compile the source to a library, which is there whole or not at all."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise MissingError("there is no C compiler (install gcc)")
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as partial:
        pass
    try:
        command = [*compiler.split(), *_OPTIONS, "-o", partial.name, str(_SOURCES[0])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except OSError as error:
            raise MissingError(f"the C compiler {compiler!r} cannot be started") from error
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"{compiler} takes more than {_TIMEOUT:.0f} s") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MissingError(f"{compiler} ends with {done.returncode}: {last}")
        Path(partial.name).replace(file)
    finally:
        Path(partial.name).unlink(missing_ok=True)


def _bound(library: Any) -> Kernels:
    """The functions with the types of their arguments."""
    pointer, whole, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    types = {
        "few_rows": [*[pointer] * 4, *[whole] * 4, *[number] * 2, pointer],
        "multiply_pairs": [*[pointer] * 3, *[whole] * 3, number],
        "add_norm": [*[pointer] * 4, *[whole] * 4, ctypes.c_float, number],
        "silu_mul": [*[pointer] * 2, *[whole] * 2, number],
        "run": [ctypes.POINTER(Pass), number],
    }
    functions = {}
    for name, arguments in types.items():
        functions[name] = getattr(library, f"ultrafuser_{name}")
        functions[name].argtypes, functions[name].restype = arguments, None
    return Kernels(**functions, has_pairs=bool(library.ultrafuser_has_pairs()))


def _fingerprint() -> str:
    """Of the source, the options, and what -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    wanted = ("vendor_id", "cpu family", "model", "flags")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0].strip() in wanted]
    texts = [source.read_text(encoding="utf-8") for source in _SOURCES]
    parts = (*texts, *_OPTIONS, os.environ.get("CC", ""), *lines)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _openmp_libraries() -> set[str]:
    """Files of OpenMP's runtime that are loaded."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}
