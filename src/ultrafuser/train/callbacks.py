"""Code of the user's own that is told how training goes, and may ask it to stop.

A callback is an object with any of the methods of `Callback`, a class of such (made without arguments), or a function,
which is told of every step. Of several processes the first calls them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.errors import ConfigError

if TYPE_CHECKING:
    from ultrafuser.train.phase import Phase

HOOKS = ("on_phase_begin", "on_step", "on_validation", "on_checkpoint", "on_phase_end")


class StopTraining(Exception):  # noqa: N818  it is a wish and no error
    """Raised by a callback: training saves a checkpoint of this step and stops; the same command goes on from there.

    Its text is the reason, as the user is told it.
    """


class Callback:
    """What a callback may listen to; each method does nothing unless it is overridden.

    Deriving from this class is optional. Any method may raise `StopTraining`; any other exception stops training at
    once, with its traceback, and the last checkpoint stands.
    """

    def on_phase_begin(self, phase: Phase, step: int) -> object:
        """A phase begins with `step` steps done before; a phase that was finished before is not begun again."""

    def on_step(self, values: Mapping[str, Any]) -> object:
        """A step is done: its line of `metrics.jsonl`, as plain values; `values["step"]` counts from 0."""

    def on_validation(self, losses: Mapping[str, float]) -> object:
        """Validation is done: response loss of each domain, nats per token. Comes after `on_step`."""

    def on_checkpoint(self, step: int, folder: Path) -> object:
        """A whole checkpoint of `step` steps is on the disk, in this folder."""

    def on_phase_end(self, phase: Phase) -> object:
        """The last step of a phase is done and saved. Not called where training stops before."""


class NamedCallback:
    """A callback under the name that messages give it.

    Args:
        name: As the recipe has it, or the name of its class or function.
        callback: Object, class or function.

    Raises:
        ConfigError: It has no method that is ever called, or one of a name that is not.
    """

    def __init__(self, name: str, callback: object) -> None:
        self.name = name
        if inspect.isclass(callback):
            try:
                callback = callback()
            except TypeError as error:
                raise ConfigError(f"callback {name}: a class is made without arguments, but {error}") from error
        wrong = sorted(hook for hook in dir(callback) if hook.startswith("on_") and hook not in HOOKS)
        self._hooks = {hook: getattr(callback, hook) for hook in HOOKS if callable(getattr(callback, hook, None))}
        if not self._hooks and callable(callback):
            self._hooks = {"on_step": callback}
        if wrong or not self._hooks:
            raise ConfigError(
                f"callback {name} has {', '.join(wrong) or 'nothing that can be called'}: what training calls is a "
                f"function of a step's values, or a method {', '.join(HOOKS)}"
            )

    def call(self, hook: str, *arguments: object) -> None:
        """Call a method if the callback has it; what it raises carries a note of where that was."""
        if hook in self._hooks:
            try:
                self._hooks[hook](*arguments)
            except StopTraining:
                raise
            except Exception as error:
                error.add_note(f"raised by the callback {self.name} in {hook}; the last checkpoint stands")
                raise


def load_callbacks(specs: Iterable[str]) -> list[NamedCallback]:
    """Import the callbacks that a recipe names, as `module:name`.

    This runs code of theirs. Modules are looked for as Python does it, and then in the working directory.

    Raises:
        ConfigError: No such module or name, or nothing that can be called; says which.
    """
    return [_load(spec) for spec in specs]


def name_callbacks(callbacks: Iterable[object]) -> list[NamedCallback]:
    """Callbacks given in Python, under the names of their classes or functions.

    Raises:
        ConfigError: See `NamedCallback`.
    """
    return [NamedCallback(getattr(found, "__qualname__", type(found).__qualname__), found) for found in callbacks]


def _load(spec: str) -> NamedCallback:
    module_name, separator, name = spec.partition(":")
    if not (separator and module_name and name):
        raise ConfigError(f"train.callbacks: {spec!r} is no callback: write module:name, for example my_module:watch")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # behind everything installed, so a file here hides none of it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the callback's own module needs is the user's to see, with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"train.callbacks: there is no module {module_name!r}, installed or in {here} (for {spec!r})"
        ) from error
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"train.callbacks: {module_name} has no {name!r}")
        found = getattr(found, part)
    return NamedCallback(spec, found)
