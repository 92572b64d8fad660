"""Parsing `-o`: accepted, ignored and refused options."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.daemon.settle import absolute_mountpoint, settle
from unionfs.errors import UserError
from unionfs.settings.features import VALUES, Features
from unionfs.settings.mount import MountSettings
from unionfs.settings.options import (
    KEYS,
    WORDS,
    parse_options,
    split_lowers,
    split_options,
    unescape_option,
)
from unionfs.settings.parsing import parse_all
from unionfs.settings.shown import Shown


def _escape(text: str, also: str) -> str:
    return "".join("\\" + char if char in "\\" + also else char for char in text)


_PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(_PATHS, min_size=1, max_size=4), _PATHS, _PATHS)
def test_every_escaped_path_comes_back(lowers: list[str], upper: str, work: str) -> None:
    data = "lowerdir=" + ":".join(_escape(path, ":,") for path in lowers)
    data += f",upperdir={_escape(upper, ':,')},,workdir={_escape(work, ',')},ro"
    options = parse_options([data])
    assert (options.lowers, options.upper, options.work) == (lowers, upper, work)
    assert options.read_only


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    # Every failure is a sentence for the user.
    with contextlib.suppress(UserError):
        parse_options([text])


@given(st.text(st.characters(exclude_characters="\\"), max_size=20))
def test_unescape_leaves_plain_text(text: str) -> None:
    assert unescape_option(text) == text
    assert unescape_option(_escape(text, ",:")) == text


def test_split() -> None:
    assert list(split_options("a,,b=1,c=x\\,y,d=,")) == [("a", None), ("b", "1"), ("c", "x\\,y"), ("d", "")]
    assert list(split_options("")) == []
    assert split_lowers("a:b\\:c:d\\\\") == ["a", "b:c", "d\\"]


def test_selinux_context_in_quotes() -> None:
    options = parse_options(['context="system_u:object_r:container_file_t:s0:c1,c2",ro'])
    assert options.security == ['context="system_u:object_r:container_file_t:s0:c1,c2"']
    assert options.read_only
    settings = settle("/m", options=['lowerdir=/l,context="a,b"'], trusted_xattrs=True)
    assert 'context="a\\,b"' in settings.fuse_options()


def test_a_quote_in_a_path_is_a_character() -> None:
    assert parse_options(['lowerdir="a:b",ro']).lowers == ['"a', 'b"']


def test_lowers_one_by_one() -> None:
    assert parse_options(["lowerdir+=a:b,lowerdir+=c"]).lowers == ["a:b", "c"]
    with pytest.raises(UserError, match="one of the two"):
        parse_options(["lowerdir=a,lowerdir+=b"])


def test_last_of_contradicting_flags_counts() -> None:
    assert not parse_options(["ro,rw"]).read_only
    assert parse_options(["rw", "ro"]).read_only
    settings = settle("/m", options=["lowerdir=/l,exec,noexec,nodev,dev"], trusted_xattrs=True)
    assert "noexec" in settings.flags


def test_same_layer_twice_is_only_fine_when_the_same() -> None:
    assert parse_options(["upperdir=a", "upperdir=a"]).upper == "a"
    for option in ("upperdir=a,upperdir=b", "workdir=a,workdir=b", "lowerdir=a,lowerdir=b"):
        with pytest.raises(UserError, match="given twice"):
            parse_options([option])


@pytest.mark.parametrize(
    "option",
    ["squash_to_root=0", "xattr_permissions=0", "plugins=", "redirect_dir=off", "timeout", "timeout=3",
     "user=me", "X-mount.mkdir", "x-gvfs-show", "comment=a", "noxattrs=1",
     "max_threads=3", "lazytime", "nonempty"],
)  # fmt: skip
def test_harmless_options(option: str) -> None:
    parse_options([option])


def test_refusals_name_the_option_and_the_reason() -> None:
    with pytest.raises(UserError, match=r"^option nfs_export=on: .* not supported"):
        parse_options(["nfs_export=on"])
    with pytest.raises(UserError, match=r"^unknown option foo=bar;"):
        parse_options(["foo=bar"])
    with pytest.raises(UserError, match=r"show other owners\.$"):
        parse_options(["uid=3"])
    with pytest.raises(UserError, match="unknown option ro=yes"):
        parse_options(["ro=yes"])


def test_what_is_shown() -> None:
    """As in fuse-overlayfs the last option counts, and squash_to_uid= and squash_to_gid= precede."""
    mapping = "uidmapping=:0:1:1001:1001:0:1:1002:1002:64535"
    shown = parse_options([f"uidmapping=1:2:3,gidmapping=5:6:7,{mapping}"]).shown
    assert shown == Shown(uids=((0, 1, 1001), (1001, 0, 1), (1002, 1002, 64535)), gids=((5, 6, 7),))
    assert parse_options(["squash_to_root"]).shown == Shown(uid=0, gid=0)
    assert parse_options(["squash_to_uid=3,squash_to_root"]).shown == Shown(uid=3, gid=0)
    assert parse_options(["squash_to_root=0"]).shown == Shown()
    assert parse_options(["xattr_permissions=2"]).shown == Shown(permissions=2)
    assert parse_options(["static_nlink,noacl"]).shown == Shown(static_nlink=True, acl=False)
    settings = settle("/mnt", lowers=["/"], options=["uidmapping=:0:1:2,squash_to_gid=7"])
    assert MountSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_survive_json(tmp_path: object) -> None:
    import json

    from unionfs.settings.mount import MountSettings

    settings = settle("/m\udcff", options=["lowerdir=/l:/k,noexec"], trusted_xattrs=False)
    assert settings.userxattr
    assert MountSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(KeyError):
        MountSettings.from_json({})


def test_fuse_options_are_escaped() -> None:
    settings = settle("/m", options=["lowerdir=/l,fsname=a\\,b\\\\c,subtype="], trusted_xattrs=True)
    assert "fsname=a\\,b\\\\c" in settings.fuse_options()
    assert not any(option.startswith("subtype") for option in settings.fuse_options())
    assert "ro" in settings.fuse_options()
    assert settle("/m", lowers=["/l"], source="src", trusted_xattrs=True).fsname == "src"


@pytest.mark.parametrize(
    ("uid", "options", "trusted", "result"),
    [
        (0, [], True, None),
        (0, ["redirect_dir=on"], True, "on"),
        (0, ["userxattr"], True, None),
        (0, ["userxattr,redirect_dir=off"], True, "off"),
        (0, ["userxattr,redirect_dir=nofollow"], True, "nofollow"),
        (1000, [], False, "on"),
        (1000, ["redirect_dir=off"], False, "follow"),
        (1000, ["redirect_dir=nofollow"], False, "nofollow"),
        (1000, ["allow_other"], False, None),
        (1000, ["allow_root"], False, None),
    ],
)
def test_redirects_in_user_xattrs(
    monkeypatch: pytest.MonkeyPatch, uid: int, options: list[str], trusted: bool, result: str | None
) -> None:
    """Only in a mount that one ordinary user alone can reach; see `daemon.settle`."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    settings = settle("/m", lowers=["/"], options=options, trusted_xattrs=trusted)
    assert settings.features.redirect_dir == result


