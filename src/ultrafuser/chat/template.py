"""A chat template: the Jinja text that turns a conversation into what one specialist reads.

Rendering is transformers' own: a tokenizer's template gives the same text here as in `apply_chat_template`, inside the
sandbox that transformers keeps up to date, for a template from the hub is a stranger's program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from ultrafuser.chat.messages import Message
from ultrafuser.errors import TemplateError


@dataclass(frozen=True, slots=True)
class Template:
    """How one specialist's conversations are written.

    Attributes:
        name: What recipes and messages call it.
        source: Jinja text.
        end_of_turn: Texts other than the tokenizer's EOS by which a model trained on this template ends its turn, such
            as `<|im_end|>`. Generation stops there too, where the vocabulary has the text as one token.
    """

    name: str
    source: str
    end_of_turn: tuple[str, ...] = ()

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str = "",
        eos_token: str = "",
        add_generation_prompt: bool = True,
    ) -> str:
        """Write the conversation as text, special tokens included.

        Args:
            messages: The conversation.
            bos_token: Text of the tokenizer's BOS; empty for none.
            eos_token: Text of the tokenizer's EOS; empty for none.
            add_generation_prompt: End with the text that makes the model answer.

        Raises:
            TemplateError: The template is no valid Jinja, or refuses this conversation; says which template and why.
        """
        # Here, not above: it takes a second, which a command that renders nothing should not wait for.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                [[message.to_dict() for message in messages]],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
            )
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"template {self.name!r} is not valid Jinja: line {error.lineno}: {_one_line(error)}"
            ) from error
        except _ERRORS_OF_A_TEMPLATE as error:
            raise TemplateError(f"template {self.name!r} cannot write this conversation: {_one_line(error)}") from error
        return str(rendered[0][0])


# A template is a program: besides Jinja's own errors, its expressions raise whatever Python's do.
_ERRORS_OF_A_TEMPLATE = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, jinja2.TemplateError) else str(error)
    return " ".join((text or type(error).__name__).split())
