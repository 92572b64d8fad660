"""The part of the power cut that runs in the machine: a load on a union, and the check after the next boot.

``python -m tests.vm.power_cut load DEVICE KIND TURN`` writes into a union on the device, and prints what it
has made durable, one JSON object a line, after fsync(2) has returned: ``{"path", "digest"}``, or no digest
for a name that is gone. It never ends. ``check DEVICE KIND TURN CLAIMS`` reads those lines from a file and
compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import snapshot
from tests.support.mounting import command, kernel_mounted

WAYS = ((), ("--session", "pyfuse3"), ("--io", "cached"))
"""How the union is mounted, by turns; the first is what the kernel allows."""

PAGE = 4096
MIB = 1 << 20
SIZES = {"small": 9_000, "middle": 300_000, "large": 8 * MIB + 5000}
COUNTS = {"small": 400, "middle": 80, "large": 24}
HOME = Path("/mnt")
_printing = threading.Lock()


def content(name: str, size: int) -> bytes:
    """What a file of the lower holds, or one that the load makes."""
    return hashlib.shake_128(name.encode()).digest(size)


def lower_files() -> dict[str, int]:
    """The lower: names relative to it, and their sizes."""
    return {
        f"{kind}/d{number % 5}/{kind}{number}": SIZES[kind]
        for kind, count in COUNTS.items()
        for number in range(count)
    }


def _mount_device(device: str, kind: str) -> None:
    subprocess.run(["mount", "-t", kind, device, HOME], check=True)


def _layers() -> list[str]:
    return ["-l", f"{HOME}/lower", "-u", f"{HOME}/upper", "-w", f"{HOME}/work"]


@contextmanager
def _union(turn: int) -> Iterator[Path]:
    merged = Path("/run/merged")
    merged.mkdir(exist_ok=True)
    subprocess.run([*command(), "mount", *WAYS[turn % len(WAYS)], *_layers(), str(merged)], check=True)
    yield merged
    subprocess.run([*command(), "umount", str(merged)], check=True)


def _claim(path: str, data: bytes | None) -> None:
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    with _printing:
        print(json.dumps({"path": path, "digest": digest}), flush=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_up(top: Path, choice: random.Random) -> None:
    """Change the first page of files of the lower; each second one is made durable."""
    files = list(lower_files().items())
    choice.shuffle(files)
    for number, (name, size) in enumerate(files):
        if name.startswith("small/d4"):
            continue  # those belong to the names
        fd = os.open(top / name, os.O_RDWR)
        try:
            os.pwrite(fd, content(f"changed {name}", PAGE), 0)
            if number % 2:
                os.fsync(fd)
        finally:
            os.close(fd)
        if number % 2:
            _sync((top / name).parent)
            _claim(name, content(f"changed {name}", PAGE) + content(name, size)[PAGE:])


def _create(top: Path, choice: random.Random) -> None:
    """New files of all sizes, in new directories."""
    number = 0
    while True:
        directory = f"new/{number // 20}"
        (top / directory).mkdir(parents=True, exist_ok=True)
        name = f"{directory}/file{number}"
        data = content(name, choice.choice([0, 10, 5000, 70_000, 2 * MIB]))
        fd = os.open(top / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        if number % 20 == 0:
            for above in (directory, "new", "."):
                _sync(top / above)
        else:
            _sync(top / directory)
        _claim(name, data)
        number += 1


def _names(top: Path, choice: random.Random) -> None:
    """Whiteouts, renames that leave one, names that come again, opaque directories."""
    names = sorted(name for name in lower_files() if name.startswith("small/d4"))
    choice.shuffle(names)
    for number, name in enumerate(names):
        directory = (top / name).parent
        if number % 4 == 0:
            os.unlink(top / name)
            _sync(directory)
            _claim(name, None)
        elif number % 4 == 1:
            os.rename(top / name, top / f"{name}.renamed")
            _sync(top / f"{name}.renamed")
            _sync(directory)
            _claim(name, None)
            _claim(f"{name}.renamed", content(name, SIZES["small"]))
        elif number % 4 == 2:
            os.unlink(top / name)
            (top / name).mkdir()
            (top / name / "in").write_bytes(content(name, 100))
            _sync(top / name / "in")
            _sync(top / name)
            _sync(directory)
            _claim(f"{name}/in", content(name, 100))
        else:
            (top / f"{name}.next").write_bytes(content(f"{name}.next", 20_000))
            _sync(top / f"{name}.next")
            os.rename(top / f"{name}.next", top / name)
            _sync(directory)
            _claim(name, content(f"{name}.next", 20_000))


def load(device: str, kind: str, turn: int) -> None:
    """Never ends."""
    _mount_device(device, kind)
    for name in ("lower", "upper", "work"):
        (HOME / name).mkdir()
    for name, size in lower_files().items():
        path = HOME / "lower" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name, size))
    os.sync()
    with _union(turn) as top:
        print("LOADING", flush=True)
        threads = [
            threading.Thread(target=work, args=(top, random.Random(f"{turn}{work}")))
            for work in (_copy_up, _create, _names)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _wrong_in_layers() -> Iterator[str]:
    """What may not be in an upper, whatever happened (overlayfs.rst)."""
    for path, entry in snapshot.take(HOME / "upper", contents=False).items():
        shown = os.fsdecode(path)
        if os.path.basename(path).startswith(b"#"):
            yield f"{shown}: a temporary name in the upper"
        if entry.kind == stat.S_IFCHR and entry.rdev != 0:
            yield f"{shown}: a device that nobody made"
        opaque = entry.xattrs.get("trusted.overlay.opaque")
        if opaque not in (None, b"y", b"x"):
            yield f"{shown}: opaque is {opaque!r}"
    for path, entry in snapshot.take(HOME / "lower").items():
        name = os.fsdecode(path)
        if entry.kind == stat.S_IFREG and (HOME / "lower" / name).read_bytes() != content(
            name, lower_files()[name]
        ):
            yield f"{name}: the lower has changed"


def _wrong_in_union(top: Path, claims: dict[str, str | None]) -> Iterator[str]:
    for name, digest in claims.items():
        path = top / name
        if digest is None:
            if os.path.lexists(path):
                yield f"{name}: was removed, and is there"
        elif not path.is_file():
            yield f"{name}: was made durable, and is gone"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"{name}: was made durable, and holds something else ({path.stat().st_size} bytes)"
    for name, size in lower_files().items():
        path = top / name
        if name.startswith("small/d4"):
            continue  # it may be removed, or something else
        found = path.read_bytes()
        whole = content(name, size)
        if len(found) != size or found[PAGE:] != whole[PAGE:]:
            yield f"{name}: is copied in part ({len(found)} of {size} bytes)"
        elif found[:PAGE] not in (whole[:PAGE], content(f"changed {name}", PAGE)):
            yield f"{name}: its changed page is of nobody"


def _seen(top: Path) -> dict[bytes, Any]:
    return {
        path: (entry.mode, entry.uid, entry.gid, entry.content, entry.names)
        for path, entry in snapshot.take(top, xattrs=False).items()
    }


def check(device: str, kind: str, turn: int, claims: str) -> int:
    """Print what is wrong, one sentence a line; gives the exit code."""
    told: dict[str, str | None] = {}
    for line in Path(claims).read_text().splitlines():
        claim = json.loads(line)
        told[claim["path"]] = claim["digest"]
    _mount_device(device, kind)
    wrong = list(_wrong_in_layers())
    with _union(turn) as top:
        if left := os.listdir(HOME / "work/work"):
            wrong.append(f"work was not emptied: {left}")
        wrong += _wrong_in_union(top, told)
        ours = _seen(top)
        (top / "after").write_text("it can be written")
        (top / "after").unlink()
    area = Path("/run/kernel")
    area.mkdir()
    layers = {"lowers": [HOME / "lower"], "upper": HOME / "upper", "work": HOME / "work"}
    with kernel_mounted(area, **layers) as kernel:  # type: ignore[arg-type]
        theirs = _seen(kernel.mountpoint)
    wrong += [
        f"{os.fsdecode(path)}: kernel overlayfs sees something else"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]
    print("\n".join(wrong[:40]))
    upper = snapshot.take(HOME / "upper", contents=False).values()
    count = sum(1 for entry in upper if stat.S_ISREG(entry.mode))
    print(f"files in the upper: {count}; wrong: {len(wrong)}", flush=True)
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    """See the top of this module."""
    task, device, kind, turn, *rest = arguments
    if task == "load":
        load(device, kind, int(turn))
        return 0
    return check(device, kind, int(turn), *rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
