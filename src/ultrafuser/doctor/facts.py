"""What can be known of a specialist without its weights: files, configuration, tokenizer, number of parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.doctor.hub import RepoInfo, ask_hub
from ultrafuser.model.hub import cached_folder, hub_is_reachable, is_local
from ultrafuser.model.outline import READ_ERRORS, resolve_adapter, without_weights


@dataclass(slots=True)
class Facts:
    """One specialist as far as it is known; what is None could not be had, and `reasons` says why.

    Attributes:
        name: The specialist, or "tokenizer" for the recipe's own tokenizer.
        source: Where it comes from; the base, when the recipe names an adapter's folder.
        folder: Where its files lie on this machine.
        repo: What the hub says of it.
        offline: It is on the hub, which cannot be reached.
        meta_model: The architecture without weights.
        reasons: Why a part could not be read: by "config", "tokenizer" or "model".
    """

    name: str
    source: SpecialistConfig
    folder: Path | None = None
    repo: RepoInfo | None = None
    offline: bool = False
    config: Any = None
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    meta_model: Any = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether the recipe names a folder rather than a hub id."""
        return is_local(self.source.model)

    @property
    def num_parameters(self) -> int | None:
        """Parameters, a tied head counted once."""
        return None if self.meta_model is None else sum(p.numel() for p in self.meta_model.parameters())

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the language model."""
        return None if self.config is None else self.config.get_text_config()

    @property
    def num_rows(self) -> int | None:
        """Rows of its vocabulary matrices."""
        size = getattr(self.text_config, "vocab_size", None)
        return int(size) if isinstance(size, int) else None


def gather_all(recipe: Recipe) -> tuple[list[Facts], Facts]:
    """Learn what can be learnt of every specialist.

    Returns:
        The specialists in order, and whose tokenizer is shared: the recipe's own, or the first specialist.
    """
    sources = [source.model for source in recipe.specialists.values()] + (
        [recipe.tokenizer] if recipe.tokenizer else []
    )
    online = any(not is_local(model) for model in sources) and hub_is_reachable()
    specialists = [gather(name, source, online=online) for name, source in recipe.specialists.items()]
    if recipe.tokenizer is None:
        return specialists, specialists[0]
    shared = gather("tokenizer", SpecialistConfig(model=recipe.tokenizer), online=online, tokenizer_only=True)
    return specialists, shared


def gather(name: str, source: SpecialistConfig, *, online: bool, tokenizer_only: bool = False) -> Facts:
    """Learn what can be learnt of one specialist; nothing is raised.

    Args:
        name: Names it in findings.
        source: Where it comes from.
        online: The hub may be asked.
        tokenizer_only: Leave out configuration and parameters.
    """
    facts = Facts(name, resolve_adapter(source))
    source = facts.source
    if facts.is_local:
        facts.folder = Path(source.model)
    else:
        facts.folder = cached_folder(source.model, source.revision)
        facts.repo = ask_hub(source.model, source.revision) if online else None
        facts.offline = facts.repo is None
    unknown = facts.folder is None and facts.offline
    refused = facts.repo is not None and facts.repo.refusal is not None
    if unknown or refused or (facts.is_local and not Path(source.model).is_dir()):
        return facts
    where: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
    if facts.is_local or facts.offline:
        target, where["local_files_only"] = str(facts.folder), True
    else:
        target, where["revision"] = source.model, source.revision or "main"
    facts.tokenizer = _read(facts, "tokenizer", lambda: AutoTokenizer.from_pretrained(target, **where))
    if not tokenizer_only:
        facts.config = _read(facts, "config", lambda: AutoConfig.from_pretrained(target, **where))
        facts.generation = _read_generation_config(facts.folder)
        if facts.config is not None:
            facts.meta_model = _read(facts, "model", lambda: without_weights(facts.config, source.trust_remote_code))
    return facts


def _read(facts: Facts, part: str, read: Any) -> Any:
    try:
        return read()
    except READ_ERRORS as error:
        facts.reasons[part] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return None


def _read_generation_config(folder: Path | None) -> dict[str, Any]:
    try:
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
