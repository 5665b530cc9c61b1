"""Full fine-tunes of one base as the base and low-rank adapters: what it costs on the SmolLM2 trio's held-out records.

    python studies/shared_base.py --share 0.05 --share 0.10 --share 0.15

It needs runs/smollm2 (`python studies/smollm2.py train`). The trio is fused by its trained gate, or by equal weights
where there is none yet, and scored on the test split as it is and over a shared base, with adapters of several sizes.
`--other FOLDER` scores another shared-base model beside them: one whose gate was trained over the shared base, say, or
whose specialists were tuned as adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ultrafuser.alignment.collate import collate, micro_batches
from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.config.load import load_recipe
from ultrafuser.data.dataset import encode_records, load_dataset
from ultrafuser.evaluation.intervals import paired_difference_interval
from ultrafuser.export.adapters import extract_fused, measure_fused
from ultrafuser.files import write_text_atomically
from ultrafuser.model.build import read_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.specialist import load_tokenizer, parse_source
from ultrafuser.provenance import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "shared_base.json"


def load_trio(folder: Path, names: Sequence[str], tokenizer: Any) -> FusedForCausalLM:
    """The trio as it was trained: with its gate where there is one, else by equal weights."""
    if (folder / "stage1-gate" / "config.json").is_file():
        model: FusedForCausalLM = FusedForCausalLM.from_pretrained(folder / "stage1-gate")
        return model
    places = {name: folder / "specialists" / name for name in names}
    there = {name: place for name, place in places.items() if (place / "config.json").is_file()}
    return FusedForCausalLM.from_specialists(there, templates="tokenizer", tokenizer=tokenizer, weighting="uniform")


@torch.no_grad()
def nll_of_records(
    model: FusedForCausalLM, encoder: Encoder, records: Sequence[EncodedRecord]
) -> dict[str, list[float]]:
    """Summed NLL (nats) of each record, by the fusion and by each specialist, in the order of `records`."""
    sums: dict[str, dict[str, float]] = {}
    for piece in micro_batches(records, max_columns=2048):
        batch = collate(piece, pad_id=encoder.pad_id)
        loss, _, _ = model.response_loss(**batch.tensors(model.device), details=True)
        assert loss.specialist_nll is not None
        columns = {"fused": loss.nll, **dict(zip(model.names, loss.specialist_nll.unbind(-1), strict=True))}
        lengths = [record.num_response_tokens for record in piece]
        for name, nll in columns.items():
            parts = zip(piece, torch.split(nll, lengths), strict=True)
            sums.setdefault(name, {}).update({record.id: float(part.sum()) for record, part in parts})
    return {name: [by_record[record.id] for record in records] for name, by_record in sums.items()}


def score(model: FusedForCausalLM, encoder: Encoder, records: Mapping[str, Sequence[EncodedRecord]]) -> dict[str, Any]:
    """`nll_of_records` by domain."""
    return {domain: nll_of_records(model, encoder, own) for domain, own in records.items()}


def compare(before: dict[str, Any], after: dict[str, Any], records: Mapping[str, Sequence[EncodedRecord]]) -> list[Any]:
    """Mean losses and paired differences, by domain and model."""
    rows = []
    for domain, own in records.items():
        tokens = [record.num_response_tokens for record in own]
        for name in before[domain]:
            means = [
                [nll / count for nll, count in zip(scores[domain][name], tokens, strict=True)]
                for scores in (before, after)
            ]
            gap = paired_difference_interval(means[1], means[0], tokens)
            old, new = (sum(scores[domain][name]) / sum(tokens) for scores in (before, after))
            rows.append(
                {
                    "model": name,
                    "domain": domain,
                    "separate": old,
                    "shared": new,
                    "change": new / old - 1,
                    "difference": [gap.value, gap.low, gap.high],
                    "records": len(own),
                }
            )
            print(f"  {name:6} on {domain:5} {old:.4f} -> {new:.4f} ({new / old - 1:+.2%})", flush=True)
    return rows


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all specialists' parameters, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main() -> None:
    """Extract, score, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "smollm2")
    parser.add_argument("--share", type=float, action="append", help="adapters' parameters over the base's; repeatable")
    parser.add_argument("--records", type=int, default=200, help="of each domain's test split, at most")
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument(
        "--other", type=Path, help="another shared-base model of these specialists; alone without --share"
    )
    parser.add_argument("--save", type=Path, help="keep the model of the last share here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("ULTRAFUSER_DATA", str(ROOT.parent / "shared" / "data"))
    recipe = load_recipe(ROOT / "recipes" / "smollm2.yaml")
    assert recipe.data is not None
    base_place = str(options.folder / "base")
    tokenizer = load_tokenizer(parse_source(base_place))
    trio = load_trio(options.folder, list(recipe.specialists), tokenizer)
    encoder = Encoder(tokenizer, read_templates(trio.config))
    records = {
        domain: encode_records(sources, encoder, max_length=recipe.data.max_length)[: options.records]
        for domain, sources in load_dataset(recipe.data)["test"].items()
    }
    shares = options.share or ([] if options.other else [0.15])
    began = time.perf_counter()
    before = score(trio, encoder, records)
    one = weight_bytes(trio.specialists[trio.names[0]])
    differences = measure_fused(trio, base_place, max_rank=options.max_rank) if shares else {}
    results = []
    for share in shares:
        shared, extracts = extract_fused(trio, base_place, share=share, differences=differences)
        ratio = weight_bytes(shared.specialists) / one
        print(f"share {share}: weights {ratio:.3f} of one model, separate {weight_bytes(trio.specialists) / one:.3f}")
        for name, extract in extracts.items():
            print(
                f"  {name}: {extract.num_parameters:,} parameters, {extract.kept:.1%} kept, {extract.lost:.2%} left out"
            )
        results.append(
            {
                "share": share,
                "weights_over_one_model": ratio,
                "kept": {name: extract.kept for name, extract in extracts.items()},
                "left_out": {name: extract.lost for name, extract in extracts.items()},
                "largest_rank": {name: max(extract.ranks.values()) for name, extract in extracts.items()},
                "losses": compare(before, score(shared, encoder, records), records),
            }
        )
        if options.save is not None and share == shares[-1]:
            save_fused(shared, options.save, gate_only=True, tokenizer=tokenizer)
    if options.other is not None:
        tuned = FusedForCausalLM.from_pretrained(options.other)
        ratio = weight_bytes(tuned.specialists) / one
        print(f"{options.other}: weights {ratio:.3f} of one model")
        losses = compare(before, score(tuned, encoder, records), records)
        results.append({"model": str(options.other), "weights_over_one_model": ratio, "losses": losses})
    values = {
        "command": " ".join(["python", *sys.argv]),
        "weighting": trio.config.weighting,
        "specialists": trio.names,
        "seconds": time.perf_counter() - began,
        "versions": versions(),
        "hardware": hardware(),
        "results": results,
    }
    write_text_atomically(json.dumps(values, indent=1) + "\n", options.out)


if __name__ == "__main__":
    main()
