"""How a recipe's models are trained: stages, adapters, processes, what is kept and reported.

The defaults are the paper's where the paper gives a value (Ding et al. 2024, arXiv 2403.08281: Algorithm 1, Appendix
B) and say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ultrafuser.config.section import Beta, Fraction, Name, Section


class LoraConfig(Section):
    """Low-rank adapters of frozen weights (peft), one set for each specialist."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # the update counts alpha / rank
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # all of the backbone but its head


class StageConfig(Section):
    """One training stage (Algorithm 1). The defaults are the paper's stage 1 (Appendix B)."""

    steps: PositiveInt = 400
    learning_rate: PositiveFloat = 2e-5
    gate_learning_rate: PositiveFloat | None = None  # None: the same as learning_rate
    records_per_domain: PositiveInt = 64  # a batch holds this many of every domain
    train_specialists: bool = False  # stage 1 trains the gate alone
    composed_share: Fraction = 0.0  # part of each batch made by joining records of two domains; the paper has none
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: Appendix B
    min_learning_rate_ratio: Fraction = 0.0  # the cosine ends at this part of the peak
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: PositiveFloat | None = 1.0
    gate_entropy: NonNegativeFloat = 0.0  # rewards spread gate weights; the paper uses no balance term
    lora: LoraConfig | None = None  # with train_specialists: train adapters and leave the weights as they are


class TuneConfig(StageConfig):
    """Fine-tune one specialist before fusing (n = 1, the same loop)."""

    domains: tuple[Name, ...]  # which of the recipe's domains it learns from
    train_specialists: Literal[True] = True
    records_per_domain: PositiveInt = 32


class Stage1CacheConfig(Section):
    """Stage 1 from hidden states on disk: one specialist in memory at a time. Ours; results are those of `off`."""

    # YAML reads a bare off as false.
    mode: Annotated[
        Literal["off", "window", "full"], BeforeValidator(lambda mode: "off" if mode is False else mode)
    ] = "off"  # window: files make room for those of later steps; full: all are kept, for runs to come
    folder: Path | None = None  # None: <output>/hidden; runs that differ in gate or rates alone may share one
    disk_gb: PositiveFloat = 20.0  # the most that the folder holds, in 10^9 bytes


class ParallelConfig(Section):
    """Several processes, as torchrun starts them; one process needs none of it."""

    # fsdp: every process holds a part of every specialist. specialist: a group of processes for each specialist.
    mode: Literal["fsdp", "specialist"] = "fsdp"
    cpu_offload: bool = False  # parameters, gradients and optimizer state wait in host memory
    replicate_frozen: bool = False  # every process holds frozen weights whole: more memory, and nothing to gather
    timeout_s: PositiveFloat = 1800.0  # longest wait for another process within a step


class TrainConfig(Section):
    """How the loop runs; nothing here changes what is learnt but precision."""

    micro_batch_tokens: PositiveInt = 16384  # columns of a forward pass; a batch is cut into such pieces
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast over fp32 master weights
    activation_checkpointing: bool = False
    loss_chunk: PositiveInt = 1024  # response tokens whose logits are held at once, at most
    # Ours, torch's linear_cross_entropy (torch 2.13) or Liger (a GPU, pip install liger-kernel): the same to rounding,
    # but that torch's, in bf16, also adds up the gradient of a head in bf16: in 32 chunks it is 0.7 % off.
    loss_backend: Literal["chunked", "torch", "liger"] = "chunked"
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    validate_every: PositiveInt = 100
    validation_records: NonNegativeInt = 64  # per domain
    sampler: Literal["balanced", "proportional"] = "balanced"  # balanced: Section 3.1
    # Beside metrics.jsonl, which is always written; None: TensorBoard where it is installed.
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] | None = None
    # "module:name" of functions or classes that are told of every step. Naming one here imports and runs that module.
    callbacks: tuple[str, ...] = ()
    threads: PositiveInt | None = None  # None: torch's own choice
    device: str | None = None  # None: a GPU if there is one
    stage1_cache: Stage1CacheConfig = Stage1CacheConfig()
    parallel: ParallelConfig = ParallelConfig()
