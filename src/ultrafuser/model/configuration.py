"""FusedConfig: an ordered list of specialists, one gate, and how their logits are fused."""

from __future__ import annotations

import importlib
import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ultrafuser.errors import ConfigError

FUSION_SPACES = ("logits", "logprobs", "probs")
WEIGHTINGS = ("gate", "uniform", "perplexity")
GRANULARITIES = ("token", "prompt")

# `getattr(config, "specialist_text")` is how transformers finds the configuration of a part.
_PREFIX = "specialist_"


class FusedConfig(PreTrainedConfig):
    """Configuration of a `FusedForCausalLM`.

    Args:
        specialists: `{"name": ..., "config": ...}` in order. A list, since JSON sorts the keys of an object.
        templates: `{"name": ..., "source": ..., "end_of_turn": [...]}` for each specialist, in order; empty when the
            model was built without templates and reads ordinary `input_ids` alone.
        end_token: The shared end token that closes every response, as text.
        gate_hidden_size, gate_num_layers: Size of the gate (paper: 512 and 2).
        granularity: `token` weighs at every token (paper); `prompt` keeps the weights of the last prompt token.
        fusion_space: `logits` (Equation 1), `logprobs` or `probs`.
        weighting: `gate` (paper), `uniform`, or `perplexity` (PackLLM, training-free).
        perplexity_temperature: Softness of the perplexity weights.
        solo: Name of the one specialist that answers alone, for ablation; None fuses.
        shared_base: The specialists are adapters of one model, whose weights are kept once.
        gate_only: The folder holds the gate alone and refers to its specialists by `sources`.
        sources: `{"name", "model", "revision", "gguf_file", "adapter", "dtype", "digest"}` of each, in order.
        vocab_size: Tokens that all specialists share.

    Raises:
        ConfigError: A name that cannot be used, twice the same name, or an unknown option.
    """

    model_type = "ultrafuser"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        specialists: list[dict[str, Any]] | None = None,
        templates: list[dict[str, Any]] | None = None,
        end_token: str | None = None,
        gate_hidden_size: int = 512,
        gate_num_layers: int = 2,
        granularity: str = "token",
        fusion_space: str = "logits",
        weighting: str = "gate",
        perplexity_temperature: float = 1.0,
        solo: str | None = None,
        shared_base: bool = False,
        gate_only: bool = False,
        sources: list[dict[str, Any]] | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        configs = {str(part["name"]): _as_config(part["config"]) for part in specialists or []}
        if len(configs) != len(specialists or []):
            raise ConfigError("two specialists have the same name")
        for name in configs:
            check_name(name)
        for option, value, known in (
            ("fusion_space", fusion_space, FUSION_SPACES),
            ("weighting", weighting, WEIGHTINGS),
            ("granularity", granularity, GRANULARITIES),
            ("solo", solo, (None, *configs)),
        ):
            if value not in known:
                raise ConfigError(f"{option} is {value!r}; choose one of {', '.join(map(str, known))}")
        # Set before super().__init__: it hands the attention implementation to every part.
        self._specialist_configs = configs
        self.templates = list(templates or [])
        self.end_token = end_token
        self.gate_hidden_size = gate_hidden_size
        self.gate_num_layers = gate_num_layers
        self.granularity = granularity
        self.fusion_space = fusion_space
        self.weighting = weighting
        self.perplexity_temperature = perplexity_temperature
        self.solo = solo
        self.shared_base = shared_base
        self.gate_only = gate_only
        self.sources = list(sources or [])
        self.vocab_size = vocab_size or min((config.vocab_size for config in configs.values()), default=0)
        # Heads are tied, or not, inside each specialist.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        # Whoever holds a configuration may ask the Auto classes for its model next: register it.
        importlib.import_module("ultrafuser.model.fused")

    @property
    def specialist_configs(self) -> dict[str, PreTrainedConfig]:
        """Configuration of each specialist by name, in order."""
        return self._specialist_configs

    @property
    def names(self) -> list[str]:
        """Names of the specialists, in order."""
        return list(self._specialist_configs)

    @property
    def hidden_sizes(self) -> list[int]:
        """Width of each specialist's last hidden state, in order."""
        return [_hidden_size(config.get_text_config()) for config in self._specialist_configs.values()]

    @property
    def hidden_size(self) -> int:
        """Width of the fused model's last hidden state: the sum over specialists."""
        return sum(self.hidden_sizes)

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """Where transformers finds the parts, so that dtype and attention implementation reach them."""
        return {_PREFIX + name: type(config) for name, config in self.__dict__.get("_specialist_configs", {}).items()}

    def __getattr__(self, key: str) -> Any:
        configs = self.__dict__.get("_specialist_configs", {})
        if key.startswith(_PREFIX) and key.removeprefix(_PREFIX) in configs:
            return configs[key.removeprefix(_PREFIX)]
        raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The first specialist's: what a tool that expects one backbone should see."""
        del decoder, encoder
        for config in self._specialist_configs.values():
            text_config: PreTrainedConfig = config.get_text_config()
            return text_config
        return self

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read plain values, and bring the model: `AutoModelForCausalLM` knows it from then on."""
        import ultrafuser.model.fused  # noqa: F401

        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the specialists as an ordered list."""
        output: dict[str, Any] = super().to_dict()
        output.pop("_specialist_configs", None)
        parts = []
        for name, config in self._specialist_configs.items():
            plain = config.to_dict()
            plain.pop("transformers_version", None)
            parts.append({"name": name, "config": plain})
        output["specialists"] = parts
        return output


def check_name(name: str) -> None:
    """Refuse names that would break saved weights, transformers or vLLM.

    Raises:
        ConfigError: Not a lower-case identifier.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"specialist name {name!r}: use lower-case letters, digits and _, starting with a letter")


def _hidden_size(config: PreTrainedConfig) -> int:
    # OPT-350m alone projects its last hidden state before the head.
    size: int = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return size


def _as_config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
