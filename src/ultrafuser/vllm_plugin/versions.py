"""Which releases of vLLM the plugin is made for: it reaches into models and loader, which change with every release."""

from __future__ import annotations

import re

from ultrafuser.errors import ConfigError

# Tested with 0.32.0. Raise both together, after tests/test_vllm_*.py pass with the new release.
FIRST = (0, 32)
BEFORE = (0, 33)
ANY_VERSION = "ULTRAFUSER_ANY_VLLM"  # environment variable: go on at one's own risk


def check_version(version: str, *, unchecked: bool = False) -> None:
    """Refuse a release that the plugin was not tested with.

    Args:
        version: As `vllm.__version__` says: "0.32.0", "0.32.1+cpu", "0.33.0rc1".
        unchecked: Accept every version.

    Raises:
        ConfigError: Too old, too new, or no release.
    """
    found = re.match(r"(\d+)\.(\d+)\.\d+(?!\.?(?:rc|dev))(?:\D|$)", version)
    if unchecked or (found and FIRST <= (int(found[1]), int(found[2])) < BEFORE):
        return
    first, before = (".".join(map(str, part)) for part in (FIRST, BEFORE))
    raise ConfigError(
        f"vLLM {version} is installed, but the plugin is made for {first} up to, not including, {before}: "
        f"pip install 'vllm>={first},<{before}', or set {ANY_VERSION}=1 to try all the same"
    )
