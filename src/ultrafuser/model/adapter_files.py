"""Files of a fused model with adapters: gate and adapters, and its frozen weights by reference or beside them, once.

```
config.json          for each specialist: where its frozen weights are, their hash, its adapter's folder and hash
gate.safetensors
adapters/<name>/     a peft folder each
base/                only in a folder that needs no other: the frozen weights of a shared base,
specialists/<name>/  or of each specialist
```
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.errors import ModelError
from ultrafuser.model.lora import WEIGHTS_FILE, Adapter, has_adapter, read_adapter, without_adapter, write_adapter

if TYPE_CHECKING:
    from ultrafuser.model.fused import FusedForCausalLM

HERE = "./"  # how a place inside the folder itself begins


def has_adapters(model: FusedForCausalLM) -> bool:
    """Whether a specialist has an adapter, or all share a base."""
    return bool(model.config.shared_base) or any(has_adapter(part) for part in model.specialists.values())


def write_adapters(model: FusedForCausalLM, folder: Path, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write each specialist's adapter; returns the sources with `lora` and `lora_digest` of each."""
    written = []
    for part in sources:
        specialist: Any = model.specialists[part["name"]]
        lora = None
        if has_adapter(specialist):
            lora = f"{HERE}adapters/{part['name']}"
            write_adapter(specialist, folder / lora, base=absolute(part["model"]), revision=part.get("revision"))
        written.append({**part, "lora": lora, "lora_digest": _digest(folder / lora) if lora else None})
    return written


def write_frozen(model: FusedForCausalLM, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Write the frozen weights as plain model folders, a shared base once; returns sources that refer to them."""
    sources = []
    for number, part in enumerate(model.config.sources):
        place = f"{HERE}base" if model.config.shared_base else f"{HERE}specialists/{part['name']}"
        if number == 0 or not model.config.shared_base:
            plain: Any = without_adapter(model.specialists[part["name"]])
            plain.save_pretrained(folder / place, **options)
        sources.append({**part, "model": place, **dict.fromkeys(("revision", "gguf_file", "adapter"))})
    return sources


def read_adapters(folder: Path, sources: list[dict[str, Any]], *, check: bool) -> dict[str, Adapter | None]:
    """The adapters of a saved model by specialist.

    Raises:
        ModelError: One is missing, or is not what was saved.
    """
    adapters: dict[str, Adapter | None] = {}
    for part in sources:
        name, lora = part["name"], part.get("lora")
        if lora is None:
            adapters[name] = None
            continue
        if not (folder / lora / WEIGHTS_FILE).is_file():
            raise ModelError(f"{folder} lacks the adapter of specialist {name!r}, {lora}: fetch the folder again")
        if check and (found := _digest(folder / lora)) != part["lora_digest"]:
            raise ModelError(
                f"the adapter of specialist {name!r} in {folder / lora} is not the one that was saved (hash "
                f"{found[:12]}, expected {part['lora_digest'][:12]}): restore it, or pass check_digests=False"
            )
        adapters[name] = read_adapter(folder / lora, name=name)
    return adapters


def locate(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A source whose place inside the folder is written out."""
    place = str(part["model"] or "")
    return {**part, "model": str((folder / place).resolve())} if place.startswith(HERE) else copy.copy(part)


def absolute(place: str) -> str:
    """A folder's whole path; a hub id as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _digest(adapter: Path) -> str:
    with (adapter / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
