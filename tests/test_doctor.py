"""The doctor finds what would go wrong before any weight is loaded, and says what to do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from typer.testing import CliRunner

from tiny_specialists import make_tokenizer, save_specialist
from ultrafuser.cli.main import app
from ultrafuser.config.load import parse_recipe
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.doctor import facts as facts_module
from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.files import _is_whole, check_files
from ultrafuser.doctor.finding import Finding
from ultrafuser.doctor.hub import RepoInfo
from ultrafuser.doctor.licences import _from_folder
from ultrafuser.doctor.machine import Machine
from ultrafuser.doctor.report import Report, examine
from ultrafuser.doctor.show import print_report
from ultrafuser.doctor.unset import load_to_examine

RECIPES = Path(__file__).parent.parent / "recipes"
BIG = Machine(num_cores=2, ram_bytes=2**34)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two specialists that agree in everything; tests that break one make their own."""
    folder = tmp_path_factory.mktemp("twins")
    return save_specialist(folder / "a"), save_specialist(folder / "b")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text('{"prompt": "1 + 1?", "completion": "2"}\n', encoding="utf-8")
    return path


def make_recipe(
    *folders: Path | str, data: Path | str | None = None, template: str = "ultralm", **fields: Any
) -> Recipe:
    names = ("text", "code", "math")
    specialists = {
        name: {"model": str(folder), "template": template} for name, folder in zip(names, folders, strict=False)
    }
    if data is not None:
        fields["data"] = {"domains": {"text": {"sources": [{"path": str(data)}]}}, "max_length": 256}
    return parse_recipe({"name": "test", "specialists": specialists, **fields})


def find(report: Report, level: str, words: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.level == level and words in finding.what]


def test_sound_specialists_have_neither_blockers_nor_warnings(twins: tuple[Path, Path], records: Path) -> None:
    """But for the benchmarks that nobody named."""
    report = examine(make_recipe(*twins, data=records), machine=BIG)

    assert [finding.subject for finding in report.findings if finding.level != "ok"] == ["benchmarks"]
    assert find(report, "ok", "260 tokens agree between text, code")
    assert find(report, "ok", "responses are closed with '</s>'")
    assert find(report, "ok", "text mit, code mit")
    assert not report.has_blocker


def test_sizes_come_from_the_configuration(twins: tuple[Path, Path], records: Path) -> None:
    """Parameters as transformers counts them; a KV cache of 2 x layers x heads; phases of weights and moments."""
    from transformers import AutoModelForCausalLM

    stage2 = {"train_specialists": True}
    report = examine(make_recipe(*twins, data=records, stage2=stage2), machine=BIG)

    expected = AutoModelForCausalLM.from_pretrained(twins[0]).num_parameters()
    text, needs = report.sizes[0], {need.phase: need for need in report.needs}
    gate = (16 + 1) * 512 + 512 + 1
    assert text.num_parameters == expected
    assert text.weights_bytes == 4 * expected
    assert text.kv_bytes_per_token == 2 * 2 * 1 * 8 * 4
    assert needs["stage1"].bytes == 4 * (2 * expected + 4 * gate)
    assert needs["stage1"].checkpoint_bytes == 12 * gate
    assert needs["stage2"].bytes == 16 * (2 * expected + gate)
    assert needs["inference"].bytes == 4 * (2 * expected + gate) + 2 * 256 * text.kv_bytes_per_token


def test_weights_are_not_read(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real machine may not hold them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)

    assert not examine(make_recipe(*twins), machine=BIG).has_blocker


