"""Prints or writes the tables of docs/compliance.md; see `scripts/compliance-tables`."""

from __future__ import annotations

import sys

from tests.support import behaviours, tables, who_sees_what


def main() -> None:
    """Print the tables, or write them into the page."""
    for name, make in (("behaviours", behaviours.table), ("who-sees-what", who_sees_what.table)):
        table = make()
        if sys.argv[1:] == ["--write"]:
            tables.write(name, table)
        else:
            print(*table, "", sep="\n")


if __name__ == "__main__":
    main()