@pytest.mark.parametrize(
    ("uid", "options"),
    [
        (0, "userxattr,redirect_dir=on"), (0, "redirect_dir=follow,userxattr"),
        (1000, "allow_other,redirect_dir=on"), (1000, "redirect_dir=follow,allow_root"),
    ],
)  # fmt: skip
def test_redirects_that_other_users_could_make(
    monkeypatch: pytest.MonkeyPatch, uid: int, options: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(UserError, match=r"^redirect_dir=(on|follow) conflicts"):
        settle("/m", lowers=["/"], options=[options], trusted_xattrs=uid == 0 and "userxattr" not in options)


def test_features_are_kept_with_the_settings() -> None:
    """The last value of each feature counts, and travels with the settings to the daemon."""
    options = parse_options(["redirect_dir=off,xino=off", "redirect_dir=nofollow"])
    assert options.features == Features(redirect_dir="nofollow", xino="off")
    settings = settle("/mnt", lowers=["/"], options=["xino=off"])
    assert settings.features == Features(xino="off")
    assert MountSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_flags_of_the_mount() -> None:
    """The kernel's defaults are left out; root's mounts are as the kernel's, a user's as fusermount3's."""
    usual = ("dev", "suid") if os.geteuid() == 0 else ("nodev", "nosuid")

    def flags(words: str) -> set[str]:
        return set(settle("/m", options=[f"lowerdir=/l,{words}"], trusted_xattrs=True).flags)

    for words in ("", "ro", "rw", "exec,async,atime,relatime,diratime"):
        assert flags(words) == set(usual), words
    for word in ("noexec", "noatime", "sync", "nodiratime"):
        assert flags(word) == {*usual, word}
        assert flags(f"ro,{word}") == {*usual, word}
    assert flags("nodev") == ({"nodev", "suid"} if os.geteuid() == 0 else {"nodev", "nosuid"})
    assert flags("nosuid") == ({"dev", "nosuid"} if os.geteuid() == 0 else {"nodev", "nosuid"})


def test_who_may_use_the_mount() -> None:
    def allowed(words: str) -> tuple[bool, bool]:
        settings = settle("/m", options=[f"lowerdir=/l,{words}"], trusted_xattrs=True)
        return settings.allow_other, settings.allow_root

    assert allowed("allow_other") == (True, False)
    assert allowed("allow_root") == (False, True)
    assert allowed("") == (os.geteuid() == 0, False)
    with pytest.raises(UserError, match="exclude each other"):
        allowed("allow_other,allow_root")


@pytest.mark.parametrize(
    ("uid", "words", "others", "flags"),
    [
        (1000, "", (False, False), {"nodev", "nosuid"}),
        (1000, "allow_other", (True, False), {"nodev", "nosuid"}),
        (1000, "allow_root", (False, True), {"nodev", "nosuid"}),
        (1000, "suid,dev,noexec", (False, False), {"nodev", "nosuid", "noexec"}),
        (0, "", (True, False), {"dev", "suid"}),
        (0, "allow_root", (False, True), {"dev", "suid"}),
        (0, "nosuid", (True, False), {"dev", "nosuid"}),
    ],
)
def test_of_root_and_of_others(
    monkeypatch: pytest.MonkeyPatch, uid: int, words: str, others: tuple[bool, bool], flags: set[str]
) -> None:
    """Who may use the mount, and the flags that fusermount3 insists on."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    settings = settle("/m", options=[f"lowerdir=/l,{words}"], trusted_xattrs=uid == 0)
    assert (settings.allow_other, settings.allow_root) == others
    assert set(settings.flags) == flags
    assert settings.userxattr == (uid != 0)


def test_the_layers() -> None:
    """By letter or by option, the same twice; absolute; without an upper read-only."""
    layers: dict[str, Any] = {"lowers": ["/l", "/l2"], "upper": "/u", "work": "/w"}
    options = ["lowerdir=/l:/l2,upperdir=/u,workdir=/w"]
    given = settle("/m", options=options)
    assert (given.lowers, given.upper, given.work) == (("/l", "/l2"), "/u", "/w")
    assert settle("/m", **layers) == settle("/m", options=options, **layers) == given
    assert (given.read_only, given.upper_tmpfs) == (False, None)
    assert (given.subtype, given.fsname) == ("unionfs", "unionfs")
    assert settle("/m", lowers=["/l"]).read_only
    assert settle("/m", options=["ro"], **layers).read_only
    tmpfs = settle("/m", lowers=["/l"], upper="tmpfs:size=1m")
    assert (tmpfs.read_only, tmpfs.upper, tmpfs.work) == (False, None, None)
    assert settle("m", lowers=["l"]).lowers == (f"{os.getcwd()}/l",)
    assert settle("m", lowers=["l"]).mountpoint == f"{os.getcwd()}/m"
    assert (given.mounted_by, given.storage, given.storage_root) == (os.getuid(), (), "")
    for more, text in (
        ({"upper": "/other"}, r"the upper is given both by -u and by -o upperdir=; "),
        ({"work": "/other"}, r"the work is given both by -w and by -o workdir=; "),
        ({"lowers": ["/l"]}, r"the lower is given both by -l and by -o lowerdir=; "),
    ):
        with pytest.raises(UserError, match=f"^{text}"):
            settle("/m", options=options, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "no lower is given"),
        ({"lowers": ["/l", ""]}, "an empty path is given"),
        ({"lowers": ["/l"], "upper": "", "work": "/w"}, "an empty path is given"),
        ({"lowers": ["/l"], "upper": "/u", "work": ""}, "an empty path is given"),
        ({"lowers": ["/l"], "upper": ""}, "an empty path is given"),
        ({"lowers": ["/l"], "work": ""}, "an empty path is given"),
        ({"options": ["lowerdir=/l,upperdir=/u,workdir=/w"], "upper": ""}, "the upper is given both by -u"),
        ({"lowers": ["/l"], "upper": "/u"}, "upper /u is given without a work directory"),
        ({"lowers": ["/l"], "work": "/w"}, "work /w is given without an upper"),
        ({"lowers": ["/l"], "upper": "tmpfs:size=1m", "work": "/w"}, "work /w is given, but with upper"),
        ({"lowers": ["/l"], "upper": "tmpfs.d"}, "upper tmpfs.d is given without a work directory"),
        ({"lowers": ["/l\0"]}, r"'/l.x00' contains a zero byte"),
    ],
)
def test_layers_that_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"^{text}"):
        settle("/m", **arguments)


def test_an_empty_mountpoint() -> None:
    with pytest.raises(UserError, match="an empty path"):
        settle("", lowers=["/l"])


def test_the_words_of_a_mount() -> None:
    """What is given by letter and by option, and what the configuration has no say in."""
    def settled(*options: str, **more: Any) -> MountSettings:
        return settle("/m", lowers=["/l"], options=options, trusted_xattrs=True, **more)

    assert settled("debug", log_level="error").log_level == "debug"
    assert settled(log_level="error").log_level == "error"
    assert settled("fsname=x", source="src").fsname == "x"
    assert settled("subtype=").subtype == ""
    assert settled("volatile").volatile
    assert settled("userxattr").userxattr
    assert not settled().userxattr
    assert settle("/m", lowers=["/l"], trusted_xattrs=False).userxattr
    assert [settled(watch_lower=True).watch_lower, settled("watch_lower").watch_lower] == [True, True]
    assert not settled().watch_lower
    assert settled("outlive").outlive
    assert settled("max_nodes=9").max_nodes == 9
    assert settled("session=direct", session="auto").session == "direct"
    assert settled("io=cached", io="cached").io == "cached"
    assert settled("session=pyfuse3").io == "auto"
    for options, more, text in (
        (["session=direct"], {"session": "pyfuse3"}, "--session pyfuse3 and -o session=direct differ"),
        (["io=cached"], {"io": "hybrid"}, "--io hybrid and -o io=cached differ"),
        (["session=other"], {}, "option session=other: write one of auto, "),
        (["io=other"], {}, "option io=other: write one of auto, "),
        (["io=cached"], {"session": "pyfuse3"}, "--io cached needs --session direct"),
        (["session=pyfuse3"], {"io": "cached"}, "--io cached needs --session direct"),
    ):
        with pytest.raises(UserError, match=f"^{text}"):
            settled(*options, **more)


def test_features_that_exclude_each_other() -> None:
    """metacopy=on needs redirects, and markers that only root can make."""
    def features(words: str, *, trusted: bool = True) -> Features:
        return settle("/m", lowers=["/l"], options=[words], trusted_xattrs=trusted).features

    for words in ("metacopy=on", "metacopy=on,redirect_dir=on"):
        assert features(words).metacopy == "on"
    for words in ("metacopy=on,redirect_dir=off", "metacopy=on,redirect_dir=follow"):
        with pytest.raises(UserError, match="metacopy=on needs redirects"):
            features(words)
    with pytest.raises(UserError, match=r"metacopy=on conflicts with markers in user\.\* xattrs"):
        features("metacopy=on", trusted=False)
    shown = features("xattr_permissions=2")
    assert (shown.metacopy, shown.index, shown.redirect_dir) == ("off", "off", "follow")
    assert features("xattr_permissions=2,redirect_dir=on").redirect_dir == "on"
    assert features("xattr_permissions=2,userxattr").redirect_dir is None


def test_permissions_in_xattrs_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mount that others reach, too, no redirect is read."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    def redirects(words: str) -> str | None:
        settings = settle("/m", lowers=["/l"], options=[words], trusted_xattrs=False)
        return settings.features.redirect_dir

    assert redirects("xattr_permissions=2") == "follow"
    assert redirects("xattr_permissions=2,allow_other") is None
    assert redirects("xattr_permissions=2,allow_root") is None


def test_a_mountpoint_behind_links(tmp_path: Path) -> None:
    """It is found without a request to what is mounted there; a link that leads nowhere stays a name."""
    for name, target in (("a", "/proc"), ("b", "a"), ("c", tmp_path / "b"), ("loop", "loop"), ("gone", "x")):
        (tmp_path / name).symlink_to(target)
    place = str(tmp_path)
    for name in ("a", "b", "c", "c/", "../" + tmp_path.name + "/c"):
        assert absolute_mountpoint(f"{place}/{name}") == "/proc"
    assert absolute_mountpoint("/proc") == absolute_mountpoint("/proc/.") == "/proc"
    assert absolute_mountpoint("/proc/sys/..") == "/proc"
    assert absolute_mountpoint(f"{place}/gone") == f"{place}/x"
    assert absolute_mountpoint(f"{place}/none") == f"{place}/none"
    assert absolute_mountpoint(f"{place}/loop") == f"{place}/loop"
    assert absolute_mountpoint("/") == "/"


def test_storage() -> None:
    """As -v and --tmpfs, whose commas may be colons."""
    options = ["lowerdir=/", "volume=vol:/data:ro:nocopy,volume=/etc:/host/etc:ro\\,rslave,volume=/anonymous"]
    options.append("tmpfs=/run:size=1m:ro,tmpfs=/tmp")
    settings = settle("/mnt", options=options, storage=parse_all(["a1:/a"], [], []))
    volumes = ["a1:/a", "vol:/data:ro,nocopy", "/etc:/host/etc:ro,rslave", "/anonymous"]
    expected = parse_all(volumes, [], ["/run:size=1m,ro", "/tmp"])
    assert sorted(settings.storage, key=str) == sorted(expected, key=str)
    assert settings.storage[-1].target == "/host/etc"
    for option, text in (
        ("volume=", "option volume has no value, so write volume=[SRC:]TARGET"),
        ("volume=vol:data", "option volume=vol:data: target data is a relative path"),
        ("tmpfs=/run:size=x", "option tmpfs=/run:size=x: invalid size"),
        ("volume=vol:/a:ro:bad", "option volume=vol:/a:ro:bad: unknown mode bad"),
        ("volume=vol:/a,tmpfs=/a", "target /a is given twice"),
    ):
        with pytest.raises(UserError, match="^" + re.escape(text)):
            settle("/mnt", options=["lowerdir=/", option])


@pytest.mark.parametrize("word", WORDS)
def test_the_listed_words_change_something(word: str) -> None:
    assert parse_options([word]) != parse_options([])


@pytest.mark.parametrize("key", KEYS)
def test_the_listed_keys_take_a_value(key: str) -> None:
    words = {"max_nodes": "9", "xattr_permissions": "2", "squash_to_uid": "1", "squash_to_gid": "1"}
    words |= dict.fromkeys(("uidmapping", "gidmapping"), "0:1:1")
    words |= {name: values[0] for name, values in VALUES.items()}
    parse_options([f"{key}={words.get(key, '/x')}"])
    with pytest.raises(UserError, match="unknown option"):
        parse_options([f"{key}x=/x"])
