"""`unionfs check`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from unionfs.cli.common import print_json
from unionfs.cli.completing import complete_directories, complete_files
from unionfs.daemon.preflight import check_directory, check_lower, check_unused
from unionfs.daemon.settle import absolute
from unionfs.daemon.silent import await_layers, interruptible, layers_of
from unionfs.errors import quoted, reason
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.sys.override import override_modes

if TYPE_CHECKING:
    from unionfs.union.checkwork import Finding

FOUND = 1
REPAIRED = 3
"""Exit codes."""
DONE = "repaired"


@click.command(
    epilog="""\b
Examples:
  unionfs check --upper /srv/changes --work /srv/work --lower /srv/base
  unionfs check -u changes -l top -l bottom --repair
""",
)
@click.option("-u", "--upper", metavar="DIR", shell_complete=complete_directories,
              required=True, help="The upper; it must not be mounted.")
@click.option(
    "-l", "--lower", "lowers", multiple=True, required=True, metavar="DIR|IMAGE",
    shell_complete=complete_files, help="A lower; the first is on top.",
)  # fmt: skip
@click.option("-w", "--work", metavar="DIR", shell_complete=complete_directories,
              help="The work directory, to examine it and its index, too.")
@click.option("--userxattr", is_flag=True, help="Markers are user.overlay.* xattrs (always without root).")
@click.option("--repair", is_flag=True, help="Apply the cures.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def check(
    upper: str, lowers: tuple[str, ...], work: str | None, userxattr: bool, repair: bool, as_json: bool
) -> int:
    """Find what is wrong in an upper: redirects that lead nowhere, whiteouts of nothing, files without their
    data, markers that no mount understands, leftovers in the work directory and its index.

    Prints one line for each: the path, the cause, the cure. Writes nothing without --repair, which applies
    each cure but those that only you can decide.

    \b
    Exit codes:
      0  nothing is wrong
      1  something is wrong and not repaired, or the check failed
      3  with --repair: all that was wrong is repaired
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.union.check import check as examine
    from unionfs.union.resting import resting

    await_layers(layers_of(lowers, upper, work))
    access = os.R_OK | os.X_OK | (os.W_OK if repair else 0)
    check_directory("upper", upper, access)
    for lower in lowers:
        check_lower(lower)
    if work is not None:
        check_directory("work", work, access)
    upper, work = absolute(upper), None if work is None else absolute(work)
    check_unused(upper, work)
    userxattr = userxattr or not may_use_trusted_xattrs()
    override_modes()
    states: list[str] = []
    facts = []
    paths = [absolute(lower) for lower in lowers]
    with (
        interruptible(),
        resting(upper, paths, work, userxattr=userxattr, writable=repair) as layers,
    ):
        for finding in examine(layers):
            if repair:
                layers.may_change()
            states.append(_repair(finding) if repair else "")
            if as_json:
                facts.append(_facts(finding, states[-1]))
            else:
                print(_line(finding, states[-1]))
    if as_json:
        print_json(facts)
    if not states:
        return 0
    return REPAIRED if all(state == DONE for state in states) else FOUND


def _line(finding: Finding, state: str) -> str:
    outcome = f" ({state})" if state else ""
    return f"{quoted(finding.path)}: {finding.cause}; {finding.cure}.{outcome}"


def _facts(finding: Finding, state: str) -> dict[str, object]:
    return {
        "path": os.fsdecode(finding.path),
        "cause": finding.cause,
        "cure": finding.cure,
        "repairable": finding.repair is not None,
        "repaired": state == DONE,
    }


def _repair(finding: Finding) -> str:
    """Apply the cure. Returns the outcome, empty if there is nothing to apply."""
    if finding.repair is None:
        return ""
    try:
        finding.repair()
    except OSError as error:
        return f"not repaired: {reason(error)}"
    return DONE
