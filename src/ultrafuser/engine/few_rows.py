"""A few rows times weights as fast as memory is read: `few_rows.c`, compiled by this machine's C compiler.

That takes a second at first use; the library is kept in the user's cache folder, under a name made of the source, the
options and the processor. Where there is no compiler, no such processor, or what was compiled computes something else,
products are torch's (`weights.py`), which read with fewer bytes a second and cost more the more rows there are. The
environment variable ULTRAFUSER_KERNEL=0 leaves it out.

Shapes: G specialists, M rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MOST_ROWS = 32  # above that arithmetic is what costs, and torch's own products do it better
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = Path(__file__).with_name("few_rows.c")
_OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("gcc", "cc", "clang")
_TIMEOUT = 60.0  # seconds
_LOG = logging.getLogger(__name__)


class _MissingError(Exception):
    """Why there is no kernel, in words that end a sentence."""


def has_kernel() -> bool:
    """Whether the kernel can be used; compiles it where that was not done yet."""
    return _kernel().call is not None


def why_missing() -> str:
    """Why there is no kernel, or an empty text."""
    return _kernel().reason


def multiply(x: Float[Tensor, "G M I"], weight: Float[Tensor, "G O I"], num_threads: int) -> Float[Tensor, "G M O"]:
    """Rows times weights, in fp32; a sum is the same to the bit whatever M, G and `num_threads` are.

    Args:
        x: In fp32.
        weight: In fp32, bf16 or fp16, one member after another in memory.
        num_threads: That share the work; those of torch.

    Raises:
        ValueError: Shapes or types do not fit, or the weight is not contiguous.
    """
    num_members, num_rows, num_in = x.shape
    num_out = weight.shape[1]
    fits = weight.shape == (num_members, num_out, num_in) and weight.is_contiguous()
    known = x.dtype == torch.float32 and weight.dtype in _KINDS and x.device.type == weight.device.type == "cpu"
    if not (fits and known):
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype} and weights {tuple(weight.shape)} of {weight.dtype} do not fit, or lie"
            " in memory in other ways than the kernel reads"
        )
    call, reason = _kernel()
    if call is None:
        raise ValueError(f"there is no kernel: {reason}")
    x = x.contiguous()
    y = torch.empty((num_members, num_rows, num_out))
    kind = _KINDS[weight.dtype]
    call(x.data_ptr(), weight.data_ptr(), y.data_ptr(), num_members, num_rows, num_in, num_out, kind, num_threads)
    return y


class _Kernel(NamedTuple):
    """The function in the library, or why there is none."""

    call: Callable[..., None] | None
    reason: str = ""


@cache
def _kernel() -> _Kernel:
    try:
        call = _loaded()
        _check(call)
    except _MissingError as error:
        _LOG.info("a few rows are multiplied by torch's own kernels: %s", error)
        return _Kernel(None, str(error))
    return _Kernel(call)


def _loaded() -> Callable[..., None]:
    if os.environ.get("ULTRAFUSER_KERNEL") == "0":
        raise _MissingError("ULTRAFUSER_KERNEL=0 leaves it out")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise _MissingError(f"it is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise _MissingError("the processor has no AVX2")
    before = _openmp_libraries()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ultrafuser"
    file = folder / f"few_rows-{_fingerprint()}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            _compile(file)
        library: Any = ctypes.CDLL(str(file))
    except OSError as error:  # a folder that may not be written to, or from which nothing may be loaded
        _LOG.info("%s cannot be used: %s", file, error)
        with tempfile.TemporaryDirectory() as place:
            _compile(Path(place, file.name))
            try:
                library = ctypes.CDLL(str(Path(place, file.name)))
            except OSError as another:
                raise _MissingError(f"the compiled library cannot be loaded: {another}") from another
    if more := _openmp_libraries() - before:
        raise _MissingError(f"its threads would be others than torch's: {', '.join(sorted(more))}")
    call: Any = library.ultrafuser_few_rows
    call.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 4, *[ctypes.c_int] * 2]
    call.restype = None
    return call  # type: ignore[no-any-return]


def _compile(file: Path) -> None:
    """Compile the source to a library, which is there whole or not at all."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise _MissingError("there is no C compiler (install gcc)")
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as partial:
        pass
    try:
        command = [*compiler.split(), *_OPTIONS, "-o", partial.name, str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise _MissingError(f"{compiler} ends with {done.returncode}: {last}")
        Path(partial.name).replace(file)
    except FileNotFoundError as error:
        raise _MissingError(f"the C compiler {compiler!r} cannot be started") from error
    except subprocess.TimeoutExpired as error:
        raise _MissingError(f"{compiler} takes more than {_TIMEOUT:.0f} s") from error
    finally:
        Path(partial.name).unlink(missing_ok=True)


def _check(call: Callable[..., None]) -> None:
    """Compare with torch, so that a compiler's fault costs time and no answers."""
    generator = torch.Generator().manual_seed(0)
    for dtype, kind in _KINDS.items():
        for num_rows, num_in, num_out in ((1, 24, 8), (3, 13, 6), (7, 40, 9)):
            x = torch.randn((2, num_rows, num_in), generator=generator)
            weight = torch.randn((2, num_out, num_in), generator=generator).to(dtype)
            y = torch.empty((2, num_rows, num_out))
            call(x.data_ptr(), weight.data_ptr(), y.data_ptr(), 2, num_rows, num_in, num_out, kind, 1)
            if not torch.allclose(y, torch.bmm(x, weight.float().transpose(1, 2)), rtol=1e-4, atol=1e-4):
                raise _MissingError(f"what the compiler made of it multiplies {dtype} wrongly")


def _fingerprint() -> str:
    """Of the source, the options, and what -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    wanted = ("vendor_id", "cpu family", "model", "flags")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0].strip() in wanted]
    parts = (_SOURCE.read_text(encoding="utf-8"), *_OPTIONS, os.environ.get("CC", ""), *lines)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _openmp_libraries() -> set[str]:
    """Files of OpenMP's runtime that are loaded."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}
