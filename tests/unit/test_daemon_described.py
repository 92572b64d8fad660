"""Settings and figures of a mount as words."""

from __future__ import annotations

import os

from unionfs.daemon.described import copying_up, io_reasons, setting_rows
from unionfs.daemon.settle import settle
from unionfs.settings.parsing import parse_all


def test_the_rows_of_settings() -> None:
    """Each value in its own words, the storage in rows of its own."""
    storage = parse_all(["vol:/data:ro", "/etc:/e"], [], ["/run"])
    settings = settle("/m", lowers=["/a", "/b\n"], upper="tmpfs:size=1m,nr_inodes=9", storage=storage)
    rows = setting_rows(settings.to_json())
    values = dict(rows)
    assert values["lowers"] == r"/a, '/b\n'"
    assert values["upper_tmpfs"] == "size=1048576, nr_inodes=9"
    assert (values["upper"], values["security"], values["lives_with"]) == ("-", "-", "-")
    assert (values["read_only"], values["volatile"], values["allow_root"]) == ("no", "no", "no")
    assert values["allow_other"] == ("yes" if os.geteuid() == 0 else "no")
    assert (values["max_nodes"], values["fsname"]) == ("0", "unionfs")
    assert [value for name, value in rows if name == "storage"] == [
        "volume vol at /data (read-only)", "bind /etc at /e", "tmpfs at /run",
    ]  # fmt: skip
    plain = dict(setting_rows(settle("/m", lowers=["/a"], upper="tmpfs").to_json()))
    assert (plain["upper_tmpfs"], plain["lowers"]) == ("yes", "/a")


def test_the_rows_of_features_and_of_what_is_shown() -> None:
    """Each has a row of its own, with the name of its option."""
    options = ["xino=off", "uidmapping=0:1000:1:5:7:2", "squash_to_gid=4", "static_nlink", "noacl"]
    values = dict(setting_rows(settle("/m", lowers=["/a"], upper="/u", work="/w", options=options).to_json()))
    assert {"features", "shown"}.isdisjoint(values)
    assert [values[name] for name in ("redirect_dir", "index", "metacopy", "xino")] == ["-", "-", "-", "off"]
    assert (values["uidmapping"], values["gidmapping"]) == ("0:1000:1, 5:7:2", "-")
    assert (values["squash_to_uid"], values["squash_to_gid"]) == ("-", "4")
    assert (values["static_nlink"], values["acl"], values["xattr_permissions"]) == ("yes", "no", "0")


def test_why_data_flows_that_way() -> None:
    """What says nothing is left out; a daemon of another version may answer anything."""
    io = {"io": "x", "why": "because", "why_not": {"a": "not a", "b": ""}, "missing": {"c": "no c"}}
    assert io_reasons(io) == ["because", "not a", "no c"]
    assert io_reasons({"why_not": "x"}) == io_reasons(None) == io_reasons("x") == []


def test_what_is_copied_up() -> None:
    """At 512 KiB per second the other 2 MiB take 4 seconds; nothing is foretold before the first byte."""
    copies = [
        {"path": "a b", "copied": 1 << 20, "size": 3 << 20, "seconds": 2.0},
        {"path": "c", "copied": 0, "size": 3 << 20, "seconds": 0},
    ]
    assert copying_up({"copying_up": copies}) == [
        "a b: 1.0 MiB of 3.0 MiB, 512.0 KiB/s, 0:04 left", "c: 0 B of 3.0 MiB, 0 B/s",
    ]  # fmt: skip
    assert copying_up({}) == []
