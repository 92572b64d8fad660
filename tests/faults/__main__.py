"""``python -m tests.faults``: all faults, or some; see scripts/faults."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import util

from tests.faults import branches, commands, images, injecting, plan, snapshots
from tests.faults.batch import Report
from tests.faults.operations import OPERATIONS
from tests.faults.plan import KINDS, OUTLIVING, SESSIONS
from tests.support import areas, mounting


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--session", action="append", choices=SESSIONS, help="only that session (repeatable)")
    parser.add_argument("--operation", metavar="TEXT", default="", help="only those with TEXT in their name")
    parser.add_argument("--tenth", type=int, metavar="N", help="every tenth fault, from the N-th on")
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
    for session, kind in itertools.product(arguments.session or SESSIONS, KINDS):
        if not operations or arguments.only not in (None, kind):
            continue
        if kind == "deaths" and session not in OUTLIVING:
            continue
        with areas.area() as area:
            done = plan.run(
                area, session, operations=operations, kind=kind, tenth=arguments.tenth, told=_print
            )
        _tell(done, report)
    if scenarios and arguments.only in (None, "commands"):
        with areas.area() as area:
            _tell(commands.run_all(area, scenarios=scenarios, tenth=arguments.tenth, told=_print), report)
    if of_branches and arguments.only in (None, "branches"):
        with areas.area() as area:
            done = branches.run_all(area, scenarios=of_branches, tenth=arguments.tenth, told=_print)
            report.add(done)  # its problems were told
    if arguments.only in (None, "snapshots"):
        chosen = [one for one in snapshots.SESSIONS if one in (arguments.session or snapshots.SESSIONS)]
        for session, order, kills in itertools.product(chosen, orders, (False, True)):
            with areas.area() as area:
                done = snapshots.run(area, session, order, kills=kills, tenth=arguments.tenth, told=_print)
                _tell(done, report)
    seconds = time.monotonic() - began
    _print(f"{report.tried} faults tried in {seconds:.0f} s, {len(report.problems)} problems")
    return 1 if report.problems else 0


def _tell(done: Report, report: Report) -> None:
    for problem in done.problems:
        _print(f"  {problem}")
    report.add(done)


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
