"""Lists of things: a table, names alone, JSON, or a template; common to `ls` of mounts, volumes and more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from unionfs.cli.common import on_terminal, print_table
from unionfs.cli.completing import filter_completer
from unionfs.cli.template import parse, render, render_rows
from unionfs.cli.terminal import all_printable

_F = TypeVar("_F", bound=Callable[..., Any])


def list_options(
    quiet: str, filters: Sequence[str], values: Mapping[str, Sequence[str]]
) -> Callable[[_F], _F]:
    """Add -q, whose help is `quiet`, -f with these keys, and the known values of some, --format and --json.

    The command receives `quiet`, `filters`, `template` and `as_json`.
    """
    def add(command: _F) -> _F:
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print a JSON array."),
            click.option("--format", "template", metavar="table|json|TEMPLATE",
                         help="A Go template, see above."),
            click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE",
                         shell_complete=filter_completer(filters, values),
                         help=f"By {', '.join(filters)}; may be repeated, and all must hold."),
            click.option("-q", "--quiet", is_flag=True, help=quiet),
        ):  # fmt: skip
            command = option(command)
        return command

    return add


def wants_fields(template: str | None) -> bool:
    """Return whether `--format` shows more than the default table does."""
    return template not in (None, "table")


def print_list(
    rows: Sequence[Mapping[str, Any]],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    headings: Mapping[str, str],
    template: str | None,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Print a table, by default `table`: its headings and rows. Raises UserError for a bad template.

    `rows` have the fields of a template, for which `headings` names the columns. `names` are printed instead
    of the default table. `--format json` prints one object per line, as docker does.
    """
    if template == "json":
        for row in rows:
            print(render("{{json .}}", row))
    elif not wants_fields(template):
        if names is not None:
            for name in names:
                print(name)
        elif table[1] or table[0]:
            print_table(*table)
    elif template is not None and template.startswith("table"):
        first, *rest = render_rows(template, [_safe(row) for row in rows], headings)
        print_table(first, rest)
    elif template is not None:
        nodes = parse(template)  # so that an error is one also where there are no rows
        for row in rows:
            print(render(nodes, _safe(row)))


def _safe(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Escape control characters on a terminal: some values come from others."""
    found: Mapping[str, Any] = all_printable(row) if on_terminal() else row
    return found
