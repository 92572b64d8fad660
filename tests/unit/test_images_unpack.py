"""Layers unpacked: the kernel's format, compared with kernel overlayfs, and hostile layers."""

from __future__ import annotations

import codecs
import os
import stat
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import mounting
from tests.support.layers import (
    Member,
    device,
    digest,
    directory,
    file,
    hard_link,
    opaque,
    symlink,
    tar,
    whiteout,
)
from unionfs.errors import UserError
from unionfs.images.layers import import_layer
from unionfs.images.rules import DEFAULTS, Rules


def unpacked(area: Path, *members: Member, rules: Rules = DEFAULTS, name: str = "layer") -> Path:
    """The directory of a layer."""
    (area / "layer.tar").write_bytes(tar(members))
    target = area / name
    _, diff_id = import_layer(str(area / "layer.tar"), str(target), userxattr=False, rules=rules)
    assert diff_id == digest((area / "layer.tar").read_bytes())
    return target


def names_over(area: Path, layer: Path, lower: Path) -> list[str]:
    """The paths that kernel overlayfs shows of a layer over a lower."""
    with mounting.kernel_mounted(area, lowers=[layer, lower]) as mount:
        return sorted(str(path.relative_to(mount.mountpoint)) for path in mount.mountpoint.rglob("*"))


@pytest.fixture
def lower(kernel_overlay: None, area: Path) -> Path:
    for name in ("d/x", "d/y", "e/x", "f"):
        path = area / "lower" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return area / "lower"


@pytest.mark.parametrize(
    ("members", "shown"),
    [
        ([directory("d"), whiteout("d/x"), whiteout("f")], ["d", "d/y", "e", "e/x"]),
        ([directory("d"), opaque("d"), file("d/new")], ["d", "d/new", "e", "e/x", "f"]),
        ([directory("d"), file("d/new"), opaque("d")], ["d", "d/new", "e", "e/x", "f"]),
        # What stands beside its own whiteout stays, in either order.
        ([whiteout("d"), directory("d"), file("d/new")], ["d", "d/new", "e", "e/x", "f"]),
        ([directory("d"), file("d/new"), whiteout("d")], ["d", "d/new", "e", "e/x", "f"]),
        ([whiteout("f"), file("f", b"2")], ["d", "d/x", "d/y", "e", "e/x", "f"]),
        ([file("f", b"2"), whiteout("f")], ["d", "d/x", "d/y", "e", "e/x", "f"]),
        ([whiteout("d"), file("d/x/z")], ["d", "d/x", "d/x/z", "e", "e/x", "f"]),
        ([file("d")], ["d", "e", "e/x", "f"]),
        ([file(".wh..wh.plnk/1"), file(".wh..wh.aufs")], ["d", "d/x", "d/y", "e", "e/x", "f"]),
    ],
    ids=lambda value: "",
)
def test_whiteouts_are_the_kernels(lower: Path, area: Path, members: list[Member], shown: list[str]) -> None:
    if any(isinstance(m, tuple) and m[0].name.startswith(".wh..wh.plnk/") for m in members):
        members = members[1:]
    assert names_over(area, unpacked(area, *members), lower) == shown


def test_attributes_links_and_times(root: None, area: Path) -> None:
    layer = unpacked(
        area,
        directory("d", uid=5, gid=6),
        file("d/f", b"data", mode=0o4711, uid=1000, gid=1001, pax_headers={
            "mtime": "12.5", "SCHILY.xattr.user.k": "v", "SCHILY.xattr.trusted.overlay.opaque": "y",
            "SCHILY.xattr.security.selinux": "label",
        }),
        hard_link("g", "./d/f"),
        symlink("s", "/etc/passwd", uid=7),
        file("no/parents/f"),
        _fifo("p"),
    )  # fmt: skip
    status = (layer / "d/f").stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4711, 1000, 1001)
    assert status.st_mtime_ns == 12_500_000_000
    assert os.path.samefile(layer / "g", layer / "d/f")
    assert os.readlink(layer / "s") == "/etc/passwd"
    assert (layer / "s").lstat().st_uid == 7
    assert (layer / "d").stat().st_mtime == 1_600_000_000
    assert stat.S_IMODE((layer / "no").stat().st_mode) == 0o755
    assert stat.S_ISFIFO((layer / "p").stat().st_mode)
    # A marker of overlayfs in a layer is a user's xattr, and a label of another host is none of this one.
    assert sorted(os.listxattr(layer / "d/f")) == ["trusted.overlay.overlay.opaque", "user.k"]


