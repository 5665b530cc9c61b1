"""Specialist-parallel serving: a process for each specialist, one sum over the processes for each token.

Every rank holds one specialist, the gate, and that specialist's cache. The first rank runs the engine; its runner sends
the others what to read, and gets the fused logits as a sum of `exp(score) * logits` over the ranks, together with the
scores: dividing by the sum of `exp(score)` makes it the softmax's weights (Equation 1). A step costs one message to
each rank (0.15 ms over gloo on one machine) and one reduction of V + N floats for each row.

Shapes: B choices, T new tokens, M rows whose next token is wanted, N specialists, V vocabulary.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from ultrafuser.engine.engine import Engine
from ultrafuser.engine.memory import fit_slots, free_bytes, may_pack
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.ranks import Ranks, join_ranks
from ultrafuser.engine.runner import MARGIN, Feed, Runner
from ultrafuser.engine.shard import LARGEST_SCORE, Question, Shard
from ultrafuser.errors import ConfigError, ModelError, UltrafuserError
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.device import choose_device
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.load import LoadOptions
from ultrafuser.model.specialist import first_line

log = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 1800.0
_LONG = 32  # tokens of a row from which a pass begins at once, and not with the next question


class ParallelRunner(Runner):
    """The first rank's runner. What it gives for hidden states are their numbers, [B, T, 1]; see `Shard`.

    Passes of few tokens wait for the question that follows and go along with it, in one message.

    Args:
        model: Knows all specialists and holds none.
        shard: Of this rank.
        bytes_per_token: Of all ranks.
        weight_bytes: Of all ranks.
    """

    def __init__(self, model: FusedForCausalLM, shard: Shard, *, bytes_per_token: int, weight_bytes: int) -> None:
        self.model, self.shard, self.ranks = model, shard, shard.ranks
        self.num_specialists = len(model.names)
        self.draft_form, self.released = "exact", False
        self._bytes_per_token, self._weight_bytes = bytes_per_token, weight_bytes
        self._orders: list[dict[str, Any]] = []
        self._next_row = 1
        self._fused: tuple[dict[str, list[int]], Tensor, Tensor] | None = None  # rows, and their scores and logits

    @property
    def num_views(self) -> int:
        """Specialists."""
        return self.num_specialists

    @property
    def bytes_per_token(self) -> int:
        """Of cache, for one token of a choice in all views."""
        return self._bytes_per_token

    @property
    def weight_bytes(self) -> int:
        """Weights that one pass of all specialists reads."""
        return self._weight_bytes

    def clear_slot(self, slot: int) -> None:
        """Forget what a slot holds."""
        self._orders.append({"clear": slot})

    def copy_slot(self, source: int, target: int, lengths: Sequence[int]) -> None:
        """Copy what a slot holds, `lengths` tokens of each view, to another."""
        self._orders.append({"copy": [source, target], "lengths": list(lengths)})

    def hidden(self, feeds: Mapping[int, Feed], *, reduced: bool = False) -> dict[int, Int[Tensor, "B T 1"]]:
        """Numbers of the hidden states that the ranks will compute, all with the same weights."""
        del reduced
        found: dict[int, Tensor] = {}
        order: dict[str, Any] = {}
        longest = 0
        for view, feed in feeds.items():
            shape = (len(feed.slots), max(map(len, feed.tokens)), 1)
            num_rows, longest = shape[0] * shape[1], max(longest, shape[1])
            numbers = torch.arange(self._next_row, self._next_row + num_rows, device=self.ranks.device)
            found[view] = numbers.view(shape)
            order[str(view)] = {
                "first": self._next_row,
                "slots": list(feed.slots),
                "starts": list(feed.starts),
                "tokens": [list(tokens) for tokens in feed.tokens],
            }
            self._next_row += num_rows
        if order:
            self._orders.append({"feeds": order})
        if longest >= _LONG:
            self._ask(None)
        return found

    def logits(self, view: int, hidden: Int[Tensor, "M 1"], *, reduced: bool = False) -> Float[Tensor, "M V"]:
        """What one view says alone."""
        del reduced
        rows = {str(view): hidden[:, 0].tolist()}
        return self._sum(Question("weighted", rows, weights={str(view): [1.0] * len(hidden)}))

    def scores(self, hidden: Mapping[int, Int[Tensor, "M 1"]]) -> Float[Tensor, "M N"]:
        """As `Runner.scores`; where weights are the gate's, the same sum brings the logits that go with them."""
        rows = _numbers(hidden)
        config = self.model.config
        num_rows = len(next(iter(rows.values())))
        if config.weighting != "gate":
            return torch.zeros((num_rows, self.num_specialists), device=self.ranks.device)
        if config.granularity == "prompt":  # weights come from other rows than logits
            return self._sum(Question("scores", rows))
        if self._fused is None or self._fused[0] != rows:
            total = self._sum(Question("fused", rows, config.fusion_space))
            scores, logits = total[:, -self.num_specialists :], total[:, : -self.num_specialists]
            sums = scores.clamp(-LARGEST_SCORE, LARGEST_SCORE).exp().masked_fill(~self._active(rows), 0.0).sum(dim=-1)
            self._fused = rows, scores.contiguous(), self._finish(logits / sums[:, None])
        return self._fused[1]

    def fused(self, hidden: Mapping[int, Int[Tensor, "M 1"]], weights: Float[Tensor, "M N"]) -> Float[Tensor, "M V"]:
        """Fused logits, fp32 (Equation 1); another sum where the weights are not the gate's."""
        rows = _numbers(hidden)
        if self._fused is not None and self._fused[0] == rows:
            _, scores, logits = self._fused
            gates = self.weights(scores, self._active(rows))
            if scores.abs().max() <= LARGEST_SCORE and torch.equal(gates, weights):
                return logits
        columns = {view: weights[:, int(view)].tolist() for view in rows}
        return self._finish(self._sum(Question("weighted", rows, self.model.config.fusion_space, columns)))

    def close(self) -> None:
        """Let the other ranks end. Harmless when they have."""
        self.ranks.close()

    def _active(self, rows: Mapping[str, list[int]]) -> Tensor:
        """Which specialists have a row [M, N]."""
        columns = [rows.get(str(view)) for view in range(self.num_specialists)]
        num_rows = len(next(iter(rows.values())))
        active = [[number > 0 for number in column] if column else [False] * num_rows for column in columns]
        return torch.tensor(active, device=self.ranks.device).T

    def _finish(self, values: Tensor) -> Tensor:
        if self.model.config.fusion_space != "probs":
            return values
        return values.clamp(min=torch.finfo(values.dtype).tiny).log()

    def _sum(self, question: Question) -> Tensor:
        total = self._ask(question)
        assert total is not None
        return total

    def _ask(self, question: Question | None) -> Tensor | None:
        """Send what is due, and do this rank's part of it."""
        orders, self._orders = self._orders, []
        message = {"orders": orders, "question": question.to_json() if question is not None else None}
        self.ranks.send(message)
        return self.shard.take_part(message)


