"""Go templates for `--format`, as docker has them: text/template with fields, pipelines, if, with, range.

The language is that of https://pkg.go.dev/text/template without `template`, `define` and `block`; the
functions are docker's (docs: "Format command and log output") and the comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unionfs.cli.template.evaluate import Joined, Scope
from unionfs.cli.template.parse import Parsed, parse

__all__ = ["Joined", "parse", "render", "render_rows"]


def render(template: str | Parsed, values: Mapping[str, Any]) -> str:
    """Render one value. Raises UserError for what is not of the language, or an unknown field."""
    nodes = parse(template) if isinstance(template, str) else template
    return Scope(values, values).text(nodes)


def render_rows(
    template: str, rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]
) -> list[list[str]]:
    """Return the rows of docker's `table TEMPLATE`, headings first; tabs separate the columns."""
    nodes = parse(template.removeprefix("table").strip())
    table = [render(nodes, row).split("\t") for row in (headings, *rows)]
    width = max(map(len, table))
    return [cells + [""] * (width - len(cells)) for cells in table]
