"""The hooks `generate()` calls: a cache per specialist, each step's inputs, which tokens end an answer.

`generate()` keeps one growing row of ids. A specialist's own row is its constant prompt, left-padded to the
common length P, followed by the columns from P on, which are the response and the same for all.

Shapes: B rows, T columns so far, P prompt columns, N specialists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

from ultrafuser.model.cache import FusedCache, JointCache

_PER_SPECIALIST = ("specialist_input_ids", "specialist_attention_mask", "prompt_length")


class FusedDecoding:
    """Mixin of `FusedForCausalLM`: what `GenerationMixin` asks of a model."""

    specialists: Any
    config: Any

    if TYPE_CHECKING:

        @property
        def names(self) -> list[str]: ...

        @property
        def active_names(self) -> list[str]: ...

        @property
        def runs_jointly(self) -> bool: ...

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let each specialist build its own cache, of whatever kind was asked for, and hold them together."""
        prompt_mask = model_kwargs.get("specialist_attention_mask", model_kwargs.get("attention_mask"))
        if isinstance(prompt_mask, Tensor):
            model_kwargs["prompt_length"] = prompt_mask.shape[-1]
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        if self.runs_jointly:
            own: dict[str, Any] = {}
            num_rows = batch_size * len(self.names)
            self.specialists[self.names[0]]._prepare_cache_for_generation(
                generation_config, own, generation_mode, num_rows, max_cache_length
            )
            # One of constant shape is for compiled steps, whose masks are made for each specialist.
            if not own["past_key_values"].is_compileable:
                model_kwargs["past_key_values"] = JointCache(own["past_key_values"], len(self.names))
                return
        views: dict[str, Cache] = {}
        for name in self.active_names:
            own = {}
            self.specialists[name]._prepare_cache_for_generation(
                generation_config, own, generation_mode, batch_size, max_cache_length
            )
            views[name] = own["past_key_values"]
        model_kwargs["past_key_values"] = FusedCache(views)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        specialist_input_ids: Tensor | None = None,
        specialist_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step: the new columns of every specialist's view, masks over all columns.

        Args:
            input_ids: [B, T] all columns so far, or without `next_sequence_length` the new ones alone, which follow
                what the cache holds: so `generate()` reads a prompt in chunks.
            next_sequence_length: How many columns are new; None: all of `input_ids`.
            specialist_input_ids: [B, N, P] constant prompts.
            specialist_attention_mask: [B, N, P] for these.
        """
        new, stop = int(next_sequence_length or input_ids.shape[1]), input_ids.shape[1]
        if next_sequence_length is None and past_key_values is not None:
            stop += int(past_key_values.get_seq_length())
        inputs: dict[str, Any] = {
            # Cloned, not `contiguous()`: one row's column would keep a stride that grows, and be compiled again.
            "input_ids": input_ids[:, -new:].clone(memory_format=torch.contiguous_format),
            "past_key_values": past_key_values,
            **{key: value for key, value in kwargs.items() if key not in ("position_ids", "labels")},
        }
        if (num_prompt := inputs.pop("prompt_length", None)) is not None and stop - new < num_prompt <= stop:
            inputs["prompt_length"] = num_prompt - (stop - new)
        masks: Tensor | None = attention_mask
        if specialist_input_ids is not None:
            assert specialist_attention_mask is not None, "prompts come with their masks"
            prompts = specialist_input_ids[..., stop - new : stop]
            response = inputs["input_ids"][:, None, prompts.shape[-1] :].expand(-1, len(self.names), -1)
            inputs["specialist_input_ids"] = torch.cat([prompts, response], dim=-1).contiguous()
            seen = specialist_attention_mask[..., :stop]
            ones = seen.new_ones((*seen.shape[:-1], stop - seen.shape[-1]))
            masks = inputs["specialist_attention_mask"] = torch.cat([seen, ones], dim=-1)
        else:
            inputs["attention_mask"] = attention_mask
        # Not for a prompt: prompts differ in length, so there is nothing to compile once.
        one_shape = isinstance(past_key_values, FusedCache) and past_key_values.is_compileable
        if one_shape and masks is not None and not is_first_iteration:
            assert isinstance(past_key_values, FusedCache)
            self._static_masks(inputs, masks, past_key_values, new)
        return inputs

    def _static_masks(self, inputs: dict[str, Any], masks: Tensor, cache: FusedCache, new: int) -> None:
        """Replace growing 2-D masks by 4-D ones of constant shape, so that a compiled step is compiled once."""
        if masks.dim() == 2:
            masks = masks[:, None].expand(-1, len(self.names), -1)
            inputs["attention_mask"] = None
        prepared: list[Any] = [None] * len(self.names)
        positions = (masks.long().cumsum(dim=-1)[..., -new:] - 1).clamp(min=0)
        for name in self.active_names:
            j = self.names.index(name)
            specialist = self.specialists[name]
            prepared[j] = create_masks_for_generate(
                config=specialist.config,
                inputs_embeds=torch.empty(
                    (masks.shape[0], new, 0), dtype=specialist.dtype, device=inputs["input_ids"].device
                ),
                attention_mask=masks[:, j],
                past_key_values=cache.views[name],
                position_ids=positions[:, j],
            )
        inputs["specialist_attention_mask"] = prepared
        inputs["specialist_position_ids"] = positions

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Assisted decoding: an assistant is an ordinary LM and knows nothing of per-specialist prompts."""
        model_kwargs = {k: v for k, v in kwargs.pop("model_kwargs").items() if k not in _PER_SPECIALIST}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]
