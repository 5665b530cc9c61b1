"""`ultrafuser doctor`: check a recipe before any weight is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from ultrafuser.cli.options import Overrides, RecipePath


def doctor(
    recipe: RecipePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Check vocabulary, templates, files, licences, memory before loading weights; exit 1 on a blocker.

    Example: ultrafuser doctor recipes/paper.yaml
    """
    from ultrafuser.doctor.report import examine
    from ultrafuser.doctor.show import print_report
    from ultrafuser.doctor.unset import load_to_examine

    report = examine(load_to_examine(recipe, overrides))
    print_report(report, as_json=as_json)
    if report.has_blocker:
        raise typer.Exit(1)
