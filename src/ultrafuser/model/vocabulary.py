"""One vocabulary: the same token at the same id for every specialist, or a clear error.

Fusing adds logits token by token, so id 17 must mean the same everywhere. Surplus rows (CodeLlama has 32,016,
WizardMath 32,001) are dropped with a notice; padded rows beyond the tokenizer are harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ultrafuser.errors import VocabularyError

logger = logging.getLogger(__name__)


def check_vocabularies(tokenizers: Mapping[str, Any], *, size: int | None = None) -> int:
    """Compare tokenizers token by token.

    Args:
        tokenizers: Tokenizer of each specialist by name; the first one's ids are the reference.
        size: Compare ids below this (the rows that all heads share); None: all ids that all tokenizers have.

    Returns:
        Number of ids compared.

    Raises:
        VocabularyError: Names the first id whose token differs, and both tokens.
    """
    by_id = {
        name: {index: token for token, index in tokenizer.get_vocab().items()} for name, tokenizer in tokenizers.items()
    }
    common = min((max(tokens, default=-1) + 1 for tokens in by_id.values()), default=0)
    if size is not None:
        common = min(common, size)
    first, *others = by_id
    for name in others:
        for index in range(common):
            expected, actual = by_id[first].get(index), by_id[name].get(index)
            if expected != actual:
                raise VocabularyError(
                    f"token {index} is {expected!r} for specialist {first!r} but {actual!r} for {name!r}: fusing adds "
                    "logits token by token, so all must share one vocabulary. Leave one out, or convert its tokenizer."
                )
    return common


def check_special_tokens(tokenizer: Any, *, size: int) -> None:
    """Refuse a shared tokenizer whose end, beginning or padding every batch would hold and no specialist could read.

    Args:
        tokenizer: The shared one.
        size: Rows that all heads share.

    Raises:
        VocabularyError: Names the token and what to do.
    """
    for key in ("eos_token", "bos_token", "pad_token"):
        index = getattr(tokenizer, f"{key}_id", None)
        if index is not None and index >= size:
            raise VocabularyError(
                f"{getattr(tokenizer, key)!r}, the {key} of the shared tokenizer, is token {index}, but the "
                f"specialists share {size}: set tokenizer in the recipe to one of {size} tokens"
            )


def trim_vocabulary(specialists: Mapping[str, PreTrainedModel], *, size: int | None = None) -> int:
    """Cut every specialist to the rows all have, in place, with a notice for each that loses some.

    Args:
        specialists: Models by name.
        size: Cut to this many rows at most; None: to what the smallest has.

    Returns:
        The common number of rows.
    """
    rows = {name: int(model.get_output_embeddings().weight.shape[0]) for name, model in specialists.items()}
    common = min([*rows.values(), *([size] if size is not None else [])])
    for name, model in specialists.items():
        if rows[name] > common:
            logger.warning(
                "specialist %r has %d vocabulary rows; the %d beyond the common %d are dropped",
                name,
                rows[name],
                rows[name] - common,
                common,
            )
        embeddings: Any = model.get_input_embeddings()
        if int(embeddings.weight.shape[0]) != common or rows[name] != common:
            model.resize_token_embeddings(common)
            _forget_dropped_tokens(model, common)
    return common


def _forget_dropped_tokens(model: PreTrainedModel, size: int) -> None:
    """A padding token among the dropped rows would make the saved configuration one that cannot be built."""
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for key in ("pad_token_id", "bos_token_id"):
            index = getattr(config, key, None)
            if isinstance(index, int) and index >= size:
                setattr(config, key, None)
