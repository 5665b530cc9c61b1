"""From what a user types to an engine."""

from __future__ import annotations

from ultrafuser.engine.engine import Engine, EngineOptions
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
