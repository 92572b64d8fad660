"""Uppers exported as layers: made by kernel overlayfs, imported again, and shown over the same lowers."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import areas, mounting
from tests.support.edits import OPERATIONS, apply, build
from tests.support.layers import difference, digest, directory, file, opaque, shown, tar, whiteout
from unionfs.errors import LayerError, UserError
from unionfs.images import pack
from unionfs.images.layers import export_layer, import_layer, squash_layers
from unionfs.images.rules import DEFAULTS

ALL_FEATURES = ("redirect_dir=on", "metacopy=on", "index=on")
Edit = Callable[[Path], object]


def edit(area: Path, change: Edit, *options: str) -> None:
    """Change the merged tree, on kernel overlayfs."""
    for name in ("upper", "work"):
        (area / name).mkdir(exist_ok=True)
    with mounting.kernel_mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", options=options
    ) as mount:
        change(mount.mountpoint)


@contextmanager
def merged(area: Path, upper: str, options: tuple[str, ...]) -> Iterator[Path]:
    """The kernel's merged tree of an upper over the lower."""
    # The index of hard links is in the work directory.
    work = area / ("work" if upper == "upper" else f"work-of-{upper}")
    work.mkdir(exist_ok=True)
    with mounting.kernel_mounted(
        area, lowers=[area / "lower"], upper=area / upper, work=work, options=options
    ) as mount:
        yield mount.mountpoint


def exported(area: Path, *, lowers: bool = True, name: str = "layer.tar") -> Path:
    below = [str(area / "lower")] if lowers else []
    work = str(area / "work") if lowers and (area / "work").exists() else None
    written = export_layer(str(area / "upper"), below, str(area / name), work=work, userxattr=False)
    data = (area / name).read_bytes()
    assert written.digest == digest(data)
    return area / name


def imported(area: Path, source: Path, name: str) -> Path:
    import_layer(str(source), str(area / name), userxattr=False, rules=DEFAULTS)
    return area / name


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as found:
        return {member.name.removeprefix("./") or ".": member for member in found}


@pytest.fixture
def lower(kernel_overlay: None, area: Path) -> Path:
    (area / "lower").mkdir()
    build(area / "lower")
    return area / "lower"


