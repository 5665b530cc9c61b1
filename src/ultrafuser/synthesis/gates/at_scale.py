"""Near duplicates among millions of texts: datatrove's four MinHash steps find candidates, in parallel and out of core.

The gate asks the database for every single text; past some millions that is what a run waits for. Here signatures,
buckets and clusters are files that any number of processes or machines write. What they call a cluster is then compared
exactly and in order, as the gate does, so both drop the same texts but for pairs that one of the two does not find.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ultrafuser.errors import ConfigError, DataError
from ultrafuser.synthesis.gates.duplicates import bands_for
from ultrafuser.synthesis.gates.settings import NearDuplicatesSettings
from ultrafuser.synthesis.gates.texts import jaccard, shingles
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.stages.base import View

Steps = list[Any]
Execute = Callable[[Steps, int, Path], None]


def near_duplicates_of(
    view: View,
    stages: Sequence[StageName],
    folder: Path,
    settings: NearDuplicatesSettings,
    *,
    num_tasks: int = 4,
    execute: Execute | None = None,
) -> list[str]:
    """Keys of kept items of these stages that are like an earlier one, in the order of (round, key).

    Switch the gate `near_duplicates` off while the stages run, call this, and have the items struck like those that a
    person strikes.
    """
    texts = ((item.key, item.text) for item in view.items(*stages))
    return near_duplicates(texts, folder, settings, num_tasks=num_tasks, execute=execute)


def near_duplicates(
    texts: Iterable[tuple[str, str]],
    folder: Path,
    settings: NearDuplicatesSettings,
    *,
    num_tasks: int = 4,
    execute: Execute | None = None,
) -> list[str]:
    """Keys of texts that are like an earlier one.

    Args:
        texts: Key and text; read once.
        folder: For what the steps write, some ten times the size of the texts; must not exist, or be from a run
            of the same texts that was interrupted, which then goes on.
        num_tasks: Parts into which the texts are cut.
        execute: Runs steps as so many tasks, with a folder for logs, and returns when they are done; None: here, in
            as many processes as there are tasks. On a cluster: see `docs/synthesize.md`.

    Raises:
        ConfigError: datatrove is not installed.
        DataError: The folder holds something else.
    """
    try:
        from ultrafuser.synthesis.gates import datatrove_steps
    except ImportError as error:
        raise ConfigError(
            f"near duplicates at scale need datatrove ({error}): pip install 'ultrafuser[datatrove]'"
        ) from None
    num_bands, rows = bands_for(settings.threshold, settings.permutations)
    _write(texts, folder, num_tasks)
    steps = datatrove_steps.minhash_steps(
        folder, words=settings.words, num_bands=num_bands, rows=rows, num_tasks=num_tasks
    )
    for number, (step, tasks) in enumerate(steps, start=1):
        (execute or datatrove_steps.locally)(step, tasks, folder / "logs" / str(number))
    return _later_ones(folder / "alike", settings)


def _write(texts: Iterable[tuple[str, str]], folder: Path, num_tasks: int) -> None:
    """One file a task, texts dealt out in turn."""
    target, unfinished = folder / "texts", folder / "texts.unfinished"
    if folder.exists() and not (target.exists() or unfinished.exists()) and any(folder.iterdir()):
        raise DataError(f"{folder} holds something else: give a folder that is not there yet")
    if target.exists():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = [(unfinished / f"{task:05d}.jsonl").open("w", encoding="utf-8") for task in range(num_tasks)]
    try:
        for number, (key, text) in enumerate(texts):
            row = {"id": key, "text": text, "number": number}
            files[number % num_tasks].write(json.dumps(row) + "\n")
    finally:
        for file in files:
            file.close()
    unfinished.rename(target)


def _later_ones(folder: Path, settings: NearDuplicatesSettings) -> list[str]:
    """Of each cluster, what is like an earlier member that stays."""
    clusters: dict[int, list[tuple[int, str, str]]] = defaultdict(list)
    for row in _rows(folder):
        metadata = row["metadata"]
        clusters[metadata["minhash_cluster_id"]].append((metadata["number"], row["id"], row["text"]))
    found: list[tuple[int, str]] = []
    for members in clusters.values():
        staying: list[frozenset[str]] = []
        for number, key, text in sorted(members):
            own = shingles(text, settings.words)
            if any(jaccard(own, other) >= settings.threshold for other in staying):
                found.append((number, key))
            else:
                staying.append(own)
    return [key for _, key in sorted(found)]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
