"""Run pjdfstest on ext4, kernel overlayfs and unionfs, and compare assertion by assertion."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.support import areas, mounting

_LINE = re.compile(r"^(not ok|ok)\s+(\d+)(.*)$", re.MULTILINE)
_PLAN = re.compile(r"^1\.\.(\d+)", re.MULTILINE)

#: One assertion: the test file and its number there.
Key = tuple[str, int]


def run(test: Path, name: str, directory: Path) -> dict[Key, str]:
    """The assertions of one test file; the text is empty if the assertion holds."""
    done = subprocess.run(
        ["sh", str(test)], cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    found = {}
    for verdict, number, text in _LINE.findall(done.stdout):
        held = verdict == "ok" or "# TODO" in text
        found[name, int(number)] = "" if held else text.strip(" -") or "failed"
    plan = _PLAN.search(done.stdout)
    for number in range(1, int(plan[1]) + 1 if plan else 0):
        found.setdefault((name, number), "the test file ended early")
    if not found:
        found[name, 0] = f"no result: {done.stdout[-300:]}"
    return found


def run_all(tests: Path, only: str, where: str, directory: Path) -> dict[Key, str]:
    """Every test file whose path contains ``only``, in ``directory``."""
    files = [path for path in sorted(tests.rglob("*.t")) if only in str(path.relative_to(tests))]
    if not files:
        sys.exit(f"no test file of {tests} has {only!r} in its path")
    found: dict[Key, str] = {}
    for count, path in enumerate(files, 1):
        if sys.stderr.isatty():
            print(f"\r{where}: {count}/{len(files)} ", end="", file=sys.stderr, flush=True)
        found |= run(path, str(path.relative_to(tests)), directory)
    failed = sum(bool(text) for text in found.values())
    print(f"\r{where}: {len(files)} files, {len(found)} assertions, {failed} do not hold", flush=True)
    return found


def main() -> int:
    """The command; see scripts/pjdfstest-compare --help."""
    parser = argparse.ArgumentParser(prog="scripts/pjdfstest-compare")
    parser.add_argument("--session", default="direct-hybrid")
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tests = Path(os.environ["PJDFSTEST_DIR"]).resolve() / "tests"

    results: dict[str, dict[Key, str]] = {}
    os.umask(0o022)
    with ExitStack() as stack:
        disk = stack.enter_context(areas.filesystem("ext4", 1 << 30))
        plain = disk / "plain"
        plain.mkdir()
        results["ext4"] = run_all(tests, options.only, "ext4", plain)
        for where in ("overlayfs", "unionfs"):
            layers = {name: disk / where / name for name in ("lower", "upper", "work")}
            for path in (*layers.values(), layers["lower"] / "here"):
                path.mkdir(parents=True)
            mounted = mounting.mounted(
                disk / where, lowers=[layers["lower"]], upper=layers["upper"], work=layers["work"],
                session="overlay" if where == "overlayfs" else options.session,
            )  # fmt: skip
            with mounted as mount:
                results[where] = run_all(tests, options.only, where, mount.mountpoint / "here")

    def fails_only(here: str, there: str) -> list[Key]:
        return [key for key, text in results[here].items() if text and not results[there].get(key, "?")]

    worse = fails_only("unionfs", "overlayfs")
    better = fails_only("overlayfs", "unionfs")
    print(f"\nOnly overlayfs fails: {len(better)}. Only unionfs fails: {len(worse)}.")
    for key in sorted(worse):
        print(f"{key[0]} {key[1]}: {results['unionfs'][key]}")
    if options.json is not None:
        failures = {
            f"{name} {number}": {where: found.get((name, number)) for where, found in results.items()}
            for name, number in sorted(set().union(*results.values()))
            if any(found.get((name, number)) for found in results.values())
        }
        options.json.write_text(json.dumps(failures, indent=1))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
