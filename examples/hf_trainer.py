"""A fused model trained by plain `transformers.Trainer`, on the batches that `ultrafuser train` would train on.

    python examples/hf_trainer.py recipes/smollm2.yaml runs/by_trainer --stage stage1 --pieces 4

The loss of a step is the NLL per response token of the whole batch, however many pieces it is cut into: the model takes
`num_items_in_batch` and divides by it. Losses and parameters are those of our own loop, to rounding, which
tests/test_hf_trainer.py proves. What our loop does and this does not: composed records, a learning rate of its own for
the gate, an entropy bonus, stage 1 from hidden states on disk, checkpoints that are whole or not there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ultrafuser.alignment.collate import Collator
from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.config.load import load_recipe
from ultrafuser.config.training import StageConfig
from ultrafuser.data.dataset import encode_records, load_dataset
from ultrafuser.data.drawn import DrawnRecords
from ultrafuser.data.sampler import Sampler
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.specialist import load_tokenizer
from ultrafuser.train.phase import choose_parameters


def make_trainer(
    model: FusedForCausalLM,
    records: Mapping[str, Sequence[EncodedRecord]],
    stage: StageConfig,
    output: Path,
    *,
    pad_id: int,
    seed: int = 0,
    pieces: int = 1,
    **options: Any,
) -> Trainer:
    """A Trainer that trains one stage.

    Args:
        model: Trained in place: the gate alone, or everything (`stage.train_specialists`).
        records: Encoded records of each domain.
        stage: Steps, rate and batch.
        output: Its folder.
        pad_id: Of the tokenizer.
        seed: Of the batches.
        pieces: Parts that a batch is cut into (gradient accumulation); a divisor of its size.
        options: More of `TrainingArguments`.
    """
    choose_parameters(model, train_specialists=stage.train_specialists)
    sizes = {domain: len(some) for domain, some in records.items()}
    sampler = Sampler(sizes, records_per_domain=stage.records_per_domain, seed=seed)
    drawn = DrawnRecords(records, sampler, steps=stage.steps)
    if drawn.batch_size % pieces:
        raise SystemExit(f"a batch has {drawn.batch_size} records, which {pieces} does not divide")
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        per_device_train_batch_size=drawn.batch_size // pieces,
        gradient_accumulation_steps=pieces,
        train_sampling_strategy="sequential",  # the data set is in order already
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm or 0.0,
        seed=seed,
        **{"logging_steps": 1, "report_to": "none", "save_strategy": "no", **options},
    )
    drawn_at_once = arguments.train_batch_size * arguments.world_size * pieces
    if drawn_at_once != drawn.batch_size:  # accelerate deals whole batches to processes, and makes longer ones for GPUs
        raise SystemExit(
            f"several processes or GPUs would draw {drawn_at_once} records in a step instead of {drawn.batch_size}: "
            "show one GPU (CUDA_VISIBLE_DEVICES), or run ultrafuser train"
        )
    return Trainer(model=model, args=arguments, train_dataset=drawn, data_collator=Collator(pad_id))


def main() -> None:
    """Train one stage of a recipe and save the model, which `from_pretrained` loads."""
    parser = argparse.ArgumentParser(description="Train a stage of a recipe with transformers.Trainer.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1")
    parser.add_argument("--pieces", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()

    recipe = load_recipe(options.recipe, options.overrides)
    stage = getattr(recipe, options.stage)
    if recipe.data is None or stage is None:
        raise SystemExit(f"{options.recipe} has no data, or no {options.stage}")
    tokenizer = load_tokenizer(next(iter(recipe.specialists.values())))
    model = FusedForCausalLM.from_recipe(recipe, tokenizer=tokenizer)
    encoder = Encoder(tokenizer, read_templates(model.config))
    records = {
        domain: encode_records(
            some, encoder, max_length=recipe.data.max_length, overlength=recipe.data.overlength, turns=recipe.data.turns
        )
        for domain, some in load_dataset(recipe.data)["train"].items()
    }
    trainer = make_trainer(
        model, records, stage, options.output, pad_id=encoder.pad_id, seed=recipe.seed, pieces=options.pieces
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
