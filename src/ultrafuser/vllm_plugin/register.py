"""The entry point that vLLM calls in each of its processes: says what a fused model is and which class runs it.

Nothing here loads torch or a model. An unsupported vLLM still serves everything else: only a fused model is refused.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from ultrafuser.errors import ConfigError, UltrafuserError
from ultrafuser.vllm_plugin.versions import ANY_VERSION, check_version

ARCHITECTURE = "FusedForCausalLM"
MODEL_CLASS = "ultrafuser.vllm_plugin.model:FusedForVllm"


def register() -> None:
    """Make `FusedForCausalLM` known to vLLM; calling it again changes nothing."""
    from transformers import AutoConfig
    from vllm.version import __version__

    from ultrafuser.model.configuration import FusedConfig

    _show_our_errors_in_one_line()
    try:
        check_version(__version__, unchecked=bool(os.environ.get(ANY_VERSION)))
    except ConfigError as error:
        AutoConfig.register(FusedConfig.model_type, _refusing(error), exist_ok=True)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ultrafuser.vllm_plugin.settings import FusedSettings

    AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = FusedSettings
    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)


def _refusing(error: ConfigError) -> type[Any]:
    """A configuration that cannot be read: the first thing that vLLM does with a model."""
    from ultrafuser.model.configuration import FusedConfig

    class RefusedConfig(FusedConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            del config_dict, kwargs
            raise error

    return RefusedConfig


def _show_our_errors_in_one_line() -> None:
    """A user's mistake ends `vllm serve` with one line, as it ends our own commands; a bug keeps its traceback."""
    if getattr(sys.excepthook, "shows_ultrafuser_errors", False):
        return
    previous = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UltrafuserError):
            print(f"ultrafuser: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    show.shows_ultrafuser_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show
