"""One template for all specialists: what engines need that read one prompt, and what it costs.

A specialist was trained in its own template; in another one it answers a little worse. How much is measured as
response loss on held-out records, once with own templates and once with the shared one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.chat.messages import Conversation
from ultrafuser.chat.template import Template
from ultrafuser.errors import ModelError
from ultrafuser.evaluation.intervals import Interval, paired_difference_interval
from ultrafuser.evaluation.losses import LossScore, score_losses
from ultrafuser.model.build import read_templates, resolve_templates, use_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator

OWN, SHARED = "own templates", "shared template"


@dataclass(frozen=True, slots=True)
class TemplateCost:
    """Response loss of one domain, nats per token.

    Attributes:
        own: With each specialist's own template.
        shared: With the shared one.
        change: Shared minus own, with an interval over the same conversations.
        num_conversations: Measured on so many.
    """

    domain: str
    own: float
    shared: float
    change: Interval
    num_conversations: int


def shared_template(model: FusedForCausalLM, tokenizer: Any, spec: str) -> Template:
    """The template that all specialists will read.

    Args:
        model: Built with templates.
        tokenizer: The shared one; its own template is what "tokenizer" means.
        spec: A name of the library, "tokenizer", a `.jinja` file, or the name of a specialist, whose template it is.

    Raises:
        ModelError: The model was built without templates.
        TemplateError: No such template.
    """
    own = read_templates(model.config)
    if not own:
        raise ModelError("the model has no templates, so all specialists read one prompt already: serve it as it is")
    if spec in model.names:
        return own[model.names.index(spec)]
    return resolve_templates(spec, model.names, tokenizer)[0]


def measure_cost(
    model: FusedForCausalLM,
    tokenizer: Any,
    template: Template,
    conversations: Mapping[str, Sequence[Conversation]],
) -> Iterator[TemplateCost]:
    """What the shared template costs on conversations of each domain; the model keeps its own templates."""
    for domain, held_out in conversations.items():
        own = score_losses(FusedGenerator(model, tokenizer), held_out)
        with _speaking(model, tokenizer, template):
            shared = score_losses(FusedGenerator(model, tokenizer), held_out)
        yield TemplateCost(domain, own.loss.value, shared.loss.value, _change(own, shared), len(held_out))


def save_shared(
    model: FusedForCausalLM,
    tokenizer: Any,
    template: Template,
    folder: Path,
    *,
    costs: Sequence[TemplateCost] = (),
    gate_only: bool = False,
) -> Path:
    """Write the model with one template for all specialists, whole or not at all.

    Args:
        model: Given its own templates back afterwards.
        tokenizer: The shared one; gets the template as its chat template.
        template: For all.
        folder: Replaced if it exists.
        costs: For the model card.
        gate_only: Refer to the specialists instead of copying them.

    Raises:
        ModelError: As `save_fused`.
    """
    results = {
        OWN: {cost.domain: {"loss": cost.own} for cost in costs},
        SHARED: {cost.domain: {"loss": cost.shared} for cost in costs},
    }
    before, tokenizer.chat_template = tokenizer.chat_template, template.source
    try:
        with _speaking(model, tokenizer, template):
            return save_fused(
                model, folder, tokenizer=tokenizer, gate_only=gate_only, results=results if costs else None
            )
    finally:
        tokenizer.chat_template = before


@contextmanager
def _speaking(model: FusedForCausalLM, tokenizer: Any, template: Template) -> Iterator[None]:
    templates, generation_config = model.config.templates, model.generation_config
    use_templates(model, [template] * len(model.names), tokenizer)
    try:
        yield
    finally:
        model.config.templates, model.generation_config = templates, generation_config


def _change(own: LossScore, shared: LossScore) -> Interval:
    tokens = [answer.num_tokens for answer in own.answers]
    return paired_difference_interval([a.loss for a in shared.answers], [a.loss for a in own.answers], tokens)
