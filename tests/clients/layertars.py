"""The layers of a saved image as comparable values, and what they make of the tree below them.

The format of whiteouts: the OCI image specification, layer.md.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True)
class Entry:
    """A member of a layer; ``mtime`` in whole seconds, None if it is of the build's own time."""

    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int | None
    target: str = ""
    content: str = ""
    xattrs: tuple[tuple[str, str], ...] = ()
    rdev: tuple[int, int] = (0, 0)


Layer = dict[str, Entry]
"""Members by path; whiteouts are members, too."""
Tree = dict[str, Entry]


def read(archive: Path, since: float) -> list[Layer]:
    """The layers of an image from `podman save --format docker-archive` or `docker save`, the lowest first.

    Times from ``since`` on are those of the build.
    """
    with tarfile.open(archive) as outer:
        manifest: list[dict[str, Any]] = json.load(_member(outer, "manifest.json"))
        layers = []
        for name in manifest[0]["Layers"]:
            with tarfile.open(fileobj=_member(outer, name)) as tar:
                layers.append(_layer(tar, since))
        return layers


def _member(tar: tarfile.TarFile, name: str) -> Any:
    found = tar.getmember(name)
    while found.issym():  # a layer that occurs twice
        found = tar.getmember(str(Path(name).parent.joinpath(found.linkname)))
    return tar.extractfile(found)


def _layer(tar: tarfile.TarFile, since: float) -> Layer:
    layer: Layer = {}
    for member in tar:
        path = member.name.removeprefix("./").rstrip("/") or "."
        content = ""
        if member.isreg():
            file = tar.extractfile(member)
            assert file is not None
            content = hashlib.file_digest(file, "blake2b").hexdigest()  # type: ignore[arg-type]
        xattrs = tuple(sorted(
            (key.removeprefix("SCHILY.xattr."), value)
            for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")
        ))  # fmt: skip
        target = member.linkname.removeprefix("./") if member.islnk() else member.linkname
        layer[path] = Entry(
            member.type, member.mode & 0o7777, member.uid, member.gid,
            None if member.mtime >= since - 1 else int(member.mtime), target, content, xattrs,
            (member.devmajor, member.devminor) if member.isdev() else (0, 0),
        )  # fmt: skip
    return layer


def _below(tree: Tree, path: str) -> list[str]:
    return [name for name in tree if name.startswith(f"{path}/")]


def apply(tree: Tree, layer: Layer) -> Tree:
    """The tree with a layer on top. A hard link is stored as a copy of its target's entry."""
    new = dict(tree)
    for path in layer:
        parent, _, name = path.rpartition("/")
        if name == OPAQUE:
            gone = _below(tree, parent)
        elif name.startswith(WHITEOUT):
            victim = f"{parent}/{name.removeprefix(WHITEOUT)}".lstrip("/")
            gone = [victim, *_below(tree, victim)]
        else:
            continue
        for victim in gone:
            new.pop(victim, None)
    links = []
    for path, entry in layer.items():
        if path.rpartition("/")[2].startswith(WHITEOUT):
            continue
        if entry.kind != tarfile.DIRTYPE:
            for victim in _below(new, path):
                if victim not in layer:
                    del new[victim]
        if entry.kind == tarfile.LNKTYPE:
            links.append(path)
        else:
            new[path] = entry
    for path in links:
        new[path] = new[layer[path].target]
    return new


def link_groups(layer: Layer) -> list[list[str]]:
    """The names of each hard-linked file of a layer."""
    groups: dict[str, list[str]] = {}
    for path, entry in layer.items():
        if entry.kind == tarfile.LNKTYPE:
            groups.setdefault(entry.target, [entry.target]).append(path)
    return sorted(sorted(group) for group in groups.values())


def without_link_order(layer: Layer) -> Layer:
    """The layer with each hard link as a copy of its target: which name comes first does not matter."""
    return {
        path: layer[entry.target] if entry.kind == tarfile.LNKTYPE else entry for path, entry in layer.items()
    }


def differences(ours: Layer, kernels: Layer, before: Tree) -> dict[str, str]:
    """Members of two layers over the same tree that differ, except for noise, with a description.

    Noise, because no reader of the image sees it. The kernel's layers are packed from the upper, ours from a
    comparison of two trees, since podman does so with every mount program.

    - A directory or file that is as it was below, in one of them only: the upper has the parents of what was
      changed, and copies of what was opened for writing or got the attributes it had.
    - A whiteout of something that is not below, or that lies in a directory which is itself removed.
    - A new hard link of a file below: podman's comparison does not see that the other name belongs to it.
    - An opaque directory in one, whiteouts of everything in it in the other.
    """
    first, second = without_link_order(ours), without_link_order(kernels)
    found = {}
    for path in sorted(first.keys() | second.keys()):
        mine, other = first.get(path), second.get(path)
        if mine == other or path.rpartition("/")[2].startswith(WHITEOUT):
            continue
        present = mine or other
        if (mine is None or other is None) and _same(before.get(path), present):
            continue
        found[path] = f"{mine} instead of {other}"
    after_first, after_second = apply(before, ours), apply(before, kernels)
    for path in sorted(before.keys() & (after_first.keys() ^ after_second.keys())):
        found[path] = "removed only by ours" if path in after_second else "removed only by the kernel's"
    groups = [
        sorted(filter(None, (_changed_names(group, layer, before) for group in link_groups(layer))))
        for layer in (ours, kernels)
    ]
    if groups[0] != groups[1]:
        found["hard links"] = f"{groups[0]} instead of {groups[1]}"
    return found


def _changed_names(group: list[str], layer: Layer, before: Tree) -> list[str]:
    """The names of a hard-linked file that are not as below; none if that leaves only one."""
    plain = without_link_order(layer)
    changed = [name for name in group if not _same(before.get(name), plain[name])]
    return changed if len(changed) > 1 else []


def _same(below: Entry | None, now: Entry | None) -> bool:
    if below is None or now is None:
        return False
    if below.kind == tarfile.DIRTYPE:  # the time of a directory changes with its entries
        return replace(below, mtime=None) == replace(now, mtime=None)
    return below == now
