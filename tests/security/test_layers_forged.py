"""Layers with forged markers: the union behaves like kernel overlayfs."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounting import kernel_mounted, mounted
from unionfs.union.diff import diff

TRUSTED = "trusted.overlay."


class Forge:
    """Three lowers and an upper, filled before the mount."""

    def __init__(self, root: Path, prefix: str = TRUSTED) -> None:
        self.root = root
        self.prefix = prefix
        self.layers = {name: root / name for name in ("upper", "l0", "l1", "l2")}
        self.work = root / "work"
        for path in (*self.layers.values(), self.work):
            path.mkdir(parents=True)

    def path(self, place: str) -> Path:
        """`l0:a/b` as a path; creates the directories above it."""
        layer, _, rest = place.partition(":")
        path = self.layers[layer] / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def file(self, place: str, text: str = "text") -> Path:
        path = self.path(place)
        path.write_text(text)
        return path

    def directory(self, place: str) -> Path:
        path = self.path(place)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mark(self, place: str, name: str, value: bytes = b"") -> None:
        os.setxattr(self.path(place), self.prefix + name, value, follow_symlinks=False)

    def whiteout(self, place: str) -> None:
        self.file(place, "")
        self.mark(place, "whiteout")

    def char(self, place: str) -> Path:
        path = self.path(place)
        os.mknod(path, stat.S_IFCHR | 0o600, 0)
        return path

    @contextmanager
    def mounted(self, session: str) -> Iterator[Path]:
        """The union by one session, or kernel overlayfs for `kernel`."""
        options = ["userxattr"] if self.prefix != TRUSTED else ["redirect_dir=on"]
        chosen: dict[str, Any] = {
            "lowers": [self.layers[name] for name in ("l0", "l1", "l2")],
            "upper": self.layers["upper"],
            "work": self.work,
            "options": options,
        }
        with (
            kernel_mounted(self.root, **chosen)
            if session == "kernel"
            else mounted(self.root, session=session, **chosen)
        ) as mount:
            yield mount.mountpoint


def _tried(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return call(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _listed(path: Path) -> Any:
    with os.scandir(path) as entries:
        return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)


def _facts(path: Path) -> Any:
    """For one object: the errno of stat, or all values independent of the filesystem."""
    st = _tried(os.lstat, path)
    if isinstance(st, str):
        return st
    xattrs = _tried(os.listxattr, path, follow_symlinks=False)
    facts: list[Any] = [oct(st.st_mode), st.st_uid, sorted(xattrs) if isinstance(xattrs, list) else xattrs]
    if stat.S_ISREG(st.st_mode):
        facts += [st.st_size, _tried(path.read_bytes)]
    elif stat.S_ISLNK(st.st_mode):
        facts.append(_tried(os.readlink, path))
    elif not stat.S_ISDIR(st.st_mode):
        facts.append(st.st_rdev)
    return facts


def _walk(top: Path, path: Path | None = None) -> dict[str, Any]:
    """List each directory before any lookup in it, and once more afterwards."""
    path = path or top
    name = str(path.relative_to(top))
    found: dict[str, Any] = {name: [_facts(path), _tried(_listed, path)]}
    if isinstance(found[name][1], str):
        return found
    for inner, is_directory in found[name][1]:
        if is_directory:
            found |= _walk(top, path / inner)
        else:
            found[str((path / inner).relative_to(top))] = _facts(path / inner)
    found[name].append(_tried(_listed, path))
    return found


def _removed(top: Path, names: list[str]) -> list[Any]:
    """The results of removing, renaming and creating these names."""
    said: list[Any] = []
    for name in names:
        path = top / name
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (os.rmdir, (path.parent,)),
            (os.rmdir, (path,)),
            (os.unlink, (path,)),
            (os.mkdir, (path,)),
            (os.mknod, (path,)),
            (os.rename, (path, f"{path}-new")),
            (os.rename, (path.parent / "good", path)),
            (os.chmod, (path, 0o700)),
        ]
        said += [(name, call.__name__, _tried(call, *arguments)) for call, arguments in calls]
        done = subprocess.run(["rm", "-r", path.parent], capture_output=True, check=False)
        said.append((name, done.returncode, os.path.lexists(path.parent)))
    return said


def _same(area: Path, session: str, make: Callable[[Forge], list[str]], prefix: str = TRUSTED) -> None:
    """Walks of both, and the results of operations on the names from `make`, are equal."""
    found = []
    for which in ("kernel", session):
        forge = Forge(area / which, prefix)
        names = make(forge)
        with forge.mounted(which) as top:
            found.append((_walk(top), _removed(top, names)))
    (kernel, kernel_said), (ours, said) = found
    different = [
        f"{key}: {kernel.get(key)} {ours.get(key)}"
        for key in {**kernel, **ours}
        if kernel.get(key) != ours.get(key)
    ]
    different += [f"{one} {other}" for one, other in zip(kernel_said, said, strict=True) if one != other]
    assert not different, "\n".join(different[:30])


REDIRECTS = {
    "dotdot": b"..", "empty": b"", "dot": b".", "relative": b"a/b", "up": b"../old", "nul": b"ol\0d",
    "ended": b"missing\0", "only-nul": b"\0", "absolute-dotdot": b"/%b/../old", "dotdot-first": b"/../%b/old",
    "absolute-dot": b"/./%b/old", "root": b"/", "double-slash": b"//%b/old", "slash-last": b"/%b/old/",
    "absolute-nul": b"/%b/missing\0x", "long": b"x" * 300, "longest": b"x" * 255,
    "absolute-long": b"/" + b"x" * 300, "longer-than-a-path": b"/" + b"/".join([b"x" * 200] * 15),
    "missing": b"nowhere", "absolute-missing": b"/no/where",
    "dotdot-below-missing": b"/no/../%b/old", "a-file": b"good", "absolute-file": b"/%b/good",
    "through-a-file": b"/%b/good/old", "spaces": b" ", "binary": b"\xff\xfe\x01", "newline": b"a\nb",
}  # fmt: skip


def _redirects(forge: Forge) -> list[str]:
    names = []
    for name, value in REDIRECTS.items():
        for layer in ("l0", "upper"):
            case = f"{name}-{layer}"
            for place in (f"{layer}:{case}/bad", f"l1:{case}/bad", f"l2:{case}/bad", f"l2:{case}/old"):
                forge.file(f"{place}/from-{place[:2]}")
            forge.file(f"{layer}:{case}/good")
            forge.mark(f"{layer}:{case}/bad", "redirect", value.replace(b"%b", case.encode()))
            names.append(f"{case}/bad")
    return names


def test_broken_redirects(kernel_overlay: None, area: Path, session: str) -> None:
    """The name cannot be looked up, or is not merged; its directory still lists it."""
    _same(area, session, _redirects)


def test_redirects_that_any_user_could_make(kernel_overlay: None, area: Path, session: str) -> None:
    """With the prefix `user.overlay.` none is followed: it would bypass the permissions on the way."""
    _same(area, session, _redirects, "user.overlay.")


def test_broken_redirects_among_many_names(kernel_overlay: None, area: Path, session: str) -> None:
    """A long listing uses READDIRPLUS and READDIR."""

    def make(forge: Forge) -> list[str]:
        for index in range(800):
            forge.file(f"l0:many/{index}-{'x' * 60}", "")
        for index in range(100):
            forge.directory(f"l0:many/bad{index}")
            forge.mark(f"l0:many/bad{index}", "redirect", b"..")
        forge.directory("l1:many")
        return []

    _same(area, session, make)


def test_a_walk_prepares_them_too(kernel_overlay: None, area: Path, session: str) -> None:
    """Listings of directories that a walk will list next are prepared."""

    def make(forge: Forge) -> list[str]:
        for index in range(40):
            forge.file(f"l0:tree/{index}/good")
            forge.directory(f"l0:tree/{index}/bad")
            if index % 3 == 0:
                forge.mark(f"l0:tree/{index}/bad", "redirect", b"..")
            forge.directory(f"l1:tree/{index}")
        return []

    _same(area, session, make)


def test_redirects_on_the_way(kernel_overlay: None, area: Path, session: str) -> None:
    """A directory in the path of an absolute redirect may itself be redirected, opaque or broken."""

    def make(forge: Forge) -> list[str]:
        names = []
        marks = [
            ("redirect", b".."), ("redirect", b""), ("redirect", b"a/b"), ("redirect", b"other"),
            ("redirect", b"/%b/other"), ("redirect", b"/%b/none"), ("opaque", b"y"), ("opaque", b"x"),
            ("opaque", b"yes"), ("redirect", b"other\0x"),
        ]  # fmt: skip
        for index, (name, value) in enumerate(marks):
            case = f"case{index}"
            forge.file(f"l0:{case}/bad/top")
            forge.mark(f"l0:{case}/bad", "redirect", f"/{case}/way/end".encode())
            for layer in ("l1", "l2"):
                forge.file(f"{layer}:{case}/way/end/way-{layer}")
                forge.file(f"{layer}:{case}/other/end/other-{layer}")
            forge.mark(f"l1:{case}/way", name, value.replace(b"%b", case.encode()))
            names.append(f"{case}/bad")
        return names

    _same(area, session, make)


def test_diff_lists_them(root: None, area: Path) -> None:
    forge = Forge(area / "x")
    _redirects(forge)
    lowers = [str(forge.layers[name]) for name in ("l0", "l1", "l2")]
    listed = {path: kind for kind, path in diff(str(forge.layers["upper"]), lowers, TRUSTED.encode())}
    assert listed[b"/dotdot-upper/bad"] == "C"
    assert b"/dotdot-l0/bad" not in listed


_EVERYWHERE = ("upper", "l0", "l1", "l2")


def _whiteout_shapes(forge: Forge) -> list[str]:
    """Positions of the whiteout, of its directory, and of an opaque.

    Excludes marks on another layer's directory alone: overlayfs hides these too, after its first lookup of
    any marked directory of the whiteout's layer.
    """
    names = []
    shapes: list[tuple[str, list[str], tuple[str, ...]]] = []
    for layer in ("l0", "l1", "l2", "upper"):
        for dirs in (_EVERYWHERE, ("l0", "l1", "l2"), (layer,)):
            for marked in ([], *([one] for one in dirs), list(dirs)):
                if layer == "upper" and "upper" in marked:
                    continue  # the union creates and hides such ones itself
                if marked and layer not in marked:
                    continue
                shapes.append((layer, marked, dirs))
    for index, (layer, marked, dirs) in enumerate(shapes):
        for value in (b"x", b"z", b"xx", b""):
            if value != b"x" and (not marked or index % 3):
                continue
            case = f"{index}-{layer}-{'.'.join(marked)}-{'.'.join(dirs)}-{value.decode()}"
            for one in dirs:
                forge.file(f"{one}:{case}/own-{one}")
            forge.whiteout(f"{layer}:{case}/bad")
            below = {"upper": "l0", "l0": "l1", "l1": "l2"}.get(layer)
            if below in dirs:
                forge.file(f"{below}:{case}/bad", "below")
            for one in marked:
                if one in dirs:
                    forge.mark(f"{one}:{case}", "opaque", value)
            if value != b"x":
                names.append(f"{case}/bad")
    return names


@pytest.mark.parametrize("prefix", [TRUSTED, "user.overlay."])
def test_xattr_whiteouts(kernel_overlay: None, area: Path, session: str, prefix: str) -> None:
    """A lookup finds none of them; a listing omits those whose directory is marked."""
    _same(area, session, _whiteout_shapes, prefix)


@pytest.mark.parametrize(("layer", "marked"), [("l0", "l1"), ("l0", "l2"), ("l1", "l0"), ("l0", "upper")])
def test_xattr_whiteouts_marked_in_another_layer(
    kernel_overlay: None, area: Path, session: str, layer: str, marked: str
) -> None:
    def make(forge: Forge) -> list[str]:
        for one in _EVERYWHERE:
            forge.file(f"{one}:case/own-{one}")
        forge.whiteout(f"{layer}:case/bad")
        forge.file("l2:case/bad", "below")
        forge.mark(f"{marked}:case", "opaque", b"x")
        return ["case/bad"]

    _same(area, session, make)


@pytest.mark.parametrize("marks", [[], ["l0"], ["l1"], ["l2"], ["l0", "l1", "l2"]], ids="+".join)
def test_xattr_whiteouts_in_the_root(
    kernel_overlay: None, area: Path, session: str, marks: list[str]
) -> None:
    def make(forge: Forge) -> list[str]:
        for layer, below in (("l0", "l1"), ("l1", "l2"), ("l2", "")):
            forge.whiteout(f"{layer}:bad-{layer}")
            if below:
                forge.file(f"{below}:bad-{layer}", "below")
        for layer in marks:
            forge.mark(f"{layer}:", "opaque", b"x")
        return []

    _same(area, session, make)


def _whiteouts_only(forge: Forge) -> None:
    for case, layer, mark in (("a", "l0", b"x"), ("b", "l0", b""), ("c", "l1", b"x"), ("d", "l2", b"x")):
        for one in ("l0", "l1", "l2"):
            forge.directory(f"{one}:{case}/dir")
        forge.whiteout(f"{layer}:{case}/dir/bad")
        if mark:
            forge.mark(f"{layer}:{case}/dir", "opaque", mark)


def test_directories_of_listed_whiteouts(kernel_overlay: None, area: Path, session: str) -> None:
    """They are not empty."""

    def make(forge: Forge) -> list[str]:
        _whiteouts_only(forge)
        return ["b/dir/bad", "d/dir/bad", "b/dir", "d/dir"]

    _same(area, session, make)


def test_directories_of_hidden_whiteouts(root: None, area: Path, session: str) -> None:
    """They are empty. (Linux 6.18 lists nothing in them either, but rmdir is ENOTEMPTY.)"""
    forge = Forge(area / "x")
    _whiteouts_only(forge)
    with forge.mounted(session) as top:
        for case in ("a", "c"):
            assert os.listdir(top / case / "dir") == []
            os.rmdir(top / case / "dir")
            assert os.listdir(top / case) == []


# -- odd xattrs on odd objects ------------------------------------------------------------------------------


def _opaque(forge: Forge) -> None:
    for index, value in enumerate((b"y", b"x", b"", b"n", b"yy", b"Y", b"y\0", b"1")):
        for layer in ("l0", "upper", "l2"):
            forge.file(f"{layer}:dir-{layer}{index}/top")
            forge.mark(f"{layer}:dir-{layer}{index}", "opaque", value)
            forge.file(f"l1:dir-{layer}{index}/below")
        for layer in ("l0", "upper"):
            for name, text in (("full", "text"), ("empty", "")):
                forge.file(f"{layer}:files/{name}-{layer}{index}", text)
                forge.mark(f"{layer}:files/{name}-{layer}{index}", "opaque", value)
                forge.file(f"l1:files/{name}-{layer}{index}", "below")
    os.symlink("x", forge.path("l0:files/link"))
    forge.mark("l0:files/link", "opaque", b"y")
    forge.file("l1:files/link", "below")


def _redirects_on_others(forge: Forge) -> None:
    forge.file("l1:d/other")
    for index, value in enumerate((b"other", b"..", b"", b"/d/other", b"a/b")):
        for layer in ("l0", "upper"):
            forge.file(f"{layer}:d/{layer}{index}", "top")
            forge.mark(f"{layer}:d/{layer}{index}", "redirect", value)
            forge.file(f"l1:d/{layer}{index}", "below")


def _whiteouts_that_are_none(forge: Forge) -> None:
    for layer in ("l0", "upper"):
        forge.file(f"{layer}:d/{layer}dir/in")
        forge.file(f"l1:d/{layer}dir/below")
        forge.directory(f"{layer}:d/{layer}empty")
        forge.directory(f"l1:d/{layer}empty")
        forge.file(f"{layer}:d/{layer}full", "text")
        forge.file(f"l1:d/{layer}full", "below")
        with forge.path(f"{layer}:d/{layer}sparse").open("w") as file:
            file.truncate(100_000)
        os.mkfifo(forge.path(f"{layer}:d/{layer}fifo"))
        os.symlink("x", forge.path(f"{layer}:d/{layer}link"))
        os.mknod(forge.path(f"{layer}:d/{layer}null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
        for name in ("dir", "empty", "full", "sparse", "fifo", "link", "null"):
            forge.mark(f"{layer}:d/{layer}{name}", "whiteout", b"y")
    # (overlayfs's first listing contains real ones in the upper, later ones do not)
    for index, value in enumerate((b"", b"y", b"n", b"x" * 100)):
        forge.file(f"l0:d/value{index}", "")
        forge.mark(f"l0:d/value{index}", "whiteout", value)
        forge.file(f"l1:d/value{index}", "below")


def _garbage(forge: Forge) -> None:
    values = (b"", b"x", b"\xff" * 300, b"\0" * 29, b"U+99", b"L-1", b"\0\xfb\x1d\0\0" + b"\1" * 20, b"ai")
    for name in ("origin", "impure", "nlink", "upper", "uuid", "index", "other"):
        for index, value in enumerate(values):
            for layer in ("l0", "upper"):
                case = f"{layer}-{name}{index}"
                forge.file(f"{layer}:d/{case}", "top")
                forge.mark(f"{layer}:d/{case}", name, value)
                forge.directory(f"{layer}:d/{case}-dir")
                forge.mark(f"{layer}:d/{case}-dir", name, value)
                forge.file(f"l1:d/{case}-dir/below")


def _devices(forge: Forge) -> None:
    """In merged directories; elsewhere overlayfs lists whiteouts too, unlike the union."""
    for layer in ("l0", "upper"):
        d = f"{layer}:{layer}"
        os.link(forge.char(f"{d}/whiteout"), forge.path(f"{d}/linked"))
        os.mknod(forge.path(f"{d}/mode"), stat.S_IFCHR | 0o777, 0)
        os.mknod(forge.path(f"{d}/block"), stat.S_IFBLK | 0o600, 0)
        os.mknod(forge.path(f"{d}/minor"), stat.S_IFCHR | 0o600, os.makedev(0, 1))
        os.mknod(forge.path(f"{d}/major"), stat.S_IFCHR | 0o600, os.makedev(1, 0))
        for name in ("whiteout", "linked", "mode", "block", "minor", "major", "more"):
            forge.file(f"l1:{layer}/{name}", "below")
    forge.char("l2:l0/lowest")
    forge.char("l2:root-lowest")
    forge.char("l0:root-whiteout")
    forge.file("l1:root-whiteout")


def _names_and_links(forge: Forge) -> None:
    forge.file(f"l0:d/{'n' * 255}")
    forge.file(f"l1:d/{'n' * 255}", "below")
    forge.directory(f"upper:d/{'u' * 255}")
    forge.file(f"l0:d/{'u' * 255}/file")
    for raw in (b"\xff\xfe", b"\n", b" ", b"...", b"-rf", b"\x1b[2J", b"#1", b"index"):
        forge.file(f"l0:d/{os.fsdecode(raw)}")
    targets = {"loop": "loop", "up": "..", "long": "x" * 4000, "absolute": "/etc", "dir": "d"}
    for name, target in targets.items():
        os.symlink(target, forge.path(f"l0:links/{name}"))
    forge.mark("l0:links/absolute", "redirect", b"/etc")
    forge.file("l1:links/absolute/passwd")
    forge.file("l1:links/dir/file")
    os.symlink("d", forge.path("l1:between"))
    forge.file("l0:between/above")
    forge.file("l2:between/below")
    for name, make in (("file", forge.file), ("whiteout", forge.whiteout), ("char", forge.char)):
        make(f"l1:{name}-between")
        forge.file(f"l0:{name}-between/above")
        forge.file(f"l2:{name}-between/below")
    os.mkfifo(forge.path("l1:fifo-between"))
    forge.file("l0:fifo-between/above")
    forge.file("l2:fifo-between/below")


def _many_xattrs(forge: Forge) -> None:
    for layer in ("l0", "upper"):
        forge.file(f"{layer}:{layer}/top")
        forge.file(f"l1:{layer}/below")
        forge.mark(f"{layer}:{layer}", "opaque", b"y")
        for index in range(200):
            if isinstance(_tried(forge.mark, f"{layer}:{layer}", "z" * 60 + str(index)), str):
                break


def _escaped(forge: Forge) -> None:
    forge.file("l0:d/file", "")
    for name in ("overlay.opaque", "overlay.whiteout", "overlay.overlay.opaque", "overlay.redirect"):
        forge.mark("l0:d", name, b"y")
        forge.mark("l0:d/file", name, b"y")
    for name in ("user.overlay.opaque", "user.overlay.whiteout", "trusted.overlay", "trusted.overlayx"):
        os.setxattr(forge.path("l0:d"), name, b"y")
    forge.file("l1:d/below")
    forge.file("l1:d/file", "below")


def _modes(forge: Forge) -> None:
    for mode in (0, 0o111, 0o444, 0o7777, 0o2755, 0o1777):
        forge.file(f"l0:dir{mode:o}/top")
        forge.file(f"l1:dir{mode:o}/below")
        for path in (forge.path(f"l0:dir{mode:o}"), forge.file(f"l0:file{mode:o}")):
            os.chown(path, 4294967294, 4294967294)
            path.chmod(mode)


def _roots(forge: Forge) -> None:
    for layer in _EVERYWHERE:
        forge.file(f"{layer}:{layer}")
        forge.mark(f"{layer}:", "opaque", b"y")
        forge.mark(f"{layer}:", "redirect", b"..")
        forge.mark(f"{layer}:", "whiteout")
        forge.mark(f"{layer}:", "metacopy")


@pytest.mark.parametrize(
    "make",
    [_opaque, _redirects_on_others, _whiteouts_that_are_none, _garbage, _devices, _names_and_links,
     _many_xattrs, _escaped, _modes, _roots],
)  # fmt: skip
def test_odd_markers(
    kernel_overlay: None, area: Path, session: str, make: Callable[[Forge], None]
) -> None:
    def made(forge: Forge) -> list[str]:
        make(forge)
        return []

    _same(area, session, made)
