"""beartype as the tests use it, where every function and method of the package is decorated on its own."""

from collections.abc import Callable
from typing import Any, Self, TypeVar

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

Function = TypeVar("Function", bound=Callable[..., Any])

# A method decorated alone cannot know what `Self` is.
_checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))


def check_calls(function: Function) -> Function:
    try:
        return _checked(function)
    except BeartypeDecorHintPep3119Exception:
        # A Protocol that is not @runtime_checkable can be checked by mypy alone.
        return function
