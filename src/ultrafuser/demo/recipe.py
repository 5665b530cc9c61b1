"""The demo's recipe: three tiny specialists in the paper's three templates, tuned, then fused in two stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ultrafuser.config.recipe import (
    DataConfig,
    DomainConfig,
    GateConfig,
    Recipe,
    SourceConfig,
    SpecialistConfig,
)
from ultrafuser.config.training import StageConfig, TrainConfig, TuneConfig

TEMPLATES = {"text": "ultralm", "code": "codellama", "math": "wizardmath"}
DOMAINS = tuple(TEMPLATES)

ITEMS_PER_DOMAIN = 6000
TEST_ITEMS = 200

# A gate that stays a little undecided lets specialists learn from each other's domains in stage 2.
GATE_ENTROPY = 0.1
COMPOSED_SHARE = 0.4  # of a fusion batch; chosen on validation questions, see docs/results.md
BETAS = (0.9, 0.95)
BASE = TuneConfig(
    domains=DOMAINS,
    steps=60,
    learning_rate=2e-3,
    records_per_domain=16,
    warmup_steps=10,
    betas=BETAS,
    weight_decay=0.01,
)
TUNE = BASE.model_copy(update={"records_per_domain": 48, "min_learning_rate_ratio": 0.1})
TUNE_STEPS = {"text": 150, "code": 60, "math": 100}  # by how hard the domain is
STAGE1 = StageConfig(steps=80, learning_rate=3e-3, records_per_domain=16, composed_share=COMPOSED_SHARE, warmup_steps=5)
STAGE2 = StageConfig(
    steps=200,
    learning_rate=1e-3,
    gate_learning_rate=1e-3,
    records_per_domain=16,
    train_specialists=True,
    gate_entropy=GATE_ENTROPY,
    composed_share=COMPOSED_SHARE,
    warmup_steps=5,
    betas=BETAS,
    weight_decay=0.01,
)
FURTHER = BASE.model_copy(update={"steps": STAGE1.steps + STAGE2.steps, "learning_rate": 1e-3})


def tuned(model: Path, template: str, tune: TuneConfig) -> SpecialistConfig:
    """A specialist to be fine-tuned from a model at hand."""
    return SpecialistConfig(model=str(model), template=template, tune=tune)


def demo_recipe(
    folder: Path, base: Path, files: Mapping[str, Path], seed: int, *, composed_share: float | None = None
) -> Recipe:
    """The recipe of the fused model."""
    change = {} if composed_share is None else {"composed_share": composed_share}
    return Recipe(
        name="demo",
        output=folder,
        seed=seed,
        specialists={name: _specialist(name, base) for name in TEMPLATES},
        gate=GateConfig(hidden_size=128),
        data=DataConfig(
            domains={name: DomainConfig(sources=(SourceConfig(path=str(path)),)) for name, path in files.items()},
            validation_fraction=0.01,
            max_length=512,
        ),
        train=TrainConfig(
            micro_batch_tokens=1536, checkpoint_every=75, validate_every=50, validation_records=48, keep_checkpoints=1
        ),
        stage1=STAGE1.model_copy(update=change),
        stage2=STAGE2.model_copy(update=change),
    )


def _specialist(name: str, base: Path) -> SpecialistConfig:
    tune = TUNE.model_copy(update={"domains": (name,), "steps": TUNE_STEPS[name]})
    return tuned(base, TEMPLATES[name], tune)