def _fifo(name: str) -> Member:
    member = tarfile.TarInfo(name)
    member.type = tarfile.FIFOTYPE
    return member


def test_zeros_become_holes(root: None, area: Path) -> None:
    layer = unpacked(area, file("f", bytes(8 << 20) + b"end"))
    status = (layer / "f").stat()
    assert (status.st_size, (layer / "f").read_bytes()[-3:]) == ((8 << 20) + 3, b"end")
    assert status.st_blocks * 512 < 1 << 20


HOSTILE: dict[str, tuple[list[Member], str]] = {
    "dots": ([file("../../../../tmp/escaped")], "leads out of the layer"),
    "dots inside": ([file("a/../../escaped")], "leads out of the layer"),
    "absolute": ([file("/tmp/escaped")], "is absolute"),
    "symlink": ([symlink("s", "/tmp"), file("s/escaped")], "which is not a directory"),
    "relative symlink": ([symlink("s", "../.."), file("s/escaped")], "which is not a directory"),
    "hard link out": ([hard_link("h", "../../../etc/passwd")], "leads out of the layer"),
    "absolute hard link": ([hard_link("h", "/etc/passwd")], "is absolute"),
    "hard link through a symlink": ([symlink("s", "/etc"), hard_link("h", "s/passwd")], "not a directory"),
    "hard link to nothing": ([hard_link("h", "lower-only")], "which is not there"),
    "hard link to itself": ([hard_link("h", "./h")], "leads to itself"),
    "hard link to a directory": ([directory("d"), hard_link("h", "d")], "leads to a directory"),
    "hard link to a whiteout": ([whiteout("w"), hard_link("h", "w")], "leads to a whiteout"),
    "hard link to a whiteout's name": ([whiteout("w"), hard_link("h", ".wh.w")], "leads to a whiteout"),
    "two files": ([file("f", b"1"), file("f", b"2")], "two entries"),
    "two kinds": ([directory("d"), file("d")], "two entries"),
    "a file, then below it": ([file("f"), file("f/g")], "not a directory"),
    "two whiteouts": ([whiteout("f"), whiteout("f")], "two whiteouts"),
    "a line feed": ([file("a\nb")], "--any-name"),
    "an escape sequence": ([file("a\x1b[31m")], "--any-name"),
    "a line feed in a link": ([file("f"), hard_link("h", "f\n")], "--any-name"),
    "a whiteout of ..": ([file("d/.wh...")], "hides nothing"),
    "a whiteout of nothing": ([file(".wh.")], "hides nothing"),
    "below a whiteout": ([file(".wh.d/f")], "below a whiteout"),
    "a device 0/0": ([device("w", 0, 0)], "character device 0/0"),
    "no root": ([file(".", b"x")], "root is not a directory"),
    "an owner that is none": ([file("f", uid=2**32 - 1)], "not a user id"),
    "a time out of range": ([file("f", pax_headers={"mtime": "99999999999999"})], "out of range"),
    "an ACL that is none": ([file("f", pax_headers={"SCHILY.acl.access": "user:9999999999:r--"})], "ACL"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layers_are_refused(name: str, root: None, area: Path) -> None:
    members, words = HOSTILE[name]
    with pytest.raises(UserError) as refused:
        unpacked(area, *members)
    text = str(refused.value)
    assert words in text
    assert text.startswith("the layer ")
    assert text.isprintable()
    assert text.endswith(".")
    # Neither the target nor anything beside it is left.
    assert sorted(path.name for path in area.iterdir()) == ["layer.tar"]
    assert "escaped" not in {*os.listdir("/tmp"), *os.listdir(area.parent)}


def test_names_that_are_asked_for(root: None, area: Path) -> None:
    layer = unpacked(area, file("a\nb"), rules=Rules(any_name=True))
    assert os.listdir(layer) == ["a\nb"]


def test_a_directory_may_be_named_twice(root: None, area: Path) -> None:
    layer = unpacked(area, directory("d", uid=1), file("d/f"), directory("d", uid=2))
    assert (layer / "d").stat().st_uid == 2


@pytest.mark.parametrize(
    ("rules", "members", "words"),
    [
        (replace(DEFAULTS, entries=3), [file(f"f{n}") for n in range(4)], "--max-entries"),
        (replace(DEFAULTS, entries=3), [file("a/b/c/d")], "--max-entries"),
        (replace(DEFAULTS, size=100_000), [file("f", b"x" * 200_000)], "--max-size"),
    ],
)
def test_limits(root: None, area: Path, rules: Rules, members: list[Member], words: str) -> None:
    with pytest.raises(UserError, match=words):
        unpacked(area, *members, rules=rules)
    assert sorted(path.name for path in area.iterdir()) == ["layer.tar"]


@pytest.mark.parametrize("program", ["gzip", "zstd"])
def test_a_decompression_bomb_is_refused(root: None, area: Path, program: str) -> None:
    size = 600 << 20
    with open(area / "plain", "wb") as out:
        out.write(tar([file("f", b"")])[:512].replace(b"00000000000\0", b"%011o\0" % size, 1))
    # The header's sum is wrong, but the ratio is noticed in the data before the end, or never.
    data = bytearray((area / "plain").read_bytes())
    data[148:156] = b"%06o\0 " % (sum(data) - sum(data[148:156]) + 256)
    (area / "plain").write_bytes(data)
    os.truncate(area / "plain", 512 + size + 1024)
    with open(area / "bomb", "wb") as out:
        subprocess.run([program, "-c", area / "plain"], check=True, stdout=out)
    (area / "plain").unlink()
    with pytest.raises(UserError, match="--max-ratio"):
        import_layer(str(area / "bomb"), str(area / "out"), userxattr=False, rules=DEFAULTS)
    assert sorted(path.name for path in area.iterdir()) == ["bomb"]


def test_an_ordinary_user(root: None, area: Path) -> None:
    os.chown(area, 1000, 1000)
    (area / "layer.tar").write_bytes(
        tar([directory("d"), whiteout("d/x"), opaque("d"), file("f", b"1", mode=0o4755)])
    )
    (area / "device.tar").write_bytes(tar([device("null", 1, 3)]))
    said = as_user(area, "layer.tar", "out")
    assert any("only root can restore owners" in note for note in said)
    status = (area / "out/f").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (1000, 0o755)
    assert os.getxattr(area / "out/d", "user.overlay.opaque") == b"y"
    said = as_user(area, "device.tar", "out2")
    assert "null is a device file, which only root can make" in said[0]
    assert not (area / "out2").exists()
    said = as_user(area, "device.tar", "out2", Rules(skip_devices=True))
    assert "device files were left out, as null." in said
    assert os.listdir(area / "out2") == []


def as_user(area: Path, source: str, target: str, rules: Rules = DEFAULTS) -> list[str]:
    """Import a layer as uid 1000; returns the notes, or the error."""
    codecs.lookup("ascii")  # its module, which the user may not be able to read
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(1000, 1000, 1000)
            os.setresuid(1000, 1000, 1000)
            try:
                contents, _ = import_layer(
                    str(area / source), str(area / target), userxattr=True, rules=rules
                )
                os.write(writer, "\n".join(contents.notes).encode())
            except UserError as error:
                os.write(writer, str(error).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said.splitlines()
