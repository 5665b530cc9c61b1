"""Which device models run on: the one that is asked for, if it is there and works; and what it is slow at."""

from __future__ import annotations

import torch

from ultrafuser.errors import ConfigError


def choose_device(name: str | None, setting: str) -> torch.device:
    """The device of a name; an accelerator where no name is given and there is one.

    Args:
        name: As torch writes it; None or empty leaves the choice.
        setting: What the user calls the name, for the message.

    Raises:
        ConfigError: There is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # "cuda" is a name everywhere, "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        raise ConfigError(f"{setting} {name!r} cannot be used here: write {', '.join(['cpu', *found])}") from error
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bf16 numbers; a CPU without them takes ten times as long."""
    if device.type != "cpu":
        return True
    here = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16") if here.get("architecture") == "x86_64" else ("bf16",)
    return any(here.get(name, False) for name in names)
