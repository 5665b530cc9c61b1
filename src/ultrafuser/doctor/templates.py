"""Templates: does each one write a conversation of two turns, and keep the history as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ultrafuser.chat.library import load_template
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.chat.template import Template
from ultrafuser.chat.turns import split_turns
from ultrafuser.config.recipe import Recipe
from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, blocker, ok, warning
from ultrafuser.errors import TemplateError

SYSTEM = Message("system", "Answer in one word.")
ONE_TURN: Conversation = (Message("user", "What is the capital of France?"), Message("assistant", "Paris."))
TWO_TURNS: Conversation = (*ONE_TURN, Message("user", "And of Spain?"), Message("assistant", "Madrid."))


def find_templates(specialists: Sequence[Facts], shared: Facts) -> tuple[dict[str, Template], list[Finding]]:
    """The template of each specialist, as far as it can be had, and what stood in the way."""
    templates: dict[str, Template] = {}
    findings = []
    for facts in specialists:
        tokenizer = facts.tokenizer if facts.tokenizer is not None else shared.tokenizer
        spec = facts.source.template
        if spec == "tokenizer" and tokenizer is None:
            if "tokenizer" in facts.reasons:
                findings.append(
                    blocker(facts.name, "its template is its tokenizer's, which cannot be read", "set template")
                )
            continue
        try:
            templates[facts.name] = load_template(spec, tokenizer_template=getattr(tokenizer, "chat_template", None))
        except TemplateError as error:
            findings.append(blocker(facts.name, str(error), "set another template"))
    return templates, findings


def check_template(name: str, template: Template, recipe: Recipe, tokenizer: Any) -> Iterator[Finding]:
    """Render a sample of two turns with a system message; where that fails, find out what does work."""
    if "strftime_now" in template.source:
        yield warning(
            name,
            f"template {template.name!r} writes today's date: prompts, and so results, change from day to day",
            "copy the template to a .jinja file with a fixed date",
        )
    last_only = recipe.data is not None and recipe.data.turns == "last"
    if (problem := _problem(template, ONE_TURN, tokenizer)) is not None:
        yield blocker(name, problem, "choose another template: this one cannot write a question and its answer")
    elif (problem := _problem(template, TWO_TURNS, tokenizer)) is not None:
        # A conversation cut to its last turn may still be written; then only the recipe has to say so.
        do = "records of one turn work, as does data.turns: last where the template writes the whole"
        yield ok(name, problem, do) if last_only else warning(name, problem, do)
    elif (problem := _problem(template, (SYSTEM, *TWO_TURNS), tokenizer)) is not None:
        yield warning(
            name, f"with a system message: {problem}", "leave system messages out, or choose another template"
        )
    else:
        yield ok(name, f"template {template.name!r} writes system message and two turns, history unchanged")


def sample_prompt(template: Template, tokenizer: Any) -> str | None:
    """What opens a conversation, as the specialist reads it."""
    try:
        names = _names(tokenizer)
        return template.render(ONE_TURN[:1], bos_token=names["bos_token"], eos_token=names["eos_token"])
    except TemplateError:
        return None


def _problem(template: Template, conversation: Conversation, tokenizer: Any) -> str | None:
    names = _names(tokenizer)
    try:
        pieces = split_turns(template, conversation, **names, end_token=names["eos_token"] or "</s>")
    except TemplateError as error:
        return str(error)
    if any(not piece.prompt for piece in pieces):
        return f"template {template.name!r} writes nothing before a response"
    return None


def _names(tokenizer: Any) -> dict[str, str]:
    return {
        "bos_token": getattr(tokenizer, "bos_token", None) or "",
        "eos_token": getattr(tokenizer, "eos_token", None) or "",
    }
