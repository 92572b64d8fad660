"""`unionfs branch ls`."""

from __future__ import annotations

import os
from typing import Any

import click

from unionfs.cli.branch.common import json_option, print_json, root_option
from unionfs.cli.run import complain, moment, print_table
from unionfs.cli.terminal import shell_word
from unionfs.errors import UserError, quoted


@click.command(epilog="Example: unionfs branch ls --json")
@root_option
@json_option
def ls(root: str | None, as_json: bool) -> int:
    """List branches: name, what each lies over, when it was made, where it is mounted, the last command of
    `try` and its exit code.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.mounts import mount_of
    from unionfs.branches.store import Store

    code, found = 0, []
    for branch in Store(root).branches():
        try:
            record = branch.record()
        except UserError as error:
            code = complain("unionfs", str(error))
            continue
        entry = mount_of(branch)
        values: dict[str, Any] = {
            "name": branch.name, "base": record.base, "parent": record.parent, "uid": record.uid,
            "created": moment(record.created / 1e9), "upper": branch.upper,
            "mountpoint": None if entry is None else entry.settings.mountpoint,
            "command": list(record.command) or None, "exit_code": record.exit_code,
            "ended": None if record.ended is None else moment(record.ended / 1e9),
        }  # fmt: skip
        found.append(values)
    parents = {values["parent"] for values in found}
    for values in found:
        values["frozen"] = values["name"] in parents
    if as_json:
        print_json(found)
    elif found:
        headings = "NAME", "OVER", "MADE", "MOUNTED", "COMMAND", "EXIT"
        print_table(headings, [_row(values) for values in found])
    return code


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    words = " ".join(shell_word(os.fsencode(word)) for word in values["command"] or ())
    over = quoted(values["base"]) if values["parent"] is None else f"branch {values['parent']}"
    return (
        values["name"] + (" (frozen)" if values["frozen"] else ""),
        over,
        values["created"].replace("T", " ")[:19],
        quoted(values["mountpoint"]) if values["mountpoint"] else "-",
        words if len(words) < 40 else words[:37] + "...",
        "-" if values["exit_code"] is None else str(values["exit_code"]),
    )
