"""Play, and shorten, a sequence of operations that was printed by a failing run.

    python -m tests.oracle.replay FILE [--session S] [--lowers N] [-o OPTION] [--index] [--no-shrink]

FILE holds lines as they are printed: ``op('unlink', 'root', b'm/low')``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.oracle.operations import Op, op
from tests.oracle.pair import Pair
from tests.support import areas, mounting


def shrink(ops: Sequence[Op], fails: Callable[[Sequence[Op]], bool], seconds: float) -> list[Op]:
    """The shortest failing subsequence that delta debugging (Zeller) finds within the time."""
    deadline = time.monotonic() + seconds
    current = list(ops)
    size = max(1, len(current) // 2)
    while True:
        at = 0
        removed = False
        while at < len(current):
            if time.monotonic() > deadline:
                return current
            candidate = current[:at] + current[at + size :]
            if candidate and fails(candidate):
                current, removed = candidate, True
            else:
                at += size
        if size == 1 and not removed:
            return current
        if not removed or size > len(current):
            size = max(1, size // 2)


def report(pair: Pair, ops: Sequence[Op], text: str, *, seconds: float) -> str:
    """The failure's text with the shortened sequence below it."""
    full = "upper read by" in text or "was changed" in text
    shown, message = list(ops), text
    if first := pair.replay(ops, full=full):
        message = first
        shown = shrink(ops, lambda some: pair.replay(some, full=full) is not None, seconds)
        message = pair.replay(shown, full=full) or message
        how = f"{len(shown)} of {len(ops)} operations are enough"
    else:
        how = "not repeated in a fresh tree: needs what came before, or other timing"
    sequence = "\n".join(map(str, shown))
    options = "".join(f" -o {option}" for option in pair.options) + (" --index" if pair.index else "")
    command = f"python -m tests.oracle.replay FILE --session {pair.session} --lowers {pair.count}{options}"
    return f"{message}\n\n{how} ({command}):\n{sequence}\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--session", default=mounting.sessions()[0])
    parser.add_argument("--lowers", type=int, default=3)
    parser.add_argument("--index", action="store_true", help="with index=on")
    parser.add_argument("-o", dest="options", action="append", default=[], help="an option of both mounts")
    parser.add_argument("--no-shrink", action="store_true")
    options = parser.parse_args()
    lines = [line for line in options.file.read_text().splitlines() if line.startswith("op(")]
    ops = [eval(line, {"op": op}) for line in lines]
    with areas.area() as area:
        pair = Pair(area, options.session, options.lowers, options=options.options, index=options.index)
        try:
            text = pair.replay(ops)
            if text is not None and not options.no_shrink:
                text = report(pair, ops, text, seconds=300)
        finally:
            pair.destroy()
    sys.stdout.write((text or "no difference") + "\n")
    return 1 if text else 0


if __name__ == "__main__":
    sys.exit(main())
