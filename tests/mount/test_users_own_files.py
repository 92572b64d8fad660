"""An ordinary user may do to a union over his own files all that he may do to a copy of them, whatever their
modes.

The expected value of each row is the result of the same calls, by the same user, on a native copy.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from tests.mount import cli_calls
from tests.mount.user_calls import UID, Host, ordinary_user
from tests.support import areas, own_files, snapshot

SESSIONS = ("pyfuse3", "direct")
WAYS = ("fusermount3", "namespace")


@pytest.fixture(scope="module", params=[f"{way}-{session}" for way in WAYS for session in SESSIONS])
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """The results of all scenarios, `run` and after a second mount (`look`)."""
    way, _, session = request.param.partition("-")
    if os.geteuid() != 0:
        pytest.skip("another identity needs root")
    with areas.area() as area, cli_calls.place(area) as place, ordinary_user(place) as host:
        yield _run(host, way, session)
        left = sorted(str(path) for path in host.place.work.rglob("*"))
        assert left == [str(host.place.work / name) for name in ("index", "work")]


def _run(host: Host, way: str, session: str) -> dict[str, dict[str, Any]]:
    place = host.place
    native = place.root / "native"
    native.mkdir()
    os.chown(native, UID, UID)
    python, unionfs = host.command[0], " ".join(host.command)
    calls = f"{python} -m tests.support.own_files"
    assert host.run("sh", "-ec", f"{calls} build {native} {place.lower}").returncode == 0
    mount = f"{unionfs} mount --session {session} {' '.join(map(str, place.layers))} {place.merged}"
    results = {}
    for what in ("run", "look"):
        act = f"{calls} {what} {native} {place.merged} > {host.runtime}/{what}"
        script = f"{mount}; {act}; {unionfs} umount {place.merged}"
        words = ("unshare", "-Urm") if way == "namespace" else ()
        done = host.run(*words, "sh", "-ec", script, timeout=4 * cli_calls.SECONDS)
        if "unshare" in done.stderr:
            pytest.skip(f"no user namespaces here: {done.stderr}")
        assert done.returncode == 0, done.stderr
        results[what] = json.loads((host.runtime / what).read_text())
    return results


@pytest.mark.parametrize("name", list(own_files.SCENARIOS))
def test_the_same_as_on_a_copy(results: dict[str, dict[str, Any]], name: str) -> None:
    for what in ("run", "look"):
        native, union = results[what][name]
        assert union == native, what


def test_check_of_files_without_permissions(host: Host) -> None:
    """An upper with copies of mode 0000 and 0200, which have markers, can be examined by their owner."""
    place = host.place
    host.mount()
    for name, mode in (("base", "0"), ("deep", "200")):
        assert host.run("chmod", mode, place.merged / name).returncode == 0
    assert host.unionfs("umount", place.merged).returncode == 0
    layers = ("-u", place.upper, "-l", place.lower, "-l", place.lower2, "-w", place.work)
    done = host.unionfs("check", *layers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _markers(host: Host) -> None:
    """An upper of the user with markers of overlayfs on objects of modes that deny reading or writing."""
    place = host.place
    files = {"none": 0, "read": 0o444, "write": 0o200}
    directories = {"closed": 0, "fixed": 0o555}
    for name in directories:
        (place.upper / name).mkdir()
        (place.lower / name).mkdir()
        for directory in (place.upper, place.lower):
            os.chown(directory / name, UID, UID)
        os.setxattr(place.upper / name, "user.overlay.opaque", b"y")
        os.mknod(place.upper / name / "gone", stat.S_IFCHR)
    for path in [place.upper / name for name in files] + [place.upper / "closed/file"]:
        path.write_text(path.name)
        os.chown(path, UID, UID)
        os.setxattr(path, "user.overlay.origin", b"x")
        path.chmod(files.get(path.name, 0o400))
    for name, mode in directories.items():
        (place.upper / name).chmod(mode)


def test_convert_of_files_without_permissions(host: Host) -> None:
    """All markers of the user's own objects are rewritten, and nothing else is changed."""
    place = host.place
    _markers(host)
    before = set(snapshot.take(place.upper))
    done = host.unionfs("convert", "-u", place.upper, "--to", "oci")
    assert (done.returncode, done.stderr) == (0, "")
    after = set(snapshot.take(place.upper))
    assert len([path for path in after if b"/.wh." in path]) == 4
    assert {path for path in after if b".wh." not in path} == {path for path in before if b"gone" not in path}
    for root, directories, files in os.walk(place.upper):
        for name in directories + files:
            assert os.listxattr(os.path.join(root, name)) == []
    done = host.unionfs("convert", "-u", place.upper, "--to", "overlay")
    assert (done.returncode, done.stderr) == (0, "")
    for path in ("closed", "fixed"):
        assert os.getxattr(place.upper / path, "user.overlay.opaque") == b"y"
        assert os.listdir(place.upper / path)[0] in ("gone", "file")
    for path, mode in (("none", 0), ("read", 0o444), ("write", 0o200), ("closed", 0), ("fixed", 0o555)):
        assert stat.S_IMODE((place.upper / path).stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["file", "unreadable", "directory", "immutable", "append", "above"])
def test_convert_refuses_what_the_user_may_not_change(host: Host, kind: str) -> None:
    """In one sentence, and before anything is changed."""
    place = host.place
    _markers(host)
    path = place.upper / "read"
    if kind in ("immutable", "append"):
        if host.root("chattr", "+i" if kind == "immutable" else "+a", path, check=False).returncode != 0:
            pytest.skip("no chattr here")
    elif kind in ("directory", "above"):
        path = place.upper / ("closed" if kind == "directory" else "fixed")
        os.chown(path, 0, 0)
        path.chmod(0o755 if kind == "above" else 0)
    else:
        os.chown(path, 0, 0)
        path.chmod(0o644 if kind == "file" else 0)
    before = snapshot.take(place.upper)
    try:
        done = host.unionfs("convert", "-u", place.upper, "--to", "oci")
        assert snapshot.take(place.upper) == before
    finally:
        host.root("chattr", "-ia", path, check=False)
    cli_calls.refused(done, str(path), "root")
