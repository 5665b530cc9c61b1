"""Devices on paper: what they hold, and how many operations a second they do.

Memory is what torch reports as usable, in GiB; rates are the makers' dense matrix rates with fp32 sums, bf16 and fp32
(torch multiplies fp32 without TF32 unless told otherwise), from the data sheets of each card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ultrafuser.errors import ConfigError
from ultrafuser.model.memory import machine_bytes
from ultrafuser.train.hidden.plan import measure_flops
from ultrafuser.train.parallel.world import read_environment

GIB = 2**30
TERA = 10**12
GPU_UTILISATION = 0.4  # model FLOPs a second over the maker's rate; the paper's run comes out at about that
CPU_UTILISATION = 0.5  # over a matrix product alone, measured here: layers of small models do worse than that
# GiB, TFLOP/s in bf16, TFLOP/s in fp32
KNOWN = {
    "A100-40GB": (39.4, 312.0, 19.5),
    "A100-80GB": (79.1, 312.0, 19.5),
    "H100-80GB": (79.1, 989.0, 67.0),
    "H200-141GB": (139.8, 989.0, 67.0),
    "L40S-48GB": (44.4, 362.0, 91.6),
    "RTX-4090-24GB": (23.5, 165.2, 82.6),
}


@dataclass(frozen=True, slots=True)
class Devices:
    """Some equal devices, one process each.

    Attributes:
        name: Of the kind.
        count: How many.
        memory_bytes: What one holds.
        flops_per_s: Of one, by precision: "bf16" and "fp32".
        utilisation: Part of that rate that training reaches.
        is_cpu: Whether it is this machine's processor; several processes then share its memory.
    """

    name: str
    count: int
    memory_bytes: int
    flops_per_s: dict[str, float]
    utilisation: float
    is_cpu: bool = False

    def __str__(self) -> str:
        return f"{self.count} x {self.name}"


def parse_devices(text: str, *, utilisation: float | None = None) -> Devices:
    """Devices as a user writes them: `16xA100-80GB`, `H100`, `cpu`.

    Raises:
        ConfigError: No such device; lists those that are known.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?([A-Za-z][\w-]*)", text.strip())
    count, name = (int(match[1] or 1), match[2].upper().replace("_", "-")) if match else (0, "")
    if name == "CPU" and count:
        return this_machine("cpu", count=count, utilisation=utilisation)
    found = [known for known in KNOWN if known == name or known.startswith(name + "-")]
    if not count or not found:
        known = ", ".join(KNOWN)
        raise ConfigError(f"--devices {text!r}: write COUNTxDEVICE, as in 16xA100-80GB; known are {known} and cpu")
    memory, bf16, fp32 = KNOWN[found[-1]]
    rates = {"bf16": bf16 * TERA, "fp32": fp32 * TERA}
    return Devices(found[-1], count, int(memory * GIB), rates, utilisation or GPU_UTILISATION)


def this_machine(device: str | None, *, count: int | None = None, utilisation: float | None = None) -> Devices:
    """What there is here, measured by a matrix product; as many as torchrun has started.

    Args:
        device: The recipe's `train.device`.
        count: Processes; None: as the environment says.
        utilisation: None: a rule of thumb.
    """
    if count is None:
        count = read_environment()[1]
    on_gpu = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    place = torch.device("cuda" if on_gpu else "cpu")
    rates = {"bf16": measure_flops(place, torch.bfloat16), "fp32": measure_flops(place, torch.float32)}
    if on_gpu:
        card = torch.cuda.get_device_properties(0)
        return Devices(card.name, count, int(card.total_memory), rates, utilisation or GPU_UTILISATION)
    # Processes of one machine share its cores and its memory.
    shared = {kind: rate / count for kind, rate in rates.items()}
    return Devices("cpu", count, machine_bytes() // count, shared, utilisation or CPU_UTILISATION, is_cpu=True)
