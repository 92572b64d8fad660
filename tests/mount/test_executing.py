"""Files that are executed, opened with O_PATH, and opened again through /proc/self/fd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]


def _build(root: Path) -> None:
    shutil.copy("/bin/sleep", root / "lower")
    (root / "lower").chmod(0o755)
    for name in ("data", "other"):
        (root / name).write_bytes(b"data")


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_what_is_executed_cannot_be_written(world: MakeWorld, name: str) -> None:
    made = world(_build)

    def calls(root: Path) -> list[object]:
        program = root / name
        if name == "upper":
            shutil.copy("/bin/sleep", program)
        running = subprocess.Popen([program, "30"])
        try:
            found = [errno_of(os.open, program, flags) for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC)]
            found.append(errno_of(os.truncate, program, 1))
            os.link(program, root / "link")
            found.append(errno_of(os.open, root / "link", os.O_WRONLY))
            found.append(errno_of(os.rename, root / "other", program))
            found.append(errno_of(os.open, root / "link", os.O_WRONLY))
        finally:
            running.kill()
            running.wait()
        fd = os.open(root / "link", os.O_WRONLY)
        found.append(errno_of(subprocess.call, [root / "link", "0"]))
        os.close(fd)
        return [*found, subprocess.call([root / "link", "0"]), program.read_bytes()]

    made.as_native(calls)


@pytest.mark.parametrize("name", ["data", "own"])
def test_path_descriptors(world: MakeWorld, name: str) -> None:
    """What they allow, before and after the file's name is gone."""
    made = world(_build)
    if made.mount.session == "direct-passthrough":
        pytest.skip("a reader of the lower keeps it, see test_who_sees_what.py")

    def calls(root: Path) -> list[object]:
        (root / "own").write_bytes(b"data")
        fd = os.open(root / name, os.O_PATH)
        try:
            again = f"/proc/self/fd/{fd}"
            found: list[object] = [errno_of(os.read, fd, 1), errno_of(os.fchmod, fd, 0o600)]
            found.append(Path(again).read_bytes())
            with open(again, "r+b") as file:
                file.write(b"more")
            found.append((root / name).read_bytes())
            os.rename(root / name, root / "renamed")
            found.append(Path(again).read_bytes())
            os.unlink(root / "renamed")
            with open(again, "ab") as file:
                file.write(b"!")
            return [*found, Path(again).read_bytes(), os.fstat(fd).st_nlink, os.fstat(fd).st_size]
        finally:
            os.close(fd)

    made.as_native(calls)
