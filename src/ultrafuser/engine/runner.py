"""Runner: all views of some choices, from new tokens to hidden states, gate weights and fused logits.

Specialists of one Llama-like shape may run as a stack in one pass, or one after another; others run by their own
layers. A drafting model is one more view after those of the specialists, which is never fused.

Shapes: B choices, T new tokens, M rows whose next token is wanted, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ultrafuser.engine import few_rows
from ultrafuser.engine.backbones import Backbone, ModelBackbone
from ultrafuser.engine.graphs import StepGraphs
from ultrafuser.engine.llama import LlamaStack, can_stack, is_llama_like
from ultrafuser.engine.proof import ask_models, check_backbone
from ultrafuser.engine.reduced import is_int4_fast
from ultrafuser.engine.shared import SharedStack, has_known_adapters, have_one_base, is_adapted
from ultrafuser.engine.slots import SlotCache
from ultrafuser.engine.weights import AnyFormat, DraftWeights, WeightFormat, is_widened
from ultrafuser.errors import ConfigError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fusion import fuse_logits, gate_weights, uniform_scores

MARGIN = 16  # columns of a slot beyond the context, which shorter rows of a block may fill with rubbish
RunnerKind = Literal["auto", "sequential", "stacked"]


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
    drafter: Backbone | None = None  # the same specialists in fewer bytes, over the same slots
    graphs: StepGraphs | None = None


class _Weights(NamedTuple):
    """Options of `Runner` that concern weights."""

    form: WeightFormat
    pack: bool
    release: bool
    static_shapes: bool | None


class Runner:
    """Runs views.

    Args:
        model: The fused model, in evaluation.
        num_slots: Choices that may run at once.
        max_context: Tokens of the longest view.
        margin: Columns beyond that, which shorter rows of a block may fill with rubbish.
        kind: "stacked" runs equal specialists in one pass, "sequential" never does, "auto" does where it is faster.
        form: Format of the weights; others than "exact" need Llama-like specialists on the CPU.
        draft_form: Format of the weights with which specialists run ahead; "auto" is int8 where our own kernel is,
            or int4 where torch's is fast; for weights in 16 bits only where they may be copied.
        draft: A small model of the same vocabulary that drafts.
        static_shapes: Run steps of few tokens in constant shapes; None does so on CUDA.
        pack: Copy exact weights where that makes them faster.
        release: Give back the memory of weights that were copied.

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
        draft_form: DraftWeights = "exact",
        draft: PreTrainedModel | None = None,
        static_shapes: bool | None = None,
        pack: bool = True,
        release: bool = False,
    ) -> None:
        self.model = model
        self.num_specialists = len(model.names)
        self._gate_device = next(model.fusion_gate.parameters()).device
        models = [*model.specialists.values(), *([draft] if draft is not None else [])]
        labels = [*model.names, *(["draft"] if draft is not None else [])]
        length = max_context + margin
        self.groups: list[_Group] = []
        self._place: list[tuple[_Group, int]] = []  # of each view: its group, and which member it is there
        grouped = _grouped(models, self.num_specialists, kind)
        is_lean = all(stack is not None for views, stack in grouped if views[0] < self.num_specialists)
        self.draft_form = _draft_form(draft_form, form, models[: self.num_specialists], is_lean, pack)
        weights = _Weights(form, pack, release, static_shapes)
        for views, stack in grouped:
            drafts = self.draft_form if views[0] < self.num_specialists else "exact"
            parts, names = [models[view] for view in views], [labels[view] for view in views]
            group = _make_group(views, stack, parts, names, weights, drafts, num_slots=num_slots, length=length)
            self.groups.append(group)
            self._place += [(group, member) for member in range(len(views))]
        self.released = any(isinstance(g.backbone, LlamaStack) and g.backbone.released for g in self.groups)

    @property
    def num_views(self) -> int:
        """Specialists, and the drafting model if there is one."""
        return len(self._place)

    @property
    def bytes_per_token(self) -> int:
        """Of cache, for one token of a choice in all views."""
        return sum(group.cache.bytes_per_token for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass of all specialists reads."""
        return sum(g.backbone.weight_bytes for g in self.groups if g.views[0] < self.num_specialists)

    def clear_slot(self, slot: int) -> None:
        """Forget what a slot holds."""
        for group in self.groups:
            group.cache.clear(slot)

    def copy_slot(self, source: int, target: int, lengths: Sequence[int]) -> None:
        """Copy what a slot holds, `lengths` tokens of each view, to another."""
        for group in self.groups:
            if length := max(lengths[view] for view in group.views):
                group.cache.copy(source, target, length)

    def hidden(self, feeds: Mapping[int, Feed], *, reduced: bool = False) -> dict[int, Float[Tensor, "B T _"]]:
        """Last hidden states of the new tokens of some views; rows are as long as the longest of their view's.

        Args:
            feeds: What each reads.
            reduced: With the weights for drafts: what it leaves in the cache must be read again.
        """
        found: dict[int, Tensor] = {}
        for group in self.groups:
            backbone = group.drafter if reduced and group.drafter is not None else group.backbone
            wanted = [view for view in group.views if view in feeds]
            together = len(wanted) == len(group.views) and len({tuple(feeds[view].slots) for view in wanted}) == 1
            if together:
                ids, starts = _block([feeds[view] for view in wanted], backbone.device)
                slots = feeds[wanted[0]].slots
                graphs = group.graphs if backbone is group.backbone else None
                if graphs is not None and graphs.takes(ids.shape[1], ids.shape[2], slots):
                    longest = max(start for view in wanted for start in feeds[view].starts)
                    hidden = graphs.hidden(ids, starts, longest)
                else:
                    hidden = backbone.hidden(ids, starts, group.cache, slots)
                found |= dict(zip(wanted, hidden, strict=True))
                continue
            for view in wanted:
                ids, starts = _block([feeds[view]], backbone.device)
                member = group.views.index(view)
                found[view] = backbone.hidden(ids, starts, group.cache, feeds[view].slots, member)[0]
        return found

    def logits(self, view: int, hidden: Float[Tensor, "M H"], *, reduced: bool = False) -> Float[Tensor, "M V"]:
        """What one view says alone."""
        group, member = self._place[view]
        backbone = group.drafter if reduced and group.drafter is not None else group.backbone
        return backbone.logits(hidden[None], member)[0].float()

    def scores(self, hidden: Mapping[int, Float[Tensor, "M _"]]) -> Float[Tensor, "M N"]:
        """The gate's scores of hidden states that all specialists have, or zeros where the model weighs alike.

        Perplexity weights come from the prompt and are held by the choice; here they are zeros, too.
        """
        first = next(iter(hidden.values()))
        if self.model.config.weighting != "gate":
            return uniform_scores(first, self.num_specialists)
        gate, names, views = self.model.fusion_gate, self.model.names, sorted(hidden)
        states = [hidden[view].to(self._gate_device) for view in views]
        if gate.projections:
            scores = torch.stack([gate.score(own, names[view]) for own, view in zip(states, views, strict=True)])
        else:  # one call for all: a small model's steps are as short as a few calls of a module
            scores = gate.score(torch.stack(states), names[0])
        scores = scores.t().to(first.device)
        if len(views) == self.num_specialists:
            return scores
        full = first.new_zeros((len(first), self.num_specialists), dtype=torch.float32)
        full[:, views] = scores
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
        shared = self._place[views[0]][0].backbone
        if isinstance(shared, SharedStack) and self.model.config.fusion_space == "logits":  # all are of its group
            stacked = torch.stack([hidden[view] for view in views])
            return shared.fused_logits(stacked, weights[:, views].to(stacked.device)).to(weights.device)
        said: dict[int, Tensor] = {}
        for group in self.groups:
            if len(group.views) > 1 and all(view in hidden for view in group.views):
                stacked = torch.stack([hidden[view] for view in group.views])
                said |= dict(zip(group.views, group.backbone.logits(stacked), strict=True))
        device = weights.device
        logits = [(said[view] if view in said else self.logits(view, hidden[view])).to(device) for view in views]
        return fuse_logits(logits, weights[:, views], self.model.config.fusion_space)


def _make_group(
    views: list[int],
    stack: type[LlamaStack] | None,
    models: Sequence[PreTrainedModel],
    names: Sequence[str],
    weights: _Weights,
    draft_form: AnyFormat,
    *,
    num_slots: int,
    length: int,
) -> _Group:
    """Views that run together, proven to compute what their models do."""
    device, threads = models[0].device, torch.get_num_threads()
    if weights.form != "exact" and device.type != "cpu":
        raise ConfigError(f"weights in {weights.form} are for the CPU, and these are on {device}: use exact weights")
    drafter: LlamaStack | None = None
    backbone: Backbone
    if stack is not None:
        first = next(models[0].parameters())
        widens = first.dtype != torch.float32 and is_widened(first, pack=weights.pack)
        proof = ask_models(models, names, num_slots=num_slots, length=length, in_fp32=widens)
        if draft_form != "exact":
            drafter = stack(models, length=length, form=draft_form, num_threads=threads)
        form, pack, release, _ = weights
        backbone = stack(models, length=length, form=form, num_threads=threads, pack=pack, release=release)
    elif weights.form != "exact" and is_llama_like(models[0]) and is_adapted(models[0]):
        raise ConfigError(
            f"weights in {weights.form} are known for adapters of one base that run together, and {names[0]!r} runs "
            "alone: use the runner auto, or exact weights"
        )
    elif weights.form != "exact":
        raise ConfigError(
            f"weights in {weights.form} are known for Llama-like specialists, and {names[0]!r} is a "
            f"{type(models[0]).__name__}: use exact weights"
        )
    else:
        backbone = ModelBackbone(models[0], name=names[0])
        proof = ask_models(models, names, num_slots=num_slots, length=length)
    cache = SlotCache(len(models), num_slots, length, backbone.kv_heads, dtype=backbone.cache_dtype, device=device)
    check_backbone(backbone, cache, proof, exact=weights.form == "exact")
    if drafter is not None:
        check_backbone(drafter, cache, proof, exact=False)
    group = _Group(views, backbone, cache, drafter)
    is_static = device.type == "cuda" if weights.static_shapes is None else weights.static_shapes
    if is_static and isinstance(backbone, LlamaStack):
        group.graphs = StepGraphs(backbone, cache)
    return group


def _draft_form(
    wanted: DraftWeights, form: WeightFormat, specialists: Sequence[PreTrainedModel], is_lean: bool, pack: bool
) -> AnyFormat:
    """The format of drafts: exact, too, where the weights themselves are in the wanted one."""
    if wanted in ("exact", form):
        return "exact"
    is_fp32 = all(model.dtype == torch.float32 for model in specialists)
    fits = is_lean and all(model.device.type == "cpu" for model in specialists)
    fits = fits and (is_fp32 or form != "exact" or few_rows.has_kernel())
    if wanted == "auto":
        if not fits or form == "int8" or not (is_fp32 or pack):  # half as much again of 16 bits
            return "exact"
        return "int8" if few_rows.has_kernel() else "int4" if is_int4_fast() else "exact"
    if not fits:
        raise ConfigError(f"drafts in {wanted} take Llama-like specialists in fp32 on the CPU: use auto or exact")
    return wanted


def _grouped(
    models: Sequence[PreTrainedModel], num_specialists: int, kind: RunnerKind
) -> list[tuple[list[int], type[LlamaStack] | None]]:
    """Which views run together, and by what; None stands for their own layers."""
    specialists, several = models[:num_specialists], num_specialists > 1
    together = _stack_of(specialists) if several else None
    if kind == "stacked" and together is None:
        raise ConfigError(
            "these specialists cannot be stacked: that takes two or more Llama-like ones of one shape and type. "
            "Use the sequential runner."
        )
    groups: list[tuple[list[int], type[LlamaStack] | None]]
    if together is not None and kind != "sequential":
        groups = [(list(range(num_specialists)), together)]
    elif several and have_one_base(specialists):  # each in a stack of its own would hold the base once more
        groups = [([view], None) for view in range(num_specialists)]
    else:
        groups = [([view], _stack_of([model])) for view, model in enumerate(specialists)]
    return groups + [([view], _stack_of([models[view]])) for view in range(num_specialists, len(models))]


def _stack_of(models: Sequence[PreTrainedModel]) -> type[LlamaStack] | None:
    """What can run these models in one pass, if anything."""
    if not all(map(is_llama_like, models)):
        return None
    if any(map(is_adapted, models)):
        return SharedStack if have_one_base(models) and all(map(has_known_adapters, models)) else None
    return LlamaStack if can_stack(models) else None


def _block(feeds: Sequence[Feed], device: torch.device) -> tuple[Int[Tensor, "G B T"], Int[Tensor, "G B"]]:
    """Ids and starts of views that run together; shorter rows repeat their last token, which nobody will see."""
    longest = max(len(tokens) for feed in feeds for tokens in feed.tokens)
    rows: list[Any] = [[[*t, *([t[-1]] * (longest - len(t)))] for t in feed.tokens] for feed in feeds]
    return torch.tensor(rows, device=device), torch.tensor([feed.starts for feed in feeds], device=device)
