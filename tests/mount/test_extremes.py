"""Names of every byte, the longest paths, and files of 2^40 bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.world import World, outcome

MakeWorld = Callable[..., World]

BYTES = bytes(one for one in range(1, 256) if one != ord("/"))
NAMES = [*(bytes([one]) for one in BYTES if one != ord(".")), BYTES, b"\xff" * 255, b".\x01", b"..."]
LARGE = 1 << 40
PATH_MAX = 4096


def _write(root: int, name: bytes, content: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=root)
    os.write(fd, content)
    os.close(fd)


def _build(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    for name in NAMES:
        _write(fd, name, name)
    os.close(fd)


def _moved(name: bytes) -> bytes:
    return name[:-1] + b"\x02" if len(name) == 255 else name + b"\n"


def test_names_of_every_byte(world: MakeWorld) -> None:
    """Listed, read, copied up, moved, removed and made again."""
    made = world(_build, options=["volatile"])

    def use(root: Path) -> list[object]:
        fd = os.open(root, os.O_RDONLY)
        found: list[object] = [sorted(os.listdir(os.fsencode(root)))]
        for number, name in enumerate(NAMES):
            with open(os.fsencode(root) + b"/" + name, "ab") as file:
                file.write(b"more")
            new = _moved(name)
            os.rename(name, new, src_dir_fd=fd, dst_dir_fd=fd)
            if number % 2:
                os.unlink(new, dir_fd=fd)
                _write(fd, name, b"again")
        for name in sorted(os.listdir(os.fsencode(root))):
            found += [name, Path(os.fsdecode(os.fsencode(root) + b"/" + name)).read_bytes()]
        os.close(fd)
        return found

    made.as_native(use)
    expected = [*NAMES[1::2], *map(_moved, NAMES[::2])]
    assert sorted(os.listdir(os.fsencode(made.upper))) == sorted({*expected, *NAMES})
    assert sorted(os.listdir(os.fsencode(made.union))) == sorted(expected)


def _deep(root: Path) -> list[str]:
    """Names of directories which, below a root, make up a path of nearly 4,095 bytes."""
    left = PATH_MAX - 1 - len(os.fsencode(root)) - 1
    names = []
    while left > 300:
        names.append("d" * 200)
        left -= 201
    return names


def _tree(names: list[str]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        fd = os.open(root, os.O_RDONLY)
        for name in names:
            os.mkdir(name, dir_fd=fd)
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        _write(fd, b"old", b"old")
        os.close(fd)

    return build


def test_the_longest_paths(world: MakeWorld, area: Path) -> None:
    """A path of 4,095 bytes works, also for copy-ups; one of 4,096 does not."""
    names = _deep(area / "native")
    made = world(_tree(names))

    def use(root: Path) -> list[object]:
        deep = "/".join([str(root), *names])
        rest = PATH_MAX - 1 - len(os.fsencode(deep)) - 1
        longest, too_long = f"{deep}/{'n' * rest}", f"{deep}/{'n' * (rest + 1)}"
        found: list[object] = [len(os.fsencode(longest))]
        os.chmod(f"{deep}/old", 0o600)
        os.rename(f"{deep}/old", longest)
        Path(f"{deep}/new").write_text("new")
        found += [Path(longest).read_bytes(), os.stat(longest).st_mode]
        found.append(max(map(len, os.listdir(deep))) == rest)
        found.append(outcome(lambda path: path.write_text("x"), Path(too_long)))
        found.append(outcome(lambda path: os.link(longest, too_long), root))
        os.unlink(longest)
        return [*found, os.listdir(deep)]

    made.as_native(use)


@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_a_file_of_two_to_the_fortieth_bytes(world: MakeWorld, layer: str) -> None:
    """Read and written at its end and copied up, with its holes."""

    def build(root: Path) -> None:
        with open(root / "large", "wb") as file:
            file.truncate(LARGE)
            os.pwrite(file.fileno(), b"middle", LARGE // 2)

    made = world(build)
    if layer == "upper":
        os.utime(made.union / "large")
        with open(made.union / "large", "r+b"):
            pass

    def use(root: Path) -> list[object]:
        found: list[object] = []
        with open(root / "large", "r+b") as file:
            fd = file.fileno()
            found += [os.fstat(fd).st_size, os.pread(fd, 6, LARGE // 2), os.pread(fd, 10, LARGE - 5)]
            found += [os.pwrite(fd, b"end", LARGE), os.pread(fd, 10, LARGE - 2), os.fstat(fd).st_size]
            found += [os.lseek(fd, 0, os.SEEK_DATA) <= LARGE // 2]
            os.ftruncate(fd, LARGE + (1 << 30))
            os.fsync(fd)
        found += [os.stat(root / "large").st_size, os.stat(root / "large").st_blocks < 1 << 12]
        os.truncate(root / "large", LARGE // 2 + 3)
        with open(root / "large", "rb") as again:
            again.seek(-3, os.SEEK_END)
            found.append(again.read())
        return found

    found = made.as_native(use)
    assert found[-2:] == [True, b"mid"]
