"""What cannot be served ends in one line, before anything is loaded: of `vllm serve`, and of the configuration."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import make_fused, make_model, make_tokenizer, make_trio
from vllm_helpers import HIDDEN, SMALL, VllmHome, install, make_servable, save

LOOKUP = {"method": "ngram", "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def home() -> VllmHome:
    return install()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(make_servable(), root / "good", max_shard_size="200KB")
    return root


def broken(root: Path, name: str, change: Callable[[Path], None]) -> Path:
    folder = Path(shutil.copytree(root / "good", root / name))
    change(folder)
    return folder


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def lengthen_vocabulary(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def answers(home: VllmHome, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    short = make_trio() | {"code": make_model(seed=1, hidden_size=16, max_position_embeddings=128)}
    save(make_fused(short, templates="chatml"), root / "short")
    window = make_trio() | {"code": make_model("mistral", seed=1, hidden_size=16, sliding_window=32)}
    save(make_fused(window, templates="chatml"), root / "window")
    jobs = [
        ("shard", broken(root, "shard", lose_a_shard), {}),
        ("tokenizer", broken(root, "tokenizer", lengthen_vocabulary), {}),
        ("rows", broken(root, "rows", lambda folder: change_config(folder, vocab_size=200)), {}),
        ("probs", broken(root, "probs", lambda folder: change_config(folder, fusion_space="probs")), {}),
        ("prompt", broken(root, "prompt", lambda folder: change_config(folder, granularity="prompt")), {}),
        ("pipeline", root / "good", {"pipeline_parallel_size": 2}),
        ("lora", root / "good", {"enable_lora": True}),
        ("context", root / "short", {"max_model_len": 300}),
        ("drafted", root / "good", {"additional_config": {"own_prompts": True}, "speculative_config": LOOKUP}),
        ("neither", root / "good", {"additional_config": {"own_prompts": "yes"}}),
        ("window", root / "window", {"additional_config": {"own_prompts": True}}),
        ("fitted", root / "short", {"max_model_len": None}),
        ("good", root / "good", {}),
    ]
    return home.answer(
        [{"name": n, "task": "refuse", "model": str(place), "args": args} for n, place, args in jobs],
        tmp_path_factory.mktemp("answers"),
    )


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("shard", "ModelError", "one of the"),
        ("tokenizer", "VocabularyError", "has the token '<new>'"),
        ("rows", "VocabularyError", "has 262 rows, but the specialists share 200 tokens"),
        ("probs", "ConfigError", "not linear in the logits"),
        ("prompt", "ConfigError", "granularity: prompt"),
        ("pipeline", "ConfigError", "cannot be cut by layers"),
        ("lora", "ConfigError", "takes no adapters"),
        ("drafted", "ConfigError", "own_prompts cannot be had with speculation"),
        ("neither", "ConfigError", "own_prompts is true or false, not 'yes'"),
        ("window", "ConfigError", "specialist 'code' attends to a sliding window"),
        ("context", "ConfigError", "--max-model-len 300 is more than the 128 tokens"),
    ],
)
def test_a_mistake_is_one_error_of_ours(name: str, kind: str, words: str, answers: dict[str, Any]):
    assert answers[name]["kind"] == kind
    assert words in answers[name]["error"]
    assert "\n" not in answers[name]["error"]


def test_the_context_is_that_of_the_specialist_that_reads_least(answers: dict[str, Any]):
    assert answers["fitted"] == {"max_model_len": 128}
    assert answers["good"] == {"max_model_len": 512}


def test_vllm_serve_shows_the_mistake_in_one_line(home: VllmHome, root: Path):
    folder = broken(root, "again", lose_a_shard)

    ended = subprocess.run(
        [home.python.parent / "vllm", "serve", folder, *SMALL],
        capture_output=True,
        text=True,
        env=home.environment,
        timeout=240,
    )

    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr + ended.stdout
    assert ended.stderr.strip().splitlines()[-1].startswith(f"ultrafuser: {folder} lacks model-00002-of-")


def test_another_vllm_refuses_a_fused_model_and_no_other(home: VllmHome, root: Path, tmp_path: Path):
    make_model(hidden_size=HIDDEN).save_pretrained(tmp_path / "plain")
    script = (
        "import sys, vllm.version; vllm.version.__version__ = '0.99.0'\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins()\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.from_pretrained(sys.argv[2]).model_type)\n"
        "AutoConfig.from_pretrained(sys.argv[1])\n"
    )

    ended = subprocess.run(
        [home.python, "-c", script, root / "good", tmp_path / "plain"],
        capture_output=True,
        text=True,
        env=home.environment,
        timeout=240,
    )

    assert ended.stdout.split()[-1] == "llama"
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("ultrafuser: vLLM 0.99.0 is installed, but the plugin")
    assert "Traceback" not in ended.stderr


def test_the_plugin_is_found_by_its_entry_point_and_loads_no_model_class(home: VllmHome):
    script = (
        "import sys\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm import ModelRegistry\n"
        "print('FusedForCausalLM' in ModelRegistry.get_supported_archs())\n"
        "print('ultrafuser.vllm_plugin.model' in sys.modules)"
    )

    ended = subprocess.run(
        [home.python, "-c", script], capture_output=True, text=True, env=home.environment, timeout=240
    )

    assert ended.stdout.split() == ["True", "False"], ended.stderr
