"""Read a synthesis recipe: YAML text, `--set` overrides, one clear line for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ultrafuser.config.load import read_tree, resolve_path, sections_of, validate
from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe


def load_synthesis(path: Path | str, overrides: Sequence[str] = ()) -> SynthesisRecipe:
    """Read a recipe file and apply overrides such as ``limits.max_cost=5``.

    `${NAME}` stands for an environment variable. Domains' folders and the folder of test sets are taken from the recipe
    file's folder when they exist there, else from the working directory, as is the run folder.

    Raises:
        ConfigError: No such file, no YAML, an unknown key or stage, or a value that does not fit; one line per mistake.
    """
    path = Path(path)
    tree = read_tree(path, overrides)
    resolve_path(tree, "benchmarks", path.parent)
    for domain in sections_of(tree.get("domains")):
        resolve_path(domain, "folder", path.parent)
    _give_empty_domains(tree)
    _check_stages(tree, path)
    return validate(SynthesisRecipe, tree, where=str(path))


def _give_empty_domains(tree: dict[str, Any]) -> None:
    """`math:` with nothing behind it is a domain as it comes."""
    domains = tree.get("domains")
    if isinstance(domains, dict):
        tree["domains"] = {name: {} if domain is None else domain for name, domain in domains.items()}


def _check_stages(tree: dict[str, Any], path: Path) -> None:
    known = get_args(StageName)
    stages, reviewed = tree.get("stages"), tree.get("review_after")
    named = [(f"stages.{name}", name) for name in stages if name != "default"] if isinstance(stages, dict) else []
    named += [("review_after", name) for name in reviewed] if isinstance(reviewed, list) else []
    for where, name in named:
        if name not in known:
            raise ConfigError(f"{path}: {where}: there is no stage {name!r}; known: {', '.join(known)}")
