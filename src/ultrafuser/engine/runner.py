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
from ultrafuser.engine.graphs import StepGraphs
from ultrafuser.engine.llama import LlamaStack, can_stack, is_llama_like
from ultrafuser.engine.slots import SlotCache
from ultrafuser.engine.weights import WeightFormat
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.backbone import head_logits, last_hidden_state
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fusion import fuse_logits, gate_weights, uniform_scores

MARGIN = 16  # columns of a slot beyond the context, which shorter rows of a block may fill with rubbish
RunnerKind = Literal["auto", "sequential", "stacked"]
_CHECKED = 6  # tokens of the text on which a backbone is compared with its model
_LONGEST_WINDOW = 512


class Backbone(Protocol):
    """One or more specialists over one slot cache."""

    num_members: int
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """Heads and their size of each layer."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass reads."""
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
    graphs: StepGraphs | None = None


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
        static_shapes: Run steps of few tokens in constant shapes; None does so on CUDA.
        release: Give back the memory of weights that were packed.

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
        static_shapes: bool | None = None,
        release: bool = False,
    ) -> None:
        self.model = model
        self.num_specialists = len(model.names)
        models = [*model.specialists.values(), *([draft] if draft is not None else [])]
        labels = [*model.names, *(["draft"] if draft is not None else [])]
        length = max_context + margin
        self.groups: list[_Group] = []
        self._place: list[tuple[_Group, int]] = []  # of each view: its group, and which member it is there
        for views in _grouped(models, self.num_specialists, kind):
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
            on_cuda = parts[0].device.type == "cuda"
            if isinstance(backbone, LlamaStack):
                if static_shapes if static_shapes is not None else on_cuda:
                    group.graphs = StepGraphs(backbone, cache, compile_with="inductor" if on_cuda else None)
                if release and form != "exact":
                    backbone.release(parts)
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

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass of all specialists reads."""
        return sum(g.backbone.weight_bytes for g in self.groups if g.views[0] < self.num_specialists)

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
                slots = feeds[wanted[0]].slots
                if group.graphs is not None and group.graphs.takes(ids.shape[1], ids.shape[2], slots):
                    longest = max(start for view in wanted for start in feeds[view].starts)
                    hidden = group.graphs.hidden(ids, starts, longest)
                else:
                    hidden = group.backbone.hidden(ids, starts, group.cache, slots)
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
    """Run a text in blocks beside a shorter one, and compare with the models' own forward.

    Reduced weights are only checked to give numbers: how far they are off is measured on text, by `ultrafuser bench`.

    Raises:
        ModelError: The engine's results are not the model's, or its forward does not work with the engine's cache.
    """
    if cache.length < _CHECKED:
        raise ModelError(f"a context of {cache.length} tokens is too small for the engine: {_CHECKED} are the least")
    # Past a small window, too, since some architectures cut it in their own way.
    longest = min(max([_CHECKED, *(w + _CHECKED for m in models for w in _small_windows(m))]), cache.length)
    lengths = [longest, _CHECKED][: min(cache.num_slots, 2)]
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.get_output_embeddings().weight.shape[0] for model in models)
    ids = torch.randint(0, vocab, (len(models), len(lengths), longest), generator=generator).to(backbone.device)
    try:
        actual = _read_in_blocks(backbone, cache, ids, lengths)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _cannot_run(models[0], names[0], f"its forward fails over the engine's cache, {reason}") from error
    for j, (model, name) in enumerate(zip(models, names, strict=True)):
        for row, length in enumerate(lengths):
            text = ids[j, row, :length][None].to(model.device)
            own = last_hidden_state(model, text, position_ids=torch.arange(length, device=model.device)[None])
            expected = head_logits(model, own[0]).float().to(actual[row].device)
            tolerance = 2e-3 if model.dtype == torch.float32 else 5e-2
            off = float((actual[row][j] - expected).abs().max())
            allowed = tolerance * float(expected.abs().max().clamp(min=1.0))
            if not (off <= allowed if exact else actual[row][j].isfinite().all()):
                raise _cannot_run(model, name, f"logits off by {off:.3g}")


def _read_in_blocks(
    backbone: Backbone, cache: SlotCache, ids: Int[Tensor, "G B T"], lengths: Sequence[int]
) -> list[Float[Tensor, "G _ V"]]:
    """Logits of each text: most of it alone, then one token and two more of all texts together."""
    slots = list(range(len(lengths)))
    first = [length - 3 for length in lengths]
    hidden = [
        [backbone.hidden(ids[:, slot : slot + 1, :n], ids.new_zeros((len(ids), 1)), cache, [slot])[:, 0]]
        for slot, n in zip(slots, first, strict=True)
    ]
    for skip, num_new in ((0, 1), (1, 2)):
        starts = torch.tensor([n + skip for n in first], device=ids.device)
        columns = starts[:, None] + torch.arange(num_new, device=ids.device)
        block = ids.gather(2, columns.expand(len(ids), -1, -1))
        states = backbone.hidden(block, starts.expand(len(ids), -1), cache, slots)
        for slot in slots:
            hidden[slot].append(states[:, slot])
    return [backbone.logits(torch.cat(parts, dim=1)).float() for parts in hidden]


def _small_windows(model: PreTrainedModel) -> list[int]:
    """Windows of attention that a check can afford to pass, whatever an architecture calls them."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    return [size for size in sizes if isinstance(size, int) and 0 < size <= _LONGEST_WINDOW]


def _cannot_run(model: PreTrainedModel, name: str, reason: str) -> ModelError:
    return ModelError(
        f"specialist {name!r} is a {type(model).__name__}, which the engine does not run as it is ({reason}): "
        "use FusedGenerator, and report the architecture"
    )


def _grouped(models: Sequence[PreTrainedModel], num_specialists: int, kind: RunnerKind) -> list[list[int]]:
    """Which views run together."""
    specialists = models[:num_specialists]
    stackable = num_specialists > 1 and all(is_llama_like(m) for m in specialists) and can_stack(specialists)
    if kind == "stacked" and not stackable:
        raise ConfigError(
            "these specialists cannot be stacked: that takes two or more Llama-like ones of one shape and type. "
            "Use the sequential runner."
        )
    together = stackable and kind != "sequential"
    groups = [list(range(num_specialists))] if together else [[view] for view in range(num_specialists)]
    return groups + [[view] for view in range(num_specialists, len(models))]


def _block(feeds: Sequence[Feed], device: torch.device) -> tuple[Int[Tensor, "G B T"], Int[Tensor, "G B"]]:
    """Ids and starts of views that run together; shorter rows repeat their last token, which nobody will see."""
    longest = max(len(tokens) for feed in feeds for tokens in feed.tokens)
    rows: list[Any] = [[[*t, *([t[-1]] * (longest - len(t)))] for t in feed.tokens] for feed in feeds]
    return torch.tensor(rows, device=device), torch.tensor([feed.starts for feed in feeds], device=device)
