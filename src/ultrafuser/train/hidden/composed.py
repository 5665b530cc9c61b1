"""Composed records as token ids on disk, so that a second run need not join, render and tokenise them again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn
from ultrafuser.data.sampler import Draw
from ultrafuser.files import write_text_atomically

logger = logging.getLogger(__name__)


def encode_composed(
    folder: Path, draws: Sequence[Draw], make: Callable[[Draw], EncodedRecord], *, identity: Sequence[object]
) -> dict[Draw, EncodedRecord]:
    """The composed records of a stage, read where they were kept, else made and kept.

    Args:
        folder: Takes the file.
        draws: Which; all of them composed.
        make: Encodes one.
        identity: All that decides what is made of them: templates, vocabulary, the records' content.

    Raises:
        DataError: The file cannot be written.
    """
    if not draws:
        return {}
    places = [[draw.domain, draw.index, draw.joined] for draw in draws]
    key = hashlib.sha256(json.dumps([identity, places], default=str).encode()).hexdigest()
    path = folder / f"composed-{key[:20]}.json"
    if path.exists():
        try:
            return dict(zip(draws, map(_read, json.loads(path.read_text(encoding="utf-8"))), strict=True))
        except (ValueError, TypeError) as error:
            logger.warning("%s holds no composed records (%s): made anew", path, error)
    made = [make(draw) for draw in draws]
    write_text_atomically(json.dumps([_plain(record) for record in made]), path)
    return dict(zip(draws, made, strict=True))


def _plain(record: EncodedRecord) -> list[object]:
    turns = [[turn.prompts, turn.response, turn.hides_end] for turn in record.turns]
    return [record.id, record.domain, turns]


def _read(plain: Sequence[object]) -> EncodedRecord:
    name, domain, turns = plain
    return EncodedRecord(
        str(name),
        str(domain),
        tuple(
            EncodedTurn(tuple(tuple(ids) for ids in prompts), tuple(response), tuple(hides))
            for prompts, response, hides in turns  # type: ignore[attr-defined]
        ),
    )
