"""The hub, asked briefly: is it there, and what of a model lies in the cache.

One probe of a few seconds decides whether anything is asked at all, so nothing waits for retries without a network.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

PROBE_TIMEOUT_S = 3.0


def is_local(model: str) -> bool:
    """Whether a recipe's `model` names a folder; `owner/name` that is no folder here is a hub id."""
    path = Path(model)
    return path.exists() or path.is_absolute() or model.startswith((".", "~")) or len(path.parts) != 2


def hub_is_reachable() -> bool:
    """Whether the hub answers, and may be asked (HF_HUB_OFFLINE)."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """The folder of a cached model, if its configuration at least was ever fetched."""
    path = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None
