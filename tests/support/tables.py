"""The tables of docs/compliance.md, whose cells come from running tests; see `scripts/compliance-tables`."""

from __future__ import annotations

from tests.support.worker import REPOSITORY

DOCUMENT = REPOSITORY / "docs/compliance.md"


def _span(text: str, name: str) -> tuple[int, int]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return text.index(begin) + len(begin), text.index(end)


def table(columns: dict[str, dict[str, str]]) -> list[str]:
    """A table: of each column, by its title, the cells by the titles of their rows."""
    rows = list(next(iter(columns.values())))
    return [
        "| " + " | ".join(["", *columns]) + " |",
        "|---" * (len(columns) + 1) + "|",
        *("| " + " | ".join([row, *(cells[row] for cells in columns.values())]) + " |" for row in rows),
    ]


def write(name: str, table: list[str]) -> None:
    """Replace the table between its marks in the page."""
    text = DOCUMENT.read_text()
    start, stop = _span(text, name)
    DOCUMENT.write_text(text[:start] + "\n" + "\n".join(table) + "\n" + text[stop:])


def documented(name: str, title: str) -> dict[str, str]:
    """A column of the page: its cells by the titles of their rows."""
    text = DOCUMENT.read_text()
    start, stop = _span(text, name)
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in text[start:stop].strip().splitlines()
    ]
    index = rows[0].index(title)
    return {row[0]: row[index] for row in rows[2:]}
