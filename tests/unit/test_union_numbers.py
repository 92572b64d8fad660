"""Numbers of several filesystems, and what origins and indexes may hold."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, copy_up, get, open_union
from unionfs.errors import LayerError
from unionfs.settings.features import Features
from unionfs.union.changes import Changes
from unionfs.union.layers import LayerStack
from unionfs.union.numbers import Numbers
from unionfs.union.origin import Origins
from unionfs.union.tree import Union

__all__ = ["open_union"]

LARGE = (1 << 52) - 1


def test_numbers_of_filesystems_never_meet() -> None:
    devices, inodes = range(10, 1010), (0, 1, 2, 12345, LARGE)
    numbers = Numbers(devices)
    found = {numbers.of(device, inode) for device, inode in product(devices, inodes)}
    assert len(found) == len(devices) * len(inodes)
    assert all(1 < number < 1 << 63 for number in found)


def test_a_new_layer_on_top_changes_no_number() -> None:
    before, after = Numbers([1, 2]), Numbers([1, 2, 3, 1])
    for device, inode in product((1, 2), (2, 12345, LARGE)):
        assert before.of(device, inode) == after.of(device, inode)


def test_numbers_of_one_filesystem_are_its_own() -> None:
    numbers = Numbers([7, 7, 7])
    assert [numbers.of(7, inode) for inode in (2, LARGE, LARGE << 9)] == [2, LARGE, LARGE << 9]
    assert numbers.of(7, 1) > 1, "the root's"


def test_large_numbers_are_hashed() -> None:
    numbers = Numbers([1, 2])
    found = {numbers.of(device, 1 << 60) for device in (1, 2, 3)}
    assert len(found) == 3
    assert all(number >> 62 == 1 for number in found)


def test_xino_off_fits_into_32_bits() -> None:
    numbers = Numbers([1, 2], xino=False)
    assert [numbers.of(device, 77) for device in (1, 2)] == [77, 77]
    assert numbers.of(1, 77, directory=True) == 77
    assert 1 << 31 <= numbers.of(2, 77, directory=True) < 1 << 32
    assert numbers.of(2, 78, directory=True) != numbers.of(2, 77, directory=True)


def test_a_readonly_file_of_an_ordinary_user_has_an_origin(tmp_path: Path, open_union: OpenUnion) -> None:
    """`user.*` xattrs need write permission, so the mode comes last."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").write_text("x")
    (tmp_path / "l0/f").chmod(0o444)
    union = open_union()
    copy_up(union, get(union, "f"))
    assert os.getxattr(tmp_path / "upper/f", "user.overlay.origin")
    assert (tmp_path / "upper/f").stat().st_mode & 0o777 == 0o444


