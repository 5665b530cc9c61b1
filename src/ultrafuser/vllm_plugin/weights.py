"""Whose a weight of a checkpoint is: names as they stand in our files, dealt to specialists and gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from torch import Tensor

from ultrafuser.model.configuration import FusedConfig

GATE = "fusion_gate"
SPECIALISTS = "specialists"
# Modules whose rows are tokens, under the names that causal LMs of transformers use.
_PER_TOKEN = frozenset({"embed_tokens", "lm_head", "embed_in", "embed_out", "wte", "word_embeddings"})


def running_names(config: FusedConfig) -> list[str]:
    """Specialists that run: all in order, or the one that answers alone."""
    return [config.solo] if config.solo else list(config.names)


def needs_gate(config: FusedConfig) -> bool:
    """Whether weights come from the gate: not with one specialist, nor where all weigh alike."""
    return config.weighting == "gate" and len(running_names(config)) > 1


def deal(
    weights: Iterable[tuple[str, Tensor]], config: FusedConfig
) -> Iterator[tuple[str, Iterator[tuple[str, Tensor]]]]:
    """Cut a stream of weights into runs of one owner, without holding them.

    Args:
        weights: Name in the files and tensor. Of a gate-only checkpoint: the gate's own names, and specialists' names
            with their prefix.
        config: Of the checkpoint.

    Yields:
        `fusion_gate` or the name of a specialist that runs, and its weights under its own names. Each run must be read
        before the next is asked for. Rows beyond the shared vocabulary are cut off.
    """
    running = set(running_names(config))

    def owner(item: tuple[str, Tensor]) -> str:
        first, _, rest = item[0].partition(".")
        if first == SPECIALISTS:
            return rest.partition(".")[0]
        return GATE

    for who, run in groupby(weights, key=owner):
        if who == GATE:
            yield GATE, ((name.removeprefix(f"{GATE}."), tensor) for name, tensor in run)
        elif who in running:
            prefix = f"{SPECIALISTS}.{who}."
            yield who, ((name.removeprefix(prefix), trim(name, tensor, config.vocab_size)) for name, tensor in run)


def trim(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """Cut what has a row per token to the tokens that all specialists share."""
    return tensor[:vocab_size] if is_per_token(name) else tensor


def is_per_token(name: str) -> bool:
    """Whether a weight has a row for each token of the vocabulary."""
    return len(parts := name.split(".")) > 1 and parts[-2] in _PER_TOKEN
