"""The command; see scripts/perf --help and docs/performance.md."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from benchmarks.perf import commands, host, report, results
from benchmarks.perf.area import MEMORY, check_place, filesystem_of, new_area
from benchmarks.perf.contestants import CONTESTANTS, Contestant
from benchmarks.perf.figures import Results
from benchmarks.perf.measuring import measure, progress, try_all, turns
from benchmarks.perf.parts import QUICK, Sizes
from benchmarks.perf.processes import CommandFailed, Interrupted, catch_signals, end_all, held
from benchmarks.perf.workloads import GROUPS, Workload, all_workloads, chosen


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, and exits with 1."""

    def error(self, message: str) -> NoReturn:
        _refuse(message.removeprefix("argument "))


def _refuse(sentence: str) -> NoReturn:
    sys.exit(f"scripts/perf: {sentence}; see scripts/perf --help")


def _arguments() -> argparse.Namespace:
    parser = _Parser(
        prog="scripts/perf", allow_abbrev=False,
        description="The union beside kernel overlayfs and other FUSE unions.",
    )  # fmt: skip
    add = parser.add_argument
    add("--list", action="store_true", help="list contestants and workloads, and measure nothing")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="fewer and smaller workloads, one round")
    how_much.add_argument("--full", action="store_true", help="all of fio's combinations, too")
    add("--only", nargs="+", default=[], metavar="NAME", help="these workloads or groups; patterns, too")
    add("--contestant", nargs="+", default=[], metavar="NAME", help="only these contestants")
    add("--on", type=Path, metavar="DIR", help="where layers are created (default: in memory)")
    add("--rounds", type=_positive, metavar="N", help="turns of each contestant (default 3)")
    add("--seconds", type=_seconds, metavar="S", help="the maximum duration of an fio job (default 0.2)")
    add(
        "--size",
        type=_positive,
        metavar="MIB",
        help="size of fio's file (default 256); copy-up's is four times that",
    )
    add("--entries", type=_positive, metavar="N", help="size of the large tree (default 100000)")
    add("--json", type=_writable, metavar="FILE", help="also write every sample to FILE")
    add("--html", type=_writable, metavar="FILE", help="also write a page with plots to FILE")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.01 <= number <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.01 to 60")
    return number


def _writable(text: str) -> Path:
    """A writable path, checked before ten minutes are spent."""
    path = Path(text)
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    return path


def _sizes(options: argparse.Namespace) -> Sizes:
    sizes = QUICK if options.quick else Sizes()
    if options.size is not None:
        sizes = replace(sizes, megabytes=options.size, copy_up_megabytes=4 * options.size)
    if options.entries is not None:
        sizes = replace(sizes, entries=options.entries)
    return sizes


def _chosen_workloads(options: argparse.Namespace, workloads: Sequence[Workload]) -> list[Workload]:
    try:
        return chosen(workloads, options.only, quick=options.quick, full=options.full)
    except ValueError as error:
        _refuse(f"there is no workload or group {error}, and none that fits it (--list shows all)")


def _chosen_contestants(names: Sequence[str]) -> list[Contestant]:
    known = {contestant.name for contestant in CONTESTANTS}
    for name in names:
        if name not in known:
            _refuse(f"there is no contestant {name} (scripts/perf --list shows them)")
    return [each for each in CONTESTANTS if not names or each.name in names]


def _print_list(workloads: Sequence[Workload]) -> None:
    print("Contestants (--contestant):")
    for contestant in CONTESTANTS:
        print(f"  {contestant.name:24}{contestant.what}")
    print("Workloads (--only; a group's name takes all of it). +: with --quick, too")
    group = ""
    for workload in workloads:
        if workload.group != group:
            group = workload.group
            print(f" {group}" + (" (only with --full or --only)" if group == "fio-matrix" else ""))
        print(f" {'+' if workload.quick else ' '}{workload.name:34} {workload.what}")


def _facts(
    workloads: Sequence[Workload], contestants: Sequence[Contestant], versions: dict[str, str]
) -> tuple[list[results.ContestantFacts], list[results.WorkloadFacts]]:
    return (
        [
            results.ContestantFacts(each.name, each.what, each.kind, versions.get(each.name, ""))
            for each in contestants
        ],
        [
            results.WorkloadFacts(
                each.name, each.group, each.what, tuple(figure.name for figure in each.figures),
                operation=each.operation, family=each.family,
            )
            for each in workloads
        ],
    )  # fmt: skip


def _publish(run: results.Run, options: argparse.Namespace) -> bool:
    """Print the run and write its files; return whether all succeeded."""
    written = True
    try:
        if options.json is not None:
            results.save(run, options.json)
        if options.html is not None:
            commands.write_page(run, options.html, (options.json or options.html.with_suffix(".json")).name)
    except OSError as error:  # still print what was measured
        print(
            f"scripts/perf: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr
        )
        written = False
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may have ended
    report.print_results(report.make_console(), run)
    return written


def main() -> int:
    """Measure and report; return the exit code."""
    if sys.argv[1:2] and sys.argv[1] in commands.NAMES:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is not an error
        return commands.main(sys.argv[1:])
    options = _arguments()
    sizes = _sizes(options)
    workloads = all_workloads(sizes.entries)
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` is not an error
        _print_list(workloads)
        return 0
    workloads_chosen = _chosen_workloads(options, workloads)
    contestants = _chosen_contestants(options.contestant)
    base = options.on or MEMORY
    if (reason := check_place(base)) is not None:
        _refuse(reason)
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = options.seconds or (0.1 if options.quick else 0.2)
    machine = host.machine(base, filesystem_of(base))
    found = Results()
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    made, began = datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    code = 0
    catch_signals()
    try:
        # Only the selected workloads' trees are created, so only these need room.
        used = {part for workload in workloads_chosen for part in workload.parts()}
        with new_area(base, sizes, used) as area:
            try_all(contestants, area, versions, missing)
            report.print_contestants(report.make_console(), machine, versions, missing)
            able = [contestant for contestant in contestants if contestant.name in versions]
            if not able:
                print("scripts/perf: no contestant can mount here", file=sys.stderr)
                return 1
            with progress(turns(workloads_chosen, able, rounds)) as say:
                measure(workloads_chosen, able, area, rounds, seconds, found, say)
    except Interrupted as interrupted:
        print("\nInterrupted; what was measured until then:")
        code = 128 + int(interrupted.args[0])
    except (CommandFailed, OSError) as error:
        print(f"scripts/perf: {error}", file=sys.stderr)
        return 1
    finally:
        with held():
            end_all()
    took = time.monotonic() - began
    settings = {
        "quick": options.quick, "full": options.full, "only": options.only, "rounds": rounds,
        "seconds": seconds, **asdict(sizes),
    }  # fmt: skip
    contestant_facts, workload_facts = _facts(workloads_chosen, contestants, versions)
    written = _publish(
        results.Run(
            found, contestant_facts, workload_facts, dict(GROUPS), machine, settings, missing,
            complete=code == 0, made=made, seconds=round(took, 1),
        ),
        options,
    )  # fmt: skip
    print(f"{took:.0f} s in all.")
    return code or (0 if written else 1)


if __name__ == "__main__":
    sys.exit(main())
