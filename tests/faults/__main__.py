"""``python -m tests.faults``: all faults, or some; see scripts/faults."""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import util
from typing import Final

from tests.faults import branches, commands, images, injecting, plan, snapshots
from tests.faults.batch import ERRORS, Report
from tests.faults.injecting import KILL
from tests.faults.operations import OPERATIONS
from tests.faults.plan import KINDS, OUTLIVING, SESSIONS, Selection
from tests.support import areas, mounting

FAULTS: Final = {"KILL": KILL, **{errno.errorcode[error]: error for error in ERRORS}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--session", action="append", choices=SESSIONS, help="only that session (repeatable)")
    parser.add_argument("--operation", metavar="TEXT", default="", help="only those with TEXT in their name")
    parser.add_argument("--tenth", type=int, metavar="N", help="every tenth fault, from the N-th on")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only that one (repeatable)")
    kinds = [*KINDS, "commands", "branches", "snapshots"]
    parser.add_argument("--only", choices=kinds, help="not the other kinds")
    arguments = parser.parse_args()
    if reason := injecting.reason() or mounting.overlay_reason():
        print(f"scripts/faults: {reason}", file=sys.stderr)
        return 1
    operations = [one for one in OPERATIONS if arguments.operation in one.name]
    scenarios = [
        one for one in (*commands.SCENARIOS, *images.SCENARIOS) if arguments.operation in one.name
    ]
    of_branches = [one for one in branches.SCENARIOS if arguments.operation in one.name]
    orders = [order for order in snapshots.ORDERS if arguments.operation in f"snapshot {order}"]
    if not (operations or scenarios or of_branches or orders):
        parser.error(f"neither an operation nor a command has {arguments.operation!r} in its name")
    place = ExitStack()
    place.enter_context(areas.run_directory())
    util.Finalize(None, place.close, exitpriority=-200)  # after multiprocessing's directory in there
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="runtime-")
    report, began = Report(), time.monotonic()
    some = Selection(arguments.tenth, errors=tuple(FAULTS[one] for one in arguments.fault or ()))
    for session, kind in itertools.product(arguments.session or SESSIONS, KINDS):
        if not operations or arguments.only not in (None, kind):
            continue
        if kind == "deaths" and session not in OUTLIVING:
            continue
        with areas.area() as area:
            report.add(plan.run(area, session, operations=operations, kind=kind, some=some, told=_print))
    if scenarios and arguments.only in (None, "commands"):
        with areas.area() as area:
            report.add(commands.run_all(area, scenarios=scenarios, some=some, told=_print))
    if of_branches and arguments.only in (None, "branches"):
        with areas.area() as area:
            report.add(branches.run_all(area, scenarios=of_branches, some=some, told=_print))
    if arguments.only in (None, "snapshots"):
        chosen = [one for one in snapshots.SESSIONS if one in (arguments.session or snapshots.SESSIONS)]
        for session, order, kills in itertools.product(chosen, orders, (False, True)):
            with areas.area() as area:
                report.add(snapshots.run(area, session, order, kills=kills, some=some, told=_print))
    seconds = time.monotonic() - began
    _print(f"{report.tried} faults tried in {seconds:.0f} s, {len(report.problems)} problems")
    return 1 if report.problems else 0


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
