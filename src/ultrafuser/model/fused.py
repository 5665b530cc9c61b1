"""FusedForCausalLM: n specialists and a gate as one causal LM of transformers (Equation 1).

Every specialist runs on every token, in its own chat template; the gate weighs their logits.

Shapes: B rows, T columns, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import head_logits, last_hidden_state, linear_head
from ultrafuser.model.cache import FusedCache, JointCache
from ultrafuser.model.columns import previous_visible, response_columns, response_starts, visible_positions
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.decoding import FusedDecoding
from ultrafuser.model.fusion import fuse_logits, gate_weights, hold_scores, perplexity_scores, uniform_scores
from ultrafuser.model.gate import Gate
from ultrafuser.model.joint import build_joint, joint_hidden_states, runs_jointly
from ultrafuser.model.loss import Head, LossBackend, TokenLoss, fused_loss

if TYPE_CHECKING:
    from ultrafuser.chat.template import Template
    from ultrafuser.config.recipe import Recipe, SpecialistConfig

logger = logging.getLogger(__name__)

_WHOLE_PROMPT = (
    "perplexity weights need the whole prompt in one forward: no chunked prefill, and prompt_length with a cache"
)
_LOADING_WISHES = (
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
)


@dataclass
class FusedOutput(CausalLMOutputWithPast):
    """Output of `FusedForCausalLM.forward`.

    Attributes:
        loss: Mean NLL over labelled tokens, nats; None without labels.
        logits: [B, T, V], fp32; None in training unless `skip_logits=False`.
        past_key_values: The advanced cache.
        gate_weights: [B, T, N]: weights of the specialists in predicting the token after each column.
    """

    gate_weights: Tensor | None = None


class FusedForCausalLM(FusedDecoding, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Several specialists that write one text.

    Build it with `from_specialists`, load it with `from_pretrained`.
    """

    config_class = FusedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # The pattern is matched against module names; Llama's gate_proj must not match.
    _keep_in_fp32_modules_strict = ["fusion_gate"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        self.specialists = nn.ModuleDict(
            {name: AutoModelForCausalLM.from_config(part) for name, part in config.specialist_configs.items()}
        )
        self.fusion_gate = Gate(
            dict(zip(config.names, config.hidden_sizes, strict=True)),
            hidden_size=config.gate_hidden_size,
            num_layers=config.gate_num_layers,
        ).float()
        self.last_gate_weights: Tensor | None = None  # of the latest forward, for whoever watches generate()
        self._joint: tuple[Any, PreTrainedModel] | None = None  # a tuple: no part of this model's own modules
        self._joins: bool | None = None
        self.loss_chunk = 1024
        self.loss_backend: LossBackend = "chunked"
        # Specialists left out at load are in the file and not here, on purpose.
        mine = "|".join(config.names)
        self._keys_to_ignore_on_load_unexpected = [rf"^(specialists|fusion_gate\.projections)\.(?!({mine})\.)"]
        self.post_init()  # type: ignore[no-untyped-call]
        self._adopt_specialists()

    def _adopt_specialists(self) -> None:
        """Know of tied heads and of what the specialists ask of a loader; `post_init` sees direct children only."""
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        for specialist in self.specialists.values():
            for wish in _LOADING_WISHES:
                getattr(self, wish).update(getattr(specialist, wish, None) or ())

    @classmethod
    def from_specialists(
        cls,
        specialists: Mapping[str, PreTrainedModel | str | Path | SpecialistConfig],
        *,
        templates: Mapping[str, str | Template] | Sequence[str | Template] | str | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Fuse models; the gate is new and untrained. See `ultrafuser.model.build.build_fused`."""
        from ultrafuser.model.build import build_fused

        fused: Self = build_fused(
            cls, specialists, templates=templates, tokenizer=tokenizer, dtype=dtype, seed=seed, **options
        )
        return fused

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, tokenizer: Any = None) -> Self:
        """Fuse the specialists of a recipe as they are on disk; the gate is new and untrained."""
        from ultrafuser.model.build import build_from_recipe

        fused: Self = build_from_recipe(cls, recipe, tokenizer=tokenizer)
        return fused

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved fusion, full or gate-only; `ultrafuser.model.checkpoint.load_fused` has `without` and `add`."""
        from ultrafuser.model.checkpoint import load_fused

        return load_fused(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write all weights; where specialists have adapters, frozen weights, adapters and gate apart."""
        from ultrafuser.model.adapter_files import has_adapters
        from ultrafuser.model.checkpoint import write_adapted

        if has_adapters(self):
            write_adapted(self, save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def names(self) -> list[str]:
        """Names of the specialists, in order."""
        return list(self.specialists)

    @property
    def active_names(self) -> list[str]:
        """Specialists that run: all, or the one named by `config.solo`."""
        return [self.config.solo] if self.config.solo else self.names

    def get_input_embeddings(self) -> nn.Module:
        """The first specialist's."""
        module: nn.Module = self.specialists[self.names[0]].get_input_embeddings()
        return module

    def get_output_embeddings(self) -> None:
        """None: the fused model has n heads, tied or not inside each specialist."""

    def head(self, name: str, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """Logits of one specialist."""
        return head_logits(self.specialists[name], hidden)

    def loss_head(self, name: str) -> Head:
        """One specialist's head as the loss wants it: tensors where it is one linear layer, else a function."""
        return linear_head(self.specialists[name]) or partial(self.head, name)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        specialist_input_ids: Int[Tensor, "B N T"] | None = None,
        specialist_attention_mask: Tensor | Sequence[Any] | None = None,
        specialist_position_ids: Int[Tensor, "B N T"] | None = None,
        prompt_length: int | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> FusedOutput:
        """Run all specialists on their own view of the text and fuse what they say.

        Args:
            input_ids: Tokens that all specialists read; or the first one's view, when `specialist_input_ids` is given.
            attention_mask: [B, past + T], 1 where a token is real; padding may stand on either side.
            labels: Token of each column where it is a response token, -100 elsewhere; shifted here, as usual.
            position_ids: Positions of `input_ids`; default: counted over real tokens.
            past_key_values: A `FusedCache`; made on demand when `use_cache` is true.
            logits_to_keep: Give logits of the last so many columns only; 0 keeps all.
            specialist_input_ids: Each specialist's own view, in its template, of one length with the response aligned.
            specialist_attention_mask: [B, N, past + T] for these; or a 4-D mask each, to decode with a static cache.
            specialist_position_ids: Positions of these; default: counted over real tokens.
            prompt_length: Columns of these inputs that are prompt, where it ends among them; for granularity "prompt"
                and perplexity weights without labels.
            skip_logits: Leave logits out; default: in training with labels, where nobody reads them.
            num_items_in_batch: Divisor of the loss, as `transformers.Trainer` passes it; default: labelled tokens.

        Returns:
            `FusedOutput` with loss, logits, cache and gate weights [B, T, N].

        Raises:
            ModelError: Neither kind of input ids, or a cache that is no `FusedCache`.

        Source: Ding et al. 2024 (arXiv 2403.08281), Equation 1.
        """
        if past_key_values is None and use_cache and not self.training:
            configs = {name: self.config.specialist_configs[name] for name in self.active_names}
            past_key_values = (
                JointCache.from_configs(configs) if self.runs_jointly else FusedCache.from_configs(configs)
            )
        if past_key_values is not None and not isinstance(past_key_values, FusedCache):
            raise ModelError(f"past_key_values is a {type(past_key_values).__name__}; pass a FusedCache, or none")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        views = self._views(input_ids, attention_mask, specialist_input_ids, specialist_attention_mask)
        positions: dict[str, Tensor | None] = dict.fromkeys(views, position_ids)
        if specialist_position_ids is not None:
            positions = {name: specialist_position_ids[:, self.names.index(name)] for name in views}
        hiddens = self._hidden_states(views, positions, past_length=past_length, cache=past_key_values)
        starts = response_starts(labels, prompt_length, next(iter(views.values()))[0])
        weights = self._weights(hiddens, views, starts, past_key_values, prompt_length)
        self.last_gate_weights = weights.detach()
        loss = None
        if labels is not None:
            loss = self._loss(hiddens, weights, labels, num_items_in_batch)
        logits = None
        if not (skip_logits if skip_logits is not None else self.training and labels is not None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._fused_logits({name: hidden[:, keep] for name, hidden in hiddens.items()}, weights[:, keep])
        return FusedOutput(loss=loss, logits=logits, past_key_values=past_key_values, gate_weights=weights)

    def response_nll(
        self,
        labels: Int[Tensor, "B T"],
        specialist_input_ids: Int[Tensor, "B N T"],
        specialist_attention_mask: Int[Tensor, "B N T"],
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M N"], Bool[Tensor, "B T"]]:
        """What training and scoring need: NLL and gate weights of each response token, and no logits.

        Returns:
            NLL (nats) and weights of the M response tokens in row order, and the mask of the columns that predict them.
        """
        loss, weights, predicting = self.response_loss(labels, specialist_input_ids, specialist_attention_mask)
        return loss.nll, weights, predicting

    def response_loss(
        self,
        labels: Int[Tensor, "B T"],
        specialist_input_ids: Int[Tensor, "B N T"],
        specialist_attention_mask: Int[Tensor, "B N T"],
        *,
        details: bool = False,
    ) -> tuple[TokenLoss, Float[Tensor, "M N"], Bool[Tensor, "B T"]]:
        """As `response_nll`, and with `details` also top-1 hits and the NLL of each active specialist, in one pass."""
        views = self._views(None, None, specialist_input_ids, specialist_attention_mask)
        hiddens = self._hidden_states(views, dict.fromkeys(views))
        starts = response_starts(labels, None, labels)
        predicting, targets = response_columns(labels)
        held = self.config.granularity == "prompt" or self.config.weighting == "perplexity"
        if held:
            weights = self._weights(hiddens, views, starts, None)[predicting]
            rows = {name: hidden[predicting] for name, hidden in hiddens.items()}
        else:
            rows = {name: hidden[predicting] for name, hidden in hiddens.items()}
            weights = self._weights(rows, views, None, None)
        return self.token_loss(rows, weights, targets, details=details), weights, predicting

    def token_loss(
        self,
        rows: Mapping[str, Float[Tensor, "M _"]],
        weights: Float[Tensor, "M N"],
        targets: Int[Tensor, " M"],
        *,
        details: bool = False,
    ) -> TokenLoss:
        """Loss of tokens whose last hidden states are known, by specialist; `weights` are of all specialists."""
        return fused_loss(
            list(rows.values()),
            weights[:, [self.names.index(name) for name in rows]],
            targets,
            [self.loss_head(name) for name in rows],
            space=self.config.fusion_space,
            chunk=self.loss_chunk,
            details=details,
            backend=self.loss_backend,
        )

    @property
    def runs_jointly(self) -> bool:
        """Whether the specialists share one base and run as one forward of n x B rows."""
        if not self.config.shared_base or len(self.active_names) == 1:
            return False
        if self._joins is None:
            self._joins = runs_jointly(self._specialists_by_name())
            if not self._joins:
                logger.warning("the specialists share their base, but this architecture runs them one after another")
        return self._joins

    def _specialists_by_name(self) -> dict[str, PreTrainedModel]:
        return {name: self.specialists[name] for name in self.names}

    def joint_model(self) -> PreTrainedModel:
        """The specialists of a shared base as one model, for rows that lie specialist by specialist."""
        first = self.specialists[self.names[0]]
        checkpointing = getattr(first.base_model, "gradient_checkpointing", False)
        state = (first.device, first.dtype, checkpointing, first.config._attn_implementation)
        if self._joint is None or self._joint[0] != state:
            self._joint = (state, build_joint(self._specialists_by_name()))
        joint = self._joint[1]
        if joint.training != first.training:
            joint.train(first.training)
        return joint

    def forget_joint(self) -> None:
        """To be called when adapters are added or taken away."""
        self._joint = self._joins = None

    def _hidden_states(
        self,
        views: Mapping[str, tuple[Tensor, Any]],
        positions: Mapping[str, Tensor | None],
        *,
        past_length: int | Tensor = 0,
        cache: FusedCache | None = None,
    ) -> dict[str, Tensor]:
        """Last hidden states [B, T, H] of each active specialist, in one forward where they share a base."""
        if isinstance(cache, JointCache) or (cache is None and self.runs_jointly):
            inner = cache.joint if isinstance(cache, JointCache) else None
            return joint_hidden_states(self.joint_model(), views, positions, past_length=past_length, cache=inner)
        hiddens = {}
        for name, (ids, mask) in views.items():
            own = positions[name]
            hiddens[name] = last_hidden_state(
                self.specialists[name],
                ids,
                attention_mask=mask,
                position_ids=own if own is not None else visible_positions(mask, ids, past_length),
                cache=cache.views[name] if cache is not None else None,
            )
        return hiddens

    def _views(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        specialist_input_ids: Tensor | None,
        specialist_attention_mask: Tensor | Sequence[Any] | None,
    ) -> dict[str, tuple[Tensor, Any]]:
        """Each active specialist's ids [B, T] and mask."""
        if specialist_input_ids is None and input_ids is None:
            raise ModelError("forward needs input_ids, or specialist_input_ids")
        views: dict[str, tuple[Tensor, Any]] = {}
        for name in self.active_names:
            j = self.names.index(name)
            mask = attention_mask
            if isinstance(specialist_attention_mask, Tensor):
                mask = specialist_attention_mask[:, j]
            elif specialist_attention_mask is not None:
                mask = specialist_attention_mask[j]
            ids = input_ids if specialist_input_ids is None else specialist_input_ids[:, j]
            assert ids is not None
            views[name] = (ids, mask)
        return views

    def _weights(
        self,
        hiddens: Mapping[str, Tensor],
        views: Mapping[str, tuple[Tensor, Any]],
        starts: Tensor | None,
        cache: FusedCache | None,
        prompt_length: int | None = None,
    ) -> Tensor:
        """Weights [..., N]; one-hot when one specialist answers alone."""
        first = next(iter(hiddens.values()))
        if self.config.solo or len(self.names) == 1:
            only = self.config.solo or self.names[0]
            weights = first.new_zeros((*first.shape[:-1], len(self.names)), dtype=torch.float32)
            weights[..., self.names.index(only)] = 1.0
            return weights
        if self.config.weighting == "uniform":
            return gate_weights(uniform_scores(first, len(self.names)))
        scores = self._scores(hiddens, views, cache)
        if starts is not None and (self.config.granularity == "prompt" or self.config.weighting == "perplexity"):
            scores = hold_scores(scores, starts, cache.held_scores if cache is not None else None)
            if cache is not None and prompt_length is not None:
                cache.held_scores = scores[:, -1]
        return gate_weights(scores)

    def _scores(
        self, hiddens: Mapping[str, Tensor], views: Mapping[str, tuple[Tensor, Any]], cache: FusedCache | None
    ) -> Tensor:
        """Scores [..., N] of the specialists that run, by the gate or by their perplexity."""
        if self.config.weighting == "gate":
            return self.fusion_gate(list(hiddens.values()), list(hiddens))  # type: ignore[no-any-return]
        first = next(iter(hiddens.values()))
        if cache is not None and cache.held_scores is not None:
            return uniform_scores(first, len(self.names))  # the carried ones hold
        if cache is not None and int(cache.get_seq_length()) > first.shape[1]:
            raise ModelError(_WHOLE_PROMPT)
        return self._perplexity_scores(hiddens, views)

    def _perplexity_scores(self, hiddens: Mapping[str, Tensor], views: Mapping[str, tuple[Tensor, Any]]) -> Tensor:
        """Scores [B, T, N] from how well each specialist predicts the text it has seen, a head at a time."""
        scores = []
        for name, hidden in hiddens.items():
            ids, mask = views[name]
            visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            if visible.shape != ids.shape:
                raise ModelError(_WHOLE_PROMPT)
            before = previous_visible(visible)
            known = visible & (before >= 0)  # the first real token has nothing before it
            rows, columns = known.nonzero(as_tuple=True)
            predicting = hidden[rows, before[rows, columns]]
            nll = hidden.new_zeros(ids.shape, dtype=torch.float32)
            alone = torch.ones_like(predicting[:, :1], dtype=torch.float32)
            head = [self.loss_head(name)]
            nll[rows, columns] = fused_loss([predicting], alone, ids[rows, columns], head, chunk=self.loss_chunk).nll
            scores.append(perplexity_scores(nll, known, self.config.perplexity_temperature))
        return torch.stack(scores, dim=-1)

    def _fused_logits(self, hiddens: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        active = [self.names.index(name) for name in hiddens]
        logits = [self.head(name, hidden) for name, hidden in hiddens.items()]
        return fuse_logits(logits, weights[..., active], self.config.fusion_space)

    def _loss(
        self, hiddens: Mapping[str, Tensor], weights: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        predicting, targets = response_columns(labels)
        rows = {name: hidden[predicting] for name, hidden in hiddens.items()}
        nll = self.token_loss(rows, weights[predicting], targets).nll
        return nll.sum() / (num_items if num_items is not None else max(len(nll), 1))


AutoModelForCausalLM.register(FusedConfig, FusedForCausalLM, exist_ok=True)
