"""Runner: all views of some choices, from new tokens to hidden states, gate weights and fused logits.

Specialists of one Llama-like shape may run as a stack in one pass, or one after another; others run by their own
layers. A drafting model is one more view after those of the specialists, which is never fused.

Shapes: B choices, T new tokens, M rows whose next token is wanted, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ultrafuser.engine.backbones import ModelBackbone
from ultrafuser.engine.llama import LlamaStack, can_stack, is_llama_like
from ultrafuser.engine.slots import SlotCache
from ultrafuser.engine.weights import WeightFormat
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.backbone import head_logits, last_hidden_state
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fusion import fuse_logits, gate_weights, uniform_scores

RunnerKind = Literal["auto", "sequential", "stacked"]


class Backbone(Protocol):
    """One or more specialists over one slot cache."""

    num_members: int
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """Heads and their size of each layer."""
        ...

    def hidden(
        self,
        ids: Int[Tensor, "G B T"],
        starts: Int[Tensor, "G B"],
        cache: SlotCache,
        slots: Sequence[int],
        member: int | None = None,
    ) -> Float[Tensor, "G B T H"]:
        """Last hidden states of new tokens."""
        ...

    def logits(self, hidden: Float[Tensor, "G M H"], member: int | None = None) -> Float[Tensor, "G M V"]:
        """Logits of hidden states."""
        ...


class Feed(NamedTuple):
    """New tokens for one view.

    Attributes:
        slots: Of the choices.
        starts: Tokens of this view that each has in its slot.
        tokens: The new ones of each, at least one.
    """

    slots: list[int]
    starts: list[int]
    tokens: Sequence[Sequence[int]]


@dataclass(slots=True)
class _Group:
    views: list[int]
    backbone: Backbone
    cache: SlotCache


class Runner:
    """Runs views.

    Args:
        model: The fused model, in evaluation.
        num_slots: Choices that may run at once.
        max_context: Tokens of the longest view.
        margin: Columns beyond that, which shorter rows of a block may fill with rubbish.
        kind: "stacked" runs equal specialists in one pass, "sequential" never does, "auto" does where it is faster.
        form: Format of the weights; others than "exact" need Llama-like specialists on the CPU.
        draft: A small model of the same vocabulary that drafts.

    Raises:
        ConfigError: An option that these specialists do not allow.
        ModelError: An architecture that the engine cannot run.
    """

    def __init__(
        self,
        model: FusedForCausalLM,
        *,
        num_slots: int,
        max_context: int,
        margin: int,
        kind: RunnerKind = "auto",
        form: WeightFormat = "exact",
        draft: PreTrainedModel | None = None,
    ) -> None:
        self.model = model
        self.num_specialists = len(model.names)
        models = [*model.specialists.values(), *([draft] if draft is not None else [])]
        labels = [*model.names, *(["draft"] if draft is not None else [])]
        length = max_context + margin
        self.groups: list[_Group] = []
        self._place: list[tuple[_Group, int]] = []  # of each view: its group, and which member it is there
        for views in _grouped(models, self.num_specialists, kind, form):
            parts = [models[view] for view in views]
            backbone: Backbone
            if is_llama_like(parts[0]):
                backbone = LlamaStack(parts, length=length, form=form, num_threads=torch.get_num_threads())
            elif form != "exact":
                raise ConfigError(
                    f"weights in {form} are known for Llama-like specialists, and {labels[views[0]]!r} is a "
                    f"{type(parts[0]).__name__}: use exact weights"
                )
            else:
                backbone = ModelBackbone(parts[0], name=labels[views[0]])
            cache = SlotCache(
                len(parts), num_slots, length, backbone.kv_heads, dtype=backbone.compute_dtype, device=parts[0].device
            )
            group = _Group(list(views), backbone, cache)
            check_backbone(group.backbone, cache, parts, [labels[view] for view in views], exact=form == "exact")
            self.groups.append(group)
            self._place += [(group, member) for member in range(len(views))]

    @property
    def num_views(self) -> int:
        """Specialists, and the drafting model if there is one."""
        return len(self._place)

    @property
    def bytes_per_token(self) -> int:
        """Of cache, for one token of a choice in all views."""
        return sum(group.cache.bytes_per_token for group in self.groups)

    def copy_slot(self, source: int, target: int, lengths: Sequence[int]) -> None:
        """Copy what a slot holds, `lengths` tokens of each view, to another."""
        for group in self.groups:
            if length := max(lengths[view] for view in group.views):
                group.cache.copy(source, target, length)

    def hidden(self, feeds: Mapping[int, Feed]) -> dict[int, Float[Tensor, "B T _"]]:
        """Last hidden states of the new tokens of some views; rows are as long as the longest of their view's."""
        found: dict[int, Tensor] = {}
        for group in self.groups:
            wanted = [view for view in group.views if view in feeds]
            together = len(wanted) == len(group.views) and len({tuple(feeds[view].slots) for view in wanted}) == 1
            if together:
                ids, starts = _block([feeds[view] for view in wanted], group.backbone.device)
                hidden = group.backbone.hidden(ids, starts, group.cache, feeds[wanted[0]].slots)
                found |= dict(zip(wanted, hidden, strict=True))
                continue
            for view in wanted:
                ids, starts = _block([feeds[view]], group.backbone.device)
                member = group.views.index(view)
                found[view] = group.backbone.hidden(ids, starts, group.cache, feeds[view].slots, member)[0]
        return found

    def logits(self, view: int, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M V"]:
        """What one view says alone."""
        group, member = self._place[view]
        return group.backbone.logits(hidden[None], member)[0].float()

    def scores(self, hidden: Mapping[int, Float[Tensor, "M _"]]) -> Float[Tensor, "M N"]:
        """The gate's scores of hidden states that all specialists have, or zeros where the model weighs alike.

        Perplexity weights come from the prompt and are held by the choice; here they are zeros, too.
        """
        first = next(iter(hidden.values()))
        if self.model.config.weighting != "gate":
            return uniform_scores(first, self.num_specialists)
        gate, names = self.model.fusion_gate, self.model.names
        device = first.device
        scores = [gate.score(hidden[view].to(gate_device(gate)), names[view]).to(device) for view in sorted(hidden)]
        full = first.new_zeros((len(first), self.num_specialists), dtype=torch.float32)
        full[:, sorted(hidden)] = torch.stack(scores, dim=-1)
        return full

    def weights(
        self, scores: Float[Tensor, "M N"], active: Tensor, fixed: Tensor | None = None
    ) -> Float[Tensor, "M N"]:
        """Softmax over the active specialists [M, N]; rows of `fixed` [M, N] that are numbers stand instead."""
        weights = gate_weights(scores.masked_fill(~active, -torch.inf))
        return weights if fixed is None else torch.where(fixed.isnan(), weights, fixed)

    def fused(self, hidden: Mapping[int, Float[Tensor, "M _"]], weights: Float[Tensor, "M N"]) -> Float[Tensor, "M V"]:
        """Fused logits, fp32 (Equation 1)."""
        views = sorted(hidden)
        said: dict[int, Tensor] = {}
        for group in self.groups:
            if len(group.views) > 1 and all(view in hidden for view in group.views):
                stacked = torch.stack([hidden[view] for view in group.views])
                said |= dict(zip(group.views, group.backbone.logits(stacked), strict=True))
        device = weights.device
        logits = [(said[view] if view in said else self.logits(view, hidden[view])).to(device) for view in views]
        return fuse_logits(logits, weights[:, views], self.model.config.fusion_space)


def gate_device(gate: torch.nn.Module) -> torch.device:
    """Where the gate is."""
    return next(gate.parameters()).device


@torch.no_grad()
def check_backbone(
    backbone: Backbone, cache: SlotCache, models: Sequence[PreTrainedModel], names: Sequence[str], *, exact: bool
) -> None:
    """Run six tokens in two blocks beside another choice, and compare with the models' own forward.

    Reduced weights are only checked to give numbers: how far they are off is measured on text, by `ultrafuser bench`.

    Raises:
        ModelError: The engine's results are not the model's.
    """
    if cache.length < 6:
        raise ModelError(f"a context of {cache.length} tokens is too small for the engine: 6 are the least")
    slots = [0, 1] if cache.num_slots > 1 else [0]
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.get_output_embeddings().weight.shape[0] for model in models)
    ids = torch.randint(0, vocab, (len(models), len(slots), 6), generator=generator).to(backbone.device)
    zeros = torch.zeros((len(models), len(slots)), dtype=torch.long, device=backbone.device)
    parts = [
        backbone.hidden(ids[..., :4], zeros, cache, slots),
        backbone.hidden(ids[..., 4:5], zeros + 4, cache, slots),
        backbone.hidden(ids[..., 5:], zeros + 5, cache, slots),
    ]
    hidden = torch.cat(parts, dim=2)
    actual = backbone.logits(hidden.flatten(1, 2)).float()
    for j, (model, name) in enumerate(zip(models, names, strict=True)):
        positions = torch.arange(6, device=model.device).expand_as(ids[j])
        own = last_hidden_state(model, ids[j].to(model.device), position_ids=positions)
        expected = head_logits(model, own.flatten(0, 1)).float().to(actual.device)
        largest = float(expected.abs().max().clamp(min=1.0))
        tolerance = (2e-3 if model.dtype == torch.float32 else 5e-2) * largest
        error = float((actual[j] - expected).abs().max())
        if not (error <= tolerance if exact else actual[j].isfinite().all()):
            raise ModelError(
                f"specialist {name!r} is a {type(model).__name__}, which the engine does not run as it is (logits off "
                f"by {error:.3g}): use FusedGenerator, and report the architecture"
            )


