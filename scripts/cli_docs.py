"""Write docs/cli.md from the commands themselves; `--check` only says whether it is current.

Reads what each command declares, never its printed help, so neither the width of a terminal nor the
way help is drawn changes the page.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.main import get_command

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Written by `make docs` from the commands themselves; edit their docstrings, not this page.
"""
TYPE_NAMES = {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "BOOLEAN"}
HIDDEN = {"help", "install_completion", "show_completion"}


def render(app: typer.Typer) -> str:
    """The page for every verb of `app`."""
    root = get_command(app)
    root.name = root.name or "ultrafuser"
    verbs = sorted(_verbs(root, "ultrafuser"), key=lambda verb: verb[0])
    index = "\n".join(f"* [`{path}`](#{path.replace(' ', '-')}): {_summary(verb)}" for path, verb in verbs)
    sections = [_section(path, verb) for path, verb in verbs]
    return "\n".join([HEAD, index, "", *sections]).rstrip() + "\n"


def _verbs(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    commands = getattr(command, "commands", None)
    if commands is None:
        yield path, command
        return
    if _visible(command):
        yield path, command
    default = getattr(command, "default_command", None)  # may be called by the name of its group alone
    for name, child in commands.items():
        if not child.hidden:
            yield from _verbs(child, path if name == default else f"{path} {name}")


def _visible(command: Any) -> list[Any]:
    return [param for param in command.params if param.name not in HIDDEN and not param.hidden]


def _help(command: Any) -> str:
    # \f ends what a command shows of its docstring, \b keeps the line breaks of a paragraph.
    return inspect.cleandoc((command.help or "").split("\f")[0]).replace("\b\n", "").strip()


def _summary(command: Any) -> str:
    return " ".join(_help(command).split("\n\n")[0].split())


def _section(path: str, command: Any) -> str:
    visible = _visible(command)
    arguments = [param for param in visible if param.param_type_name == "argument"]
    options = [param for param in visible if param.param_type_name == "option"]
    usage = " ".join(
        [
            path,
            *map(_usage, arguments),
            *(["[OPTIONS]"] if options else []),
            *(["COMMAND"] if hasattr(command, "commands") else []),
        ]
    )
    parts = [f"## {path}", f"```\n{usage}\n```", _prose(_help(command))]
    if arguments:
        rows = [(f"`{_metavar(param)}`", _meaning(param)) for param in arguments]
        parts.append(_table(("argument", "meaning"), rows))
    if options:
        rows = [(f"`{_flags(param)}`", _meaning(param)) for param in options]
        parts.append(_table(("option", "meaning"), rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _prose(text: str) -> str:
    """Lines to paste stand as code."""
    return re.sub(r"^(Examples?):\s+(ultrafuser .+)$", r"\1: `\2`", text, flags=re.MULTILINE)


def _usage(argument: Any) -> str:
    text = _metavar(argument) + ("..." if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def _flags(option: Any) -> str:
    flags = ", ".join(option.opts) + "".join(f" / {flag}" for flag in option.secondary_opts)
    return flags if option.is_flag or option.count else f"{flags} {_metavar(option)}"


def _metavar(param: Any) -> str:
    if param.metavar:
        return str(param.metavar)
    if param.param_type_name == "argument":
        return str(param.name).upper()
    return _value_name(param.type_descriptor.annotation)


def _value_name(annotation: Any) -> str:
    """What to type for a value: choices as `a|b`, else the name of its type."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_args(annotation):
        inner = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
        return " ".join(dict.fromkeys(_value_name(part) for part in inner))
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return "|".join(str(choice.value) for choice in annotation)
    return TYPE_NAMES.get(annotation, "TEXT")


def _meaning(param: Any) -> str:
    notes = []
    if param.param_type_name == "option" and param.required:
        notes.append("Required.")
    if param.multiple:
        notes.append("May be given several times.")
    default = _default(param)
    if default is not None:
        notes.append(f"Default: {default}.")
    return " ".join([*(param.help or "").split(), *notes]).replace("|", "\\|")


def _default(param: Any) -> str | None:
    shown = getattr(param, "show_default", None)
    if isinstance(shown, str):
        return shown
    value = param.default
    if shown is False or value is None or value is False or value in ("", [], ()) or callable(value):
        return None
    if value is True:
        return f"`{param.opts[0]}`" if param.param_type_name == "option" else "`true`"
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"`{_plain(item)}`" for item in values)


def _plain(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    # A bar inside a cell must be escaped, within code as well.
    lines = [f"| {name.replace('|', chr(92) + '|')} | {meaning} |" for name, meaning in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare it."""
    from ultrafuser.cli.main import app

    page = render(app)
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        print("docs/cli.md is not what the commands say: run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
