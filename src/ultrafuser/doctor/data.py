"""Data: are the files of a recipe there. Their content is `ultrafuser prepare`'s business."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from ultrafuser.config.recipe import DataConfig, Recipe
from ultrafuser.data.benchmarks import BENCHMARKS
from ultrafuser.data.files import HUB_ID, HUB_PREFIX, READERS
from ultrafuser.data.formats import check_format
from ultrafuser.doctor.finding import Finding, blocker, ok, warning
from ultrafuser.doctor.unset import unset_variables
from ultrafuser.errors import ConfigError


def check_data(recipe: Recipe) -> Iterator[Finding]:
    """Every source of every domain, and the benchmarks that training data is kept clear of."""
    data = recipe.data
    if data is None:
        yield warning("data", "the recipe has no data section", "it can be fused, but its gate cannot be trained")
        return
    for domain in data.domains:
        yield from _check_domain(domain, data)
    yield from _check_benchmarks(data.benchmarks)


def _check_domain(domain: str, data: DataConfig) -> Iterator[Finding]:
    subject, num_bytes, num_found = f"data: {domain}", 0, 0
    for source in data.domains[domain].sources:
        try:
            check_format(source.file_format)
        except ConfigError as error:
            yield blocker(subject, str(error), "set file_format: auto, or one of these")
        if source.path.startswith(HUB_PREFIX):
            yield _check_hub(subject, source.path)
        elif names := unset_variables(source.path):
            yield _unset(subject, source.path, names)
        else:
            problem, size = _look_at(Path(source.path))
            if problem is not None:
                yield problem_finding(subject, problem)
            else:
                num_found, num_bytes = num_found + 1, num_bytes + size
    if num_found:
        yield ok(subject, f"{num_found} source{'s' * (num_found > 1)}, {num_bytes / 1e6:.1f} MB; `prepare` reads them")


def problem_finding(subject: str, problem: str) -> Finding:
    """A local source that cannot be read."""
    return blocker(subject, problem, "check the path in data.domains, or fetch the file")


def _look_at(path: Path) -> tuple[str | None, int]:
    """What is wrong with a local source, or None; and its size in bytes."""
    if not path.exists():
        return f"{path} does not exist", 0
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and _has_known_ending(file)]
    if not files:
        return f"{path} holds no data file; known endings: {', '.join(READERS)} (text may end in .gz)", 0
    if empty := [file for file in files if file.stat().st_size == 0]:
        return f"{empty[0]} is empty", 0
    if denied := [file for file in files if not os.access(file, os.R_OK)]:
        return f"{denied[0]} may not be read", 0
    return None, sum(file.stat().st_size for file in files)


def _has_known_ending(file: Path) -> bool:
    return not file.name.startswith(".") and Path(file.name.lower().removesuffix(".gz")).suffix in READERS


def _check_hub(subject: str, path: str) -> Finding:
    if HUB_ID.fullmatch(path) is None:
        return blocker(subject, f"{path!r} is no hub data set", "write hub:owner/name[:config][@revision][#split]")
    if importlib.util.find_spec("datasets") is None:
        return warning(subject, f"{path} needs the datasets package", "pip install 'ultrafuser[data]'")
    return warning(subject, f"{path} is on the hub and was not looked at", "`prepare` reads it; needs a network")


def _check_benchmarks(folder: str | None) -> Iterator[Finding]:
    subject = "benchmarks"
    if folder is None:
        do = "set data.benchmarks to a folder of test sets if you will report results on them"
        yield warning(subject, "training data is not compared with any test set", do)
    elif names := unset_variables(folder):
        yield _unset(subject, folder, names)
    elif missing := [item.file for item in BENCHMARKS.values() if not (Path(folder) / item.file).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield blocker(subject, f"{folder} lacks {missing[0]}{more}", "add the files, or leave data.benchmarks out")
    else:
        yield ok(subject, f"{len(BENCHMARKS)} test sets to keep clear of")


def _unset(subject: str, path: str, names: list[str]) -> Finding:
    return warning(
        subject, f"{path} cannot be checked: {names[0]} is not set", f"set the environment variable {names[0]}"
    )
