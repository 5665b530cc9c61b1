"""Licences: under what terms each specialist, and so the fused model, may be used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, ok, warning

SUBJECT = "licences"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial|research[- ]only", re.IGNORECASE)
# Told by the first lines of the licence text; the more special before the more general.
KNOWN_TEXTS = (
    ("llama 2 community license", "llama2"),
    ("llama 3", "llama3"),
    ("apache license", "apache-2.0"),
    ("mit license", "mit"),
    ("bsd 3-clause", "bsd-3-clause"),
    ("gnu affero general public license", "agpl-3.0"),
    ("gnu general public license", "gpl-3.0"),
    ("creative commons attribution-noncommercial", "cc-by-nc-4.0"),
)


def check_licences(specialists: Sequence[Facts]) -> Iterator[Finding]:
    """The licence of each specialist that can be looked at; a fused model is bound by all of them."""
    licences: dict[str, str] = {}
    for facts in specialists:
        if facts.folder is None and facts.repo is None:
            continue
        licence = find_licence(facts)
        if licence is None:
            yield warning(facts.name, "its licence is unknown", "look it up: the fused model is bound by it too")
            continue
        licences[facts.name] = licence
        if NON_COMMERCIAL.search(licence):
            yield warning(
                facts.name, f"its licence forbids commercial use: {licence}", "so does the fused model's, then"
            )
    text = ", ".join(f"{name} {licence}" for name, licence in licences.items())
    if len(set(licences.values())) > 1:
        yield warning(SUBJECT, f"licences differ: {text}", "the fused model is bound by all of them")
    elif licences:
        yield ok(SUBJECT, text)


def find_licence(facts: Facts) -> str | None:
    """The licence by the model card on the hub, the card in the folder, or the licence file."""
    if facts.repo is not None and facts.repo.licence:
        return facts.repo.licence
    return _from_folder(facts.folder) if facts.folder is not None else None


def _from_folder(folder: Path) -> str | None:
    for file in (path for path in (folder / "README.md", folder / "readme.md") if path.is_file()):
        card = _front_matter(file.read_text(encoding="utf-8", errors="replace"))
        # "other" is the hub's word for a licence that has a name of its own.
        names = (card.get("license_name"), card.get("license"))
        if licence := next((name for name in names if isinstance(name, str) and name.strip()), None):
            return licence.strip()
    for file in sorted(folder.glob("LICEN[SC]E*")):
        beginning = " ".join(file.read_text(encoding="utf-8", errors="replace")[:2000].lower().split())
        return next((name for text, name in KNOWN_TEXTS if text in beginning), f"see {file.name}")
    return None


def _front_matter(text: str) -> dict[str, Any]:
    match = FRONT_MATTER.match(text)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}
