"""What the hub says of a model: its files, its licence, or why it gives nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

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
