"""Rights that a daemon has dropped when its mount is usable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, call, succeed, unionfs, wait_for
from tests.mount.user_calls import Host
from unionfs.sys.capabilities import NAMES

READING = {"DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "SYS_ADMIN", "SYS_RESOURCE"}
WRITING = {
    "CHOWN", "FSETID", "LEASE", "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "SETFCAP", "SETGID",
    "SETUID",
}  # fmt: skip


def status(pid: int, name: str) -> str:
    """A field of proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name + ":"))


def capabilities(pid: int, which: str) -> set[str]:
    bits = int(status(pid, which), 16)
    return {name for number, name in enumerate(NAMES) if bits >> number & 1}


def test_names_of_capabilities() -> None:
    """As in the C library of another program."""
    if shutil.which("capsh") is None:
        pytest.skip("capsh is not installed")
    bits = (1 << len(NAMES)) - 1
    shown = subprocess.run(["capsh", f"--decode={bits:x}"], capture_output=True, text=True, check=True).stdout
    assert shown.strip().partition("=")[2].split(",") == [f"cap_{name.lower()}" for name in NAMES]


@pytest.mark.parametrize("io", ["hybrid", "passthrough", "cached"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("writable", READING | WRITING),
        ("read-only", READING),
        ("storage", READING | WRITING | {"NET_BIND_SERVICE"}),
        ("read-only with storage", READING | WRITING | {"NET_BIND_SERVICE"}),
    ],
)
def test_capabilities(place: Place, kind: str, expected: set[str], io: str) -> None:
    if kind == "writable":
        pid = place.mount("--io", io)
    elif kind == "read-only":
        succeed(unionfs("mount", "-l", place.lower, "--io", io, place.merged))
        pid = place.pid()
    elif kind == "read-only with storage":  # whose volumes are filled with files of any owner
        (place.lower / "b").mkdir()
        succeed(unionfs("mount", "-l", place.lower, "--io", io, "-v", f"{place.lower2}:/b", place.merged))
        pid = place.pid()
    else:
        pid = place.mount("--io", io, "--tmpfs", "/t", "-v", f"{place.lower2}:/b:ro")
    for which in ("CapEff", "CapPrm", "CapBnd"):
        assert capabilities(pid, which) == expected & capabilities(os.getpid(), which), which
    assert capabilities(pid, "CapInh") == capabilities(pid, "CapAmb") == set()
    assert status(pid, "NoNewPrivs") == "1"
    for task in os.listdir(f"/proc/{pid}/task"):
        assert int(status(int(task), "CapEff"), 16) == int(status(pid, "CapEff"), 16)
    succeed(unionfs("umount", place.merged))


def test_the_other_session(place: Place) -> None:
    pid = place.mount("--session", "pyfuse3")
    assert capabilities(pid, "CapEff") == (READING | WRITING) & capabilities(os.getpid(), "CapEff")
    (place.merged / "base").write_text("written\n")
    os.chown(place.merged / "base", 1001, 1002)
    assert (place.upper / "base").read_text() == "written\n"
    succeed(unionfs("umount", place.merged))


def test_a_users_daemon_can_still_unmount(host: Host, place: Place) -> None:
    """fusermount3 is set-user-id, so no_new_privs would prevent a daemon from ending its mount."""
    pid = host.mount()
    assert status(pid, "NoNewPrivs") == "0"
    assert capabilities(pid, "CapEff") == set()
    host.root("kill", str(pid))
    assert wait_for(lambda: str(place.merged) not in host.root("cat", "/proc/mounts").stdout)


def test_the_keyring_of_the_mounting_session(place: Place) -> None:
    """A daemon has a new session keyring, without the keys of the mounting user."""
    if shutil.which("keyctl") is None:
        pytest.skip("keyctl is not installed")
    script = (
        "keyctl add user unionfs-test secret @s > /dev/null && "
        "keyctl search @s user unionfs-test > /dev/null && "
        f"exec {sys.executable} -c 'import os; from unionfs.daemon.confine import confine; "
        'from unionfs.daemon.settle import settle; confine(settle("/mnt", lowers=["/usr"])); '
        'os.execvp("keyctl", ["keyctl", "search", "@s", "user", "unionfs-test"])\''
    )
    done = call(("keyctl", "session", "-", "sh", "-c", script))
    if "Operation not permitted" in done.stderr or "not implemented" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode != 0
    assert "not available" in done.stderr, done.stderr


def test_limits_that_stay() -> None:
    """Those that only CAP_SYS_RESOURCE could raise; not the ones of which the highest is enough."""
    code = "from unionfs.daemon.confine import own_limits; print(own_limits())"
    drop = "setpriv --bounding-set -sys_resource --inh-caps -sys_resource"
    for kind, left in (("-S", []), ("-SH", ["file size 1024000"])):
        limits = " ".join(f"ulimit {kind} {limit};" for limit in ("-f 1000", "-n 200", "-u 4000"))
        done = call(("bash", "-c"), f"{limits} exec {drop} {sys.executable} -c '{code}'")
        assert succeed(done) == f"{left}\n"


def test_where_proc_hides_processes() -> None:
    """The groups of a caller are in /proc: with hidepid, see proc(5), only CAP_SYS_PTRACE shows them."""
    code = (
        "from unionfs.daemon.confine import needed_capabilities; from unionfs.daemon.settle import settle; "
        'print(*needed_capabilities(settle("/m", lowers=["/usr"])))'
    )
    kept = []
    for option in ("hidepid=0", "hidepid=2"):
        script = f"mount -t proc -o {option} proc /proc && exec {sys.executable} -c '{code}'"
        done = call(("unshare", "-pfm", "sh", "-c", script))
        kept.append(set(succeed(done).split()))
    assert kept == [READING, READING | {"SYS_PTRACE"}]


def test_doctor_says_what_is_left(root: None) -> None:
    done = unionfs("doctor", "--json")
    findings = {finding["name"]: finding["detail"] for finding in json.loads(done.stdout)["findings"]}
    line = findings["rights of a daemon"]
    assert "of 41 capabilities" in line
    assert "SYS_ADMIN" in line
