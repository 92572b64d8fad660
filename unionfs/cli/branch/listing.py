"""`unionfs branch ls`."""

from __future__ import annotations

import os
from typing import Any

import click

from unionfs.cli.branch.common import json_option
from unionfs.cli.common import complain, print_json, print_table, root_option
from unionfs.cli.terminal import shell_word
from unionfs.errors import quoted
from unionfs.settings.words import in_table, moment


@click.command(epilog="Example: unionfs branch ls --json")
@root_option
@json_option
def ls(root: str | None, as_json: bool) -> int:
    """List branches: name, what each lies over, when it was made, where it is mounted, the last command of
    `try` and its exit code.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.listed import listed

    sentences: list[str] = []
    found = listed(root, sentences.append)
    for sentence in sentences:
        complain("unionfs", sentence)
    for values in found:
        values["created"] = moment(values["created"])
        values["ended"] = None if values["ended"] is None else moment(values["ended"])
    if as_json:
        print_json(found)
    elif found:
        headings = "NAME", "OVER", "MADE", "MOUNTED", "COMMAND", "EXIT"
        print_table(headings, [_row(values) for values in found])
    return 1 if sentences else 0


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    words = " ".join(shell_word(os.fsencode(word)) for word in values["command"] or ())
    over = quoted(values["base"]) if values["parent"] is None else f"branch {values['parent']}"
    return (
        values["name"] + (" (frozen)" if values["frozen"] else ""),
        over,
        in_table(values["created"]),
        quoted(values["mountpoint"]) if values["mountpoint"] else "-",
        words if len(words) < 40 else words[:37] + "...",
        "-" if values["exit_code"] is None else str(values["exit_code"]),
    )
