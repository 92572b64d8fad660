"""Renames of directories with lower parts: nodes, what a new mount reads, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.mounting import kernel_mounted
from tests.support.world import errno_of
from tests.unit.test_union_bound import show
from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names, open_union, read
from unionfs.core.places import Layer
from unionfs.sys import calls
from unionfs.union import redirecting
from unionfs.union.changes import Changes
from unionfs.union.layers import LayerStack
from unionfs.union.markers import Markers
from unionfs.union.redirecting import mode
from unionfs.union.tree import Union

__all__ = ["open_union"]

REDIRECT = "user.overlay.redirect"


def rename(union: Union, old: str, new: str, flags: int = 0) -> None:
    """Rename by paths, copying up files first."""
    ends = []
    for path in (old, new):
        above, _, name = path.rpartition("/")
        ends.append((get(union, above) if above else union.nodes.root, name.encode()))
    while lower := Changes(union).rename(*ends[0], *ends[1], flags):
        for node in lower:
            copy_up(union, node)


def tree(union: Union, path: str = "") -> dict[str, bytes | None]:
    """Every name below a directory, with the content of files."""
    found: dict[str, bytes | None] = {}
    for name in sorted(names(union, path)):
        inner = f"{path}/{name.decode()}".lstrip("/")
        if get(union, inner).is_dir:
            found[inner] = None
            found |= tree(union, inner)
        else:
            found[inner] = read(union, inner)
    return found


def redirects(upper: Path) -> dict[str, bytes]:
    """The redirects in an upper, by path."""
    found = {}
    for at, folders, _ in os.walk(upper):
        for name in folders:
            path = Path(at, name)
            if REDIRECT in os.listxattr(path):
                found[str(path.relative_to(upper))] = os.getxattr(path, REDIRECT)
    return found


Mount = Callable[..., Union]


@pytest.fixture
def mount(open_union: OpenUnion) -> Mount:
    """Opens the layers, after it has closed the union that had them open."""
    last: list[Union] = []

    def open_(lowers: int = 2) -> Union:
        while last:
            union = last.pop()
            union.close()
            union.stack.close()
        last.append(open_union(lowers))
        return last[0]

    return open_


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Two lowers: ``d`` is in both, with a directory in each."""
    for path in ("l0/d/sub/f", "l0/d/one", "l1/d/sub/g", "l1/d/two", "l0/other/h", "l0/file"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    return tmp_path


def test_nodes_below_stay(layers: Path, mount: Mount) -> None:
    """Node ids, inode numbers, lower parts and open files of everything below a renamed directory."""
    union = mount()
    paths = ["d", "d/sub", "d/sub/f", "d/sub/g", "d/two"]
    nodes = {path: get(union, path) for path in paths}
    before = {path: (node.id, node.ino, node.parts[-1:]) for path, node in nodes.items()}
    file = union.files.lend(nodes["d/sub/g"], write=False)
    rename(union, "d", "other/moved")
    for path in paths:
        node = get(union, "other/moved" + path[1:])
        assert node is nodes[path]
        assert (node.id, node.ino, node.parts[-1:]) == before[path]
    assert find(union, "d") is None
    assert file.read(100, 0) == b"l1/d/sub/g"
    union.files.take_back(nodes["d/sub/g"], file)
    copy_up(union, nodes["d/sub/g"])
    assert (layers / "upper/other/moved/sub/g").read_text() == "l1/d/sub/g"
    rename(union, "other/moved/sub", "sub")
    assert get(union, "sub/g") is nodes["d/sub/g"]
    assert redirects(layers / "upper") == {"other/moved": b"/d", "sub": b"/d/sub"}


@pytest.mark.parametrize("again", [False, True])
def test_a_new_mount_shows_the_same(layers: Path, mount: Mount, again: bool) -> None:
    """Also with the upper as a lower below a new upper, in which the directories are renamed again."""
    union = mount()
    rename(union, "d", "e")
    rename(union, "e/sub", "other/sub")
    Changes(union).mkdir(union.nodes.root, b"d", 0o755, ME)
    rename(union, "other", "d/deep")
    expected = tree(union)
    assert expected["d/deep/sub/g"] == b"l1/d/sub/g"
    assert set(expected) == {"d", "d/deep", "d/deep/h", "d/deep/sub", "d/deep/sub/f", "d/deep/sub/g", "e",
                             "e/one", "e/two", "file"}  # fmt: skip
    assert tree(mount()) == expected
    if not again:
        return
    for name, new in (("l1", "l2"), ("l0", "l1"), ("upper", "l0")):
        (layers / name).rename(layers / new)
    union = mount(3)
    assert tree(union) == expected
    rename(union, "d/deep/sub", "file", calls.RENAME_EXCHANGE)
    rename(union, "e", "file/e")
    expected = tree(union)
    assert expected["file/e/two"] == b"l1/d/two"
    assert tree(mount(3)) == expected
    assert redirects(layers / "upper") == {"file": b"/d/deep/sub", "file/e": b"/e"}


def test_the_old_name_is_free(layers: Path, mount: Mount) -> None:
    """A new directory there does not merge with the lowers, and the renamed one can come back."""
    union = mount()
    rename(union, "d", "e")
    Changes(union).mkdir(union.nodes.root, b"d", 0o755, ME)
    assert names(union, "d") == set()
    rename(union, "d", "mine")
    rename(union, "e", "d")
    expected = tree(union)
    assert expected["d/sub/g"] == b"l1/d/sub/g"
    assert expected["mine"] is None
    assert tree(mount()) == expected


def test_a_redirect_to_nothing_hides(layers: Path, mount: Mount) -> None:
    """A directory whose redirect leads nowhere does not merge with something else after a rename."""
    (layers / "upper/x").mkdir(parents=True)
    os.setxattr(layers / "upper/x", REDIRECT, b"h")
    (layers / "l0/other/h").unlink()
    (layers / "l0/other/h/secret").mkdir(parents=True)
    union = mount()
    assert names(union, "x") == set()
    rename(union, "x", "other/x")
    assert names(mount(), "other/x") == set()


def test_too_long(layers: Path, mount: Mount) -> None:
    """EXDEV, and nothing is copied up; within the parent the name is enough."""
    name = "n" * 128  # the longest redirect has 256 bytes
    (layers / "l0" / name / name).mkdir(parents=True)
    (layers / "l0" / name / name[2:]).mkdir()
    union = mount()
    assert errno_of(rename, union, f"{name}/{name}", "new") == errno.EXDEV
    assert os.listdir(layers / "upper") == []
    rename(union, f"{name}/{name}", f"{name}/new")
    rename(union, f"{name}/{name[2:]}", "new")
    assert redirects(layers / "upper") == {
        f"{name}/new": name.encode(), "new": f"/{name}/{name[2:]}".encode()
    }  # fmt: skip


def test_storage_below_is_carried_along(layers: Path, mount: Mount) -> None:
    (layers / "data").mkdir()
    (layers / "data/in").write_text("volume")
    union = mount()
    show(union, "d/sub", layers / "data")
    rename(union, "d", "e")
    assert read(union, "e/sub/in") == b"volume"
    assert errno_of(rename, union, "e/sub", "away") == errno.EBUSY
    assert errno_of(rename, union, "other", "e/sub") == errno.EBUSY


MOVES: list[Callable[[Union], None]] = [
    lambda union: rename(union, "d", "e"),
    lambda union: rename(union, "d", "other/e"),
    lambda union: rename(union, "d", "other", calls.RENAME_EXCHANGE),
    lambda union: rename(union, "d/sub", "file", calls.RENAME_EXCHANGE),
]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("call", ["setxattr", "renameat2"])
def test_a_failure_leaves_the_old_tree(
    layers: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch, move: Callable[[Union], None],
    call: str,
) -> None:  # fmt: skip
    """Each step fails once; a new mount shows the old tree then, and the new one after the last step."""
    before = tree(mount())
    module = os if call == "setxattr" else calls
    real, remaining = getattr(module, call), 0

    def called(*arguments: object, **extra: object) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **extra)

    for steps in range(10):
        for name in ("upper", "work"):
            shutil.rmtree(layers / name)
        union, remaining = mount(), steps
        with monkeypatch.context() as patched:
            patched.setattr(module, call, called)
            ended = errno_of(move, union)
        if not ended:
            break
        assert ended == (errno.EXDEV if call == "setxattr" else errno.ENOSPC)
        assert tree(union) == before
        assert tree(mount()) == before
    assert steps
    assert tree(union) != before
    assert tree(mount()) == tree(union)


