"""docs/cli.md says what the commands say."""

import enum
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from ultrafuser.cli.synthesize import DefaultGroup

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "cli_docs.py"


@pytest.fixture(scope="module")
def cli_docs() -> ModuleType:
    spec = spec_from_file_location("cli_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_page_is_current(columns: str):
    environment = os.environ | {"COLUMNS": columns, "TERMINAL_WIDTH": columns}

    result = subprocess.run([sys.executable, SCRIPT, "--check"], env=environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


def test_a_page_tells_arguments_options_defaults_and_examples(cli_docs: ModuleType):
    class Space(enum.StrEnum):
        LOGITS = "logits"
        PROBS = "probs"

    app = typer.Typer()

    @app.callback()
    def root(verbose: Annotated[bool, typer.Option("--verbose", help="Say more.")] = False) -> None:
        """Fuse."""

    @app.command()
    def train(
        recipe: Annotated[Path, typer.Argument(help="A recipe | a name.")],
        overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
        temperature: Annotated[float, typer.Option(help="Heat.")] = 0.0,
        steps: Annotated[int, typer.Option(help="Steps.")] = 20,
        space: Annotated[Space, typer.Option(help="Where to fuse.")] = Space.LOGITS,
        resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on.")] = True,
    ) -> None:
        """Train the gate.

        Example: ultrafuser train recipes/tiny.yaml --set stage1.steps=20
        """

    @app.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    page = cli_docs.render(app)

    assert "ultrafuser [OPTIONS] COMMAND" in page
    assert "| `--verbose` | Say more. |" in page
    assert "* [`ultrafuser train`](#ultrafuser-train): Train the gate." in page
    assert "ultrafuser train RECIPE [OPTIONS]" in page
    assert "Example: `ultrafuser train recipes/tiny.yaml --set stage1.steps=20`" in page
    assert r"| `RECIPE` | A recipe \| a name. |" in page
    assert "| `--set KEY=VALUE` | Change a key. May be given several times. |" in page
    assert "| `--temperature NUMBER` | Heat. Default: `0.0`. |" in page
    assert "| `--steps INTEGER` | Steps. Default: `20`. |" in page
    assert r"| `--space logits\|probs` | Where to fuse. Default: `logits`. |" in page
    assert "| `--resume / --fresh` | Go on. Default: `--resume`. |" in page
    assert "secret" not in page


def test_a_default_command_stands_under_the_name_of_its_group(cli_docs: ModuleType):
    app, group = typer.Typer(), typer.Typer(cls=DefaultGroup)

    @group.command()
    def run(recipe: Path) -> None:
        """Make it."""

    @group.command()
    def status(recipe: Path) -> None:
        """How far it is."""

    app.add_typer(group, name="synthesize")

    page = cli_docs.render(app)

    assert "* [`ultrafuser synthesize`](#ultrafuser-synthesize): Make it." in page
    assert "ultrafuser synthesize RECIPE" in page
    assert "* [`ultrafuser synthesize status`](#ultrafuser-synthesize-status): How far it is." in page
    assert "synthesize run" not in page
