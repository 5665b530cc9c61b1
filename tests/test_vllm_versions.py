"""The plugin runs in the vLLM it was tested with; another one is refused in one line, and only for a fused model."""

import tomllib
from pathlib import Path

import pytest

from ultrafuser.errors import ConfigError
from ultrafuser.vllm_plugin.versions import BEFORE, FIRST, check_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.2.post1"])
def test_releases_of_the_range_are_accepted(version: str):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.3.2", "0.32.0rc1", "0.32.1.dev7+g12", "dev", ""])
def test_others_are_refused_with_both_versions_and_a_way_out(version: str):
    with pytest.raises(ConfigError) as error:
        check_version(version)

    message = str(error.value)
    assert f"vLLM {version} is installed" in message
    assert "pip install 'vllm>=0.32,<0.33'" in message
    assert "ULTRAFUSER_ANY_VLLM=1" in message
    assert "\n" not in message


def test_any_version_passes_at_ones_own_risk():
    check_version("0.99.0", unchecked=True)


def test_the_extra_installs_the_range():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

    first, before = (".".join(map(str, part)) for part in (FIRST, BEFORE))
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={first},<{before}"]
