"""The machine is the one that was asked for: another kernel must not pass unnoticed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place, listed, refused, unionfs
from tests.support import mounting
from unionfs.sys import detached, fuseprobe

Facts = tuple[int, bool, tuple[int, int]]

FACTS: dict[str, Facts] = {
    # kernel: (FUSE minor, passthrough, Python); include/uapi/linux/fuse.h of each
    "6.1": (38, False, (3, 11)),
    "6.12": (41, True, (3, 13)),
}
"""What is known of the kernels that Debian ships; the host's own is whatever it is."""


@pytest.fixture
def facts(kernel: str) -> Facts:
    if kernel not in FACTS:
        pytest.skip(f"nothing is known beforehand of the kernel {kernel}")
    return FACTS[kernel]


@pytest.fixture
def place(root: None, area: Path) -> Iterator[Place]:
    with cli_calls.place(area) as found:
        yield found


def test_release(kernel: str) -> None:
    release = os.uname().release
    assert Path("/lib/modules", release, "modules.dep").exists()
    if kernel != "host":
        assert release.startswith(f"{kernel}.")
        assert "cloud" in release


def test_zfs(kernel: str) -> None:
    """It is there if it was asked for, so that its tests are not skipped unnoticed."""
    assert detached.is_known("zfs") == ("UNIONFS_VM_ZFS" in os.environ)


def test_python(facts: Facts) -> None:
    assert sys.version_info[:2] == facts[2]


def test_what_fuse_offers(facts: Facts) -> None:
    offer = fuseprobe.init_offer()
    assert offer is not None
    assert offer[0] == facts[0]
    assert fuseprobe.offers_passthrough() is facts[1]


def test_the_sessions_that_are_tested(facts: Facts) -> None:
    """Those of this kernel, and no fewer."""
    found = [name for name in mounting.SESSIONS if mounting.session_reason(name) is None]
    assert found == (mounting.SESSIONS if facts[1] else ["pyfuse3", "direct-cached"])


def test_the_way_of_data_and_why(place: Place, facts: Facts) -> None:
    """`--io auto` is hybrid where there is passthrough, else cached; `inspect` and `doctor` say why."""
    place.mount()
    found = listed(unionfs("inspect", "--json", place.merged))
    reports = json.loads(unionfs("doctor", "--json").stdout)["findings"]
    doctor = {one["name"]: one for one in reports}
    why, other = found["io"]["why"], found["io"]["why_not"]
    assert doctor["session and I/O"]["state"] == "ok"
    assert why in str(doctor["session and I/O"])
    if facts[1]:
        assert found["settings"]["io"] == "hybrid"
        assert doctor["passthrough"]["state"] == "ok"
    else:
        assert found["settings"]["io"] == "cached"
        assert doctor["passthrough"]["state"] == "limited"
        for mode in ("hybrid", "passthrough"):
            assert "does not offer passthrough" in other[mode]
            assert "Linux 6.9" in other[mode]


def test_passthrough_where_there_is_none(place: Place, facts: Facts) -> None:
    for mode in ("hybrid", "passthrough"):
        done = unionfs("mount", *place.layers, "--io", mode, place.merged)
        if facts[1]:
            assert done.returncode == 0, done.stderr
            cli_calls.succeed(unionfs("umount", place.merged))
        else:
            refused(done, f"--io {mode} cannot be had", "Linux 6.9")
