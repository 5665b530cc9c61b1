"""Slots: how many fit, that copies are whole, and that a choice that leaves frees all its caches at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_helpers import Heard, assert_answers, finish, greedy, make_engine, run
from helpers import make_fused, make_mixed, make_model
from ultrafuser.engine import few_rows, memory
from ultrafuser.engine.memory import fit_slots, may_pack
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.errors import ModelError

LLAMA_BYTES = 2 * 2 * 1 * 8 * 4  # key and value, two layers, one head of 8, fp32


def test_slots_are_those_that_fit_into_the_memory_for_caches():
    model = make_fused()
    per_slot = 100 * 3 * LLAMA_BYTES

    def fit(cache_bytes: int, max_choices: int = 16) -> tuple[int, int]:
        return fit_slots(model, EngineOptions(max_context=100, cache_bytes=cache_bytes, max_choices=max_choices))

    assert fit(5 * per_slot) == (100, 5)
    assert fit(6 * per_slot - 1) == (100, 5)
    assert fit(100 * per_slot) == (100, 16)
    assert fit(100 * per_slot, max_choices=3) == (100, 3)


def test_a_draft_model_takes_its_share():
    options = EngineOptions(max_context=100, cache_bytes=12 * 100 * LLAMA_BYTES)
    assert fit_slots(make_fused(), options) == (100, 4)
    assert fit_slots(make_fused(), options, draft=make_model()) == (100, 3)


def test_too_little_memory_is_one_clear_line():
    with pytest.raises(ModelError) as caught:
        make_engine(max_context=90, cache_bytes=1000)
    assert str(caught.value) == (
        "one choice of 90 tokens takes 0 MiB of cache and 0 MiB are there: allow a smaller context, or more memory"
    )


def test_half_of_the_free_memory_is_for_caches(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 8 * 100 * 3 * LLAMA_BYTES)
    assert fit_slots(make_fused(), EngineOptions(max_context=100, pack=False, drafts=())) == (100, 4)


def test_what_copies_of_the_weights_will_take_is_not_free(monkeypatch):
    model = make_fused()
    weights = sum(p.numel() for part in model.specialists.values() for p in part.parameters())
    caches = 2 * 100 * 3 * LLAMA_BYTES
    monkeypatch.setattr(memory, "can_pack", lambda _: True)

    def slots(for_copies: float, **options: Any) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * caches + 8 + int(for_copies * weights))
        return fit_slots(model, EngineOptions(**{"max_context": 100, "drafts": (), "pack": False, **options}))[1]

    assert slots(0.0) == slots(2.0, weights="half") == slots(0.0, weights="half", release_model=True) == 2
    assert slots(1.9, weights="half") < 2
    assert slots(0.0, drafts=("lookup",)) == 2
    for has_kernel, size in ((True, 1.0), (False, 0.625)):  # int8 or int4 for drafts
        monkeypatch.setattr(few_rows, "has_kernel", lambda told=has_kernel: told)
        assert slots(size, drafts=("self",)) == 2
        assert slots(size - 0.025, drafts=("self",)) < 2
    assert slots(4.0, pack=True) == 2  # exact weights are never given back
    assert slots(3.9, pack=True, release_model=True) < 2


def test_weights_are_held_twice_where_that_is_a_small_part_of_the_machines_memory(monkeypatch):
    model = make_fused()
    size = 4 * sum(p.numel() for part in model.specialists.values() for p in part.parameters())
    monkeypatch.setattr(memory, "_machine_bytes", lambda name: 4 * size if name == "MemTotal" else 0)
    assert may_pack(model, EngineOptions())
    assert not may_pack(model, EngineOptions(), sharers=2)
    assert may_pack(model, EngineOptions(pack=True), sharers=2)
    assert not may_pack(model, EngineOptions(pack=False))


def test_free_memory_is_a_plausible_number():
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_the_context_is_what_the_specialists_were_made_for_and_no_more():
    short = make_fused({"text": make_model("llama", max_position_embeddings=300), "code": make_model("gpt2", seed=1)})
    assert fit_slots(short, EngineOptions())[0] == 300
    assert fit_slots(short, EngineOptions(max_context=200))[0] == 200
    with pytest.raises(ModelError, match="the context is 301 tokens; these specialists were made for 300"):
        fit_slots(short, EngineOptions(max_context=301))
    long = make_fused({"text": make_model("llama", max_position_embeddings=100_000)})
    assert fit_slots(long, EngineOptions())[0] == 4096


def test_the_bytes_of_the_caches_are_those_that_were_counted():
    engine = make_engine(make_fused(make_mixed()))
    assert engine.runner.bytes_per_token == sum(
        memory._bytes_per_token(part) for part in engine.model.specialists.values()
    )


# Slots


@pytest.mark.parametrize(("slots", "member"), [([0, 1, 2], None), ([2, 0], None), ([1], None), ([0, 2], 1), ([2], 0)])
def test_what_is_written_to_slots_is_read_from_them(slots: list[int], member: int | None):
    cache = SlotCache(2, 3, 12, [(2, 4)], dtype=torch.float32, device=torch.device("cpu"))
    num_rows = len(slots) * (2 if member is None else 1)
    starts = torch.arange(num_rows) % 3
    view = SlotView(cache, slots, member, starts, 2)
    keys, values = torch.randn(num_rows, 2, 2, 4), torch.randn(num_rows, 2, 2, 4)

    view.write(0, keys, values)

    stored_keys, stored_values = view.read(0)
    members = [0, 1] if member is None else [member]
    rows = [(slot, j) for slot in slots for j in members]
    for r, (slot, j) in enumerate(rows):
        at = slice(int(starts[r]), int(starts[r]) + 2)
        assert torch.equal(stored_keys[r, :, at], keys[r])
        assert torch.equal(stored_values[r, :, at], values[r])
        assert torch.equal(cache.keys[0][slot * 2 + j, :, at], keys[r])
    touched = {slot * 2 + j for slot, j in rows}
    assert all(not cache.keys[0][row].any() for row in set(range(6)) - touched)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_token_sees_its_own_columns_up_to_itself_and_within_the_window(window: int | None):
    cache = SlotCache(1, 2, 12, [(1, 4)], dtype=torch.float32, device=torch.device("cpu"))
    mask = SlotView(cache, [0, 1], None, torch.tensor([4, 1]), 3).mask(window)

    assert mask is not None
    for row, start in enumerate([4, 1]):
        for new in range(3):
            position = start + new
            first = max(0, position - window + 1) if window is not None else 0
            assert mask[row, 0, new].nonzero().flatten().tolist() == list(range(first, position + 1))


def test_a_copy_of_a_slot_is_whole_and_touches_no_other():
    cache = SlotCache(2, 3, 6, [(1, 4), (2, 2)], dtype=torch.float32, device=torch.device("cpu"))
    for storage in (*cache.keys, *cache.values):
        storage.normal_()
    before = [storage.clone() for storage in (*cache.keys, *cache.values)]

    cache.copy(0, 2, 4)

    for storage, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(storage[4:6, :, :4], old[0:2, :, :4])
        assert torch.equal(storage[4:6, :, 4:], old[4:6, :, 4:])
        assert torch.equal(storage[:4], old[:4])


# Cancelling


@pytest.mark.parametrize("when", [0, 1, 2, 4, 6])
def test_a_cancelled_request_frees_its_slots_at_once(when: int):
    """While it waits, while its prompt is read, while it decodes: the next round takes the next request."""
    engine = make_engine(make_fused(), chunk=8, max_choices=2)
    first, second = Heard(2), Heard(2)
    choices = engine.add(greedy(20, 9, 3, n=2, max_tokens=30), first)
    engine.add(waiting := greedy(5, 6, 7, n=2, seed=4), second)
    for _ in range(when):
        engine.step()

    for choice in choices:
        choice.cancelled = True
    engine.step()

    assert first.reasons == ["cancelled", "cancelled"]
    assert engine.stats().num_running == 2
    assert engine.stats().num_waiting == 0
    finish(engine)
    assert_answers(engine.model, waiting, second)


def test_one_choice_of_a_request_can_be_cancelled_alone_while_it_decodes():
    engine = make_engine(make_fused())
    heard = Heard(3)
    choices = engine.add(request := greedy(7, 9, 5, n=3, ignore_end=True), heard)
    engine.step()
    engine.step()

    choices[1].cancelled = True
    finish(engine)

    assert heard.reasons == ["length", "cancelled", "length"]
    assert heard.ids(0) == heard.ids(2)
    assert heard.ids(1) == heard.ids(0)[: len(heard.ids(1))]
    assert len(heard.ids(0)) == request.params.max_tokens


def test_cached_tokens_are_those_of_the_running_choices():
    engine = make_engine(make_fused(), chunk=100)
    engine.add(greedy(7, 13, 5), Heard())
    engine.step()

    assert engine.stats().cached_tokens == 13 + 1  # the prompt, and the first token that the same round has fed


def test_failing_ends_everything_and_the_engine_goes_on():
    engine = make_engine(make_fused(), max_choices=2)
    heard = [Heard(), Heard(2), Heard()]
    for one in heard:
        engine.add(greedy(7, 9, 5, n=one.num_choices), one)
    engine.step()

    engine.fail_all("something broke")

    assert [one.reasons for one in heard] == [["error"], ["error", "error"], ["error"]]
    assert {error for one in heard for error in one.errors} == {"something broke"}
    assert not engine.has_work
    request = greedy(7, 9, 5)
    assert_answers(engine.model, request, run(engine, request)[0])


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_logits_that_are_no_numbers_end_their_choice_with_an_error(where: str):
    model = make_fused()
    engine = make_engine(model)
    heard = Heard(2)
    engine.add(greedy(7, 9, 5, n=2), heard)
    if where == "answer":
        engine.step()
    fused: Any = engine.runner.fused
    engine.runner.fused = lambda *args: fused(*args) * torch.nan  # type: ignore[method-assign]

    finish(engine)

    assert heard.reasons == ["error", "error"]
    assert all("no numbers (NaN)" in error for error in heard.errors)