def _grouped(
    models: Sequence[PreTrainedModel], num_specialists: int, kind: RunnerKind, form: WeightFormat
) -> list[list[int]]:
    """Which views run together."""
    specialists = models[:num_specialists]
    stackable = (
        num_specialists > 1
        and form == "exact"
        and all(is_llama_like(m) for m in specialists)
        and can_stack(specialists)
    )
    if kind == "stacked" and not stackable:
        raise ConfigError(
            "these specialists cannot be stacked: that takes two or more Llama-like ones of one shape and type, with "
            "exact weights. Use the sequential runner."
        )
    together = stackable and kind != "sequential"
    groups = [list(range(num_specialists))] if together else [[view] for view in range(num_specialists)]
    return groups + [[view] for view in range(num_specialists, len(models))]


def _block(feeds: Sequence[Feed], device: torch.device) -> tuple[Int[Tensor, "G B T"], Int[Tensor, "G B"]]:
    """Ids and starts of views that run together; shorter rows repeat their last token, which nobody will see."""
    longest = max(len(tokens) for feed in feeds for tokens in feed.tokens)
    rows: list[Any] = [[[*t, *([t[-1]] * (longest - len(t)))] for t in feed.tokens] for feed in feeds]
    return torch.tensor(rows, device=device), torch.tensor([feed.starts for feed in feeds], device=device)
