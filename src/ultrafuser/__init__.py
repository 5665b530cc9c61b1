"""UltraFuser: several fine-tuned language models become one that is as good as the best of them everywhere.

Public names load on first use, so the command line answers `--help` without waiting for torch. For the same
reason the fused model joins the Auto classes of transformers when those load, and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrafuser.chat.library import load_template
    from ultrafuser.chat.messages import Conversation, Message
    from ultrafuser.chat.template import Template
    from ultrafuser.config.load import load_recipe
    from ultrafuser.config.recipe import Recipe
    from ultrafuser.engine.engine import Engine
    from ultrafuser.engine.generator import EngineGenerator
    from ultrafuser.engine.load import load_engine
    from ultrafuser.engine.options import EngineOptions
    from ultrafuser.errors import UltrafuserError
    from ultrafuser.generation import AnswerScore, Completion, Generator, SamplingParams
    from ultrafuser.model.configuration import FusedConfig
    from ultrafuser.model.fused import FusedForCausalLM
    from ultrafuser.model.gate import Gate
    from ultrafuser.model.generator import FusedGenerator

__version__ = "0.1.0"

__all__ = [
    "AnswerScore",
    "Completion",
    "Conversation",
    "Engine",
    "EngineGenerator",
    "EngineOptions",
    "FusedConfig",
    "FusedForCausalLM",
    "FusedGenerator",
    "Gate",
    "Generator",
    "Message",
    "Recipe",
    "SamplingParams",
    "Template",
    "UltrafuserError",
    "__version__",
    "load_engine",
    "load_recipe",
    "load_template",
]

_HOME = {
    "AnswerScore": "ultrafuser.generation",
    "Completion": "ultrafuser.generation",
    "Conversation": "ultrafuser.chat.messages",
    "Engine": "ultrafuser.engine.engine",
    "EngineGenerator": "ultrafuser.engine.generator",
    "EngineOptions": "ultrafuser.engine.engine",
    "FusedConfig": "ultrafuser.model.configuration",
    "FusedForCausalLM": "ultrafuser.model.fused",
    "FusedGenerator": "ultrafuser.model.generator",
    "Gate": "ultrafuser.model.gate",
    "Generator": "ultrafuser.generation",
    "Message": "ultrafuser.chat.messages",
    "Recipe": "ultrafuser.config.recipe",
    "SamplingParams": "ultrafuser.generation",
    "Template": "ultrafuser.chat.template",
    "UltrafuserError": "ultrafuser.errors",
    "load_engine": "ultrafuser.engine.load",
    "load_recipe": "ultrafuser.config.load",
    "load_template": "ultrafuser.chat.library",
}

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
# Registers itself with AutoConfig; a configuration that is read brings its model (`FusedConfig.from_dict`).
_OUR_CONFIG = "ultrafuser.model.configuration"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _WhenAutoConfigLoads(MetaPathFinder):
    """Imports our configuration right after transformers' own AutoConfig; then steps aside."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_OUR_CONFIG)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO_CONFIG in sys.modules:
    importlib.import_module(_OUR_CONFIG)
else:
    sys.meta_path.insert(0, _WhenAutoConfigLoads())
