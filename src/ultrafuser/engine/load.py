"""From what a user types to an engine."""

from __future__ import annotations

from typing import Any, get_args

from ultrafuser.engine.drafts import DraftKind
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.runner import RunnerKind
from ultrafuser.engine.weights import DraftWeights, WeightFormat
from ultrafuser.errors import ConfigError
from ultrafuser.model.load import LoadOptions, load_model


def load_engine(place: str, options: EngineOptions = EngineOptions(), load: LoadOptions = LoadOptions()) -> Engine:
    """Load a fused model (full or gate-only), or an ordinary model alone, and make an engine of it.

    Args:
        place: Folder or hub id.
        options: Of the engine.
        load: Of the weights; the template counts for ordinary models.

    Raises:
        ConfigError: An unknown dtype or an option that the model does not allow.
        ModelError: There is no model at the place, or the engine cannot run it.
    """
    model, tokenizer = load_model(place, load)
    return Engine(model, tokenizer, options)


def make_options(**values: Any) -> EngineOptions:
    """Options from what a user typed.

    Raises:
        ConfigError: A runner, format or kind of draft that there is not.
    """
    known = {
        "runner": get_args(RunnerKind),
        "weights": get_args(WeightFormat),
        "drafts": get_args(DraftKind),
        "draft_weights": get_args(DraftWeights),
    }
    for option, choices in known.items():
        given = values.get(option, ())
        for value in (given,) if isinstance(given, str) else given:
            if value not in choices:
                raise ConfigError(f"{option} {value!r} is not known: choose of {', '.join(choices)}")
    return EngineOptions(**values)
