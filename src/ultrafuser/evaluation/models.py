"""The models under test: from what a user types to a Generator.

A place is a folder or hub id of a fused model, of an ordinary model (fused alone, n = 1), or the address of an
OpenAI-compatible endpoint with the model's name after a `#`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ultrafuser.errors import ConfigError
from ultrafuser.generation import Generator
from ultrafuser.model.load import LoadOptions, load_model

if TYPE_CHECKING:
    from ultrafuser.model.generator import FusedGenerator


def parse_model(text: str) -> tuple[str, str]:
    """Name and place of `NAME=PLACE`; a place alone is named after its last part.

    Raises:
        ConfigError: Either is empty.
    """
    before, sign, after = text.partition("=")
    named = bool(sign) and "/" not in before and ":" not in before
    name, place = (before, after) if named else (_short_name(text), text)
    if not name or not place:
        raise ConfigError(f"{text!r} is no model: write PLACE or NAME=PLACE")
    return name, place


def is_endpoint(place: str) -> bool:
    """Whether a place is an address and not a model at hand."""
    return place.startswith(("http://", "https://"))


def load_generator(place: str, options: LoadOptions = LoadOptions()) -> Generator:
    """Load a model under test.

    Raises:
        ConfigError: An endpoint without a model name, an unknown dtype, or a device that is not here.
        ModelError: There is no model at the place, or it cannot be loaded.
    """
    if is_endpoint(place):
        from ultrafuser.evaluation.remote import Endpoint

        url, _, model = place.partition("#")
        if not model:
            raise ConfigError(f"{place!r} names no model: write {place}#MODEL")
        return Endpoint(url, model)
    from ultrafuser.model.generator import FusedGenerator

    return FusedGenerator(*load_model(place, options))


def weights_digest(generator: Generator) -> str | None:
    """The hash of a fused model's weights, for `model_digest`; None for any other generator."""
    from ultrafuser.model.generator import FusedGenerator
    from ultrafuser.model.specialist import state_digest

    return state_digest(generator.model) if isinstance(generator, FusedGenerator) else None


def model_digest(generator: Generator, weights: str | None = None) -> str:
    """What identifies a generator in the journal.

    Args:
        generator: Any.
        weights: From `weights_digest`, to hash the weights of a model once however many ways it is asked.

    Raises:
        ConfigError: It is no fused model and has no `digest`.
    """
    from ultrafuser.evaluation.digest import generator_digest
    from ultrafuser.model.generator import FusedGenerator

    if isinstance(generator, FusedGenerator):
        return generator_digest(generator, weights)
    if isinstance(digest := getattr(generator, "digest", None), str) and digest:
        return digest
    raise ConfigError(f"a {type(generator).__name__} has no digest: give it an attribute `digest` that identifies it")


def answering_alone(generator: Generator, specialist: str | None) -> AbstractContextManager[Generator]:
    """The generator, with one specialist of a fused model answering alone while it lasts; None changes nothing."""
    return nullcontext(generator) if specialist is None else cast("FusedGenerator", generator).alone(specialist)


def specialist_names(generator: Generator) -> list[str]:
    """The specialists of a fused model of several; else none."""
    from ultrafuser.model.generator import FusedGenerator

    names = generator.names if isinstance(generator, FusedGenerator) else []
    return names if len(names) > 1 else []


def _short_name(place: str) -> str:
    if "#" in place:
        return place.rpartition("#")[2]
    path = Path(place)
    # runs/demo/model is the model of the run "demo".
    return path.parent.name if path.name == "model" and path.parent.name else path.name