def test_a_token_that_differs_is_a_blocker_that_names_it(twins: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_specialist(tmp_path / "other", tokenizer=make_tokenizer(swap=True))

    (finding,) = find(examine(make_recipe(twins[0], other), machine=BIG), "blocker", "for specialist")

    assert "is 'a' for specialist 'text' but 'b' for 'code'" in finding.what
    assert "Leave one out" in finding.do


def test_a_tokenizer_that_splits_texts_otherwise_is_a_warning(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """Equal tokens at equal ids, and yet other sequences for the same text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFD()
    other = save_specialist(tmp_path / "other", tokenizer=tokenizer)

    report = examine(make_recipe(twins[0], other), machine=BIG)

    assert find(report, "warning", "the tokenizer of code splits a sample text otherwise than that of text")
    assert not find(examine(make_recipe(*twins), machine=BIG), "warning", "splits a sample text")


def test_surplus_rows_are_a_notice(twins: tuple[Path, Path], tmp_path: Path) -> None:
    wide = save_specialist(tmp_path / "wide", vocab_size=276)

    report = examine(make_recipe(twins[0], wide), machine=BIG)

    assert find(report, "warning", "text 260, code 276")
    assert not report.has_blocker


def test_an_end_token_without_a_row_is_a_blocker(tmp_path: Path) -> None:
    """An id beyond the rows would fail at the first embedding."""
    narrow = save_specialist(tmp_path / "narrow", vocab_size=2, eos_token_id=None, pad_token_id=None)

    assert find(examine(make_recipe(narrow), machine=BIG), "blocker", "eos_token_id")


def test_a_tokenizer_without_an_end_is_a_blocker(tmp_path: Path) -> None:
    endless = save_specialist(tmp_path / "endless", tokenizer=make_tokenizer(eos=None))

    assert find(examine(make_recipe(endless), machine=BIG), "blocker", "no end token")


def test_stop_tokens_are_the_union(twins: tuple[Path, Path]) -> None:
    """The tokenizer's end and the template's; one that is no token cannot stop generation."""
    chatml = examine(make_recipe(twins[0], template="chatml"), machine=BIG)
    llama = examine(make_recipe(twins[0], template="llama-3"), machine=BIG)

    assert find(chatml, "ok", "generation stops at '</s>' (2), '<|im_end|>' (3)")
    assert find(llama, "warning", "'<|eot_id|>', which is no single token")


def test_what_a_template_cannot_do_is_said(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """No date, no system message, no second turn, nothing at all."""
    loop = "{{ bos_token }}{% for m in messages %}"
    end = "{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    cases = {
        "dated": (
            "{{ bos_token }}{{ strftime_now('%Y') }}" + loop.removeprefix("{{ bos_token }}") + end,
            "today's date",
        ),
        "no_system": (
            loop + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + end,
            "no system",
        ),
        "rewriting": (
            loop + "{% if loop.last or m.role == 'assistant' %}" + end[:-12] + "{% endif %}{% endfor %}",
            "turns",
        ),
        "no_bos": (loop.removeprefix("{{ bos_token }}") + end, None),
        "broken": ("{% for %}", "not valid Jinja"),
    }
    for name, (source, words) in cases.items():
        file = tmp_path / f"{name}.jinja"
        file.write_text(source, encoding="utf-8")
        report = examine(make_recipe(twins[0], template=str(file)), machine=BIG)

        level = "blocker" if name == "broken" else "warning"
        if words is not None:
            assert find(report, level, words), name
        assert report.has_blocker == (name == "broken"), name


def test_different_rotations_and_lengths_are_noticed(twins: tuple[Path, Path], tmp_path: Path, records: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    short = save_specialist(tmp_path / "short", max_position_embeddings=128, rope_parameters=rope)

    report = examine(make_recipe(twins[0], short, data=records), machine=BIG)

    assert find(report, "warning", "context lengths differ: text 512, code 128")
    assert find(report, "warning", "text theta 10,000, code theta 1,000,000")
    assert find(report, "warning", "positions up to 128, but data.max_length is 256")


def test_mixed_sizes_and_heads_are_told(twins: tuple[Path, Path], tmp_path: Path) -> None:
    wide = save_specialist(tmp_path / "wide", hidden_size=32, tie_word_embeddings=True)

    report = examine(make_recipe(twins[0], wide), machine=BIG)

    assert find(report, "ok", "hidden sizes differ (text 16, code 32)")
    assert find(report, "ok", "mixed: text own, code tied")
    assert not report.has_blocker


def test_training_in_bf16_weights_is_a_warning(twins: tuple[Path, Path], records: Path) -> None:
    recipe = make_recipe(*twins, data=records, dtype="bfloat16", stage2={"train_specialists": True})

    assert find(examine(recipe, machine=BIG), "warning", "trained in bfloat16")


def test_missing_files_are_blockers(tmp_path: Path) -> None:
    """A folder, a shard named in the index, weights that would have to be unpickled, a file cut short."""
    sharded, pickled, cut = (save_specialist(tmp_path / name) for name in ("sharded", "pickled", "cut"))
    weights = "model.safetensors"
    (sharded / weights).rename(sharded / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / f"{weights}.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    (pickled / weights).rename(pickled / "pytorch_model.bin")
    (cut / weights).write_bytes((cut / weights).read_bytes()[:-1])

    report = examine(make_recipe(sharded, pickled, cut), machine=BIG)
    absent = examine(make_recipe(tmp_path / "absent"), machine=BIG)

    assert find(report, "blocker", "lacks model-00002-of-00002.safetensors")
    assert find(report, "blocker", "pickled weights only")
    assert find(report, "blocker", "shorter than its header says")
    assert find(absent, "blocker", "there is no folder")


def test_a_file_that_is_no_safetensors_file_is_not_whole(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        (tmp_path / "x").write_bytes(content)
        assert not _is_whole(tmp_path / "x")


def test_another_kind_of_model_is_a_blocker(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")

    report = examine(make_recipe(tmp_path), machine=BIG)

    assert report.has_blocker
    assert find(report, "blocker", "'vit' is no causal LM")


def test_damaged_configuration_is_a_blocker(tmp_path: Path) -> None:
    folder = save_specialist(tmp_path / "a")
    (folder / "config.json").write_text("{", encoding="utf-8")

    assert find(examine(make_recipe(folder), machine=BIG), "blocker", "configuration cannot be read")


def test_licences_are_unknown_differ_or_forbid(twins: tuple[Path, Path], tmp_path: Path) -> None:
    free = save_specialist(tmp_path / "free", licence="cc-by-nc-4.0")
    silent = save_specialist(tmp_path / "silent", licence=None)

    report = examine(make_recipe(twins[0], free, silent), machine=BIG)

    assert find(report, "warning", "forbids commercial use: cc-by-nc-4.0")
    assert find(report, "warning", "licences differ: text mit, code cc-by-nc-4.0")
    assert [finding.subject for finding in find(report, "warning", "licence is unknown")] == ["math"]


def test_a_licence_file_serves_where_no_card_is(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("  Apache License\n Version 2.0\n", encoding="utf-8")
    assert _from_folder(tmp_path) == "apache-2.0"

    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n", encoding="utf-8")
    assert _from_folder(tmp_path) == "own"


def test_missing_data_is_a_blocker(twins: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()

    assert find(examine(make_recipe(twins[0], data=tmp_path / "x.jsonl"), machine=BIG), "blocker", "does not exist")
    assert find(examine(make_recipe(twins[0], data=empty), machine=BIG), "blocker", "is empty")
    assert find(examine(make_recipe(twins[0], data="hub:x"), machine=BIG), "warning", "hub:x")


def test_too_little_memory_is_a_blocker(twins: tuple[Path, Path], records: Path) -> None:
    """On the device that would be used; nearly too little is a warning."""
    recipe = make_recipe(*twins, data=records)
    needed = next(need.bytes for need in examine(recipe, machine=BIG).needs if need.phase == "stage1")

    assert find(examine(recipe, machine=Machine(1, needed - 1)), "blocker", "stage1 takes")
    assert find(examine(recipe, machine=Machine(1, needed + 1)), "warning", "stage1 takes")
    assert find(examine(recipe, machine=Machine(1, 2**34, needed - 1, "a GPU")), "blocker", "the GPU has")


def test_an_adapter_needs_its_files(twins: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder with an adapter stands for the base that it names."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(twins[0])}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    report = examine(make_recipe(adapter), machine=BIG)

    assert find(report, "blocker", "lacks adapter_model.safetensors")
    assert report.sizes[0].model == str(twins[0])


def test_a_hub_id_offline_is_one_quick_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """One probe for all, no retries."""
    probes: list[int] = []

    def probe() -> bool:
        probes.append(1)
        return False

    monkeypatch.setattr(facts_module, "hub_is_reachable", probe)
    started = time.monotonic()

    report = examine(make_recipe("some/model", "other/model"), machine=BIG)

    assert len(find(report, "warning", "is on the hub and cannot be checked offline")) == 2
    assert probes == [1]
    assert not report.has_blocker
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["paper", "qwen2.5-1.5b", "smollm2"])
def test_shipped_recipes_can_be_examined_without_data_or_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset ULTRAFUSER_DATA is said, not stumbled over."""
    monkeypatch.delenv("ULTRAFUSER_DATA", raising=False)

    recipe = load_to_examine(RECIPES / f"{name}.yaml", ["specialists.text.model=some/model"])
    report = examine(recipe, machine=Machine(2, 2**50))

    assert any("ULTRAFUSER_DATA is not set" in finding.what for finding in report.findings)
    assert not [f for f in report.findings if f.level == "blocker" and "there is no folder" not in f.what]


@pytest.mark.parametrize("name", ["paper", "qwen2.5-1.5b"])
def test_the_hub_recipes_pass_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULTRAFUSER_DATA", raising=False)

    result = CliRunner().invoke(app, ["doctor", str(RECIPES / f"{name}.yaml"), "--json"])

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert not report["has_blocker"]
    assert {finding["level"] for finding in report["findings"]} == {"ok", "warning"}


def test_the_paper_recipe_has_the_papers_values() -> None:
    """Section 3.1, Algorithm 1 and Appendix B."""
    recipe = load_to_examine(RECIPES / "paper.yaml")

    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    assert (recipe.stage1.steps, recipe.stage1.records_per_domain, recipe.stage1.learning_rate) == (400, 64, 2e-5)
    assert (recipe.stage2.steps, recipe.stage2.records_per_domain, recipe.stage2.learning_rate) == (5000, 32, 2e-5)
    assert (recipe.gate.hidden_size, recipe.gate.num_layers, recipe.gate.granularity) == (512, 2, "token")
    assert (recipe.fusion.space, recipe.train.sampler) == ("logits", "balanced")
    assert [source.template for source in recipe.specialists.values()] == ["ultralm", "codellama", "wizardmath"]
    assert recipe.stage1.composed_share == recipe.stage2.composed_share == 0


def test_the_command_prints_a_table_and_fails_on_a_blocker(twins: tuple[Path, Path], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(f"name: good\nspecialists: {{text: {{model: {twins[0]}, template: plain}}}}\n", encoding="utf-8")
    bad.write_text(f"name: bad\nspecialists: {{text: {{model: {tmp_path}/none}}}}\n", encoding="utf-8")

    passed, failed = (CliRunner().invoke(app, ["doctor", str(path)]) for path in (good, bad))

    assert passed.exit_code == 0
    assert "0 blockers, 1 warning" in passed.stdout
    assert failed.exit_code == 1
    assert "blocker" in failed.stdout
    assert "1 blocker," in failed.stdout


def test_what_holds_for_several_specialists_is_said_once(twins: tuple[Path, Path], capsys: Any) -> None:
    """In the table; JSON keeps one finding each."""
    report = examine(make_recipe(*twins), machine=BIG)

    print_report(report, as_json=False)

    assert "text, code" in capsys.readouterr().out
    assert len(find(report, "ok", "writes system message")) == 2


@pytest.mark.parametrize(
    ("repo", "level", "words"),
    [
        (RepoInfo(("model.safetensors.index.json",)), "ok", "is on the hub"),
        (RepoInfo(("pytorch_model.bin",)), "warning", "pickled weights"),
        (RepoInfo(("README.md",)), "blocker", "no safetensors weights"),
        (RepoInfo(refusal="is gated"), "blocker", "is gated"),
    ],
)
def test_what_the_hub_lists_is_judged(repo: RepoInfo, level: str, words: str) -> None:
    facts = Facts("text", SpecialistConfig(model="some/model"), repo=repo)

    (finding,) = check_files(facts)

    assert finding.level == level
    assert words in finding.what
