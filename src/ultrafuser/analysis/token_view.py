"""A record as each specialist sees it: token by token, what is trained, what is only read, what is hidden.

The view is taken from the tensors that training gets, not from the text they were made of.

Shapes: T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from ultrafuser.alignment.collate import IGNORED, Batch, collate
from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.drawing.palette import LIGHT_INK, LIGHT_PAGE, PALETTE, STRENGTH

Role = Literal["prompt", "trained", "hidden"]

# Two strengths in turn, so that one sees where a token ends; without colour, signs that text and code rarely hold.
_TRAINED = tuple(f"{LIGHT_INK.hex} on {PALETTE[2].over(LIGHT_PAGE, part).hex}" for part in (STRENGTH, STRENGTH / 2))
STYLES: dict[Role, tuple[str, ...]] = {
    "prompt": ("dim", "dim"),
    "trained": _TRAINED,
    "hidden": (f"{LIGHT_INK.hex} on {PALETTE[1].over(LIGHT_PAGE, STRENGTH).hex}",) * 2,
}
MARKS: dict[Role, tuple[str, str]] = {"prompt": ("", ""), "trained": ("[[", "]]"), "hidden": ("{{", "}}")}
BORDER = "|"  # between trained tokens where there is no colour
MEANINGS: dict[Role, str] = {
    "prompt": "read, not trained",
    "trained": "trained",
    "hidden": "trained, but hidden from this specialist's history: its template ends turns otherwise",
}
# A record may hold escape sequences that would move the cursor or worse; line ends and tabs are harmless.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class SeenToken:
    """One token of one specialist's view."""

    text: str
    token_id: int
    role: Role


def view_record(record: EncodedRecord, encoder: Encoder) -> list[list[SeenToken]]:
    """One list of tokens per specialist, in order; padding is left out."""
    batch = collate([record], pad_id=encoder.pad_id)
    return [_view(batch, n, encoder.tokenizer) for n in range(batch.specialist_input_ids.shape[1])]


def check_alignment(record: EncodedRecord, encoder: Encoder) -> None:
    """Make sure that every specialist's tensors hold the same response tokens, exactly where they are trained."""
    batch = collate([record], pad_id=encoder.pad_id)
    labels = batch.labels[0]
    trained = labels != IGNORED
    for n, ids in enumerate(batch.specialist_input_ids[0]):
        assert bool((ids[trained] == labels[trained]).all()), f"record {record.id}: specialist {n} has other responses"
    responses = [token for turn in record.turns for token in turn.response]
    assert labels[trained].tolist() == responses, f"record {record.id}: what is trained is not its responses"


def render_view(tokens: Sequence[SeenToken], *, colour: bool) -> Text:
    """The tokens as text, marked by colour, or by brackets where there is none."""
    text = Text()
    previous: Role = "prompt"
    for index, token in enumerate(tokens):
        if not colour and token.role != previous:
            text.append(MARKS[previous][1] + MARKS[token.role][0])
        elif not colour and token.role != "prompt":
            text.append(BORDER)
        text.append(token.text.translate(_CONTROLS), style=STYLES[token.role][index % 2] if colour else "")
        previous = token.role
    if not colour:
        text.append(MARKS[previous][1])
    return text


def render_legend(*, colour: bool) -> Text:
    """What the colours or brackets mean."""
    parts = []
    for role, meaning in MEANINGS.items():
        opening, closing = ("", "") if colour else MARKS[role]
        parts.append(Text(f"{opening}{meaning}{closing}", style=STYLES[role][0] if colour else ""))
    return Text("; ").join(parts)


def _view(batch: Batch, n: int, tokenizer: Any) -> list[SeenToken]:
    ids, mask, labels = batch.specialist_input_ids[0, n], batch.specialist_attention_mask[0, n], batch.labels[0]
    shown: list[tuple[int, Role]] = []
    for token_id, visible, label in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
        if label != IGNORED:
            shown.append((label, "trained" if visible else "hidden"))
        elif visible:
            shown.append((token_id, "prompt"))
    texts = _texts([token_id for token_id, _ in shown], tokenizer)
    return [SeenToken(text, token_id, role) for text, (token_id, role) in zip(texts, shown, strict=True)]


def _texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """The text that each token adds to those before it.

    Some tokenizers write a leading space only inside a text, and a character may take several tokens: it then stands
    with the last of them.
    """
    done = ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and stop < len(ids):
            yield ""
            continue
        yield text[len(done) :]
        done = text
