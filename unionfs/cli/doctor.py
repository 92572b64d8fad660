"""`unionfs doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from unionfs.cli.run import print_table


@click.command(
    epilog="Example: unionfs doctor --dir /var/lib/containers",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option(
    "--dir", "directory", metavar="DIR", help="The directory of the layers; default: TMPDIR or /tmp."
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
        print(json.dumps({"mounting_is_possible": possible, "findings": facts}, indent=2))
    else:
        print_table(
            ("STATE", "WHAT", "FOUND", "CURE"),
            [(finding.state, finding.name, finding.detail, finding.cure or "") for finding in findings],
        )
    return 0 if possible else 1
