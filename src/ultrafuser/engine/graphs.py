"""Decoding steps of constant shape: what CUDA graphs need, and torch.compile without compiling again.

A step is one for each number of choices (rounded up to a power of two), new tokens and columns read (rounded up, too).
Rows that are not there write beyond what anybody reads. On CUDA the step is captured as a graph and replayed, so
launching its kernels costs nothing; elsewhere it runs as it is.

Shapes: G specialists of a stack, B choices, T new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.slots import SlotCache, SlotView

LONGEST_STEP = 9  # new tokens: a draft of eight and the token before it
_FEWEST_COLUMNS = 128


@dataclass(slots=True)
class _Step:
    ids: Tensor  # [G, B, T]
    starts: Tensor  # [G, B]
    run: Callable[[], Tensor]


class StaticView(SlotView):
    """Rows of the first B slots, of shapes that depend on B, T and `num_columns` alone; nothing is read back."""

    def __init__(self, cache: SlotCache, starts: Int[Tensor, " R"], num_new: int, num_columns: int) -> None:
        self.cache = cache
        self.rows = slice(0, len(starts))
        self.row_ids = torch.arange(len(starts), device=starts.device)
        self.num_new, self.starts = num_new, None
        self.positions = starts[:, None] + torch.arange(num_new, device=starts.device)
        self.stop = num_columns
        self.single = None


class StepGraphs:
    """The steps of one stack.

    Args:
        stack: The specialists.
        cache: Their slots.
        compile_with: Backend of torch.compile, or None to run as written.
    """

    def __init__(self, stack: LlamaStack, cache: SlotCache, *, compile_with: str | None = None) -> None:
        self.stack, self.cache, self.compile_with = stack, cache, compile_with
        self.steps: dict[tuple[int, int, int], _Step] = {}
        # One after another they run, so one may use what another has done with.
        self._pool = torch.cuda.graph_pool_handle() if stack.device.type == "cuda" else None

    def takes(self, num_choices: int, num_new: int, slots: list[int]) -> bool:
        """Whether a step is of the kind that is repeated: few tokens of the first slots."""
        return num_new <= LONGEST_STEP and slots == list(range(num_choices))

    def hidden(self, ids: Int[Tensor, "G B T"], starts: Int[Tensor, "G B"], longest: int) -> Float[Tensor, "G B T H"]:
        """As `LlamaStack.hidden` for slots 0 to B - 1; `longest` is the largest start."""
        num_members, num_choices, num_new = ids.shape
        rows = min(_power_of_two(num_choices), self.cache.num_slots)
        columns = min(max(_power_of_two(longest + num_new), _FEWEST_COLUMNS), self.cache.length)
        key = (rows, num_new, columns)
        if key not in self.steps:
            self.steps[key] = self._make(num_members, *key)
        step = self.steps[key]
        step.ids[:, :num_choices].copy_(ids)
        step.starts[:, :num_choices].copy_(starts)
        # Whoever is not there writes into the margin at the end of its slot.
        step.starts[:, num_choices:].fill_(self.cache.length - num_new)
        return step.run()[:, :num_choices]

    def _make(self, num_members: int, rows: int, num_new: int, columns: int) -> _Step:
        device = self.stack.device
        ids = torch.zeros((num_members, rows, num_new), dtype=torch.long, device=device)
        starts = torch.full((num_members, rows), self.cache.length - num_new, dtype=torch.long, device=device)

        def forward(ids: Tensor, starts: Tensor) -> Tensor:
            view = StaticView(self.cache, starts.t().reshape(-1), num_new, columns)
            return self.stack.run(ids, view)

        if self.compile_with is not None:
            forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=self.compile_with)
        if device.type != "cuda":
            return _Step(ids, starts, lambda: forward(ids, starts))
        return _Step(ids, starts, _captured(lambda: forward(ids, starts), device, self._pool))


def _captured(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """Run a few times beside the main stream, then record; what comes out is overwritten by the next replay."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the device
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output.clone()

    return replay


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
