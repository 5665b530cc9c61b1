"""Conversations, the templates that write them as text, and the turns that let several templates share one response."""

from ultrafuser.chat.library import TEMPLATE_NAMES, TOKENIZER_TEMPLATE, find_end_of_turn, load_template
from ultrafuser.chat.messages import ROLES, Conversation, Message, Role, parse_conversation
from ultrafuser.chat.template import Template
from ultrafuser.chat.turns import TurnPiece, last_turn, prompt_text, split_prompt, split_turns

__all__ = [
    "ROLES",
    "TEMPLATE_NAMES",
    "TOKENIZER_TEMPLATE",
    "Conversation",
    "Message",
    "Role",
    "Template",
    "TurnPiece",
    "find_end_of_turn",
    "last_turn",
    "load_template",
    "parse_conversation",
    "prompt_text",
    "split_prompt",
    "split_turns",
]
