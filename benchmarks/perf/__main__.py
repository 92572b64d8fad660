"""The command; see scripts/perf --help and docs/performance.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.perf import report
from benchmarks.perf.area import Area, new_area
from benchmarks.perf.contestants import CONTESTANTS, REFERENCES, Contestant
from benchmarks.perf.figures import Results
from benchmarks.perf.processes import CommandFailed, Interrupted, catch_signals, end_all, held
from benchmarks.perf.workloads import Workload, all_workloads


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/perf", description="The union beside kernel overlayfs and other FUSE unions, in turns."
    )
    parser.add_argument(
        "--list", action="store_true", help="show contestants and workloads, and measure nothing"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only these workloads, or groups of them"
    )
    parser.add_argument("--contestant", nargs="+", default=[], metavar="NAME", help="only these contestants")
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of each contestant (default 3)")
    parser.add_argument(
        "--seconds", type=_seconds, default=0.3, help="how long an fio job runs at most (default 0.3)"
    )
    parser.add_argument(
        "--size", type=_positive, default=256, metavar="MIB", help="of fio's file (default 256)"
    )
    parser.add_argument(
        "--entries", type=_positive, default=100_000, help="of the large tree (default 100000; 1000000 works)"
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write every sample there, too")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.01 <= number <= 60:
        raise argparse.ArgumentTypeError("must be 0.01 to 60")
    return number


def _writable(text: str) -> Path:
    """A path that can be written; found out before ten minutes are spent."""
    path = Path(text)
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path


def _chosen_workloads(names: Sequence[str], workloads: Sequence[Workload]) -> list[Workload]:
    known = {name for workload in workloads for name in (workload.name, workload.group)}
    for name in names:
        if name not in known:
            sys.exit(f"scripts/perf: there is no workload or group {name}; see scripts/perf --list")
    return [each for each in workloads if not names or each.name in names or each.group in names]


def _chosen_contestants(names: Sequence[str]) -> list[Contestant]:
    known = {contestant.name for contestant in CONTESTANTS}
    for name in names:
        if name not in known:
            sys.exit(f"scripts/perf: there is no contestant {name}; see scripts/perf --list")
    return [each for each in CONTESTANTS if not names or each.name in names]


def _print_list(workloads: Sequence[Workload]) -> None:
    print("Contestants (--contestant):")
    for contestant in CONTESTANTS:
        print(f"  {contestant.name:24}{contestant.what}")
    print("Workloads (--only; a group's name takes all of it):")
    group = ""
    for workload in workloads:
        if workload.group != group:
            group = workload.group
            print(f" {group}")
        print(f"  {workload.name:24}{workload.what}")


def _say(text: str) -> None:
    """Progress, on a terminal in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _try_all(contestants: Sequence[Contestant], area: Area) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of those who can mount, and the reasons of the others."""
    versions, missing = {}, {}
    for contestant in contestants:
        _say(f"trying {contestant.name}")
        try:
            version = contestant.version()
            with area.layers() as layers, contestant.mounted(layers):
                versions[contestant.name] = version
        except (CommandFailed, OSError) as error:
            versions.pop(contestant.name, None)
            missing[contestant.name] = str(error)
    _say("")
    return versions, missing


def _measure(
    workloads: Sequence[Workload],
    contestants: Sequence[Contestant],
    area: Area,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """All rounds. Contestants follow one another at the same workload, every time in another order."""
    for number in range(options.rounds):
        for index, workload in enumerate(workloads):
            if workload.once and number > 0:
                continue
            shift = (number + index) % len(contestants)
            for contestant in (*contestants[shift:], *contestants[:shift]):
                if not workload.suits(contestant) or (workload.name, contestant.name) in results.failures:
                    continue
                _say(f"round {number + 1} of {options.rounds}: {workload.name} on {contestant.name}")
                try:
                    workload.take_turn(contestant, area, options.seconds, results)
                except (
                    CommandFailed,
                    OSError,
                    ValueError,
                ) as error:  # ValueError: no JSON where it should be
                    results.failures[workload.name, contestant.name] = str(error)
    _say("")


def main() -> int:
    """Measure and report; returns the exit code."""
    options = _arguments()
    workloads = all_workloads(options.entries)
    if options.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` is no error
        _print_list(workloads)
        return 0
    workloads_chosen = _chosen_workloads(options.only, workloads)
    contestants = _chosen_contestants(options.contestant)
    # Trees are only made for what was chosen, so only that needs room.
    uses = {part for workload in workloads_chosen for part in (*workload.lower, *workload.upper)}
    console = report.make_console()
    results = Results()
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    began = time.monotonic()
    code = 0
    catch_signals()
    try:
        with new_area(
            megabytes=options.size if "big" in uses else 0, entries=options.entries if "many" in uses else 0
        ) as area:
            versions, missing = _try_all(contestants, area)
            report.print_contestants(console, versions, missing)
            able = [contestant for contestant in contestants if contestant.name in versions]
            if not able:
                print("scripts/perf: no contestant can mount here", file=sys.stderr)
                return 1
            _measure(workloads_chosen, able, area, options, results)
    except Interrupted as interrupted:
        _say("")
        console.print("\nInterrupted; what was measured until then:")
        code = 128 + int(interrupted.args[0])
    except (CommandFailed, OSError) as error:
        _say("")
        print(f"scripts/perf: {error}", file=sys.stderr)
        return 1
    finally:
        with held():
            end_all()
    report.print_results(console, results, workloads_chosen, list(versions), options.rounds)
    console.print(f"{time.monotonic() - began:.0f} s in all.")
    if options.json is not None:
        whole = {
            "machine": report.machine(),
            "settings": {name: getattr(options, name) for name in ("rounds", "seconds", "size", "entries")},
            "complete": code == 0, "versions": versions, "missing": missing,
            **results.to_json(REFERENCES),
        }  # fmt: skip
        options.json.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
