"""Who is told how a run goes: made once for a run, before any weight loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ultrafuser.config.recipe import Recipe
from ultrafuser.train.callbacks import NamedCallback, load_callbacks, name_callbacks
from ultrafuser.train.tracking.tracker import choose_trackers


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told of a run besides metrics file and progress.

    Attributes:
        run: Name of the recipe.
        config: The resolved recipe as plain values.
        trackers: Their names.
        callbacks: In the order in which they are called.
    """

    run: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    trackers: tuple[str, ...] = ()
    callbacks: tuple[NamedCallback, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, callbacks: Sequence[object] = ()) -> Self:
        """Those of a recipe, then callbacks given in Python.

        Raises:
            ConfigError: A tracker that is not installed or cannot begin, or a callback that is none.
        """
        return cls(
            run=recipe.name,
            config=recipe.model_dump(mode="json"),
            trackers=choose_trackers(recipe.train.trackers),
            callbacks=(*load_callbacks(recipe.train.callbacks), *name_callbacks(callbacks)),
        )
