"""Text piece by piece is the text of all ids; stop strings are found wherever they lie and never shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine_helpers import always_draft, greedy, make_engine, run
from helpers import VOCAB_SIZE, make_fused, make_tokenizer
from ultrafuser.engine.detokenize import Detokenizer, HeldPieces
from ultrafuser.engine.requests import GenerationRequest, TokenPiece

LETTERS = ("▁", "▁a", "▁the", "a", "b", "the", "é", "中", "▁中", "😀", ".", "\n")


@cache
def byte_level() -> Any:
    return make_tokenizer()


@cache
def llama_style() -> Any:
    """Pieces that begin with a space, bytes where there is no piece, and a decoder that drops the first space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.flush()]


def byte_ids(text: str) -> list[int]:
    """A token for every byte."""
    return [llama_style().convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def piece_ids(*tokens: str) -> list[int]:
    return [llama_style().convert_tokens_to_ids(token) for token in tokens]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_joined_are_the_text_of_random_ids_of_a_byte_level_tokenizer(ids: list[int]):
    assert "".join(pieces_of(byte_level(), ids)) == byte_level().decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_pieces_joined_are_any_text_that_was_encoded(text: str):
    ids = byte_level()(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(byte_level(), ids)) == text


@given(
    st.lists(
        st.one_of(
            st.sampled_from(LETTERS).map(lambda token: piece_ids(token)),
            st.sampled_from(["é", "中", "😀", "x", " "]).map(lambda text: byte_ids(text)),
            st.sampled_from([[0], [1], [2]]),
        ),
        max_size=15,
    )
)
@settings(max_examples=300, deadline=None)
def test_pieces_joined_are_the_text_of_a_tokenizer_that_drops_the_first_space(parts: list[list[int]]):
    ids = [token for part in parts for token in part]
    assert "".join(pieces_of(llama_style(), ids)) == llama_style().decode(ids, skip_special_tokens=True)


def test_a_space_within_a_text_is_kept_and_the_first_one_dropped():
    assert pieces_of(llama_style(), piece_ids("▁the", "▁a", "b", "▁", "▁a")) == ["the", " a", "b", " ", " a", ""]


def test_a_character_of_several_tokens_comes_with_its_last_one():
    expected = ["a", "", "", "中", "b", ""]
    assert pieces_of(byte_level(), byte_level()("a中b", add_special_tokens=False)["input_ids"]) == expected
    assert pieces_of(llama_style(), byte_ids("a中b")) == expected


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_bytes_that_never_become_a_character_come_at_the_end_as_the_tokenizer_shows_them(cut: int):
    ids = byte_level()("a😀", add_special_tokens=False)["input_ids"][: 1 + cut]
    assert pieces_of(byte_level(), ids) == ["a", *[""] * cut, byte_level().decode(ids)[1:]]


def test_special_tokens_add_nothing():
    ids = [1, *byte_level()("ab", add_special_tokens=False)["input_ids"], 3, 2]
    assert pieces_of(byte_level(), ids) == ["", "a", "b", "", "", ""]


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    seen: list[int] = []

    class Counting:
        def decode(self, ids: Sequence[int], **options: Any) -> str:
            seen.append(len(ids))
            return str(byte_level().decode(ids, **options))

    ids = byte_level()("some text é " * 50, add_special_tokens=False)["input_ids"]
    pieces_of(Counting(), ids)

    assert max(seen) <= 4


def test_a_detokenizer_goes_on_from_a_copy_of_itself():
    ids = byte_level()("a中b", add_special_tokens=False)["input_ids"]
    first = Detokenizer(byte_level())
    before = [first.push(token) for token in ids[:2]]

    second = first.copy()
    rest = [[one.push(token) for token in ids[2:]] for one in (first, second)]

    assert rest[0] == rest[1]
    assert "".join([*before, *rest[1]]) == "a中b"


# Stop strings


def held(stops: Sequence[str], *texts: str) -> tuple[list[list[str]], bool]:
    """Texts that are shown after each piece, and whether a stop string was met; pieces after it are not pushed."""
    pieces = HeldPieces(stops)
    shown = []
    for number, text in enumerate(texts):
        out, stopped = pieces.push(TokenPiece(number, text))
        shown.append([piece.text for piece in out])
        if stopped:
            return shown, True
    shown.append([piece.text for piece in pieces.flush()])
    return shown, False


def test_without_stop_strings_nothing_is_held():
    assert held((), "a", "b") == ([["a"], ["b"], []], False)


def test_a_stop_string_over_several_tokens_is_never_shown():
    assert held(("END",), "x", "E", "N", "D!") == ([["x"], [], [], ["", "", ""]], True)


def test_text_before_a_stop_string_in_the_same_token_is_shown():
    assert held(("END",), "xE", "ND") == ([[], ["x", ""]], True)


def test_what_only_looked_like_a_stop_string_is_shown_in_time():
    assert held(("END",), "E", "N", "x", "E") == ([[], [], ["E", "N", "x"], [], ["E"]], False)


def test_a_beginning_within_a_beginning_is_held():
    assert held(("aab",), "a", "a", "a", "b") == ([[], [], ["a"], ["", "", ""]], True)
    assert held(("abac",), "a", "b", "a", "b", "a", "c") == ([[], [], [], ["a", "b"], [], ["", "", "", ""]], True)


def test_the_first_of_several_stop_strings_wins():
    assert held(("b", "abc"), "xab") == ([["xa"]], True)
    assert held(("c", "abc"), "xabc") == ([["x"]], True)  # the one that begins first
    assert held(("abcd", "bc"), "a", "b", "c") == ([[], [], ["a", "", ""]], True)  # the one that is complete first


def test_a_piece_in_the_middle_of_a_character_waits_for_the_rest():
    assert held((), "a", "", "é") == ([["a"], [], ["", "é"], []], False)


@given(
    st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_held_pieces_show_every_piece_once_and_the_text_up_to_the_first_stop(texts: list[str], stops: list[str]):
    shown, stopped = held(stops, *texts)

    whole, end = "", None
    for number, text in enumerate(texts):
        whole += text
        if end is None and any(stop in whole for stop in stops):
            end = number
            cut = min(at for stop in stops if (at := whole.find(stop)) >= 0)
            expected = whole[:cut]
    if end is None:
        expected, end = whole, len(texts) - 1
        assert not stopped
    flat = [text for part in shown for text in part]
    assert "".join(flat) == expected
    assert len(flat) == end + 1
    so_far = ""
    for part in shown:  # what is shown is never taken back
        so_far += "".join(part)
        assert expected.startswith(so_far)


def letters(seed: int = 1, **more: Any) -> GenerationRequest:
    """A request whose answer is 16 letters."""
    ids = [byte_level().convert_tokens_to_ids(letter) for letter in "abcdefgh"]
    bias = tuple((token, 100.0) for token in ids)
    return greedy(7, 9, 5, seed=seed, max_tokens=16, logit_bias=bias, **more)


def test_an_answer_ends_before_a_stop_string_and_has_a_weight_for_every_token():
    engine = make_engine(make_fused())
    (plain,) = run(engine, letters())
    text = plain.text()
    assert len(text) == 16
    stop = text[3:6]
    at = text.index(stop)

    (heard,) = run(engine, letters(stop=("never there", stop)))

    assert heard.text() == text[:at]
    assert heard.reasons == ["stop"]
    assert heard.ids() == plain.ids()[: at + 3]
    assert heard.weights().shape == (at + 3, 3)


def test_an_answer_that_ends_in_the_middle_of_a_stop_string_loses_nothing():
    engine = make_engine(make_fused())
    text = run(engine, letters())[0].text()

    (heard,) = run(engine, letters(stop=(text[-1] + "#", text[-3:] + "#")))

    assert (heard.text(), len(heard.ids()), heard.reasons) == (text, 16, ["length"])


def test_stop_strings_work_with_drafts_as_without():
    requests = [letters(seed, stop=("ab", "f", "hh")) for seed in range(5)]
    plain = run(make_engine(make_fused()), *requests)
    engine = make_engine(make_fused(), drafts=("lookup", "self"), max_draft_choices=4)
    always_draft(engine, "self", "lookup")

    drafted = run(engine, *requests)

    assert [(h.ids(), h.text(), h.reasons) for h in drafted] == [(h.ids(), h.text(), h.reasons) for h in plain]
    assert {h.reasons[0] for h in plain} == {"stop", "length"}
