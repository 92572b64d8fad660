"""Branches beside other ways to try something on a copy: `python -m benchmarks.branches [--only NAME]...`.

All work on the same tree of 30,000 files, each on a copy in a new filesystem (which needs root): ext4, or by
`--filesystem` one with reflinks, xfs or btrfs:

    unionfs         a branch, `unionfs try`
    cp              `cp -a --reflink=auto`, and back by `rsync -aHAX --delete`
    git             a worktree, committed and merged; git has no empty directories, owners and xattrs
    fuse-overlayfs  mounted by a script, and back by `rsync -aHAX --delete`
    try             the shell script of github.com/binpash/try (`--try PATH`), on kernel overlayfs

and make a branch, run `true` and a build of 60 C files, install an npm package of 500 files from an archive,
list what was changed, and apply that to the tree; then the same again up to the build, and throw it away.
Figures are seconds, of the whole command as called from a shell. `--results FILE` adds to those in a file,
`--write PAGE` puts its table into a page, and `--json FILE` writes it for `scripts/perf report`.

`--many` measures the commit of 10,000 changed files of 1 KiB, beside `cp -a` of them. `--files N` takes other
numbers of files, of both trees, to try it out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import lab
from benchmarks.disks import KINDS, new_filesystem
from benchmarks.perf.results import ContestantFacts, Kind

_FILES, _SOURCES, _PACKAGE, _MANY = 30_000, 60, 500, 10_000
_FEWEST = 2000
"""Directories 7 and 8 of a hundred files each are changed."""
_STEPS = ("create", "true", "C build", "npm install", "diff", "commit", "discard")
_WHATS = {
    "create": "make a branch, a copy, a worktree or a mount",
    "true": "run true in it",
    "C build": "compile 60 C files with two jobs, remove 100 files, change one",
    "npm install": "install a package of 500 files from an archive",
    "diff": "list what was changed",
    "commit": "apply it to the tree",
    "discard": "throw a branch away, on which the build was done",
}
_COMMIT_MANY = "commit of many"
_BUILD = "make -s -j2 && rm -r tree/7 && echo changed >> tree/8/1"
_NPM = "npm install --silent --offline --no-audit --no-fund --cache kept ./probe-1.0.0.tgz && rm -r kept"
_END = "<!-- end -->"
_UNIONFS = str(Path(sys.executable).parent / "unionfs")


def _make_tree(root: Path, files: int) -> None:
    """The tree that all work on."""
    source = random.Random(1)
    data = source.randbytes(1 << 20)
    for number in range(files):
        directory = root / "tree" / str(number // 100)
        if number % 100 == 0:
            directory.mkdir(parents=True)
        start, size = source.randrange(1 << 19), source.randrange(100, 8000)
        (directory / str(number % 100)).write_bytes(data[start : start + size])
    calls = "".join(f"int f{number}(int);\n" for number in range(_SOURCES))
    for number in range(_SOURCES):
        body = f"int f{number}(int n) {{ return n + {number}; }}\n"
        (root / f"f{number}.c").write_text(f"#include <stdio.h>\n#include <stdlib.h>\n{calls}{body}")
    total = " + ".join(f"f{number}(1)" for number in range(_SOURCES))
    (root / "main.c").write_text(f"{calls}int main(void) {{ return ({total}) % 7; }}\n")
    (root / "Makefile").write_text("prog: $(patsubst %.c,%.o,$(wildcard *.c))\n\t$(CC) -o $@ $^\n")
    (root / "package.json").write_text('{"name": "site", "version": "1.0.0", "private": true}\n')
    with tarfile.open(root / "probe-1.0.0.tgz", "w:gz") as archive:
        texts = {f"lib/{number}.js": f"module.exports = {number}\n" * 40 for number in range(_PACKAGE)}
        texts["package.json"] = '{"name": "probe", "version": "1.0.0"}\n'
        for name, text in texts.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def _call(words: Sequence[str | Path], **named: object) -> None:
    done = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True, **named
    )  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(f"{words}: code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


class _Contestant:
    """One way to try something; `base` is the tree, `area` a directory for the rest."""

    def __init__(self, base: Path, area: Path) -> None:
        self.base, self.area, self.place = base, area, area / "place"

    def prepare(self) -> None:
        """What is done once for a tree, and not measured."""

    def create(self) -> None:
        raise NotImplementedError

    def run(self, script: str) -> None:
        _call(["sh", "-ec", script], cwd=self.place)

    def diff(self) -> None:
        raise NotImplementedError

    def commit(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Unmount what is left."""

    def _rsync_back(self) -> None:
        _call(["rsync", "-aHAX", "--delete", f"{self.place}/", f"{self.base}/"])


