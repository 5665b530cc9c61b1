"""The real training sets read as their README counts them, and overlap the real benchmarks as it says."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jaxtyping
import pytest

from ultrafuser.data.benchmarks import load_benchmarks
from ultrafuser.data.overlap import NGRAM_WORDS, OverlapIndex, find_overlaps
from ultrafuser.data.records import Problems, Record, read_records
from ultrafuser.data.split import SPLITS, prompt_key, split_records

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}: set ULTRAFUSER_DATA")

# File: published records, those of them with an empty response.
COUNTS = {
    "text/alpaca_random_9k.json.gz": (9229, 4),
    "text/alpaca_claude_t45_5k.json": (5305, 4),
    "text/dolly_3k.json.gz": (2996, 0),
    "text/vicuna_dummy_conversations.json": (500, 0),
    "code/code_alpaca_2k.json": (2017, 2),
    "code/gpteacher_codegen.json.gz": (4535, 0),
    "code/evol_code_gen1_2k.json.gz": (1966, 0),
    "code/evol_code_gen2_2k.json.gz": (1953, 0),
    "math/gsm8k_train.jsonl.gz": (7473, 0),
    "math/aqua_cot_train.tsv": (2728, 0),
}

ITEMS = {
    "humaneval": 164,
    "mbpp": 500,
    "gsm8k": 1319,
    "sat_math": 220,
    "aqua": 254,
    "truthfulqa": 817,
    "alpaca_eval": 805,
    "mt_bench": 80,
}

# Test items that share 13 words with a file, as its README lists them; pairs not listed share none.
OVERLAPS = {
    "text/alpaca_random_9k.json.gz": {"alpaca_eval": 1},
    "code/code_alpaca_2k.json": {"humaneval": 1},
    "code/gpteacher_codegen.json.gz": {"mbpp": 2, "alpaca_eval": 1, "mt_bench": 1},
    "code/evol_code_gen1_2k.json.gz": {"sat_math": 1},
    "code/evol_code_gen2_2k.json.gz": {"humaneval": 2, "mt_bench": 1},
    "math/gsm8k_train.jsonl.gz": {"gsm8k": 3},
    "math/aqua_cot_train.tsv": {"aqua": 2},
}

# Test items of 5 to 12 words found whole; the README's table does not compare items so short.
SHORT_OVERLAPS = {
    "text/alpaca_random_9k.json.gz": {"alpaca_eval": 3, "truthfulqa": 1},
    "text/dolly_3k.json.gz": {"alpaca_eval": 1},
    "code/evol_code_gen1_2k.json.gz": {"truthfulqa": 1},
}


@pytest.fixture(autouse=True, scope="module")
def _without_type_checks_at_each_call() -> Iterator[None]:
    """A million calls on real data take three times as long when checked; the other tests check the same code."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@cache
def load(file: str) -> tuple[tuple[Record, ...], Problems]:
    problems = Problems()
    path = DATA / file
    return tuple(read_records(path, domain=path.parent.name, on_error="skip", problems=problems)), problems


@cache
def index() -> OverlapIndex:
    return OverlapIndex(load_benchmarks(DATA / "eval"))


def count_items(hits: set[tuple[str, str]]) -> dict[str, int]:
    return {name: sum(name == benchmark for benchmark, _ in hits) for name in {benchmark for benchmark, _ in hits}}


def test_every_training_file_is_covered() -> None:
    folders = ("text", "code", "math")

    assert {f"{folder}/{path.name}" for folder in folders for path in (DATA / folder).iterdir()} == set(COUNTS)


@pytest.mark.parametrize("file", COUNTS)
def test_every_record_is_read_but_for_those_without_a_response(file: str) -> None:
    num_records, num_empty = COUNTS[file]

    records, problems = load(file)

    assert len(records) == num_records - num_empty
    assert problems.counts == ({"no response": num_empty} if num_empty else {})


def test_the_two_alpaca_subsets_share_the_records_the_readme_says() -> None:
    random, rated = ({record.id for record in load(file)[0]} for file in list(COUNTS)[:2])

    assert len(random & rated) == 935


def test_no_calculator_annotation_or_spelled_line_break_is_left_in_the_math_sets() -> None:
    gsm8k, aqua = load("math/gsm8k_train.jsonl.gz")[0], load("math/aqua_cot_train.tsv")[0]

    assert not any("<<" in message.content for record in gsm8k for message in record.messages)
    assert not any("\\n" in message.content for record in aqua for message in record.messages)
    assert all(record.messages[-1].content[-18:-2].startswith("The answer is (") for record in aqua)


def test_every_benchmark_has_its_published_number_of_items() -> None:
    assert index().num_items == ITEMS


@pytest.mark.parametrize("file", COUNTS)
def test_overlaps_agree_with_the_readme(file: str) -> None:
    report = find_overlaps(load(file)[0], index())

    long = {(hit.benchmark, hit.item_id) for hit in report.overlaps if hit.num_words >= NGRAM_WORDS}
    short = {(hit.benchmark, hit.item_id) for hit in report.overlaps} - long

    assert count_items(long) == OVERLAPS.get(file, {})
    assert count_items(short) == SHORT_OVERLAPS.get(file, {})


def test_no_prompt_of_the_code_and_alpaca_sets_straddles_two_splits() -> None:
    records = [record for file in COUNTS if file.startswith(("code/", "text/alpaca")) for record in load(file)[0]]

    dealt = split_records(records, validation=0.05, test=0.05)
    keys = {split: {prompt_key(record) for record in dealt[split]} for split in SPLITS}

    assert sum(map(len, keys.values())) == len(set.union(*keys.values()))
    assert [len(dealt[split]) / len(records) for split in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
