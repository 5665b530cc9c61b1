"""What vLLM asks before it starts its workers: is this model servable, and with which settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ultrafuser.errors import ConfigError
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.vllm_plugin.checks import check_folder, check_options, check_vocabulary, longest_context, template_names
from ultrafuser.vllm_plugin.requests import OPTION
from ultrafuser.vllm_plugin.weights import running_names

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.ultrafuser")
PROCESSOR = "ultrafuser.vllm_plugin.processors:{runner}_{num_specialists}_{vocab_size}"


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
        if own := wants_own_prompts(vllm_config):
            _fit_to_own_prompts(vllm_config)
        if drafter is None:  # beside which the first runner takes no processors
            _check_requests(vllm_config, own)


def wants_own_prompts(vllm_config: VllmConfig) -> bool:
    """Whether the server was started to give each specialist its own prompt.

    Raises:
        ConfigError: The option is neither true nor false.
    """
    extra = vllm_config.additional_config
    wanted = extra.get(OPTION, False) if isinstance(extra, dict) else False
    if not isinstance(wanted, bool):
        raise ConfigError(f"--additional-config: {OPTION} is true or false, not {wanted!r}")
    return wanted


def _fit_to_own_prompts(vllm_config: Any) -> None:
    """Switch off what counts on one prompt a request, and refuse what cannot be switched off."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    is_cpu = current_platform.is_cpu()
    refused = {
        "speculation, which drafts from one prompt": vllm_config.speculative_config is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "microbatches (--enable-dbo)": parallel.use_ubatching,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "vLLM's first model runner on a GPU (unset VLLM_USE_V2_MODEL_RUNNER)": not (
            vllm_config.use_v2_model_runner or is_cpu
        ),
    }
    for what in (what for what, is_so in refused.items() if is_so):
        raise ConfigError(f"{OPTION} cannot be had with {what}: leave one of them out")
    for name in running_names(config):
        part = config.specialist_configs[name].get_text_config()
        if "sliding_attention" in (getattr(part, "layer_types", None) or ()) or (
            getattr(part, "sliding_window", None) and getattr(part, "use_sliding_window", True)
        ):
            raise ConfigError(
                f"specialist {name!r} attends to a sliding window, whose blocks vLLM frees by the longest prompt: it "
                f"cannot be served with {OPTION}"
            )
    # A cached block is found by the longest prompt, which says nothing of the others.
    vllm_config.cache_config.enable_prefix_caching = False
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    logger.warning(
        "%s is experimental: it ran on CPUs, never yet on a GPU; prefix caching and CUDA graphs are switched off",
        OPTION,
    )


def _check_requests(vllm_config: Any, own: bool) -> None:
    model_config: Any = vllm_config.model_config
    config: FusedConfig = model_config.hf_config
    name = PROCESSOR.format(
        runner="Second" if vllm_config.use_v2_model_runner else "First",
        num_specialists=len(running_names(config)) if own else 0,
        vocab_size=config.vocab_size,
    )
    others = [one for one in model_config.logits_processors or () if one != name]
    model_config.logits_processors = [*others, name]
