"""What vLLM asks before it starts its workers: is this model servable, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ultrafuser.errors import ConfigError
from ultrafuser.vllm_plugin.checks import check_folder, check_options, check_vocabulary, longest_context, template_names

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.ultrafuser")


class FusedSettings(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Called in the process that the user started, so that a mistake is told there and before anything is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the checkpoint and fit the context to the specialist that reads least.

        Raises:
            ConfigError: An option of the model that vLLM cannot follow, or a context that a specialist cannot read.
            ModelError: A file or a weight is missing, or is not the one that the gate was trained with.
            VocabularyError: Weights or tokenizer do not fit the vocabulary.
        """
        config = model_config.hf_config
        check_options(config)
        if model_config.enable_prompt_embeds:
            raise ConfigError("--enable-prompt-embeds: a fused model reads token ids, for each specialist embeds them")
        folder = Path(str(model_config.model))
        if folder.is_dir():
            check_folder(folder, config)
            if not model_config.skip_tokenizer_init:
                check_vocabulary(model_config.tokenizer, config)
        longest = longest_context(config)
        if model_config.max_model_len > longest:
            if model_config.original_max_model_len not in (None, -1):
                raise ConfigError(
                    f"--max-model-len {model_config.max_model_len} is more than the {longest} tokens that the shortest "
                    "specialist reads: lower it"
                )
            model_config.max_model_len = longest
        if len(names := template_names(config)) > 1:
            logger.warning(
                "the specialists were trained with different templates (%s); chat uses one for all, which costs "
                "quality: ultrafuser export MODEL --for vllm makes a model with a shared one and measures the cost",
                ", ".join(names),
            )

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse ways of running that would need n hidden states where vLLM passes one.

        Raises:
            ConfigError: Pipeline parallelism, LoRA adapters, or a drafter that reads hidden states.
        """
        parallel: Any = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ConfigError("--pipeline-parallel-size: a fused model cannot be cut by layers; use tensor parallelism")
        if vllm_config.lora_config is not None:
            raise ConfigError("--enable-lora: a fused model takes no adapters; merge them into its specialists")
        drafter = vllm_config.speculative_config
        if drafter is not None and drafter.method not in ("ngram", "ngram_gpu", "draft_model", "suffix"):
            raise ConfigError(
                f"speculation by {drafter.method!r} reads one model's hidden states, of which a fused model has n: "
                "use ngram or draft_model"
            )