class Unionfs(_Contestant):
    def prepare(self) -> None:
        os.environ["UNIONFS_ROOT"] = str(self.area / "store")
        _call([_UNIONFS, "try", "--", "true"], cwd=self.base)  # the resident

    def create(self) -> None:
        _call([_UNIONFS, "branch", "create", "--no-mount", "--base", self.base, "br"])

    def run(self, script: str) -> None:
        _call([_UNIONFS, "try", "-q", "--keep", "-n", "br", "--", "sh", "-ec", script], cwd=self.base)

    def diff(self) -> None:
        _call([_UNIONFS, "branch", "diff", "--all", "br"])

    def commit(self) -> None:
        _call([_UNIONFS, "branch", "commit", "br"])

    def discard(self) -> None:
        _call([_UNIONFS, "branch", "discard", "br"])


class Copy(_Contestant):
    def create(self) -> None:
        _call(["cp", "-a", "--reflink=auto", self.base, self.place])

    def diff(self) -> None:
        subprocess.run(["diff", "-rq", self.base, self.place], check=False, capture_output=True)

    def commit(self) -> None:
        self._rsync_back()

    def discard(self) -> None:
        _call(["rm", "-rf", self.place])

    def end(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


class Worktree(_Contestant):
    def _git(self, *words: str | Path, cwd: Path | None = None) -> None:
        _call(["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *words], cwd=cwd or self.base)

    def prepare(self) -> None:
        self._git("init", "-q", "-b", "main", ".")
        self._git("config", "gc.auto", "0")
        self._git("add", ".")
        self._git("commit", "-qm", "all")

    def create(self) -> None:
        self._git("worktree", "add", "-q", "-f", "-B", "br", self.place)

    def diff(self) -> None:
        self._git("status", "--short", "-uall", cwd=self.place)

    def commit(self) -> None:
        self._git("add", "-A", cwd=self.place)
        self._git("commit", "-qm", "changed", cwd=self.place)
        self._git("merge", "-q", "--ff-only", "br")

    def discard(self) -> None:
        self._git("worktree", "remove", "--force", self.place)

    def end(self) -> None:
        self._git("worktree", "remove", "--force", self.place)


class FuseOverlayfs(_Contestant):
    def create(self) -> None:
        for name in ("upper", "work", "place"):
            (self.area / name).mkdir()
        layers = f"lowerdir={self.base},upperdir={self.area}/upper,workdir={self.area}/work"
        _call(["fuse-overlayfs", "-o", layers, self.place])

    def diff(self) -> None:
        _call(["find", self.area / "upper", "-ls"])

    def commit(self) -> None:
        self._rsync_back()

    def discard(self) -> None:
        _call(["umount", self.place])
        _call(["rm", "-rf", self.area / "upper", self.area / "work", self.place])

    def end(self) -> None:
        self.discard()


class Try(_Contestant):
    program = ""

    def _try(self, *words: str | Path) -> None:
        _call(["bash", self.program, *words], cwd=self.base, env={**os.environ, "SHELL": "/bin/bash"})

    def create(self) -> None:
        self.place.mkdir()

    def run(self, script: str) -> None:
        # It passes the words of a command to a shell unquoted.
        (self.area / "script").write_text(script)
        self._try("-N", self.place, "sh", "-e", self.area / "script")

    def diff(self) -> None:
        self._try("summary", self.place)

    def commit(self) -> None:
        self._try("-y", "commit", self.place)

    def discard(self) -> None:
        _call(["rm", "-rf", self.place])

    def end(self) -> None:
        self.discard()


_FACTS: dict[str, tuple[Kind, str]] = {
    "unionfs": ("ours", "unionfs try, branch diff, branch commit"),
    "cp": ("plain", "cp -a --reflink=auto, and back by rsync"),
    "git": ("plain", "a git worktree, committed and merged"),
    "fuse-o. script": ("plain", "fuse-overlayfs mounted by a script, and back by rsync"),
    "try": ("plain", "the script github.com/binpash/try, on kernel overlayfs"),
}
_CONTESTANTS = {
    "unionfs": Unionfs, "cp": Copy, "git": Worktree, "fuse-overlayfs": FuseOverlayfs, "try": Try,
}  # fmt: skip


def _timed(call: Callable[[], None]) -> float | str:
    """Seconds, `-` for what a contestant does not have, or why it failed."""
    os.sync()
    began = time.perf_counter()
    try:
        call()
    except NotImplementedError:
        return "-"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return "fails"
    return time.perf_counter() - began


def _measure(contestant: _Contestant) -> dict[str, float | str]:
    base = contestant.base
    found: dict[str, float | str] = {}
    found["create"] = _timed(contestant.create)
    for name, script in (("true", "true"), ("C build", _BUILD), ("npm install", _NPM)):
        found[name] = _timed(lambda script=script: contestant.run(script))  # type: ignore[misc]
    found["diff"] = _timed(contestant.diff)
    untouched = (base / "tree/7").exists() and not (base / "prog").exists()
    found["commit"] = _timed(contestant.commit)
    applied = (base / "prog").exists() and not (base / "tree/7").exists()
    if not untouched or not applied or not (base / "node_modules/probe/lib/7.js").exists():
        found["commit"] = "wrong"
    contestant.end()
    return found


def _measure_discard(contestant: _Contestant) -> float | str:
    contestant.create()
    contestant.run(_BUILD)
    return _timed(contestant.discard)


@contextmanager
def _fresh(
    template: Path, area: Path, filesystem: str, kind: type[_Contestant]
) -> Iterator[_Contestant]:
    """A contestant with a copy of the tree in a new filesystem: where many files were removed lately, new
    ones take several times as long.
    """
    with new_filesystem(area, filesystem) as place:
        _call(["cp", "-a", template, place / "base"])
        os.sync()
        contestant = kind(place / "base", place)
        contestant.prepare()
        os.sync()
        yield contestant


def _many(area: Path, filesystem: str, files: int) -> dict[str, float]:
    """Seconds of a commit of many changed files, and of `cp -a` of them: medians of three."""
    found = []
    for _ in range(3):
        with new_filesystem(area, filesystem) as place:
            found.append(_commit_and_copy(place, files))
    commits, copies = zip(*found, strict=True)
    return {"commit": statistics.median(commits), "cp -a": statistics.median(copies)}


def _commit_and_copy(place: Path, files: int) -> tuple[float, float]:
    os.environ["UNIONFS_ROOT"] = str(place / "store")
    base, upper = place / "base", place / "store/branches/br/upper"
    for number in range(files):
        if number % 100 == 0:
            (base / str(number // 100)).mkdir(parents=True)
        (base / str(number // 100) / str(number % 100)).write_bytes(b"0123456789abcdef" * 64)
    script = "find . -type f -exec sh -c 'for f; do echo more >> $f; done' - {} +"
    _call([_UNIONFS, "try", "-q", "--keep", "-n", "br", "--", "sh", "-ec", script], cwd=base)
    times = []
    copy: list[str | Path] = ["cp", "-a", upper, place / "copy"]
    for words in (copy, [_UNIONFS, "branch", "commit", "br"]):
        os.sync()
        began = time.perf_counter()
        _call(words)
        times.append(time.perf_counter() - began)
    return times[1], times[0]


def _host() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line]
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()} CPUs ({(models or [platform.machine()])[0]}), Linux {kernel}, {date.today()}"


def _table(results: dict[str, Any]) -> str:
    lines = [f"| seconds | {' | '.join(_STEPS)} |", f"|---|{'---:|' * len(_STEPS)}"]
    for name in (name for name in _CONTESTANTS if name in results["trees"]):
        found = results["trees"][name]
        cells = (found.get(step, "-") for step in _STEPS)
        lines.append(f"| {name} | {' | '.join(c if isinstance(c, str) else f'{c:.2f}' for c in cells)} |")
    text = "\n".join(lines) + f"\n\n{results['filesystem']}, {results['host']}.\n"
    if (many := results.get("many")) is not None:
        text += (
            f"The commit of {results.get('many files', _MANY):,} changed files of 1 KiB takes "
            f"{many['commit']:.2f} s; `cp -a` of them takes {many['cp -a']:.2f} s.\n"
        )
    return text


def _write(page: Path, filesystem: str, table: str) -> None:
    begin = f"<!-- made by benchmarks/branches.py on {filesystem} -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{begin}\n{table}{_END}{after}")


def _write_json(path: Path, results: dict[str, Any]) -> None:
    """Write a file for `scripts/perf report`."""
    names = {name: "fuse-o. script" if name == "fuse-overlayfs" else name for name in results["trees"]}
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    failures = {}
    for name, found in results["trees"].items():
        for step, value in found.items():
            if not isinstance(value, str):
                samples.setdefault((step, "s"), {})[names[name]] = [value]
            elif value != "-":
                failures[step, names[name]] = value
    many = results.get("many", {})
    for name, key in (("unionfs", "commit"), ("cp", "cp -a")):
        if key in many:
            samples.setdefault((_COMMIT_MANY, "s"), {})[name] = [many[key]]
    there = {name for by_name in samples.values() for name in by_name}
    number = results.get("many files", _MANY)
    whats = {**_WHATS, _COMMIT_MANY: f"commit {number:,} changed files of 1 KiB; cp: cp -a of them"}
    files, filesystem = results.get("files", _FILES), results["filesystem"]
    lab.write(
        path,
        f"branches-{filesystem}",
        f"Branches of a tree of {files:,} files, on {filesystem}",
        [ContestantFacts(name, what, kind) for name, (kind, what) in _FACTS.items() if name in there],
        {name: what for name, what in whats.items() if (name, "s") in samples},
        samples,
        failures=failures,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(_CONTESTANTS))
    parser.add_argument("--filesystem", choices=KINDS, default="ext4")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--files", type=int, help=f"of the tree ({_FILES}), and of --many ({_MANY})")
    parser.add_argument("--try", dest="try_", default="", help="the script")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--area", type=Path, default=Path(tempfile.gettempdir()))
    found = parser.parse_args()
    if found.files is not None and found.files < _FEWEST:
        parser.error(f"--files {found.files}: at least {_FEWEST} are needed")
    return found


def main() -> None:
    options = _arguments()
    Try.program = options.try_
    files, many = options.files or _FILES, options.files or _MANY
    results: dict[str, Any] = {
        "host": _host(), "filesystem": options.filesystem, "files": files, "many files": many, "trees": {},
    }  # fmt: skip
    if options.results is not None and options.results.exists():
        results |= json.loads(options.results.read_text())
    names = options.only or ([] if options.many or options.write else list(_CONTESTANTS))
    with tempfile.TemporaryDirectory(dir=options.area) as text:
        area = Path(text)
        if names:
            _make_tree(area / "template", files)
        for name in names:
            if name == "try" and not options.try_:
                continue
            fresh = partial(_fresh, area / "template", area, options.filesystem, _CONTESTANTS[name])
            with fresh() as contestant:
                found = _measure(contestant)
            with fresh() as contestant:
                found["discard"] = _measure_discard(contestant)
            results["trees"][name] = found
            print(name, found, flush=True)
            if options.results is not None:
                options.results.write_text(json.dumps(results, indent=1))
        if options.many:
            results["many"] = _many(area, options.filesystem, many)
            if options.results is not None:
                options.results.write_text(json.dumps(results, indent=1))
    print(_table(results))
    if options.json is not None:
        _write_json(options.json, results)
    if options.write is not None:
        _write(options.write, results["filesystem"], _table(results))


if __name__ == "__main__":
    main()