def test_another_users_redirect_is_refused(layers: Path, mount: Mount) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's directory")
    (layers / "l0/his").mkdir()
    os.setxattr(layers / "l0/his", REDIRECT, b"/d")
    (layers / "l1/way/end").mkdir(parents=True)
    (layers / "l0/mine").mkdir()
    os.setxattr(layers / "l0/mine", REDIRECT, b"/way/end")
    os.setxattr(layers / "l1/way", REDIRECT, b"d")
    (layers / "l2").mkdir()
    assert names(mount(3), "his") == {b"sub", b"two"}
    assert names(mount(3), "mine") == set()
    os.chown(layers / "l0/his", 1000, -1)
    os.chown(layers / "l1/way", 1000, -1)
    for name in ("his", "mine"):
        assert errno_of(get, mount(3), name) == errno.EPERM


TRUSTED, USER = b"trusted.overlay.", b"user.overlay."


@pytest.mark.parametrize(
    ("prefix", "chosen", "parameters", "result"),
    [
        (TRUSTED, None, {}, "on"),
        (TRUSTED, "off", {}, "follow"),
        (TRUSTED, "off", {"redirect_always_follow": "Y"}, "follow"),
        (TRUSTED, "off", {"redirect_always_follow": "N"}, "nofollow"),
        (TRUSTED, "follow", {"redirect_always_follow": "N"}, "follow"),
        (TRUSTED, "nofollow", {}, "nofollow"),
        (USER, None, {}, "nofollow"),
        (USER, "off", {}, "nofollow"),
        (USER, "on", {}, "on"),
        (USER, "follow", {}, "follow"),
    ],
)
def test_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: bytes, chosen: str | None,
    parameters: dict[str, str], result: str,
) -> None:  # fmt: skip
    """The options of fs/overlayfs/params.c, and the defaults."""
    monkeypatch.setattr(redirecting, "_PARAMETERS", str(tmp_path))
    for name, value in parameters.items():
        (tmp_path / name).write_text(value + "\n")
    assert mode(chosen, prefix, None) == result


