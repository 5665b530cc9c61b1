"""Files: is every file of a specialist there, and in a form that can be loaded without unpickling anything."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, blocker, ok, warning

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def check_files(facts: Facts) -> Iterator[Finding]:
    """Weights, index and shards, configuration, tokenizer, adapter."""
    yield from _check_place(facts)
    yield from _check_adapter(facts)
    if facts.source.trust_remote_code:
        yield warning(facts.name, "runs code that comes with the model (trust_remote_code)", "read that code first")
    shared_only = facts.name == "tokenizer"
    for part, what in (("config", "configuration"), ("tokenizer", "tokenizer")):
        if part not in facts.reasons or (shared_only and part == "config"):
            continue
        finding = warning if part == "tokenizer" and not shared_only else blocker
        do = "its vocabulary is taken on trust; add its tokenizer files" if finding is warning else "repair its files"
        yield finding(facts.name, f"its {what} cannot be read: {facts.reasons[part]}", do)


def _check_place(facts: Facts) -> Iterator[Finding]:
    name, model = facts.name, facts.source.model
    if facts.is_local:
        if not Path(model).is_dir():
            hint = ": give the folder and gguf_file" if model.endswith(".gguf") else ", or write a hub id (owner/name)"
            yield blocker(name, f"there is no folder {model}", f"check the path{hint}")
        elif name != "tokenizer":
            yield from _check_folder(facts, Path(model))
    elif facts.offline:
        yield from _check_cache(facts)
    elif facts.repo is not None and facts.repo.refusal is not None:
        yield blocker(name, f"{model} {facts.repo.refusal}", "or give a local folder")
    elif facts.repo is not None and name != "tokenizer":
        yield from _check_listing(facts, facts.repo.files)


def _check_cache(facts: Facts) -> Iterator[Finding]:
    name, model = facts.name, facts.source.model
    if facts.folder is None:
        yield warning(
            name,
            f"{model} is on the hub and cannot be checked offline",
            "examine again with a network, or give a local folder",
        )
    elif name != "tokenizer":
        problems = [finding for finding in _check_folder(facts, facts.folder) if finding.level == "blocker"]
        if problems:
            what = f"{model} is only partly in the cache ({problems[0].what}), and the hub cannot be reached"
            yield warning(name, what, "fetch the rest with a network")
        else:
            yield ok(name, f"{model} is in the cache")


def _check_listing(facts: Facts, files: Collection[str]) -> Iterator[Finding]:
    name, model = facts.name, facts.source.model
    if facts.source.gguf_file is not None:
        if facts.source.gguf_file not in files:
            yield blocker(name, f"{model} has no {facts.source.gguf_file}", "check gguf_file")
            return
    elif not {INDEX, SINGLE} & set(files):
        if set(PICKLED) & set(files):
            do = "transformers then asks the hub for a converted copy; if that fails, convert it yourself"
            yield warning(name, f"{model} holds pickled weights, no safetensors", do)
        else:
            yield blocker(name, f"{model} holds no safetensors weights", "give a model with safetensors weights")
        return
    yield ok(name, f"{model} is on the hub ({len(files)} files)")


def _check_folder(facts: Facts, folder: Path) -> Iterator[Finding]:
    name, gguf = facts.name, facts.source.gguf_file
    if gguf is not None:
        if not (folder / gguf).is_file():
            yield blocker(name, f"{folder} has no {gguf}", "check gguf_file")
        elif importlib.util.find_spec("gguf") is None:
            yield blocker(name, f"{gguf} needs the gguf package", "pip install 'ultrafuser[gguf]'")
        else:
            yield ok(
                name, f"{gguf} is there ({(folder / gguf).stat().st_size / 1e9:.2f} GB); it is dequantized at load"
            )
        return
    if not (folder / "config.json").is_file():
        yield blocker(name, f"{folder} has no config.json", "give the folder of a model")
        return
    if (folder / SINGLE).is_file():
        shards = {SINGLE}
    elif (folder / INDEX).is_file():
        try:
            shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            yield blocker(name, f"{folder / INDEX} is damaged", "fetch it again")
            return
    else:
        pickled = any((folder / file).is_file() for file in PICKLED)
        what = "holds pickled weights only, which are never loaded" if pickled else "has no safetensors weights"
        yield blocker(name, f"{folder} {what}", "save the model with save_pretrained, or fetch its safetensors files")
        return
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield blocker(name, f"{folder} lacks {missing[0]}{more}, named in its index", "fetch what is missing")
    elif cut := sorted(shard for shard in shards if not _is_whole(folder / shard)):
        yield blocker(
            name, f"{folder / cut[0]} is shorter than its header says, or no safetensors file", "fetch it again"
        )
    else:
        size = sum((folder / shard).stat().st_size for shard in shards)
        yield ok(name, f"{len(shards)} weight file{'s' * (len(shards) > 1)} of {size / 1e9:.2f} GB, all there")


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; reads the header alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return bool(size == 8 + length + max(ends, default=0))


def _check_adapter(facts: Facts) -> Iterator[Finding]:
    adapter = facts.source.adapter
    if adapter is None:
        return
    if importlib.util.find_spec("peft") is None:
        yield blocker(facts.name, f"the adapter {adapter} needs the peft package", "pip install 'ultrafuser[peft]'")
    folder = Path(adapter)
    if folder.is_dir():
        files = ("adapter_config.json", "adapter_model.safetensors")
        if missing := [file for file in files if not (folder / file).is_file()]:
            yield blocker(
                facts.name, f"the adapter {adapter} lacks {', '.join(missing)}", "save it with save_pretrained"
            )
    elif len(folder.parts) != 2 or folder.is_absolute():
        yield blocker(facts.name, f"there is no adapter {adapter}", "check the path, or write a hub id (owner/name)")
    else:
        yield warning(facts.name, f"the adapter {adapter} on the hub was not looked at", "load it once to be sure")
