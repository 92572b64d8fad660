"""An ordinary user may do to a union over his own files all that he may do to a copy of them, whatever their
modes.

The expected value of each row is the result of the same calls, by the same user, on a native copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.mount import cli_calls
from tests.mount.user_calls import UID, Host, ordinary_user
from tests.support import areas, own_files

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