@pytest.mark.parametrize(("value", "result"), [("N", "follow"), ("Y", "on"), (None, "follow")])
def test_the_mode_in_a_kernels_upper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, result: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can set trusted.* xattrs")
    monkeypatch.setattr(redirecting, "_PARAMETERS", str(tmp_path))
    if value is not None:
        (tmp_path / "redirect_dir").write_text(value + "\n")
    upper = tmp_path / "upper"
    upper.mkdir()
    fd = os.open(upper, os.O_PATH)
    try:
        layer = Layer(0, str(upper), fd, is_upper=True)
        assert mode(None, TRUSTED, layer) == "on"
        os.setxattr(upper, "trusted.overlay.uuid", b"0" * 16)
        assert mode(None, TRUSTED, layer) == result
        assert mode("on", TRUSTED, layer) == "on"
    finally:
        os.close(fd)


def test_markers_follow_by_default_as_overlayfs() -> None:
    assert Markers(TRUSTED).redirects_of is None
    assert Markers(USER).redirects_of == os.geteuid()


@pytest.mark.parametrize(
    "redirect",
    [b"", b"/", b"//", b"a/b", b"/a/", b"/a//b", b"a//b", b".", b"..", b"/..", b"/a/..", b"/a/.", b"/f", b"f",
     b"/f/b", b"missing", b"/missing/b", b"/a/b", b"a", b"a\0/b", b"/a/b\0", b"/a\0", b"x" * 255, b"x" * 256],
)  # fmt: skip
@pytest.mark.parametrize("at", ["d", "in/d"])
def test_any_redirect_leads_where_the_kernel_goes(
    kernel_overlay: None, area: Path, redirect: bytes, at: str
) -> None:
    """Or fails with its error."""
    (area / "l0" / at).mkdir(parents=True)
    (area / "l1/a/b").mkdir(parents=True)
    (area / "l1/in/a").mkdir(parents=True)
    for name in ("f", "a/in_a", "a/b/in_b", "in/a/in_in_a"):
        (area / "l1" / name).touch()
    (area / "l1" / at).mkdir()
    os.setxattr(area / "l0" / at, "trusted.overlay.redirect", redirect)
    paths = [area / "l0", area / "l1"]
    expected: object
    with kernel_mounted(area, lowers=paths, options=["redirect_dir=follow"]) as kernel:
        expected = errno_of(os.listdir, kernel.mountpoint / at)
        if expected == 0:
            expected = set(os.listdir(kernel.mountpoint / at))
    stack = LayerStack.open([str(path) for path in paths], None, None)
    with closing(stack), closing(Union(stack)) as union:
        found: object
        try:
            found = {os.fsdecode(name) for name in names(union, at)}
        except OSError as error:
            found = error.errno
    assert found == expected