def test_the_number_of_a_copy_with_one_name(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the origin's, without another system call: no other name can be the same file."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").write_text("x")
    union = open_union()
    copied = get(union, "f")
    copy_up(union, copied)
    union.nodes.forget(copied, 0)

    def refuse(*_: object) -> bool:
        raise AssertionError("the index is looked at")

    monkeypatch.setattr(Origins, "was_indexed", refuse)
    node = get(union, "f")
    assert node is not copied
    assert (node.in_place, node.from_origin, node.ino) == (True, True, (tmp_path / "l0/f").stat().st_ino)


class TestIndex:
    @pytest.fixture
    def linked(self, tmp_path: Path) -> Path:
        for name in ("l0", "l1", "upper", "work"):
            (tmp_path / name).mkdir()
        (tmp_path / "l0/a").write_text("x")
        os.link(tmp_path / "l0/a", tmp_path / "l0/b")
        return tmp_path

    def _open(
        self, home: Path, index: str | None = None, *, lower: str = "l0", upper: str = "upper"
    ) -> Union:
        stack = LayerStack.open(
            [str(home / lower)], str(home / upper), str(home / "work"), userxattr=True,
            features=Features(index=index),
        )  # fmt: skip
        try:
            return Union(stack)
        except BaseException:
            stack.close()
            raise

    def _close(self, union: Union) -> bool:
        union.close()
        union.stack.close()
        return union.index is not None

    def test_one_node_and_one_copy(self, linked: Path) -> None:
        union = self._open(linked)
        a, b = get(union, "a"), get(union, "b")
        assert a is b
        copy_up(union, a)
        (entry,) = (linked / "work/index").iterdir()
        assert entry.stat().st_ino == (linked / "upper/a").stat().st_ino
        assert union.attributes(b).nlink == 2
        assert self._close(union)

    def test_broken_counts_and_entries(self, linked: Path) -> None:
        """Odd xattrs are data; names with odd bytes in the index are left alone."""
        union = self._open(linked)
        copy_up(union, get(union, "a"))
        self._close(union)
        (entry,) = (linked / "work/index").iterdir()
        (linked / "work/index" / os.fsdecode(b"\xff")).write_text("")
        for value in (b"", b"U", b"X+1", b"U+9999999999999999999", b"L+1", b"U-5", b"\xff"):
            os.setxattr(entry, "user.overlay.nlink", value)
            union = self._open(linked)
            for name in ("b", "a"):
                assert union.attributes(get(union, name)).nlink >= 1
            self._close(union)

    @pytest.mark.parametrize("index", ["on", None])
    def test_another_lower_or_upper(self, linked: Path, index: str | None) -> None:
        """Refused if it was asked for; else there is no index."""
        union = self._open(linked)
        copy_up(union, get(union, "a"))
        assert self._close(union)
        os.rename(linked / "upper", linked / "original")
        (linked / "upper").mkdir()
        for where in ({"lower": "l1", "upper": "original"}, {"upper": "upper"}):
            if index == "on":
                with pytest.raises(LayerError, match="index=on"):
                    self._open(linked, index, **where)
            else:
                assert not self._close(self._open(linked, index, **where))
        assert self._close(self._open(linked, index, upper="original"))

    def test_an_upper_without_index_gets_none_by_default(self, linked: Path) -> None:
        (linked / "upper/old").write_text("")
        assert not self._close(self._open(linked))
        assert not (linked / "work/index").exists()
        assert self._close(self._open(linked, "on"))
        assert self._close(self._open(linked))
        assert not self._close(self._open(linked, "off"))

    def test_a_copy_without_names_is_removed(self, linked: Path) -> None:
        union = self._open(linked)
        changes = Changes(union)
        for name in (b"a", b"b"):
            lower = changes.unlink(union.nodes.root, name)
            if lower is not None:
                copy_up(union, lower)
                assert changes.unlink(union.nodes.root, name) is None
        assert list((linked / "work/index").iterdir()) == []
        self._close(union)

    def test_orphans_and_temporaries_are_removed_at_mount(self, linked: Path) -> None:
        self._close(self._open(linked))
        index = linked / "work/index"
        for name, links in (("#1f", b"U+1"), ("00fb", b"U-1"), ("00fc", b"U+1")):
            (index / name).write_text("")
            os.setxattr(index / name, "user.overlay.nlink", links)
        self._close(self._open(linked))
        assert [path.name for path in index.iterdir()] == ["00fc"]


def test_numbers_of_other_filesystems_keep_the_inode() -> None:
    """In the low bits, as overlayfs's xino."""
    numbers = Numbers([1, 2, 3])
    for device, inode in product((1, 2, 3), (2, 77, LARGE)):
        assert numbers.of(device, inode) == (device - 1) << 52 | inode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(("kind", "memory"), [("tmpfs", True), ("ramfs", True), ("proc", False)])
def test_which_filesystems_keep_numbers(tmp_path: Path, kind: str, memory: bool) -> None:
    code = (
        "import os, sys\n"
        "from unionfs.core.places import Layer\n"
        "layer = Layer(0, sys.argv[1], os.open(sys.argv[1], os.O_PATH), is_upper=False)\n"
        "print(layer.memory, layer.keeps_numbers)\n"
    )
    there = str(tmp_path)
    script = f'mount -t {kind} none "$1" && exec "$2" -c "$3" "$1"'
    arguments = ["unshare", "--mount", "sh", "-c", script, "sh", there, sys.executable, code]
    found = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert found == f"{memory} {memory}\n"
