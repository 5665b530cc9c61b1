"""What a comparison rests on, by content: the weights behind every path, and the records.

Whatever a comparison makes lies in the run's folder under a name. Were the ingredients replaced, old and new would
stand in one table: so it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.data.dataset import Dataset
from ultrafuser.errors import ConfigError
from ultrafuser.files import write_text_atomically

FILE = "ingredients.json"
_CONTENT = frozenset({".safetensors", ".gguf", ".bin", ".json", ".jinja"})


def check_ingredients(folder: Path, models: Mapping[str, SpecialistConfig], dataset: Dataset) -> None:
    """Keep the ingredients' hashes in the comparison's folder, or compare them with those kept there.

    Args:
        folder: Of the comparison.
        models: What it starts from, by any name: specialists, their bases.
        dataset: Its records.

    Raises:
        ConfigError: Something is no longer what it was; says what.
    """
    found = {name: _hash_model(source) for name, source in models.items()} | {"the data": _hash_records(dataset)}
    path = folder / FILE
    if not path.is_file():
        write_text_atomically(json.dumps(found, indent=1), path)
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in sorted({*found, *kept}) if found.get(name) != kept.get(name)]:
        raise ConfigError(
            f"{', '.join(changed)}: not what {folder} was made from, so its rows and its trained baselines are another "
            "comparison's: choose another folder with --set output=FOLDER"
        )


def _hash_model(source: SpecialistConfig) -> str:
    """SHA-256 of the files of a folder, adapter and template; of a hub id its name and revision, for want of more."""
    digest = hashlib.sha256()
    for place in (source.model, source.adapter, source.template):
        path = Path(place or "")
        files = path.iterdir() if place and path.is_dir() else [path] if path.is_file() else []
        digest.update(b"" if files else f"{place}@{source.revision}".encode())
        for file in sorted(file for file in files if file.suffix in _CONTENT):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _hash_records(dataset: Dataset) -> str:
    """Of the records in all splits, by their ids, which are hashes of their content."""
    ids = [{domain: [r.id for r in records] for domain, records in split.items()} for split in dataset.splits.values()]
    return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()
