"""What a user chooses of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser.engine.drafts import DraftKind
from ultrafuser.engine.runner import RunnerKind
from ultrafuser.engine.weights import DraftWeights, WeightFormat


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine works.

    Attributes:
        max_context: Tokens of the longest view; 0 takes what the specialists were made for, 4096 at most.
        max_choices: Choices that run at once, fewer where memory is short.
        cache_bytes: Memory for caches, at most; 0 takes half of what is free.
        chunk: Tokens of a prompt that are read in one round.
        runner: Specialists in a stack, one after another, or whatever is faster.
        weights: Their format; "exact" gives the model's own tokens.
        pack: Hold exact fp32 weights on x86 a second time, in a layout that is faster for prompts (and for two rows and
            more, where our own kernel cannot be had); None does so where the copy takes at most a quarter of the
            machine's memory.
        drafts: Kinds of speculation; none to decode plainly.
        draft_weights: Format of a copy of the weights with which a specialist runs ahead, which changes no token;
            "auto" is int8 (a quarter of fp32) for Llama-like specialists on the CPU, or int4 without our own kernel;
            of weights in 16 bits only where memory allows `pack`; "exact" makes none.
        max_draft_choices: With more choices in the batch nothing is drafted.
        skip_below: Weight under which a specialist is left out until it catches up; not exact, nothing is drafted with
            it, and `EngineStats` says how often it changed nothing. 0 runs everybody.
        static_shapes: Decode in steps of constant shape, on CUDA as graphs; None does so on CUDA.
        release_model: Nobody else needs the model: the memory of weights that the engine has copied is given back.
    """

    max_context: int = 0
    max_choices: int = 16
    cache_bytes: int = 0
    chunk: int = 256
    runner: RunnerKind = "auto"
    weights: WeightFormat = "exact"
    pack: bool | None = None
    drafts: tuple[DraftKind, ...] = ("lookup", "self")
    draft_weights: DraftWeights = "auto"
    max_draft_choices: int = 2
    skip_below: float = 0.0
    static_shapes: bool | None = None
    release_model: bool = False