CASES: dict[str, tuple[Edit, set[str]]] = {
    "a removed file": (lambda m: (m / "d/y").unlink(), {".", "d", "d/.wh.y"}),
    "a removed directory": (lambda m: shutil.rmtree(m / "d"), {".", ".wh.d"}),
    "a directory made again": (
        lambda m: (shutil.rmtree(m / "d"), (m / "d").mkdir(), (m / "d/n").write_text("n")),
        {".", "d", "d/.wh..wh..opq", "d/n"},
    ),
    "a file for a directory": (lambda m: (shutil.rmtree(m / "d"), (m / "d").write_text("d")), {".", "d"}),
    "a changed file": (lambda m: (m / "d/y").write_text("new"), {".", "d", "d/y"}),
    "modes and owners": (
        lambda m: ((m / "d").chmod(0o2750), os.chown(m / "f", 1000, 100)), {".", "d", "f"},
    ),
    "a device and a FIFO": (
        lambda m: (os.mknod(m / "n", stat.S_IFCHR | 0o600, os.makedev(1, 3)), os.mkfifo(m / "p")),
        {".", "n", "p"},
    ),
    "a hard link": (
        lambda m: ((m / "n").write_text("n"), os.link(m / "n", m / "d/n")), {".", "d", "d/n", "n"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_the_layer(name: str, lower: Path, area: Path) -> None:
    change, names = CASES[name]
    edit(area, change)
    assert set(members(exported(area, lowers=False))) == names


def test_the_same_upper_gives_the_same_bytes(lower: Path, area: Path) -> None:
    edit(area, lambda m: ((m / "d/y").unlink(), [(m / f"n{n}").write_text("x" * n) for n in range(50)]))
    (area / "upper/n7").touch()
    os.utime(area / "upper/n7", (1, 5))
    first = exported(area, lowers=False).read_bytes()
    for ending in ("gz", "zst"):
        one, two = (
            exported(area, lowers=False, name=f"{n}.tar.{ending}").read_bytes() for n in ("a", "b")
        )
        assert one == two
    # The same tree, made in another order on another filesystem.
    again = imported(area, area / "layer.tar", "again")
    written = export_layer(str(again), [], str(area / "second.tar"), userxattr=False)
    assert (area / "second.tar").read_bytes() == first
    assert written.diff_id == digest(first)


def test_small_files_have_the_bytes_of_any(
    lower: Path, area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in fewer steps."""
    upper = area / "upper"
    upper.mkdir()
    for size in (0, 1, 511, 512, 513, 70_000, pack._SMALL, pack._SMALL + 1):
        (upper / f"f{size}").write_bytes(os.urandom(size))
        os.utime(upper / f"f{size}", ns=(1, 1_700_000_000_123_456_789 + size))
    (upper / ("long" * 60)).write_text("a long name")
    os.utime(upper / "f1", (1, 5))
    os.utime(upper / "f511", ns=(1, -5))
    os.chown(upper / "f512", 3_000_000, 4_000_000)
    (upper / "f513").chmod(0o4711)
    os.link(upper / "f513", upper / "linked")
    os.setxattr(upper / "f70000", "user.k", b"v")
    with (upper / "sparse").open("wb") as file:
        file.truncate(50_000)
    few = exported(area, lowers=False).read_bytes()
    monkeypatch.setattr(pack, "_SMALL", -1)
    assert exported(area, lowers=False, name="other.tar").read_bytes() == few


def test_what_needs_lowers_is_refused_without(lower: Path, area: Path) -> None:
    cases: list[tuple[Edit, str, str]] = [
        (lambda m: (m / "d").rename(m / "moved"), "moved", r"\(redirect\).*--lower"),
        (lambda m: (m / "big").chmod(0o600), "big", r"\(metacopy\).*--lower"),
        (lambda m: (m / "f").write_text("new"), "f", "index.*--lower.*--work"),
    ]
    for change, name, word in cases:
        for directory_name in ("upper", "work"):
            shutil.rmtree(area / directory_name, ignore_errors=True)
        edit(area, change, *ALL_FEATURES)
        with pytest.raises(LayerError, match=rf"{name} .*{word}"):
            exported(area, lowers=False)
        assert not (area / "layer.tar").exists()


def test_renamed_directories_and_copied_metadata_come_out_whole(lower: Path, area: Path) -> None:
    def change(m: Path) -> None:
        (m / "d").rename(m / "moved")
        (m / "moved/y").unlink()
        (m / "moved/sub/x").write_text("new")
        (m / "big").chmod(0o600)

    edit(area, change, *ALL_FEATURES)
    found = members(exported(area))
    assert {"moved/.wh..wh..opq", "moved/sub", "moved/sub/x", ".wh.d", "big"} <= set(found)
    assert not {"moved/y", "moved/.wh.y"} & set(found)
    with tarfile.open(area / "layer.tar") as tar_file:
        content = tar_file.extractfile("./big")
        assert content is not None
        assert content.read() == b"big" * 500


def test_the_other_names_of_an_indexed_link_come_along(lower: Path, area: Path) -> None:
    edit(area, lambda m: (m / "f").write_text("new"), *ALL_FEATURES)
    found = members(exported(area))
    assert found["e/same-as-f"].islnk()
    assert found["e/same-as-f"].linkname == "./f"
    assert "e" in found


def test_sockets_are_left_out_with_a_note(lower: Path, area: Path) -> None:
    edit(area, lambda m: os.mknod(m / "sock", stat.S_IFSOCK | 0o600))
    written = export_layer(str(area / "upper"), [], str(area / "layer.tar"), userxattr=False)
    assert ["socket" in note for note in written.packed.notes] == [True]
    assert "sock" not in members(area / "layer.tar")


def test_a_mounted_upper_is_refused(lower: Path, area: Path) -> None:
    (area / "upper").mkdir()
    fd = os.open(area / "upper", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="in use by another mount"):
        exported(area)
    os.close(fd)


# -- random changes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ALL_FEATURES], ids=["plain", "all features"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=12))
def test_random_changes_are_the_same_after_export_and_import(
    kernel_overlay: None, options: tuple[str, ...], operations: list[tuple[object, ...]]
) -> None:
    with areas.area() as area:
        (area / "lower").mkdir()
        build(area / "lower")
        before = shown(area / "lower", private=True)
        edit(area, lambda m: [apply(m, one) for one in operations], *options)
        with merged(area, "upper", options) as root:
            wanted = shown(root)
        imported(area, exported(area), "again")
        with merged(area, "again", options) as root:
            assert difference(shown(root), wanted) == {}
        assert difference(shown(area / "lower", private=True), before) == {}
        # An imported layer has no more markers to translate.
        once = export_layer(str(area / "again"), [], str(area / "again.tar"), userxattr=False)
        assert once.packed.notes == []


# -- squashing -------------------------------------------------------------------------------------------

SQUASHED = {
    "added": ([[file("a")], [file("b")]], {".", "a", "b"}),
    "removed again": ([[file("a"), file("b")], [whiteout("a")]], {".", ".wh.a", "b"}),
    "removed, then made": ([[whiteout("a")], [file("a")]], {".", "a"}),
    "an opaque directory below": (
        [[directory("d"), opaque("d"), file("d/x")], [directory("d"), file("d/y")]],
        {".", "d", "d/.wh..wh..opq", "d/x", "d/y"},
    ),
    "an opaque directory above": (
        [[directory("d"), file("d/x")], [directory("d"), opaque("d"), file("d/y")]],
        {".", "d", "d/.wh..wh..opq", "d/y"},
    ),
    "a directory removed, then made": (
        [[directory("d"), file("d/x")], [whiteout("d")], [directory("d"), file("d/y")]],
        {".", "d", "d/.wh..wh..opq", "d/y"},
    ),
    "a directory for a file": (
        [[file("d")], [directory("d"), file("d/y")]], {".", "d", "d/.wh..wh..opq", "d/y"},
    ),
    "whiteouts below": ([[directory("d"), whiteout("d/x")], [directory("d")]], {".", "d", "d/.wh.x"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SQUASHED)
def test_squashed_layers(name: str, root: None, area: Path) -> None:
    layers, names = SQUASHED[name]
    files = []
    for number, layer in enumerate(layers):
        files.append(str(area / f"{number}.tar"))
        Path(files[-1]).write_bytes(tar(layer))
    squash_layers(files, str(area / "out.tar"), str(area / "root"), DEFAULTS)
    assert set(members(area / "out.tar")) == names
    assert os.listdir(area / "root/images/layers/trusted") == []


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rounds=st.lists(st.lists(OPERATIONS, min_size=1, max_size=6), min_size=2, max_size=3))
def test_a_squashed_layer_shows_what_its_layers_show(
    kernel_overlay: None, rounds: list[list[tuple[object, ...]]]
) -> None:
    with areas.area() as area:
        (area / "lower").mkdir()
        build(area / "lower")
        stack, files = [area / "lower"], []
        for number, operations in enumerate(rounds):
            upper, work = area / f"u{number}", area / f"w{number}"
            upper.mkdir()
            work.mkdir()
            with mounting.kernel_mounted(area, lowers=stack, upper=upper, work=work) as mount:
                for one in operations:
                    apply(mount.mountpoint, one)
            stack.insert(0, upper)
            files.append(str(area / f"{number}.tar"))
            export_layer(str(upper), [], files[-1], userxattr=False)
        with mounting.kernel_mounted(area, lowers=stack) as mount:
            wanted = shown(mount.mountpoint)
        squash_layers(files, str(area / "squashed.tar"), str(area / "root"), DEFAULTS)
        imported(area, area / "squashed.tar", "squashed")
        with mounting.kernel_mounted(area, lowers=[area / "squashed", area / "lower"]) as mount:
            assert difference(shown(mount.mountpoint), wanted) == {}
