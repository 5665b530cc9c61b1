"""The forward of Llama-like specialists over a slot cache: one specialist, or a stack of equals in one pass.

A specialist alone is a stack of one. What is saved against the layers of transformers: query, key and value are one
product, so are gate and up projection; rotations are tables; nothing is made that decoding does not read.

Shapes: G specialists of the stack, B choices, T new tokens, R = B * G rows of the cache, H hidden size, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultrafuser.engine import few_rows
from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.engine.weights import AnyFormat, Product, compute_type, make_product

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
_SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping", "pretraining_tp_scale")


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether `LlamaStack` knows the architecture: what it then computes is checked against the model itself."""
    config = model.config
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and not any(getattr(config, name, None) for name in _SCALED)
        and config.rope_parameters.get("rope_type") in ("default", "linear", "llama3")
        and len(set(_windows(config))) == 1
    )


def can_stack(models: Sequence[PreTrainedModel]) -> bool:
    """Whether Llama-like models have the same shapes and types, so that one pass can run them all."""
    return len({_signature(model) for model in models}) == 1


class _Step(NamedTuple):
    """What all layers of one forward have in common."""

    view: SlotView
    places: Tensor  # of new columns
    mask: Tensor | None
    cos: Tensor
    sin: Tensor


class LlamaStack:
    """G specialists of one shape.

    Args:
        models: Their models, which go on working unless they are released; exact weights that are not packed become
            views of the stack's buffers.
        length: Columns of the longest text.
        form: Format of the weights.
        num_threads: Of torch.
        pack: Copy exact weights where that makes them faster.
        release: Give back the memory of linear layers that were copied, each as soon as it is; embeddings stay.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        *,
        length: int,
        form: AnyFormat = "exact",
        num_threads: int = 1,
        pack: bool = True,
        release: bool = False,
    ) -> None:
        config = models[0].config
        bases: list[Any] = [model.base_model for model in models]
        layers: list[list[Any]] = [list(base.layers) for base in bases]
        self.num_members, self.num_threads = len(models), num_threads
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.hidden_size = config.hidden_size
        self.eps_value, self.eps = float(config.rms_norm_eps), torch.tensor(config.rms_norm_eps)
        self.window: int | None = _windows(config)[0]
        self.device, self.dtype = models[0].device, models[0].dtype
        self.embeddings: list[Any] = [model.get_input_embeddings() for model in models]
        self.compute_dtype = compute_type(self.embeddings[0].weight, form, pack=pack)
        kept = {id(embedding.weight) for embedding in self.embeddings}

        def product(parts: list[list[Any]]) -> Product:
            """Over the linear layers of each member."""
            made, copied = self._product(parts, form, num_threads=num_threads, pack=pack)
            for linear in copied if release else ():
                if id(linear.weight) not in kept:
                    linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            return made

        def products(*names: str) -> list[Product]:
            """One a layer, over its linear layers of these names."""
            return [
                product([[layer[index].get_submodule(name) for name in names] for layer in layers])
                for index in range(config.num_hidden_layers)
            ]

        def norm(name: str) -> list[Tensor]:
            return [
                self._stacked([layer[index].get_submodule(name).weight for layer in layers])
                for index in range(config.num_hidden_layers)
            ]

        self.qkv = products("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = products("self_attn.o_proj")
        self.gate_up = products("mlp.gate_proj", "mlp.up_proj")
        self.down = products("mlp.down_proj")
        self.norm_in, self.norm_mlp = norm("input_layernorm"), norm("post_attention_layernorm")
        # Qwen3 normalises each head of query and key.
        has_head_norm = hasattr(layers[0][0].self_attn, "q_norm")
        self.norm_q = norm("self_attn.q_norm") if has_head_norm else None
        self.norm_k = norm("self_attn.k_norm") if has_head_norm else None
        self.norm_out = self._stacked([base.norm.weight for base in bases])
        self.head = product([[model.get_output_embeddings()] for model in models])
        self.released = release and self.head.is_copy
        self.cos, self.sin = self._rotations(bases[0], length)

    def _product(
        self, parts: list[list[Any]], form: AnyFormat, *, num_threads: int, pack: bool
    ) -> tuple[Product, list[Any]]:
        """The product over the linear layers of each member, and the layers whose weights it does not need."""
        made = make_product(parts, form, num_threads=num_threads, pack=pack)
        return made, [linear for linears in parts for linear in linears] if made.is_copy else []

    def _stacked(self, weights: Sequence[Tensor]) -> Float[Tensor, "G 1 1 _"]:
        """Weights of a norm."""
        return torch.stack([weight.detach() for weight in weights])[:, None, None].to(self.compute_dtype)

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """Heads and their size, of each layer's keys and values."""
        return [(self.num_kv_heads, self.head_size)] * len(self.qkv)

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass reads, embeddings left out."""
        products = [*self.qkv, *self.out, *self.gate_up, *self.down, self.head]
        return sum(product.num_bytes for product in products)

    def hidden(
        self,
        ids: Int[Tensor, "G B T"],
        starts: Int[Tensor, "G B"],
        cache: SlotCache,
        slots: Sequence[int],
        member: int | None = None,
    ) -> Float[Tensor, "G B T H"]:
        """Last hidden states of new tokens, which join the cache.

        Args:
            ids: New tokens of each member and choice, shorter rows filled on the right with any id.
            starts: Columns that each holds already.
            cache: Of this group.
            slots: The slot of each choice.
            member: The one that runs, or None for all.
        """
        view = SlotView(cache, slots, member, starts.t().reshape(-1), ids.shape[2])
        return self.run(ids, view, member)

    def run(self, ids: Int[Tensor, "G B T"], view: SlotView, member: int | None = None) -> Float[Tensor, "G B T H"]:
        """As `hidden`, over rows of a cache that are chosen already."""
        num_members, num_choices, num_new = ids.shape
        if self._has_few_rows(num_choices * num_new, view):
            return self._run_few_rows(ids, view, member)
        step = _Step(view, view.places(self.num_kv_heads), self._mask(view), *self._turns(view))
        x = self._embed(ids, member).to(self.compute_dtype)
        shape = (num_members, num_choices * num_new, -1)
        for layer in range(len(self.qkv)):
            h = self._norm(x, self.norm_in[layer], member)
            h = self._attention(layer, h.view(shape), step, member)
            x = torch.add(x, h.view_as(x), alpha=self.out[layer].scale)
            h = self._norm(x, self.norm_mlp[layer], member)
            gate, up = self.gate_up[layer](h.view(shape), member).chunk(2, dim=-1)
            h = self.down[layer](F.silu(gate) * up, member)
            x = torch.add(x, h.view_as(x), alpha=self.down[layer].scale)
        return self._norm(x, self.norm_out, member)

    def _has_few_rows(self, num_rows: int, view: SlotView) -> bool:
        """Whether our own kernels do it all."""
        return (
            self.device.type == "cpu"
            and self.compute_dtype == torch.float32
            and few_rows.are_few(num_rows)
            and few_rows.has_kernel()
            and few_rows.can_attend(view, self.num_heads, self.num_kv_heads, self.head_size)
        )

    def _run_few_rows(self, ids: Int[Tensor, "G B T"], view: SlotView, member: int | None) -> Float[Tensor, "G B T H"]:
        """As `run`, by our own kernels."""
        num_members, num_choices, num_new = ids.shape
        attend = few_rows.Attend(
            view,
            self.cos,
            self.sin,
            num_members=num_members,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            window=self.window,
            num_threads=self.num_threads,
        )
        x = self._embed(ids, member).to(self.compute_dtype).view(num_members, num_choices * num_new, -1)

        def add_norm(x: Tensor, more: Tensor | None, scale: float, weight: Tensor) -> Tensor:
            own = weight if member is None or len(weight) == 1 else weight[member : member + 1]
            return few_rows.add_norm(x, more, own, scale=scale, eps=self.eps_value)

        h = add_norm(x, None, 1.0, self.norm_in[0])
        for layer, after in enumerate([*self.norm_in[1:], self.norm_out]):
            qkv = self.qkv[layer](h, member)
            if self.norm_q is not None and self.norm_k is not None:
                heads = torch.split(
                    qkv.view(num_members, -1, self.num_heads + 2 * self.num_kv_heads, self.head_size),
                    [self.num_heads, self.num_kv_heads, self.num_kv_heads],
                    dim=2,
                )
                # [G, M, heads, D]
                normed = [
                    add_norm(part.contiguous().view(num_members, -1, self.head_size), None, 1.0, weight[layer]).view_as(
                        part
                    )
                    for part, weight in zip(heads, (self.norm_q, self.norm_k), strict=False)
                ]
                qkv = torch.cat([*normed, heads[2]], dim=2).flatten(2)
            h = self.out[layer](attend(layer, qkv), member)
            h = add_norm(x, h, self.out[layer].scale, self.norm_mlp[layer])
            h = self.down[layer](few_rows.silu_mul(self.gate_up[layer](h, member)), member)
            h = add_norm(x, h, self.down[layer].scale, after)
        return h.view(*ids.shape, -1)

    def logits(self, hidden: Float[Tensor, "G M H"], member: int | None = None) -> Float[Tensor, "G M V"]:
        """Logits of all members, or of one."""
        return self.head(hidden.contiguous(), member)

    def _embed(self, ids: Int[Tensor, "G B T"], member: int | None) -> Float[Tensor, "G B T H"]:
        members = range(self.num_members) if member is None else (member,)
        return torch.stack([self.embeddings[j](own) for j, own in zip(members, ids, strict=True)])

    def _attention(
        self, layer: int, h: Float[Tensor, "G M H"], step: _Step, member: int | None
    ) -> Float[Tensor, "G M H"]:
        num_members, num_new, num_rows = len(h), step.view.num_new, len(step.view.row_ids)
        num_q, num_kv, size = self.num_heads, self.num_kv_heads, self.head_size
        qkv = self.qkv[layer](h, member)
        # [G, B * T, heads * D] -> [R, T, heads, D], members varying fastest
        qkv = qkv.view(num_members, num_rows // num_members, num_new, num_q + 2 * num_kv, size)
        qkv = qkv.transpose(0, 1).reshape(num_rows, num_new, num_q + 2 * num_kv, size)
        if self.norm_q is not None and self.norm_k is not None:
            q, k, v = torch.split(qkv, [num_q, num_kv, num_kv], 2)
            q = self._head_norm(q, self.norm_q[layer], member)
            qkv = torch.cat([q, self._head_norm(k, self.norm_k[layer], member), v], dim=2)
        turned = torch.addcmul(qkv * step.cos, qkv.roll(size // 2, dims=-1), step.sin)
        step.view.write_at(layer, step.places, turned[:, :, num_q:])
        keys, values = step.view.read(layer)
        q = turned[:, :, :num_q].transpose(1, 2)
        if step.mask is None and num_new > 1:  # the beginning of a text
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=num_q != num_kv)
        else:
            # The query heads that share a key stand in for further tokens, so keys need not be repeated.
            folded = q.reshape(num_rows, num_kv, num_q // num_kv * num_new, size)
            y = F.scaled_dot_product_attention(folded, keys, values, attn_mask=step.mask)
            y = y.reshape(num_rows, num_q, num_new, size)
        y = y.transpose(1, 2).reshape(num_rows // num_members, num_members, num_new, num_q * size)
        return self.out[layer](y.transpose(0, 1).reshape(num_members, -1, num_q * size), member)

    def _mask(self, view: SlotView) -> Tensor | None:
        """What is added to scores [R, 1, share * T, L]; None for the beginning of a text, or where all is seen."""
        num_new = view.num_new
        if view.single == 0 and num_new > 1 and (self.window is None or num_new <= self.window):
            return None
        seen = view.mask(self.window)
        if seen is None:
            return None
        # Once for all layers: each would make it of what is seen.
        mask = torch.zeros(seen.shape, dtype=self.compute_dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return mask if num_new == 1 else mask.repeat(1, 1, self.num_heads // self.num_kv_heads, 1)

    def _turns(self, view: SlotView) -> tuple[Float[Tensor, "R T heads D"], Float[Tensor, "R T heads D"]]:
        """Cosine and sine for the heads of query, key and value; values are not turned."""
        shape = (*view.positions.shape, self.num_heads + 2 * self.num_kv_heads, self.head_size)
        cos, sin = (table[view.positions][:, :, None].expand(shape).clone() for table in (self.cos, self.sin))
        cos[:, :, -self.num_kv_heads :] = 1
        sin[:, :, -self.num_kv_heads :] = 0
        return cos, sin

    def _norm(self, x: Float[Tensor, "G B T H"], weight: Tensor, member: int | None) -> Tensor:
        weight = weight if member is None or len(weight) == 1 else weight[member : member + 1]
        if x.dtype == torch.float32 and not x.is_cuda:  # torch's own takes twice as many operations
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x * torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_() * weight
        if len(weight) == 1:
            return F.rms_norm(x, x.shape[-1:], weight.view(-1), self.eps_value)
        return F.rms_norm(x, x.shape[-1:], None, self.eps_value) * weight

    def _head_norm(self, x: Float[Tensor, "R T K D"], weight: Tensor, member: int | None) -> Tensor:
        if member is None and len(weight) > 1:  # rows vary by member fastest
            weight = weight.repeat(len(x) // self.num_members, 1, 1, 1)
            return F.rms_norm(x, x.shape[-1:], None, self.eps_value) * weight
        own = weight[0] if len(weight) == 1 else weight[member or 0]
        return F.rms_norm(x, x.shape[-1:], own.view(-1), self.eps_value)

    def _rotations(self, base: Any, length: int) -> tuple[Tensor, Tensor]:
        """Tables [L, D]; the sine has the sign of the rotation, so that half a turn of the head is a roll."""
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = base.rotary_emb(torch.empty(0, dtype=self.compute_dtype, device=self.device), positions)
        signs = torch.ones(self.head_size, dtype=sin.dtype, device=self.device)
        signs[: self.head_size // 2] = -1
        return cos[0], sin[0] * signs


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, None where it sees all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _signature(model: PreTrainedModel) -> tuple[Any, ...]:
    """What must be equal for two models to run in one stack."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in model.named_parameters())
    config = model.config
    rope = tuple(sorted((key, str(value)) for key, value in config.rope_parameters.items()))
    return (config.model_type, shapes, config.rms_norm_eps, config.num_attention_heads, rope, tuple(_windows(config)))
