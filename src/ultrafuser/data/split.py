"""Splits: which records train, validate and test, decided by content alone.

A record's split is a pure function of its prompt: no file order, no seed, no list to keep. Equal conversations,
and different answers to one question, land on the same side in every file and on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, get_args

from ultrafuser.data.overlap import normalised_words
from ultrafuser.data.records import Record
from ultrafuser.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

HASH_BITS = 64


def prompt_key(record: Record) -> str:
    """Name a record by its first user message, whatever its case, spacing and punctuation.

    The response, later turns and the system message stay out of it: they may differ between two records that
    ask the same question, and a test question whose twin was trained on is no test.
    """
    prompt = next(message.content for message in record.messages if message.role == "user")
    words = " ".join(normalised_words(prompt)) or prompt
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def split_of(key: str, *, validation: float, test: float, salt: str = "") -> Split:
    """Say which split a key belongs to.

    The lowest hashes validate and the highest test: changing one share only moves records from or to training.

    Args:
        key: What must not straddle two splits: `prompt_key(record)`, or `record.id`.
        validation: Share of the keys, 0 to 1.
        test: Share of the keys, 0 to 1; both together at most 1.
        salt: Draws another split of the same keys.

    Raises:
        ConfigError: The shares are no shares; says which values.
    """
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise ConfigError(f"validation={validation} and test={test} must be shares that add up to at most 1")
    draw = int.from_bytes(hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=HASH_BITS // 8).digest())
    if draw < int(validation * 2**HASH_BITS):
        return "validation"
    if draw >= 2**HASH_BITS - int(test * 2**HASH_BITS):
        return "test"
    return "train"


def split_records(
    records: Iterable[Record], *, validation: float, test: float, salt: str = ""
) -> dict[Split, list[Record]]:
    """Deal records to the three splits by `prompt_key`, keeping their order."""
    dealt: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for record in records:
        dealt[split_of(prompt_key(record), validation=validation, test=test, salt=salt)].append(record)
    return dealt
