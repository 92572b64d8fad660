"""`unionfs doctor`."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from unionfs.cli.common import on_terminal, print_json, print_table
from unionfs.cli.completing import complete_directories

if TYPE_CHECKING:
    from unionfs.daemon.host import Finding


_WIDTH = 80


def _block(finding: Finding) -> str:
    """Return a finding as lines of at most 80 columns: state and name, then what is found, then the cure."""
    first = f"{finding.state:<8} {finding.name}: {finding.detail}"
    lines = textwrap.wrap(first, _WIDTH, subsequent_indent=" " * 9, break_on_hyphens=False)
    if finding.cure:
        indent = " " * 9 + "-> "
        lines += textwrap.wrap(
            finding.cure, _WIDTH, initial_indent=indent, subsequent_indent=" " * 12, break_on_hyphens=False
        )
    return "\n".join(lines)


@click.command(
    epilog="Example: unionfs doctor --dir /var/lib/containers",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option(
    "--dir", "directory", metavar="DIR", shell_complete=complete_directories,
    help="The directory of the layers; default: TMPDIR or /tmp."
)
def doctor(directory: str | None, as_json: bool) -> int:
    """Report what this host supports and what it lacks, with cures.

    Features are tested where possible, in a temporary directory that is removed afterwards. The exit code is
    1 if mounting is impossible, else 0.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.daemon.host import examine, mounting_is_possible

    findings = examine(directory)
    possible = mounting_is_possible(findings)
    if as_json:
        facts = [asdict(finding) for finding in findings]
        print_json({"mounting_is_possible": possible, "findings": facts})
    elif on_terminal():
        print_table(
            ("STATE", "WHAT", "FOUND", "CURE"),
            [(finding.state, finding.name, finding.detail, finding.cure or "") for finding in findings],
        )
    else:
        for finding in findings:
            print(_block(finding))
    return 0 if possible else 1
