"""The model card: what was fused, how, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrafuser.model.configuration import FusedConfig


def write_model_card(
    path: Path, config: FusedConfig, *, recipe: str | None = None, results: Mapping[str, Any] | None = None
) -> None:
    """Write README.md of a model folder.

    Args:
        path: The file.
        config: The fused model's.
        recipe: Resolved recipe as YAML.
        results: Scores: model -> domain -> {"loss": nats per token, "accuracy": 0..1 or None}.
    """
    path.write_text("\n".join(_lines(config, recipe, results)) + "\n", encoding="utf-8")


def _lines(config: FusedConfig, recipe: str | None, results: Mapping[str, Any] | None) -> list[str]:
    names = ", ".join(f"`{name}`" for name in config.names)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [ultrafuser, model-fusion]",
        "---",
        "",
        f"# Fusion of {len(config.names)} specialists",
        "",
        f"Specialists {names} run on every token; a shared gate weighs their logits into one next-token distribution"
        " (UltraFuser, [arXiv 2403.08281](https://arxiv.org/abs/2403.08281)).",
        "",
        "| specialist | architecture | hidden size | from | template |",
        "| --- | --- | --- | --- | --- |",
    ]
    templates = [t["name"] for t in config.templates] or ["none"] * len(config.names)
    sources = {part["name"]: part for part in config.sources}
    for (name, part), template in zip(config.specialist_configs.items(), templates, strict=True):
        source = sources.get(name, {}).get("model") or "a model in memory"
        lines.append(f"| {name} | {part.model_type} | {part.hidden_size} | {source} | {template} |")
    lines += [
        "",
        "```python",
        "import ultrafuser  # registers the architecture",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "Or talk to it: `ultrafuser chat path/to/this/folder`",
    ]
    if results:
        lines += ["", "## Results", "", *_results_table(results)]
    if recipe:
        lines += ["", "## Recipe", "", "```yaml", recipe.rstrip(), "```"]
    return lines


def _results_table(results: Mapping[str, Any]) -> list[str]:
    domains = list(dict.fromkeys(domain for scores in results.values() for domain in scores))
    lines = ["Response loss in nats per token.", "", "| model | " + " | ".join(domains) + " |"]
    lines.append("| --- " * (len(domains) + 1) + "|")
    for model, scores in results.items():
        cells = [f"{scores[domain]['loss']:.3f}" if domain in scores else "" for domain in domains]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines
