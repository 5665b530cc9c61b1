"""The records on which the cost of a change is measured: validation records of a recipe, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ultrafuser.chat.messages import Conversation
from ultrafuser.config.load import load_recipe
from ultrafuser.data.dataset import load_dataset
from ultrafuser.data.files import read_entries
from ultrafuser.data.records import read_records
from ultrafuser.errors import ConfigError, DataError

DOMAIN_FIELD = "domain"
RECIPE_SUFFIXES = (".yaml", ".yml")


def held_out_conversations(place: Path, *, per_domain: int) -> Mapping[str, list[Conversation]]:
    """Conversations by domain.

    Args:
        place: A recipe, whose validation records are taken; or a file or folder of records, all of which are, under the
            domain that their field `domain` names, or else under the name of the file.
        per_domain: Of each domain at most.

    Raises:
        ConfigError: The recipe is wrong or has no data.
        DataError: A file is missing or damaged, or there is nothing to measure on.
    """
    found: dict[str, list[Conversation]] = {}
    if place.suffix in RECIPE_SUFFIXES:
        data = load_recipe(place).data
        if data is None:
            raise ConfigError(f"{place} has no data section: give a file of records, or another recipe")
        for domain, validation in load_dataset(data)["validation"].items():
            found[domain] = [record.messages for record in validation[:per_domain]]
    else:
        named = _names_domains(place)
        for record in read_records(
            place, domain=None if named else place.stem, domain_field=DOMAIN_FIELD if named else None
        ):
            taken = found.setdefault(record.domain, [])
            if len(taken) < per_domain:
                taken.append(record.messages)
    found = {domain: conversations for domain, conversations in found.items() if conversations}
    if not found:
        raise DataError(f"{place} gives no validation records: raise data.validation_fraction, or give a file")
    return found


def _names_domains(place: Path) -> bool:
    """Whether the first record has the field."""
    _, first = next(iter(read_entries(place)))
    return isinstance(first, dict) and isinstance(first.get(DOMAIN_FIELD), str)
