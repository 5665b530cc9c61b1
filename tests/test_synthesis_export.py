"""The data set: what is in its files, that they load, and that they are there whole or not at all."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from synthesis_samples import Grower, grow, sample_recipe
from ultrafuser.data.records import read_records
from ultrafuser.errors import ConfigError, DataError
from ultrafuser.synthesis.dataset.export import MARK, export
from ultrafuser.synthesis.dataset.records import read_synthesis
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store


@pytest.fixture
def recipe(tmp_path: Path) -> SynthesisRecipe:
    return sample_recipe(tmp_path / "run")


@pytest.fixture
def store(recipe: SynthesisRecipe) -> Iterator[Store]:
    with Store.open(recipe) as opened:
        grow(opened, "text")
        grow(opened, "code", metas=1)
        yield opened


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / name).read_text(encoding="utf-8").splitlines()]


def all_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "data").glob("*.jsonl")) for row in rows(folder, path.name)]


def test_every_kept_answer_is_one_record_with_its_place_and_origin(
    store: Store, recipe: SynthesisRecipe, tmp_path: Path
):
    summary = export(store, recipe, tmp_path / "out")
    records = all_rows(tmp_path / "out")

    assert summary.num_records == len(records) == 2 * 4 * 3 + 4 * 3
    assert Counter(record["relation"] for record in records) == {"complicated": 12, "strong": 12, "weak": 12}
    strong = next(record for record in records if record["relation"] == "strong" and record["domain"] == "text")
    assert strong["sub_topic"].startswith(strong["meta_topic"].replace("area", "topic"))
    assert strong["fine_topic"] is None
    assert strong["lineage"] == ["meta_topics", "sub_topics", "strong", "responses"]
    assert [message["role"] for message in strong["messages"]] == ["user", "assistant", "user", "assistant"]
    assert strong["messages"][2]["content"].startswith("And why")
    rewritten = next(record for record in records if record["relation"] == "complicated")
    assert rewritten["lineage"] == ["meta_topics", "sub_topics", "instructions", "complicated", "responses"]
    assert rewritten["messages"][0]["content"].endswith("Name limits.")
    assert (rewritten["model"], rewritten["endpoint"]) == ("big-model-2026", "writer")
    assert rewritten["instruction_model"] == "small-model"
    assert (rewritten["licence"], rewritten["language"]) == ("apache-2.0", "en")


def test_a_topic_is_on_one_side_alone(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    export(store, recipe, tmp_path / "out")
    names = [(split, f"{domain}-{split}.jsonl") for domain in recipe.domains for split in ("train", "validation")]
    sides: dict[str, set[str]] = {"train": set(), "validation": set()}
    for split, name in names:
        sides[split] |= {row["sub_topic"] for row in rows(tmp_path / "out", name)}

    assert sides["train"]
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]


@pytest.mark.parametrize(("fraction", "validating"), [(0.0, 0), (1e-9, 1), (1.0, 8)])
def test_a_small_share_still_validates_by_one_topic_and_none_by_none(
    store: Store, recipe: SynthesisRecipe, tmp_path: Path, fraction: float, validating: int
):
    changed = recipe.model_copy(update={"export": recipe.export.model_copy(update={"validation_fraction": fraction})})
    export(store, changed, tmp_path / "out")
    path = tmp_path / "out" / "data" / "text-validation.jsonl"

    topics = {row["sub_topic"] for row in rows(tmp_path / "out", path.name)} if path.exists() else set()
    assert len(topics) == validating
    assert (tmp_path / "out" / "data" / "text-train.jsonl").exists() == (validating < 8)


def test_topics_of_one_name_are_on_one_side_in_all_domains(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run")
    with Store.open(recipe) as store:
        grower = Grower(store)
        for domain in recipe.domains:
            meta = grower.add(domain, "meta_topics", "Area")
            for number in range(20):
                name = f"Topic  {number}" if domain == "text" else f"TOPIC {number}"
                topic = grower.add(domain, "sub_topics", name, meta)
                seed = grower.add(domain, "instructions", f"Do {number} for {domain}", topic)
                grower.add(domain, "responses", "Done.", seed)
        grower.flush()
        export(store, recipe, tmp_path / "out")

    def topics(name: str) -> set[str]:
        return {" ".join(row["sub_topic"].casefold().split()) for row in rows(tmp_path / "out", name)}

    assert topics("text-validation.jsonl") == topics("code-validation.jsonl")


def test_the_same_synthesis_gives_the_same_files(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    first, second = (export(store, recipe, tmp_path / name) for name in ("one", "two"))

    assert first.checksum == second.checksum
    for name in first.files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    keys = [record.id for record in read_synthesis(store, "text", language="en")]
    assert keys == sorted(keys)


def test_datasets_loads_it_by_its_card_offline(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    export(store, recipe, tmp_path / "out")
    script = """
import json, sys
from datasets import get_dataset_config_names, load_dataset
folder = sys.argv[1]
names = get_dataset_config_names(folder)
sets = {name: load_dataset(folder, name) for name in names}
default = load_dataset(folder)
print(json.dumps({
    "names": sorted(names),
    "sizes": {name: {split: len(part) for split, part in found.items()} for name, found in sets.items()},
    "default": {split: len(part) for split, part in default.items()},
    "first": default["train"][0],
}))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["names"] == ["code", "default", "text"]
    assert sum(told["default"].values()) == 36
    assert sum(told["sizes"]["text"].values()) == 24
    assert told["first"] == rows(tmp_path / "out", "text-train.jsonl")[0]