def run_rank(
    place: str,
    options: EngineOptions = EngineOptions(),
    load: LoadOptions = LoadOptions(),
    *,
    timeout_s: float = 120.0,
) -> Engine | None:
    """Be one rank of a model's specialists, in the order of their names.

    The launcher sets the environment; each rank reads its own specialist only. On GPUs each process takes the one of
    its local rank.

        # answer.py; python -m torch.distributed.run --nproc-per-node 3 answer.py
        if (engine := run_rank("runs/demo/model")) is not None:
            print(EngineGenerator(engine).generate([(Message("user", "Hello"),)], SamplingParams())[0].text)
            close_ranks(engine)

    Args:
        place: Folder or hub id of a fused model.
        options: Of the engine; `cache_bytes` counts for each rank, and specialists are never stacked.
        load: Of the weights; an empty device takes the GPU of the local rank where there is one.
        timeout_s: Longest wait for the other ranks' part of a step. A rank that is killed is noticed at once, one that
            hangs after this time; either ends the engine with a `ModelError` that names it.

    Returns:
        The first rank's engine; None on the others, after it was closed.

    Raises:
        ConfigError: No launcher, another number of processes than specialists, or an option that does not go along.
        ModelError: The model cannot be loaded or run, or another rank is gone.
    """
    if options.runner == "stacked":
        raise ConfigError("specialists in parallel are in processes of their own and cannot be stacked: use auto")
    owns = join_ranks(_LOAD_TIMEOUT_S)
    config = _read_config(place)
    ranks = Ranks(config.names, _device(load), timeout_s=timeout_s)
    shard, context, num_slots, sums = _make_shard(place, config, ranks, options, load)
    if ranks.rank > 0:
        try:
            shard.serve()
        finally:
            if owns:
                dist.destroy_process_group()
        return None
    with torch.device("meta"):
        whole = FusedForCausalLM(config)
    whole.generation_config = shard.runner.model.generation_config
    runner = ParallelRunner(whole, shard, **sums)
    fitting = replace(options, max_context=context, max_choices=num_slots, cache_bytes=2**62, runner="auto")
    atexit.register(_leave, runner, owns)
    return Engine(whole, AutoTokenizer.from_pretrained(place), fitting, runner=runner)


