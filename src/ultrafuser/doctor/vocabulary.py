"""Vocabulary: one id, one token for every specialist; and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ultrafuser.chat.template import Template
from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, blocker, ok, warning
from ultrafuser.errors import VocabularyError
from ultrafuser.model.vocabulary import check_vocabularies

SUBJECT = "vocabulary"
# Words, spaces, digits, code, an accent and Chinese: where tokenizers of one vocabulary split differently, if at all.
PROBE = "  def f(x):\n\treturn x + 1234  # Größe, 你好\n\nThe answer is 3.5%."


def check_vocabulary(specialists: Sequence[Facts], shared: Facts) -> Iterator[Finding]:
    """Compare the tokenizers token by token, and the rows of the models."""
    known = {facts.name: facts.tokenizer for facts in (shared, *specialists) if facts.tokenizer is not None}
    rows = {facts.name: facts.num_rows for facts in specialists if facts.num_rows is not None}
    common = min(rows.values(), default=None)
    if shared.tokenizer is None and "tokenizer" in shared.reasons:
        yield blocker(
            SUBJECT, f"{shared.name} has no tokenizer, and it is the shared one", "set tokenizer in the recipe"
        )
    if len(known) > 1:
        try:
            num_compared = check_vocabularies(known, size=common)
        except VocabularyError as error:
            message, _, advice = str(error).partition(": ")
            yield blocker(SUBJECT, message, advice)
        else:
            yield ok(SUBJECT, f"{num_compared:,} tokens agree between {', '.join(known)}")
            yield from _check_splitting(known)
    yield from _check_rows(rows, shared, common)


def _check_splitting(tokenizers: Mapping[str, Any]) -> Iterator[Finding]:
    """The shared tokenizer writes for all: a specialist used to other splits reads unfamiliar sequences."""
    splits = {name: tuple(_ids(tokenizer, PROBE)) for name, tokenizer in tokenizers.items()}
    first, *others = splits
    if different := [name for name in others if splits[name] != splits[first]]:
        yield warning(
            SUBJECT,
            f"the tokenizer of {', '.join(different)} splits a sample text otherwise than that of {first}",
            f"all read what {first}'s writes; make the tokenizers equal, or set tokenizer in the recipe",
        )


def _check_rows(rows: Mapping[str, int], shared: Facts, common: int | None) -> Iterator[Finding]:
    if common is None:
        return
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        yield warning(
            SUBJECT,
            f"the models have different numbers of rows: {counts}",
            f"rows from {common:,} on are dropped; nothing to do unless a template needs one of them",
        )
    if shared.tokenizer is None:
        return
    beyond = {index: token for token, index in shared.tokenizer.get_vocab().items() if index >= common}
    if not beyond:
        return
    first = min(beyond)
    special = {"eos_token_id", "bos_token_id", "pad_token_id"}
    lost = sorted(key for key in special if getattr(shared.tokenizer, key, None) in beyond)
    finding = blocker if lost else warning
    yield finding(
        SUBJECT,
        f"{len(beyond)} tokens of the shared tokenizer, from {beyond[first]!r} ({first}), have no row in every model"
        + (f"; {', '.join(lost)} among them" if lost else ""),
        "set tokenizer in the recipe to one of " + f"{common:,} tokens",
    )


def check_stop_tokens(
    specialists: Sequence[Facts], shared: Facts, templates: Mapping[str, Template]
) -> Iterator[Finding]:
    """EOS, padding, and every text by which a template ends its turns."""
    tokenizer = shared.tokenizer
    if tokenizer is None:
        return
    if tokenizer.eos_token_id is None:
        yield blocker(
            "stop tokens", "the shared tokenizer has no end token (eos_token)", "set one: responses end with it"
        )
        return
    stops = {int(tokenizer.eos_token_id)}
    vocabulary = tokenizer.get_vocab()
    for name, template in templates.items():
        for text in template.end_of_turn:
            if text not in vocabulary:
                yield warning(
                    name,
                    f"its template ends turns with {text!r}, which is no single token of the vocabulary",
                    "generation cannot stop there; it stops at the shared end token, which training teaches",
                )
            elif (index := int(vocabulary[text])) != tokenizer.eos_token_id:
                stops.add(index)
                yield ok(
                    name, f"its template ends turns with {text!r}; the shared end token is hidden from its history"
                )
    for facts in specialists:
        own = facts.generation.get("eos_token_id", getattr(facts.config, "eos_token_id", None))
        own_ids = [own] if isinstance(own, int) else [index for index in own or () if isinstance(index, int)]
        if own_ids and tokenizer.eos_token_id not in own_ids:
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in own_ids)
            yield warning(
                facts.name,
                f"it was made to stop at {names}, but responses are closed with {tokenizer.eos_token!r}",
                "training teaches the shared end token; without training it may not stop",
            )
        stops.update(own_ids)
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})" for index in sorted(stops))
    yield ok("stop tokens", f"responses are closed with {tokenizer.eos_token!r}; generation stops at {names}")
    if tokenizer.pad_token_id is None:
        yield ok("stop tokens", "no padding token: the end token fills padding, where it is masked")


def check_start_tokens(shared: Facts, prompts: Mapping[str, str]) -> Iterator[Finding]:
    """A tokenizer that opens texts with BOS does so no longer when a template writes the text."""
    tokenizer = shared.tokenizer
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not (ids := tokenizer("a")["input_ids"]) or ids[0] != bos:
        return
    for name, prompt in prompts.items():
        if not prompt.startswith(tokenizer.bos_token):
            yield warning(
                name,
                f"its template does not open with {tokenizer.bos_token!r}, which the tokenizer adds to plain text",
                "write {{ bos_token }} at the start of the template if the specialist was trained with it",
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
