"""Proof that a backbone computes what its models do: a text, read by both, in blocks and beside another by the engine.

What the models say is kept first, since a backbone may take their weights away.

Shapes: G models, B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultrafuser.engine.backbones import Backbone
from ultrafuser.engine.few_rows import rounds
from ultrafuser.engine.slots import SlotCache
from ultrafuser.errors import ModelError
from ultrafuser.model.backbone import head_logits, last_hidden_state

_CHECKED = 6  # tokens of the text
_LONGEST_WINDOW = 512
_EXACT, _ROUNDED = 2e-3, 5e-2  # of the largest logit: what may differ in fp32 and in 16 bits
_NOISE = 4.0  # times what the model's own 16 bits do to a text


@dataclass(frozen=True, slots=True)
class Proof:
    """What models say of some texts.

    Attributes:
        ids: The texts [G, B, T].
        lengths: Of the texts.
        expected: Logits [T, V] of every model and text.
        allowed: By how much a logit of every model and text may differ.
        kinds: Of the models.
        names: Theirs.
    """

    ids: Int[Tensor, "G B T"]
    lengths: list[int]
    expected: list[list[Tensor]]
    allowed: list[list[float]]
    kinds: list[str]
    names: list[str]


@torch.no_grad()
def ask_models(
    models: Sequence[PreTrainedModel], names: Sequence[str], *, num_slots: int, length: int, in_fp32: bool = False
) -> Proof:
    """Let models read what a backbone over slots of this length will be compared on.

    Args:
        models: Those that it runs.
        names: Theirs.
        num_slots: Of the cache.
        length: Of a slot.
        in_fp32: Compute in fp32 whatever the weights are, as the backbone will: 16 bits round by more than a mistake.

    Raises:
        ModelError: The context is too small.
    """
    if length < _CHECKED:
        raise ModelError(f"a context of {length} tokens is too small for the engine: {_CHECKED} are the least")
    # Past a small window, too, since some architectures cut it in their own way.
    longest = min(max([_CHECKED, *(w + _CHECKED for m in models for w in _small_windows(m))]), length)
    lengths = [longest, _CHECKED][: min(num_slots, 2)]
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.get_output_embeddings().weight.shape[0] for model in models)
    ids = torch.randint(0, vocab, (len(models), len(lengths), longest), generator=generator).to(models[0].device)
    expected = [
        [_own_logits(model, ids[j, row, :n], in_fp32) for row, n in enumerate(lengths)]
        for j, model in enumerate(models)
    ]
    is_16_bit = models[0].dtype.itemsize == 2
    is_rounded = is_16_bit and (not in_fp32 or rounds(models[0].get_output_embeddings().weight.dtype))
    tolerance = _ROUNDED if is_rounded else _EXACT
    allowed = [[tolerance * float(logits.abs().max().clamp(min=1.0)) for logits in texts] for texts in expected]
    if is_rounded:  # some texts are moved by more, which the model itself tells
        for j, model in enumerate(models):
            for row, n in enumerate(lengths):
                moved = float((_own_logits(model, ids[j, row, :n], not in_fp32) - expected[j][row]).abs().max())
                allowed[j][row] = max(allowed[j][row], _NOISE * moved)
    return Proof(ids, lengths, expected, allowed, [type(model).__name__ for model in models], list(names))


@torch.no_grad()
def check_backbone(backbone: Backbone, cache: SlotCache, proof: Proof, *, exact: bool) -> None:
    """Run the texts in blocks, one beside the other, and compare with what the models said.

    Reduced weights are only checked to give numbers: how far they are off is measured on text, by `ultrafuser bench`.

    Raises:
        ModelError: The engine's results are not the model's, or its forward does not work with the engine's cache.
    """
    try:
        actual = _read_in_blocks(backbone, cache, proof.ids, proof.lengths)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _cannot_run(proof, 0, f"its forward fails over the engine's cache, {reason}") from error
    for j, texts in enumerate(proof.expected):
        for row, expected in enumerate(texts):
            expected = expected.to(actual[row].device)
            off = float((actual[row][j] - expected).abs().max())
            if not (off <= proof.allowed[j][row] if exact else actual[row][j].isfinite().all()):
                raise _cannot_run(proof, j, f"logits off by {off:.3g}")


def _own_logits(model: PreTrainedModel, ids: Int[Tensor, " T"], in_fp32: bool) -> Float[Tensor, "T V"]:
    text = ids[None].to(model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    with _widened(model) if in_fp32 else nullcontext():
        return head_logits(model, last_hidden_state(model, text, position_ids=positions)[0]).float()


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Let every layer compute in fp32, the weights of one at a time."""
    kept: list[tuple[nn.Parameter, Tensor]] = []

    def widen(layer: nn.Module, inputs: object) -> None:
        del inputs
        for parameter in layer.parameters():
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.float()

    def narrow(*_: object) -> None:
        while kept:
            parameter, data = kept.pop()
            parameter.data = data

    hooks = []
    for layer in _layers(model):
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow, always_call=True)]
    try:
        yield
    finally:
        narrow()
        for hook in hooks:
            hook.remove()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The smallest modules with weights of their own; a linear layer and its adapter are one."""
    if next(module.parameters(recurse=False), None) is not None or hasattr(module, "lora_A"):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


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


def _cannot_run(proof: Proof, member: int, reason: str) -> ModelError:
    return ModelError(
        f"specialist {proof.names[member]!r} is a {proof.kinds[member]}, which the engine does not run as it is "
        f"({reason}): use FusedGenerator, and report the architecture"
    )
