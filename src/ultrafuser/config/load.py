"""Read a recipe: YAML text, `--set` overrides, one clear line for each mistake."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError

# One digit before the point: a short commit hash such as 1234e56 is no number.
_SCIENTIFIC = re.compile(r"[-+]?\d(\.\d*)?[eE][-+]?\d{1,3}")
Model = TypeVar("Model", bound=BaseModel)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as ``stage1.steps=20``.

    `${NAME}` stands for an environment variable. Relative paths to local models and data are taken from the recipe
    file's folder when they exist there, else from the working directory.

    Raises:
        ConfigError: No such file, no YAML, an unknown key or a value that does not fit; one line per mistake.
    """
    path = Path(path)
    tree = read_tree(path, overrides)
    _resolve_paths(tree, path.parent)
    return parse_recipe(tree, where=str(path))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe file, overrides applied and environment variables filled in.

    Raises:
        ConfigError: No such file, no YAML, an override that does not fit, or a variable that is not set.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with keys such as name")
    for override in overrides:
        apply_override(tree, override)
    expanded: dict[str, Any] = _expand_variables(tree)
    return expanded


def parse_recipe(tree: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain values.

    Raises:
        ConfigError: An unknown key or a value that does not fit; one line per mistake.
    """
    return validate(Recipe, tree, where=where)


def validate(kind: type[Model], tree: dict[str, Any], *, where: str) -> Model:
    """Plain values as a model.

    Raises:
        ConfigError: An unknown key or a value that does not fit; one line per mistake.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}"
            + (f" (got {item['input']!r:.60})" if item["type"] not in ("missing", "value_error") else "")
            for item in error.errors()
        ]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value in place: ``a.b.c=value``, where value is YAML (so ``null``, numbers and lists work).

    Raises:
        ConfigError: No ``=``, an empty key, or a path that runs through a plain value.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r}: write KEY=VALUE, for example stage1.steps=20")
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parts[: depth + 1])} is {child!r}, not a section")
        node = child
    try:
        node[parts[-1]] = _parse_value(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is no YAML") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse_value(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 reads 2e-5 as a string: it wants 2.0e-5.
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make local paths independent of the working directory, in place."""
    resolve_path(tree, "tokenizer", folder)
    for specialist in sections_of(tree.get("specialists")):
        resolve_path(specialist, "model", folder)
        resolve_path(specialist, "adapter", folder)
        if str(specialist.get("template")).endswith(".jinja"):  # else it is a name, whatever folders there are
            resolve_path(specialist, "template", folder)
    data = tree.get("data")
    if isinstance(data, dict):
        resolve_path(data, "benchmarks", folder)
        for domain in sections_of(data.get("domains")):
            sources = domain.get("sources")
            for source in sources if isinstance(sources, list) else ():
                if isinstance(source, dict):
                    resolve_path(source, "path", folder)


def _expand_variables(node: Any) -> Any:
    """Replace `${NAME}` in every text by the environment variable of that name."""
    if isinstance(node, dict):
        return {key: _expand_variables(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand_variables(value) for value in node]
    if not isinstance(node, str):
        return node
    if missing := [name for name in _VARIABLE.findall(node) if name not in os.environ]:
        raise ConfigError(f"{node}: the environment variable {missing[0]} is not set; set it, or write the path itself")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], node)


def sections_of(tree: Any) -> list[dict[str, Any]]:
    """The mappings among the values of a mapping; none if it is no mapping."""
    return [value for value in tree.values() if isinstance(value, dict)] if isinstance(tree, dict) else []


def resolve_path(section: dict[str, Any], key: str, folder: Path) -> None:
    """Take a relative path from a folder if it exists there, in place."""
    value = section.get(key)
    if isinstance(value, str) and value and not Path(value).is_absolute() and (folder / value).exists():
        section[key] = str(folder / value)
