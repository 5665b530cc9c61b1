"""The hub, asked briefly: is it there, what does it hold of a model, and what of it lies in the cache.

One probe of a few seconds decides whether anything is asked at all, so an examination without a network never waits
for retries.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

PROBE_TIMEOUT_S = 3.0
REQUEST_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """What the hub says of a model.

    Attributes:
        files: Names of its files.
        licence: From its card, if it names one.
        refusal: Why the hub gives nothing (no such model, no access), or None.
    """

    files: tuple[str, ...] = ()
    licence: str | None = None
    refusal: str | None = None


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


def ask_hub(repo: str, revision: str | None) -> RepoInfo | None:
    """What the hub holds; None when it does not answer after all."""
    try:
        info: Any = HfApi().model_info(repo, revision=revision, timeout=REQUEST_TIMEOUT_S)
    except GatedRepoError:
        return RepoInfo(refusal="is gated: accept its licence on the hub and log in (`hf auth login`)")
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return RepoInfo(refusal="is not on the hub, or is private: check the spelling and the revision, or log in")
    except (HfHubHTTPError, OSError):
        return None
    card = getattr(info, "card_data", None)
    licence = (card.get("license_name") or card.get("license")) if card is not None else None
    return RepoInfo(tuple(file.rfilename for file in info.siblings or ()), str(licence) if licence else None)
