"""A recipe for the doctor: one whose environment variables need not be set yet.

Training refuses such a recipe; an examination says what is unset and goes on with the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ultrafuser.config.load import load_recipe
from ultrafuser.config.recipe import Recipe

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def load_to_examine(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe as `load_recipe` does, but leave `${NAME}` as it stands where NAME is not set.

    Raises:
        ConfigError: As `load_recipe`.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    with _standing_for_themselves(unset_variables("\n".join([text, *overrides]))):
        return load_recipe(path, overrides)


def unset_variables(text: str) -> list[str]:
    """Environment variables that a text names as `${NAME}` and that are not set."""
    return [name for name in dict.fromkeys(_VARIABLE.findall(text)) if name not in os.environ]


@contextmanager
def _standing_for_themselves(names: Sequence[str]) -> Iterator[None]:
    """Set each variable to its own `${NAME}` for a while, so that reading the recipe leaves it in place."""
    os.environ.update({name: "${" + name + "}" for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
