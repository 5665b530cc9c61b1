"""The public names, what they stand for, and that transformers finds the fused model by itself."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ultrafuser

PUBLIC = {
    "FusedConfig": "ultrafuser.model.configuration",
    "FusedForCausalLM": "ultrafuser.model.fused",
    "Gate": "ultrafuser.model.gate",
    "FusedGenerator": "ultrafuser.model.generator",
    "Engine": "ultrafuser.engine.engine",
    "EngineOptions": "ultrafuser.engine.engine",
    "EngineGenerator": "ultrafuser.engine.generator",
    "load_engine": "ultrafuser.engine.load",
    "SamplingParams": "ultrafuser.generation",
    "Completion": "ultrafuser.generation",
    "AnswerScore": "ultrafuser.generation",
    "Generator": "ultrafuser.generation",
    "Message": "ultrafuser.chat.messages",
    "Conversation": "ultrafuser.chat.messages",
    "Template": "ultrafuser.chat.template",
    "load_template": "ultrafuser.chat.library",
    "Recipe": "ultrafuser.config.recipe",
    "load_recipe": "ultrafuser.config.load",
    "UltrafuserError": "ultrafuser.errors",
}


def test_the_public_names_are_these():
    assert set(ultrafuser.__all__) == {*PUBLIC, "__version__"}
    assert set(ultrafuser.__all__) <= set(dir(ultrafuser))


@pytest.mark.parametrize(("name", "module"), PUBLIC.items(), ids=PUBLIC)
def test_a_public_name_is_what_its_module_defines(name: str, module: str):
    assert getattr(ultrafuser, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Router'"):
        ultrafuser.Router  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import ultrafuser; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import ultrafuser",
        "import transformers, ultrafuser; from transformers import AutoModelForCausalLM, AutoConfig",
    ],
    ids=["ultrafuser first", "transformers first", "transformers half loaded"],
)
def test_importing_the_package_is_enough_for_the_auto_classes(tmp_path: Path, imports: str):
    part = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = {"model_type": "ultrafuser", "gate_hidden_size": 4, "specialists": [{"name": "text", "config": part}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = f"{imports}; config = AutoConfig.from_pretrained({str(tmp_path)!r}); " + (
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert result.stdout.split() == ["FusedForCausalLM"], result.stderr
