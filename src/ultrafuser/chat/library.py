"""The templates by name: the paper's three, the common ones, a tokenizer's own, or a Jinja file.

Every template here keeps history stable: the text of a conversation begins with the text of its first messages, and
responses stand in it verbatim.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jinja2

from ultrafuser.chat.messages import Message
from ultrafuser.chat.template import Template
from ultrafuser.errors import TemplateError

TEMPLATE_NAMES: tuple[str, ...] = (
    "ultralm",
    "codellama",
    "wizardmath",
    "chatml",
    "llama-3",
    "qwen",
    "plain",
)
TOKENIZER_TEMPLATE = "tokenizer"


def load_template(spec: str, *, tokenizer_template: str | None = None) -> Template:
    """Find a template.

    Args:
        spec: One of `TEMPLATE_NAMES`, "tokenizer", or the path of a Jinja file (`*.jinja`).
        tokenizer_template: The tokenizer's own template, which "tokenizer" stands for.

    Raises:
        TemplateError: No such template, no such file, not Jinja, or the tokenizer has no template.
    """
    template = Template(spec, _read_source(spec, tokenizer_template))
    return replace(template, end_of_turn=find_end_of_turn(template))


def find_end_of_turn(template: Template) -> tuple[str, ...]:
    """What a template writes after a response besides the tokenizer's EOS: nothing, or a text such as `<|im_end|>`.

    Raises:
        TemplateError: The template is not valid Jinja.
    """
    question, response = Message("user", "question"), Message("assistant", "the response")
    try:
        text = template.render((question, response), add_generation_prompt=False)
    except TemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise
        return ()  # it wants another kind of conversation, which cannot be guessed
    _, found, ending = text.rpartition(response.content)
    return (ending.strip(),) if found and ending.strip() else ()


def _read_source(spec: str, tokenizer_template: str | None) -> str:
    if spec in TEMPLATE_NAMES:
        return (files("ultrafuser.chat") / "templates" / f"{spec}.jinja").read_text(encoding="utf-8")
    if spec == TOKENIZER_TEMPLATE:
        if tokenizer_template is None:
            raise TemplateError(
                f"template {spec!r}: the tokenizer has no chat template of its own; "
                f"choose one of {', '.join(TEMPLATE_NAMES)}, or give a .jinja file"
            )
        return tokenizer_template
    if spec.endswith(".jinja"):
        return _read_file(spec)
    known = ", ".join((*TEMPLATE_NAMES, TOKENIZER_TEMPLATE))
    raise TemplateError(f"unknown template {spec!r}; known: {known}, or the path of a .jinja file")


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TemplateError(f"template file {path!r} cannot be read: {reason}") from error
