"""The forward of Llama-like specialists over a slot cache: one specialist, or a stack of equals in one pass.

A specialist alone is a stack of one. What is saved against the layers of transformers: query, key and value are one
product, so are gate and up projection; rotations are tables; nothing is made that decoding does not read. A pass of few
rows is one call of our own kernel, where there is one.

Shapes: G specialists of the stack, B choices, T new tokens, R = B * G rows of the cache, H hidden size, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultrafuser.engine import few_rows
from ultrafuser.engine.attention import Heads, TorchAttention
from ultrafuser.engine.few_rows import own
from ultrafuser.engine.passes import Layers, LayerWeights, Shape, can_run
from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.engine.weights import AnyFormat, Product, cache_type, compute_type, make_product

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
        self.eps = float(config.rms_norm_eps)
        self.window: int | None = _windows(config)[0]
        self.device, self.dtype = models[0].device, models[0].dtype
        self.embeddings: list[Any] = [model.get_input_embeddings() for model in models]
        self.compute_dtype = compute_type(self.embeddings[0].weight, form, pack=pack)
        self.cache_dtype = cache_type(self.embeddings[0].weight, form, pack=pack)
        is_fp32 = self.device.type == "cpu" and self.compute_dtype == torch.float32
        self.has_kernels = is_fp32 and few_rows.has_kernel()
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
        self.layers = self._layers(config.intermediate_size) if self.has_kernels else None

    def _product(
        self, parts: list[list[Any]], form: AnyFormat, *, num_threads: int, pack: bool
    ) -> tuple[Product, list[Any]]:
        """The product over the linear layers of each member, and the layers whose weights it does not need."""
        made = make_product(parts, form, num_threads=num_threads, pack=pack)
        return made, [linear for linears in parts for linear in linears] if made.is_copy else []

    def _stacked(self, weights: Sequence[Tensor]) -> Float[Tensor, "G 1 _"]:
        """Weights of a norm."""
        return torch.stack([weight.detach() for weight in weights])[:, None].to(self.compute_dtype)

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
        num_members, num_choices, num_new = ids.shape
        if self.layers is not None and self.layers.takes(view, num_members, num_choices * num_new):
            x = self._embed(ids, member).to(self.compute_dtype).view(num_members, num_choices * num_new, -1)
            return self.layers(x, view, member).view(*ids.shape, -1)
        return self.run(ids, view, member)

    def run(self, ids: Int[Tensor, "G B T"], view: SlotView, member: int | None = None) -> Float[Tensor, "G B T H"]:
        """As `hidden`, by torch's operations, over rows of a cache that are chosen already."""
        num_members, num_choices, num_new = ids.shape
        is_lean = self.has_kernels and not torch.compiler.is_compiling()
        add_norm, silu_mul = (few_rows.add_norm, few_rows.silu_mul) if is_lean else (_add_norm, _silu_mul)
        heads = Heads(num_members, self.num_heads, self.num_kv_heads, self.window)
        attend = TorchAttention(view, self.cos, self.sin, heads)
        x = self._embed(ids, member).to(self.compute_dtype).view(num_members, num_choices * num_new, -1)

        def normed(weight: Tensor, more: Tensor | None = None) -> Tensor:
            """Of `x`, to which `more` is added."""
            return add_norm(x, more, own(weight, member), eps=self.eps, num_threads=self.num_threads)

        h = normed(self.norm_in[0])
        for layer, after in enumerate([*self.norm_in[1:], self.norm_out]):
            qkv = self._normed_heads(layer, self.qkv[layer](h, member), member)
            h = normed(self.norm_mlp[layer], self.out[layer](attend(layer, qkv), member))
            h = silu_mul(self.gate_up[layer](h, member), num_threads=self.num_threads)
            h = normed(after, self.down[layer](h, member))
        return h.view(*ids.shape, -1)

    def logits(self, hidden: Float[Tensor, "G M H"], member: int | None = None) -> Float[Tensor, "G M V"]:
        """Logits of all members, or of one."""
        return self.head(hidden.contiguous(), member)

    def _embed(self, ids: Int[Tensor, "G B T"], member: int | None) -> Float[Tensor, "G B T H"]:
        members = range(self.num_members) if member is None else (member,)
        return torch.stack([self.embeddings[j](own) for j, own in zip(members, ids, strict=True)])

    def _layers(self, inner_size: int) -> Layers | None:
        """Passes of few rows by our own kernel, where it reads all that the layers have."""
        sizes = (self.num_heads, self.num_kv_heads, self.head_size, self.hidden_size, inner_size)
        shape = Shape(*sizes, self.window, self.eps)
        layers = []
        for index in range(len(self.qkv)):
            products = (self.qkv[index], self.out[index], self.gate_up[index], self.down[index])
            qkv, out, gate_up, down = (product.matrix for product in products)
            if qkv is None or out is None or gate_up is None or down is None or not can_run(shape):
                return None
            norms = [self.norm_in[index], self.norm_mlp[index]]
            if self.norm_q is not None and self.norm_k is not None:
                norms += [self.norm_q[index], self.norm_k[index]]
            layers.append(LayerWeights(qkv, out, gate_up, down, *norms))
        options = {"num_members": self.num_members, "num_threads": self.num_threads}
        return Layers(layers, self.norm_out, self.cos, self.sin, shape, **options)

    def _normed_heads(self, layer: int, qkv: Float[Tensor, "G M _"], member: int | None) -> Float[Tensor, "G M _"]:
        """Queries and keys normalised head by head, where the architecture does that."""
        if self.norm_q is None or self.norm_k is None:
            return qkv
        num_q, num_kv = self.num_heads, self.num_kv_heads
        q, k, v = torch.split(qkv.view(*qkv.shape[:2], num_q + 2 * num_kv, self.head_size), [num_q, num_kv, num_kv], 2)
        q, k = (
            F.rms_norm(heads, heads.shape[-1:], None, self.eps) * own(weights[layer], member)[:, None]
            for heads, weights in ((q, self.norm_q), (k, self.norm_k))
        )
        return torch.cat([q, k, v], dim=2).flatten(2)

    def _rotations(self, base: Any, length: int) -> tuple[Tensor, Tensor]:
        """Tables [L, D]; the sine has the sign of the rotation, so that half a turn of the head is a roll."""
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = base.rotary_emb(torch.empty(0, dtype=self.compute_dtype, device=self.device), positions)
        signs = torch.ones(self.head_size, dtype=sin.dtype, device=self.device)
        signs[: self.head_size // 2] = -1
        return cos[0], sin[0] * signs


def _add_norm(
    x: Float[Tensor, "G M H"], more: Tensor | None, weight: Tensor, *, eps: float, num_threads: int
) -> Float[Tensor, "G M H"]:
    """`few_rows.add_norm` by torch."""
    del num_threads
    if more is not None:
        x.add_(more)
    if x.dtype == torch.float32 and not x.is_cuda:  # torch's own takes twice as many operations
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        y: Tensor = x * squares.div_(x.shape[-1]).add_(eps).rsqrt_() * weight
        return y
    if len(weight) == 1:
        return F.rms_norm(x, x.shape[-1:], weight.view(-1), eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def _silu_mul(gate_up: Float[Tensor, "G M FF"], *, num_threads: int) -> Float[Tensor, "G M F"]:
    """`few_rows.silu_mul` by torch."""
    del num_threads
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


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
