"""scripts/perf report and scripts/perf compare, which read the files of earlier runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.perf import compare
from benchmarks.perf.figures import shown
from benchmarks.perf.results import BadResults, Run, join, load

NAMES = ("compare", "report")
_WORDS: dict[compare.Verdict, tuple[str, str]] = {
    "better": ("better", "green"), "worse": ("worse", "red"),
    "gained": ("better beside overlayfs", "green"), "lost": ("worse beside overlayfs", "red"),
    "alike": ("not beside overlayfs", "dim"), "same": ("within the spread", "dim"),
    "unknown": ("too few rounds", "dim"),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message.removeprefix("argument "))


def _refuse(sentence: str) -> NoReturn:
    sys.exit(f"scripts/perf: {sentence}")


def main(words: Sequence[str]) -> int:
    """Run the command that `words` begin with; return the exit code."""
    try:
        return (_compare if words[0] == "compare" else _report)(words[1:])
    except BadResults as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}")


def _report(words: Sequence[str]) -> int:
    parser = _Parser(prog="scripts/perf report", allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    options = parser.parse_args(words)
    if any(
        options.output.exists() and path.exists() and options.output.samefile(path)
        for path in options.results
    ):
        _refuse(f"{options.output} holds the results themselves: give the page another name")
    write_page(join([load(path) for path in options.results]), options.output, options.results[0].name)
    return 0


def write_page(run: Run, path: Path, name: str) -> None:
    """Write the HTML report; `name` is the file name of the download. Raises OSError."""
    from benchmarks.perf import page  # importing matplotlib takes half a second

    path.write_text(page.render(run, name=name), encoding="utf-8")


def _threshold(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no number of percent from 0 to 1000")
    return number / 100


def _compare(words: Sequence[str]) -> int:
    parser = _Parser(prog="scripts/perf compare", allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--all", action="store_true", help="also what is within the spread")
    parser.add_argument("--threshold", type=_threshold, default=0.05, metavar="PERCENT",
                        help="smaller differences are none (default 5)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs, everything")
    options = parser.parse_args(words)
    found = compare.compare(load(options.old), load(options.new), threshold=options.threshold)
    if options.json:
        print(json.dumps(compare.to_json(found), indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
        print_comparison(console, found, everything=options.all, threshold=options.threshold)
    return 0


def print_comparison(
    console: Console, found: compare.Comparison, *, everything: bool, threshold: float
) -> None:
    """Print the differing settings, then what changed, then what only one run has."""
    for words, facts in (
        ("Other hosts", found.machine), ("Other options", found.settings), ("Other versions", found.versions)
    ):  # fmt: skip
        if facts:
            told = ", ".join(f"{name} {old} -> {new}" for name, old, new in facts)
            console.print(Text(f"{words}: {told}.", style="yellow" if facts is not found.versions else ""))
    if not found.changes:
        console.print("The two runs have no figure of a contestant in common.")
    shows = [change for change in found.changes if everything or change.verdict not in ("same", "unknown")]
    if shows:
        console.print(_table(shows))
    numbers = {verdict: sum(change.verdict == verdict for change in found.changes) for verdict in _WORDS}
    told = ", ".join(f"{count} {_WORDS[verdict][0]}" for verdict, count in numbers.items() if count)
    if found.changes:
        console.print(f"{len(found.changes)} compared: {told}.")
    if decided := len(found.changes) - numbers["unknown"]:
        console.print(Text(
            f"A difference counts from {threshold:.0%}, when the ranks of the samples tell the runs apart "
            "(Mann-Whitney, p at most 5 %; with too few for that, when they don't overlap). "
            f"Had nothing changed, at most {math.ceil(found.by_chance())} of {decided} would look so.",
            style="dim",
        ))  # fmt: skip
    if numbers["unknown"]:
        console.print(Text("Three rounds in both runs are the least that decides.", style="dim"))
    for words, names in (("Only in the old run", found.only_old), ("Only in the new run", found.only_new)):
        if names:
            console.print(Text(f"{words}: {', '.join(_only(names))}."))


def _only(names: Sequence[tuple[str, str]]) -> list[str]:
    """Figures by contestant, those without one first."""
    together: dict[str, list[str]] = {}
    for figure, contestant in names:
        together.setdefault(contestant, []).append(figure)
    return [
        (f"{', '.join(figures)}" if len(figures) <= 6 else f"{len(figures)} figures")
        + (f" on {contestant}" if contestant else "")
        for contestant, figures in together.items()
    ]


def _times(ratio: float | None, clear: bool | None) -> Text:
    if ratio is None:
        return Text("-", style="dim")
    return Text(f"x{shown(ratio)}", style="" if clear else "dim")


def _table(changes: Sequence[compare.Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("figure", "contestant"):
        table.add_column(name, overflow="fold")
    for name in ("old", "new", "change", "beside overlayfs"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("")
    for change in changes:
        word, style = _WORDS[change.verdict]
        table.add_row(
            Text(change.figure.name), Text(change.contestant), Text(shown(change.old)),
            Text(f"{shown(change.new)} {change.figure.unit}"), _times(change.ratio, change.clear),
            _times(change.relative, change.relative_clear), Text(word, style=style),
        )  # fmt: skip
    return table