def close_ranks(engine: Engine) -> None:
    """Let the other ranks of `run_rank` end; otherwise they do when this process exits."""
    assert isinstance(engine.runner, ParallelRunner)
    engine.runner.close()


def _leave(runner: ParallelRunner, owns: bool) -> None:
    runner.close()
    if owns and dist.is_initialized():
        dist.destroy_process_group()


def _make_shard(
    place: str, config: FusedConfig, ranks: Ranks, options: EngineOptions, load: LoadOptions
) -> tuple[Shard, int, int, dict[str, int]]:
    """This rank's specialist, the context and slots that fit on all ranks, and their bytes together."""
    error: UltrafuserError | None = None
    part: FusedForCausalLM | None = None
    runner: Runner | None = None
    found: dict[str, int] = {}
    try:
        part = _load_part(place, config, ranks, load)
        share = options.cache_bytes or free_bytes(ranks.device) // (2 * _ranks_per_memory(ranks.device))
        found = dict(zip(("context", "slots"), fit_slots(part, replace(options, cache_bytes=share)), strict=True))
    except UltrafuserError as failure:
        error = failure
    fits = ranks.agree(found, error)
    context, num_slots = (min(fit[key] for fit in fits) for key in ("context", "slots"))
    assert part is not None
    try:
        runner = Runner(
            part,
            num_slots=num_slots,
            max_context=context,
            margin=MARGIN,
            form=options.weights,
            static_shapes=options.static_shapes,
            pack=may_pack(part, options, sharers=_ranks_per_memory(ranks.device)),
            release=options.release_model,
        )
        found = {"bytes_per_token": runner.bytes_per_token, "weight_bytes": runner.weight_bytes}
    except UltrafuserError as failure:
        error = failure
    sizes = ranks.agree(found, error)
    assert runner is not None
    sums = {key: sum(size[key] for size in sizes) for key in ("bytes_per_token", "weight_bytes")}
    return Shard(runner, ranks, vocab_size=int(config.vocab_size)), context, num_slots, sums


def _load_part(place: str, config: FusedConfig, ranks: Ranks, load: LoadOptions) -> FusedForCausalLM:
    """The model with one specialist left in it."""
    name = config.names[ranks.rank]
    sizes = dict(zip(config.names, config.hidden_sizes, strict=True))
    # A gate that was trained on several sizes can only be read beside specialists of two.
    second = min((other for other in sizes if sizes[other] != sizes[name]), key=sizes.__getitem__, default=None)
    dtype = getattr(torch, load.dtype, None) if load.dtype else None
    if load.dtype and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"no dtype is called {load.dtype!r}; usual ones are float32 and bfloat16")
    try:
        model: FusedForCausalLM = FusedForCausalLM.from_pretrained(
            place,
            without=[other for other in config.names if other not in (name, second)],
            **({"dtype": dtype} if dtype is not None else {}),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"specialist {name!r} cannot be loaded from {place!r}: {first_line(error)}") from error
    if second is not None:
        del model.specialists[second]
    return cast(FusedForCausalLM, model.to(ranks.device).train(False))  # type: ignore[arg-type]


def _read_config(place: str) -> FusedConfig:
    try:
        values, _ = FusedConfig.get_config_dict(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model can be loaded from {place!r}: {first_line(error)}") from error
    if (kind := values.get("model_type")) != FusedConfig.model_type:
        raise ModelError(f"{place} holds a {kind} model and no fused one, which has no specialists to run in parallel")
    config: FusedConfig = FusedConfig.from_pretrained(place)
    return config


def _device(load: LoadOptions) -> torch.device:
    device = choose_device(load.device, "--device")
    if device.type == "cuda":
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        )
        torch.cuda.set_device(device)
    return device


def _ranks_per_memory(device: torch.device) -> int:
    """Ranks that share this one's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) if device.type == "cpu" else 1


def _numbers(hidden: Mapping[int, Tensor]) -> dict[str, list[int]]:
    return {str(view): hidden[view][:, 0].tolist() for view in sorted(hidden)}