@pytest.mark.parametrize("form", ["messages", "ultrachat"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_our_own_reader_reads_every_file(store: Store, recipe: SynthesisRecipe, tmp_path: Path, form: Any, ending: str):
    summary = export(store, recipe, tmp_path / "out", form=form)
    read = {name: list(read_records(tmp_path / "out" / name, domain="any")) for name in summary.files}

    assert {name: len(found) for name, found in read.items()} == summary.files
    messages = [message.content for message in read[f"data/text-train.{ending}"][0].messages]
    expected = next(record for record in read_synthesis(store, "text", language="en") if messages[0] in str(record))
    assert messages == [message.content for message in expected.messages]


def test_ultrachat_form_is_id_and_texts(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    export(store, recipe, tmp_path / "out", formats=["jsonl"], form="ultrachat")
    row = rows(tmp_path / "out", "text-train.jsonl")[0]

    assert list(row) == ["id", "data"]
    assert len(row["data"]) % 2 == 0
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_the_card_tells_what_is_in_it_and_nothing_secret(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    export(store, recipe.model_copy(update={"database": None}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])

    assert header["license"] == "cc-by-4.0"
    assert header["language"] == ["en"]
    assert [config["config_name"] for config in header["configs"]] == ["default", "text", "code"]
    files = [file for config in header["configs"] for file in config["data_files"]]
    assert all(path.endswith(".parquet") for file in files for path in file["path"])
    assert "Fewer than the recipe asks for: text 24 of 100,000, code 12 of 100,000." in card
    assert "| writer | big-model-2026 | apache-2.0 | 24 | 36 |" in card
    assert "| helper | small-model | cc-by-4.0 | 12 | 0 |" in card
    assert "| text | sub_topics | refusals | 2 | as an ai (2) |" in card
    assert "| text | instructions | duplicates | 8 | the same (8) |" in card
    for secret in ("SECRET", "10.9.8.7", str(tmp_path), "key_variable", "extra_body"):
        assert secret not in card


def test_a_failed_export_leaves_the_old_one(
    store: Store, recipe: SynthesisRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    export(store, recipe, out, formats=["jsonl"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ultrafuser.synthesis.dataset.export.put_in_place", full)
    with pytest.raises(DataError, match="No space left on device"):
        export(store, recipe, out)

    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_new_export_takes_the_place_of_the_old_one(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    export(store, recipe, tmp_path / "out")
    export(store, recipe, tmp_path / "out", formats=["jsonl"])

    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert json.loads((tmp_path / "out" / MARK).read_text(encoding="utf-8"))["records"] == 36


def test_a_folder_of_something_else_is_left_alone(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(DataError, match="holds something that is no export"):
        export(store, recipe, tmp_path)
    with pytest.raises(DataError, match="is a file"):
        export(store, recipe, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_nothing_made_yet_is_said(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run")
    with Store.open(recipe) as store, pytest.raises(DataError, match="nothing to export"):
        export(store, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(store: Store, recipe: SynthesisRecipe, tmp_path: Path):
    with pytest.raises(ConfigError, match="csv is not one; choose from jsonl, parquet"):
        export(store, recipe, tmp_path / "out", formats=["csv"])


def test_an_instruction_without_a_topic_is_a_record_too(tmp_path: Path):
    recipe = sample_recipe(tmp_path / "run", "text")
    with Store.open(recipe) as store:
        grower = Grower(store)
        seed = grower.add("text", "free", "How do tides work?")
        grower.add("text", "responses", "By the moon.\u2028And the sun: \U0001f31e", seed)
        grower.flush()
        export(store, recipe, tmp_path / "out")

    row = all_rows_of_one(tmp_path / "out")
    assert (row["meta_topic"], row["sub_topic"], row["relation"]) == (None, None, "free")
    assert row["messages"][1]["content"] == "By the moon.\u2028And the sun: \U0001f31e"


def all_rows_of_one(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "data").glob("*.jsonl")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_reading_takes_the_same_memory_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ultrafuser.synthesis.storage.view._PAGE", 50)  # so that few records are many pages
    monkeypatch.setattr("ultrafuser.synthesis.dataset.records.BATCH_RECORDS", 20)
    recipe = sample_recipe(tmp_path / "run")
    with Store.open(recipe) as store:
        grow(store, "text", metas=2, subs=5, instructions=20)
        grow(store, "code", metas=2, subs=5, instructions=100)

        def peak(domain: str, *, all_at_once: bool) -> int:
            gc.collect()
            tracemalloc.start()
            records = read_synthesis(store, domain, language="en")
            assert (len(list(records)) if all_at_once else sum(1 for _ in records)) in (200, 1000)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        peak("text", all_at_once=False)  # the first time is for what Python keeps
        few, many = (peak(domain, all_at_once=False) for domain in ("text", "code"))
        held = peak("code", all_at_once=True)

    assert many - few < 0.1 * held
