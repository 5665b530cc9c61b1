"""The sampler: a pure function of (seed, step) in which no record and no domain is favoured (Section 3.1)."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser.data.sampler import Sampler
from ultrafuser.errors import ConfigError

SIZES = {"text": 7, "code": 4, "math": 10}

sizes = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 12), min_size=2)


def draws(sampler: Sampler, steps: range) -> list:
    return [draw for step in steps for draw in sampler.batch(step)]


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 99), step=st.integers(0, 50), share=st.floats(0, 1))
def test_a_batch_depends_on_seed_and_step_alone(sizes: dict[str, int], seed: int, step: int, share: float):
    """Whatever was drawn before, in whatever order: resume needs nothing but the step."""
    one = Sampler(sizes, records_per_domain=3, seed=seed, composed_share=share)
    other = Sampler(sizes, records_per_domain=3, seed=seed, composed_share=share)

    for earlier in (9, 2, 40):
        other.batch(earlier)

    assert one.batch(step) == other.batch(step)


def test_another_seed_draws_another_order():
    first, second = (Sampler(SIZES, records_per_domain=8, seed=seed).batch(0) for seed in (0, 1))

    assert first != second


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, per_domain=st.integers(1, 5), step=st.integers(0, 100))
def test_every_domain_has_equally_many_records_in_each_batch(sizes: dict[str, int], per_domain: int, step: int):
    batch = Sampler(sizes, records_per_domain=per_domain, seed=0).batch(step)

    assert Counter(draw.domain for draw in batch) == dict.fromkeys(sizes, per_domain)
    assert all(draw.joined is None for draw in batch)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, per_domain=st.integers(1, 5), share=st.floats(0, 0.9), steps=st.integers(1, 30))
def test_every_record_is_drawn_once_an_epoch(sizes: dict[str, int], per_domain: int, share: float, steps: int):
    """Across steps and epochs, with or without composed records: no record is two draws ahead of another."""
    sampler = Sampler(sizes, records_per_domain=per_domain, seed=5, composed_share=share)

    drawn = Counter((draw.domain, draw.index) for draw in draws(sampler, range(steps)) if draw.joined is None)

    for domain, size in sizes.items():
        counts = [drawn[domain, index] for index in range(size)]
        assert max(counts) - min(counts) <= 1


def test_an_epoch_does_not_repeat_the_order_of_another():
    sampler = Sampler({"text": 10, "code": 10}, records_per_domain=5, seed=0)

    epochs = [
        tuple(draw.index for draw in draws(sampler, range(start, start + 2)) if draw.domain == "text")
        for start in (0, 2, 4)
    ]

    assert len(set(epochs)) == 3
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, share=st.floats(0, 1), start=st.integers(0, 50))
def test_a_composed_share_keeps_the_batch_size_and_the_balance(sizes: dict[str, int], share: float, start: int):
    """What does not divide evenly goes round: over as many steps as domains, each has had the same."""
    sampler = Sampler(sizes, records_per_domain=4, seed=1, composed_share=share)

    batches = [sampler.batch(start + step) for step in range(len(sizes))]
    counts = Counter(draw.domain for batch in batches for draw in batch if draw.joined is None)

    assert {len(batch) for batch in batches} == {4 * len(sizes)}
    assert len({counts[domain] for domain in sizes}) == 1
    assert sum(draw.joined is not None for draw in batches[0]) == round(share * 4 * len(sizes))


def test_composed_records_join_two_domains_and_every_ordered_pair_equally_often():
    sampler = Sampler(SIZES, records_per_domain=4, seed=0, composed_share=0.5)

    composed = [draw for draw in draws(sampler, range(10)) if draw.joined is not None]
    pairs = Counter((draw.domain, draw.joined[0]) for draw in composed)

    assert len(pairs) == 6
    assert set(pairs.values()) == {10}
    assert all(draw.domain != draw.joined[0] for draw in composed)
    assert all(draw.index < SIZES[draw.domain] and draw.joined[1] < SIZES[draw.joined[0]] for draw in composed)


def test_every_record_takes_part_in_composed_records():
    sampler = Sampler(SIZES, records_per_domain=4, seed=0, composed_share=1.0)

    composed = draws(sampler, range(40))

    for domain, size in SIZES.items():
        assert {draw.index for draw in composed if draw.domain == domain} == set(range(size))
        assert {draw.joined[1] for draw in composed if draw.joined[0] == domain} == set(range(size))


def test_the_proportional_sampler_draws_every_record_equally_often_whatever_its_domain():
    sampler = Sampler(SIZES, records_per_domain=1, seed=0, kind="proportional")

    counts = Counter((draw.domain, draw.index) for draw in draws(sampler, range(sum(SIZES.values()))))

    assert set(counts.values()) == {3}  # 21 steps of 3 draws over 21 records
    assert len(counts) == 21


def test_an_empty_domain_is_refused_by_name():
    with pytest.raises(ConfigError, match="no records to train on in code"):
        Sampler({"text": 3, "code": 0}, records_per_domain=1, seed=0)


def test_composed_records_of_a_single_domain_are_refused():
    with pytest.raises(ConfigError, match="only one: set composed_share to 0"):
        Sampler({"text": 3}, records_per_domain=1, seed=0, composed_share=0.1)
