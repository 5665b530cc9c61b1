"""Imports only go down the layers of docs/design.md, and importing the package is cheap."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "ultrafuser"

LAYERS: list[set[str]] = [
    {"errors"},
    {"chat", "files", "drawing", "provenance", "kernels"},
    {"generation", "config", "alignment", "sandbox"},
    {"data", "model"},
    {"train", "evaluation", "analysis", "baselines", "doctor", "engine", "synthesis", "vllm_plugin"},
    {"demo", "server", "export"},
    {"compare"},
    {"cli"},
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
# The package itself only names the public things, as `python -m ultrafuser` only calls the command line.
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py" and path.parent != PACKAGE] + [
    path for path in sorted(PACKAGE.glob("*.py")) if path.stem not in ("__init__", "__main__")
]


def part_of(path: Path) -> str:
    """The first name below the package: a folder, or a module beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import from the package, wherever it stands in the file."""
    package = ["ultrafuser", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "ultrafuser")


def violations(path: Path) -> Iterator[str]:
    own = part_of(path)
    for line, name in imported_names(path):
        other = name.split(".")[1] if "." in name else ""
        if other in (own, "__version__"):
            continue
        if other not in LAYER_OF:
            reason = "is not in a layer: import each name from the module that defines it"
        elif LAYER_OF[other] > LAYER_OF[own]:
            reason = f"is above {own}"
        elif LAYER_OF[other] == LAYER_OF[own]:
            reason = f"is a peer of {own}"
        else:
            continue
        yield f"{path.relative_to(ROOT)}:{line}: {name} {reason}"


def test_every_part_has_a_layer():
    assert {part_of(path) for path in FILES} <= set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    assert list(violations(path)) == []


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_the_design_page_shows_the_same_layers(number: int):
    line = re.search(rf"^ {number}  (.*)$", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert line is not None
    assert LAYERS[number] <= set(line[1].split())


@pytest.mark.parametrize("module", ["ultrafuser", "ultrafuser.errors", "ultrafuser.chat.messages"])
def test_importing_the_package_loads_nothing_heavy(module: str):
    """A command answers --help at once, however long torch takes to load."""
    script = (
        f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'numpy', 'datasets'}} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.split() == []
