"""`-v`, `--mount`, `--tmpfs` and `-u tmpfs:`: Docker's rules, and one sentence for each violation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings import parsing, tmpfs
from unionfs.settings.mount import MountSettings
from unionfs.settings.names import anonymous_name, is_name
from unionfs.settings.sizes import parse_count, parse_size, parse_tmpfs_size
from unionfs.settings.specs import BindSpec, TmpfsOptions, TmpfsSpec, VolumeSpec, from_json, to_json
from unionfs.storage.root import make_directory, storage_root

NAMES = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,20}", fullmatch=True)
STEPS = st.from_regex(r"[a-zA-Z0-9_.@-]{1,12}", fullmatch=True).filter(lambda step: step not in (".", ".."))
TARGETS = st.lists(STEPS, min_size=1, max_size=5).map(lambda steps: "/" + "/".join(steps))


def refusal(parse: Callable[[], object]) -> str:
    """The sentence of a refusal: one line that ends with a full stop."""
    with pytest.raises(UserError) as caught:
        parse()
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/data", VolumeSpec("/data", anonymous=True)),
        ("db:/data", VolumeSpec("/data", "db")),
        ("db:/data:ro", VolumeSpec("/data", "db", read_only=True)),
        ("db:/data:ro,nocopy,z", VolumeSpec("/data", "db", read_only=True, copy=False)),
        ("db:/data:", VolumeSpec("/data", "db")),
        ("db://data/../x/./y/", VolumeSpec("/x/y", "db")),
        ("/srv/site:/var/www", BindSpec("/var/www", "/srv/site", create=True)),
        ("/srv/site:/var/www:ro,Z", BindSpec("/var/www", "/srv/site", read_only=True, create=True)),
        ("//srv//site/:/w:rslave", BindSpec("/w", "/srv/site", propagation="rslave", create=True)),
        ("/:/host:ro", BindSpec("/host", "/", read_only=True, create=True)),
        # Docker accepts `ro` as a target only without a source whose mode it could be.
        ("ro:/data", VolumeSpec("/data", "ro")),
    ],
)
def test_volume(text: str, spec: object) -> None:
    assert parsing.parse_volume(text) == spec


def test_relative_sources_are_taken_against_the_callers_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, path in ((".", tmp_path), ("./a/..", tmp_path), ("../x", tmp_path.parent / "x")):
        assert parsing.parse_volume(f"{text}:/t") == BindSpec("/t", str(path), create=True)
        assert parsing.parse_mount(f"type=bind,src={text},dst=/t") == BindSpec("/t", str(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["source is empty"]),
        (":/data", ["source is empty"]),
        ("data", ["target data", "relative"]),
        ("db:data", ["target data", "relative"]),
        ("db:", ["target is empty"]),
        ("/", ["union's root"]),
        ("db:/", ["union's root"]),
        ("db:/a/..", ["union's root"]),
        ("db:/../..", ["union's root"]),
        ("/foo:ro", ["`ro`", "SOURCE:/target:ro"]),
        ("db:/data:rx", ["unknown mode rx", "nocopy"]),
        ("db:/data:ro,rw", ["`ro`", "`rw`", "exclude each other"]),
        ("db:/data:ro,ro", ["`ro`", "exclude each other"]),
        ("a:b:/c:ro", ["two colons", "--mount"]),
        ("/srv:/data:nocopy", ["`nocopy`", "volumes"]),
        ("db:/data:rshared", ["`rshared`", "bind mounts"]),
        ("x:/data", ["invalid volume name 'x'", "two characters"]),
        ("-x:/data", ["invalid volume name '-x'"]),
        ("a/b:/data", ["invalid volume name 'a/b'", "./NAME"]),
        (".hidden:/data", [".hidden is a relative path", "./"]),
        ("a" * 256 + ":/data", ["256 characters", "255"]),
    ],
)
def test_volume_refused(text: str, parts: list[str]) -> None:
    sentence = refusal(lambda: parsing.parse_volume(text))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("target=/data", VolumeSpec("/data", anonymous=True)),
        ("source=db,target=/data", VolumeSpec("/data", "db")),
        ("Type=VOLUME,src=db,dst=/data,ro", VolumeSpec("/data", "db", read_only=True)),
        ("type=volume,source=db,destination=/data,readonly=false", VolumeSpec("/data", "db")),
        (
            "source=db,target=/data,volume-driver=loop,volume-opt=size=1g,volume-opt=fs=ext4,volume-nocopy",
            VolumeSpec("/data", "db", driver="loop", options=(("fs", "ext4"), ("size", "1g")), copy=False),
        ),
        ("source=db,target=/data,volume-subpath=a/./b", VolumeSpec("/data", "db", subpath="a/b")),
        ("type=bind,source=/srv,target=/t", BindSpec("/t", "/srv")),
        (
            "type=bind,source=/srv,target=/t,readonly,bind-propagation=rslave,bind-create-src",
            BindSpec("/t", "/srv", read_only=True, propagation="rslave", create=True),
        ),
        ("type=bind,source=/srv,target=/t,bind-recursive=disabled", BindSpec("/t", "/srv", recursive=False)),
        (
            "type=bind,source=/srv,target=/t,ro,bind-recursive=writable",
            BindSpec("/t", "/srv", read_only=True, read_only_below=False),
        ),
        ("type=bind,source=/srv,target=/t,bind-nonrecursive", BindSpec("/t", "/srv", recursive=False)),
        ('type=bind,"source=/a,b:c",target=/t', BindSpec("/t", "/a,b:c")),
        ("type=tmpfs,target=/run,consistency=cached", TmpfsSpec("/run", TmpfsOptions(mode=0o1777))),
        (
            "type=tmpfs,target=/run,tmpfs-size=1.5m,tmpfs-mode=700,ro",
            TmpfsSpec("/run", TmpfsOptions(size="1572864", mode=0o700), read_only=True),
        ),
        ("type=tmpfs,target=/run,tmpfs-size=0", TmpfsSpec("/run", TmpfsOptions(mode=0o1777))),
    ],
)
def test_mount(text: str, spec: object) -> None:
    assert parsing.parse_mount(text) == spec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["target is missing"]),
        ("type=bind,source=/srv", ["target is missing", "target=/path"]),
        ("type=bind,target=/t", ["source is missing"]),
        ("type=bind,source=srv,target=/t", ["bind source srv", "relative"]),
        ("type=nfs,target=/t", ["unknown type nfs", "volume, bind and tmpfs"]),
        ("type=tmpfs,source=x,target=/t", ["source cannot go with type tmpfs"]),
        ("type=bind,source=/s,target=/t,color=red", ["unknown key color", "bind-propagation"]),
        ("type=bind,source=/s,target=/t,nonsense", ["nonsense is not a key=value"]),
        ("type=bind,source=/s,target=/t,volume-nocopy", ["volume-nocopy cannot go with type bind"]),
        ("type=volume,source=db,target=/t,tmpfs-size=1m", ["tmpfs-size cannot go with type volume"]),
        ("type=tmpfs,target=/t,bind-propagation=rslave", ["bind-propagation cannot go with type tmpfs"]),
        ("type=tmpfs,target=/t,volume-opt=a=b", ["volume-opt cannot go with type tmpfs"]),
        ("source=db,target=/t,readonly=maybe", ["readonly=maybe", "true or false"]),
        ("source=db,target", ["target has no value"]),
        ("source=db,target=t", ["target t", "relative"]),
        ("source=db,target=/t,volume-opt==x", ["volume-opt has no name"]),
        ("type=bind,source=/s,target=/t,bind-propagation=up", ["bind-propagation=up", "rslave"]),
        ("type=bind,source=/s,target=/t,bind-recursive=readonly", ["needs readonly"]),
        ("type=tmpfs,target=/t,tmpfs-size=big", ["tmpfs-size=big", "64m"]),
        ("type=tmpfs,target=/t,tmpfs-size=", ["tmpfs-size="]),
        ("type=tmpfs,target=/t,tmpfs-mode=9", ["tmpfs-mode=9", "octal"]),
        ("type=tmpfs,target=/t,tmpfs-mode=-7", ["tmpfs-mode=-7", "octal"]),
        ("target=/t,readonly", ["anonymous volume", "read-only"]),
        ("target=/t,volume-subpath=a", ["anonymous volume", "source=NAME"]),
        ("source=db,target=/t,volume-subpath=../a", ["../a", "out of the volume"]),
        ("source=db,target=/t,volume-subpath=/a", ["/a", "out of the volume"]),
        ('source=db,"target=/t', ["CSV", "quotes"]),
        ("source=d/b,target=/t", ["invalid volume name 'd/b'"]),
    ],
)
def test_mount_refused(text: str, parts: list[str]) -> None:
    sentence = refusal(lambda: parsing.parse_mount(text))
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/run", TmpfsSpec("/run", TmpfsOptions(mode=0o1777))),
        (
            "/run:rw,size=100m,mode=0700,nr_inodes=1k,uid=5,gid=6,noswap,exec",
            TmpfsSpec(
                "/run", TmpfsOptions("104857600", 0o700, "1024", 5, 6, swap=False), flags=("nosuid", "nodev")
            ),
        ),
        ("/run:ro,size=50%,swap", TmpfsSpec("/run", TmpfsOptions("50%", 0o1777, swap=True), read_only=True)),
        ("/run:huge=never", TmpfsSpec("/run", TmpfsOptions(mode=0o1777, more=(("huge", "never"),)))),
    ],
)
def test_tmpfs(text: str, spec: object) -> None:
    assert tmpfs.parse_tmpfs(text) == spec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run", ["target run", "relative"]),
        ("/", ["root"]),
        ("/run:size=1x", ["size=1x", "64m"]),
        ("/run:size=0%", ["size=0%"]),
        ("/run:size=200%", ["size=200%"]),
        ("/run:mode=8", ["mode=8"]),
        ("/run:uid=root", ["uid=root"]),
        ("/run:nr_inodes=-1", ["nr_inodes=-1"]),
        ("/run:colour", ["unknown option colour"]),
    ],
)
def test_tmpfs_refused(text: str, parts: list[str]) -> None:
    sentence = refusal(lambda: tmpfs.parse_tmpfs(text))
    for part in parts:
        assert part in sentence


def test_tmpfs_upper() -> None:
    assert tmpfs.is_tmpfs_upper("tmpfs")
    assert tmpfs.is_tmpfs_upper("tmpfs:size=64m")
    assert not tmpfs.is_tmpfs_upper("./tmpfs")
    assert not tmpfs.is_tmpfs_upper("tmpfs2")
    assert tmpfs.parse_tmpfs_upper("tmpfs") == TmpfsOptions()
    assert tmpfs.parse_tmpfs_upper("tmpfs:size=64m") == TmpfsOptions(size="67108864")
    assert "size=1z" in refusal(lambda: tmpfs.parse_tmpfs_upper("tmpfs:size=1z"))
    assert "unknown option ro" in refusal(lambda: tmpfs.parse_tmpfs_upper("tmpfs:ro"))


def test_order_and_double_targets() -> None:
    found = parsing.parse_all(["aa:/a/b/c", "bb:/a"], ["source=cc,target=/a/b"], ["/z"])
    assert [spec.target for spec in found] == ["/a", "/z", "/a/b", "/a/b/c"]
    for double in (["aa:/a", "bb:/a"], ["aa:/a", "bb:/x/../a/"]):
        assert "/a is given twice" in refusal(lambda double=double: parsing.parse_all(double, [], []))
    assert "/run is given twice" in refusal(lambda: parsing.parse_all(["aa:/run"], [], ["/run"]))


def test_sizes() -> None:
    # github.com/docker/go-units, size_test.go: TestRAMInBytes
    for text, size in {
        "32": 32, "32b": 32, "32B": 32, "32k": 32 << 10, "32K": 32 << 10, "32kb": 32 << 10, "32Kb": 32 << 10,
        "32Mb": 32 << 20, "32MB": 32 << 20, "32Gb": 32 << 30, "32G": 32 << 30, "32Tb": 32 << 40,
        "32.5 MB": int(32.5 * (1 << 20)), "32MiB": 32 << 20, "0": 0,
    }.items():  # fmt: skip
        assert parse_size(text) == size, text
    for text in ("", "hello", "-32", " 32", "32 ", "32m ", "32mm", "32bm", ".3kB", "32.", "1e3", "9999999p"):
        with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
            parse_size(text)
    assert parse_tmpfs_size("100%") == "100%"
    assert parse_count("2m") == str(2 << 20)


@given(st.text(max_size=40))
def test_no_text_is_a_crash(text: str) -> None:
    for parse in (parsing.parse_volume, parsing.parse_mount, tmpfs.parse_tmpfs, tmpfs.parse_tmpfs_upper):
        try:
            spec = parse(text)
        except UserError as error:
            sentence = str(error)
        else:
            target = getattr(spec, "target", "/x")
            assert target.startswith("/")
            assert not {"", ".", ".."} & set(target.split("/")[1:])
            continue
        assert sentence.endswith(".")
        assert "\n" not in sentence


@given(NAMES, TARGETS, st.booleans(), st.booleans())
def test_both_forms_say_the_same(name: str, target: str, read_only: bool, nocopy: bool) -> None:
    modes = [word for word, wanted in (("ro", read_only), ("nocopy", nocopy)) if wanted]
    short = f"{name}:{target}" + (":" + ",".join(modes) if modes else "")
    long = f"type=volume,source={name},target={target}" + (",readonly" if read_only else "")
    long += ",volume-nocopy" if nocopy else ""
    assert parsing.parse_volume(short) == parsing.parse_mount(long)
    assert is_name(name)


@given(
    st.lists(
        st.one_of(
            st.builds(
                VolumeSpec, TARGETS, st.none() | NAMES, st.booleans(), options=st.just((("a", "b"),))
            ),
            st.builds(BindSpec, TARGETS, TARGETS, st.booleans(), st.sampled_from(["rprivate", "rslave"])),
            st.builds(
                TmpfsSpec,
                TARGETS,
                st.builds(TmpfsOptions, st.none() | st.just("64"), st.none() | st.just(0o700)),
            ),
        ),
        max_size=4,
    ),
    st.none() | st.just(TmpfsOptions(size="1", more=(("huge", "never"),))),
)
def test_settings_go_through_json(specs: list[VolumeSpec | BindSpec | TmpfsSpec], upper: object) -> None:
    for spec in specs:
        assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    settings = settle("/", lowers=["/"], upper="tmpfs:size=1,huge=never" if upper else None, storage=specs)
    assert settings.upper_tmpfs == upper
    assert settings.storage == tuple(specs)
    assert MountSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_of_an_older_daemon() -> None:
    settings = settle("/", lowers=["/"])
    values = settings.to_json()
    for name in ("upper_tmpfs", "storage", "storage_root", "lives_with"):
        del values[name]
    assert MountSettings.from_json(values) == settings


def test_upper_in_memory_takes_no_work() -> None:
    assert "work /w" in refusal(lambda: settle("/", lowers=["/"], upper="tmpfs", work="/w"))
    settings = settle("/", lowers=["/"], upper="tmpfs")
    assert not settings.read_only
    assert settle("/", lowers=["/"], upper="tmpfs", options=["ro"]).read_only


def test_anonymous_names() -> None:
    name = anonymous_name()
    assert len(name) == 64
    assert set(name) <= set("0123456789abcdef")
    assert is_name(name)
    assert name != anonymous_name()


def test_storage_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_root("/r", {"UNIONFS_ROOT": "/e"}) == "/r"
    assert storage_root("r", {}) == f"{tmp_path}/r"
    assert storage_root(None, {"UNIONFS_ROOT": "/e"}) == "/e"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("unionfs.storage.root.is_host_root", lambda: True)
    assert storage_root(None, {"XDG_DATA_HOME": "/d"}) == "/var/lib/unionfs"
    monkeypatch.setattr("unionfs.storage.root.is_host_root", lambda: False)
    assert storage_root(None, {"XDG_DATA_HOME": "/d"}) == "/d/unionfs"
    assert storage_root(None, {"XDG_DATA_HOME": "d", "HOME": "/h"}) == "/h/.local/share/unionfs"
    assert "--root" in refusal(lambda: storage_root(""))


def test_directories_of_the_root_are_closed_to_others(tmp_path: Path) -> None:
    import os

    old = os.umask(0)
    try:
        make_directory(str(tmp_path / "a/b"))
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    assert "cannot be made" in refusal(lambda: make_directory(str(tmp_path / "file/x")))


def test_asdict_of_options_is_complete() -> None:
    options = TmpfsOptions("1", 0o700, "2", 3, 4, True, (("huge", "never"),))
    assert TmpfsOptions.from_json(json.loads(json.dumps(asdict(options)))) == options
    assert options.parameters() == [
        ("size", "1"), ("mode", "700"), ("nr_inodes", "2"), ("uid", "3"), ("gid", "4"), ("huge", "never"),
    ]  # fmt: skip
