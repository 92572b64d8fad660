"""`unionfs ls`, `inspect`, `diff`, `doctor` and the help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place, listed, refused, succeed, unionfs
from tests.support.patience import patient
from unionfs.sys import fuseprobe

COMMANDS = (
    "mount", "umount", "cleanup", "sync", "refresh", "upgrade", "ls", "inspect", "stats", "diff", "check",
    "convert", "doctor",
)  # fmt: skip


IO_MODES = ("hybrid", "passthrough", "cached")


def _mine(place: Place) -> dict[str, object]:
    found = [one for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(place.merged)]
    assert len(found) == 1
    mine: dict[str, object] = found[0]
    return mine


def test_ls(place: Place) -> None:
    pid = place.mount()
    mine = _mine(place)
    keys = {"mountpoint", "state", "pid", "layers", "session", "since", "held_by", "mounted_at"}
    assert set(mine) == keys
    assert (mine["state"], mine["pid"]) == ("active", pid)
    assert mine["layers"] == [str(place.upper), str(place.lower), str(place.lower2)]
    assert mine["session"] == "direct"
    since = datetime.fromisoformat(str(mine["since"]))
    assert abs(datetime.now().astimezone() - since) < timedelta(seconds=60)
    lines = succeed(unionfs("ls")).splitlines()
    assert lines[0].split() == ["MOUNTPOINT", "STATE", "PID", "LAYERS", "SESSION", "SINCE"]
    assert [str(place.merged), "active", str(pid), "3", "direct"] in [line.split()[:5] for line in lines]


def test_a_dead_mount(place: Place) -> None:
    """`ls` shows it; the others report that its daemon has died, and the cure."""
    pid = place.mount()
    layers = _mine(place)["layers"]
    os.kill(pid, signal.SIGKILL)
    assert cli_calls.wait_for(lambda: cli_calls.gone(pid))
    mine = _mine(place)
    assert (mine["state"], mine["pid"], mine["layers"]) == ("dead", None, layers)
    lines = succeed(unionfs("ls")).splitlines()
    assert [str(place.merged), "dead", "-", "3", "direct"] in [line.split()[:5] for line in lines]
    for command in ("inspect", "diff", "stats", "sync", "refresh"):
        refused(unionfs(command, place.merged), f"(pid {pid}) has died", f"unionfs cleanup {place.merged}")
    place.entry().remove()
    mine = _mine(place)
    assert (mine["state"], mine["pid"], mine["layers"]) == ("dead", None, None)
    refused(unionfs("inspect", place.merged), "its daemon has died", f"unionfs cleanup {place.merged}")


def test_inspect(place: Place) -> None:
    pid = place.mount("-o", "nodev,volatile,fsname=mine")
    (place.merged / "new").write_text("x")
    (place.merged / "base").write_text("changed")
    found = listed(unionfs("inspect", "--json", place.merged))
    assert found["pid"] == pid
    settings = found["settings"]
    assert settings["mountpoint"] == str(place.merged)
    assert settings["lowers"] == [str(place.lower), str(place.lower2)]
    assert (settings["upper"], settings["work"]) == (str(place.upper), str(place.work))
    assert (settings["volatile"], settings["read_only"], settings["fsname"]) == (True, False, "mine")
    assert settings["flags"] == ["nodev", "suid"]
    assert found["figures"]["copy_ups"] == 1
    assert found["figures"]["requests"]["create"] == 1
    text = succeed(unionfs("inspect", "merged", cwd=place.root))
    assert str(place.upper) in text
    assert "copy_ups" in text


def _can_pass_through() -> bool:
    facts = {fact["name"]: fact for fact in json.loads(unionfs("doctor", "--json").stdout)["findings"]}
    return bool(facts["passthrough"]["state"] == "ok")


@pytest.mark.parametrize("asked", ["auto", *IO_MODES])
def test_inspect_tells_how_data_flows(place: Place, asked: str) -> None:
    """The mode, the reason for it, and the reasons against the others, with the mode's name."""
    passes = _can_pass_through()
    if not passes and asked in ("hybrid", "passthrough"):
        refused(unionfs("mount", *place.layers, "--io", asked, place.merged), f"--io {asked} cannot be had")
        return
    place.mount("--io", asked)
    chosen = ("hybrid" if passes else "cached") if asked == "auto" else asked
    found = listed(unionfs("inspect", "--json", place.merged))
    assert (found["settings"]["session"], found["settings"]["io"]) == ("direct", chosen)
    assert set(found["io"]) == {"why", "why_not", "missing"}
    how = "chosen" if asked == "auto" else "asked for"
    assert found["io"]["why"].startswith(f"I/O is {chosen}, as {how}: ")
    assert set(found["io"]["why_not"]) == set(IO_MODES) - {chosen}
    for mode, reason in found["io"]["why_not"].items():
        assert reason.startswith(f"Not {mode}: ")
        assert reason.endswith(".")
    lines = succeed(unionfs("inspect", place.merged)).splitlines()
    assert ["io", chosen] in [line.split() for line in lines]
    assert {found["io"]["why"], *found["io"]["why_not"].values()} <= set(lines)


def test_inspect_of_the_other_session(place: Place) -> None:
    place.mount("--session", "pyfuse3")
    found = listed(unionfs("inspect", "--json", place.merged))
    assert found["settings"]["session"] == _mine(place)["session"] == "pyfuse3"


@pytest.mark.parametrize(
    ("options", "chosen", "io"),
    [
        ("session=direct,io=cached", "direct", "cached"),
        ("io=cached", "direct", "cached"),
        ("session=pyfuse3", "pyfuse3", "auto"),
        ("session=auto,io=auto", "direct", None),
    ],
)
def test_session_and_io_as_options(place: Place, options: str, chosen: str, io: str | None) -> None:
    place.mount("-o", options)
    settings = listed(unionfs("inspect", "--json", place.merged))["settings"]
    assert settings["session"] == chosen
    assert settings["io"] == io or (io is None and settings["io"] in IO_MODES)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--session", "pyfuse3", "--io", "cached"), ("--io cached", "--session direct")),
        (("-o", "session=pyfuse3,io=hybrid"), ("--io hybrid", "--session direct")),
        (("--session", "pyfuse3", "-o", "io=passthrough"), ("--io passthrough", "--session direct")),
        (("--io", "fast"), ("'fast'", "'hybrid', 'passthrough', 'cached'")),
        (("--session", "fast"), ("'fast'", "'direct', 'pyfuse3'")),
        (("-o", "io=fast"), ("io=fast", "hybrid, passthrough, cached")),
        (("-o", "session=fast"), ("session=fast", "direct, pyfuse3")),
        (("-o", "io"), ("io=auto",)),
        (("-o", "io=cached,io=hybrid"), ("given twice", "cached", "hybrid")),
        (("--io", "cached", "-o", "io=hybrid"), ("--io cached", "-o io=hybrid")),
        (("--session", "direct", "-o", "session=pyfuse3"), ("--session direct", "-o session=pyfuse3")),
    ],
)
def test_session_and_io_that_cannot_be(
    place: Place, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    before = place.snapshot()
    refused(unionfs("mount", *place.layers, *arguments, place.merged), *parts)
    assert cli_calls.mounts_at(place.merged) == []
    assert place.snapshot() == before


def _in_user_namespace(place: Place, io: str) -> cli_calls.Done:
    """Mount as root of a user namespace, show the mounts and `inspect --json`, unmount."""
    program = " ".join(cli_calls.UNIONFS)
    script = (
        f'{program} mount "$@"; code=$?; grep " {place.merged} " /proc/self/mountinfo >&2; '
        f"[ $code = 0 ] || exit $code; {program} inspect --json {place.merged}; "
        f"{program} umount {place.merged}"
    )
    layers = map(str, (*place.layers, "--io", io, place.merged))
    done = cli_calls.call(("unshare", "-U", "-r", "-m", "sh", "-c", script, "sh", *layers))
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    return done


@pytest.mark.parametrize("io", ["hybrid", "passthrough"])
def test_no_passthrough_in_a_user_namespace(place: Place, io: str) -> None:
    text = refused(_in_user_namespace(place, io), f"--io {io} cannot be had", "user namespace", "--io cached")
    assert str(place.merged) in text
    assert cli_calls.mounts_at(place.merged) == []


@pytest.mark.parametrize("io", ["auto", "cached"])
def test_io_in_a_user_namespace(place: Place, io: str) -> None:
    done = _in_user_namespace(place, io)
    assert done.returncode == 0, done.stderr
    assert " fuse.unionfs " in done.stderr
    found = json.loads(done.stdout)
    assert (found["settings"]["session"], found["settings"]["io"]) == ("direct", "cached")
    for mode in ("hybrid", "passthrough"):
        assert "user namespace" in found["io"]["why_not"][mode]


def test_inspect_of_a_daemon_that_does_not_answer(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        found = listed(unionfs("inspect", "--json", place.merged))
        assert time.monotonic() - began < patient(10)
        assert found["figures"] is None
        assert found["settings"]["upper"] == str(place.upper)
        assert "does not answer" in succeed(unionfs("inspect", place.merged))
        assert _mine(place)["pid"] == pid
    finally:
        os.kill(pid, signal.SIGCONT)


def test_inspect_of_no_mount(place: Place) -> None:
    refused(unionfs("inspect", place.merged), f"{place.merged} is not an active unionfs mount")


def test_diff(place: Place) -> None:
    strange = os.fsdecode(b"n\xff w")
    place.mount()
    (place.merged / strange).touch()
    (place.merged / "base").write_text("changed")
    (place.merged / "deep").unlink()
    (place.merged / "dir").mkdir()
    (place.merged / "dir" / "inner").touch()
    wanted = f"C /base\nD /deep\nA /dir\nA /dir/inner\nA /{strange}\n"
    assert succeed(unionfs("diff", place.merged)) == wanted
    layers = ("--upper", place.upper, "--lower", place.lower, "--lower", place.lower2)
    assert succeed(unionfs("diff", *layers)) == wanted
    succeed(unionfs("umount", place.merged))
    assert succeed(unionfs("diff", *layers)) == wanted
    assert succeed(unionfs("diff", "--upper", "upper", "--lower", "lower", cwd=place.root)).startswith(
        "C /base\n"
    )


def test_diff_without_an_upper(place: Place) -> None:
    succeed(unionfs("mount", "-l", place.lower, place.merged))
    assert succeed(unionfs("diff", place.merged)) == ""


def test_diff_of_what_is_not_there(place: Place) -> None:
    refused(unionfs("diff", place.merged), "not an active unionfs mount")
    refused(unionfs("diff", "--upper", "/nowhere", "--lower", place.lower), "upper /nowhere does not exist")
    refused(unionfs("diff", "--upper", place.upper, "--lower", place.lower / "base"), "is neither a")


def test_diff_to_a_reader_that_has_enough(place: Place) -> None:
    for number in range(5000):
        (place.upper / f"file{number}").touch()
    command = " ".join(cli_calls.UNIONFS)
    done = cli_calls.call(
        ("sh", "-c", f"{command} diff --upper {place.upper} --lower {place.lower} | head -1"),
    )
    assert done.stdout == "A /file0\n"
    assert done.stderr == ""


def test_the_log_level(place: Place) -> None:
    """`inspect` shows where the log is, and `debug` shows more there."""
    pid = place.mount("--log-level", "debug")
    log = json.loads(succeed(unionfs("inspect", "--json", place.merged)))["log"]
    succeed(unionfs("umount", place.merged))
    if log != "syslog":
        lines = [line for line in Path(log).read_text().splitlines() if f"unionfs[{pid}]" in line]
        assert any("DEBUG setting session: direct" in line for line in lines)
        assert any("DEBUG asked:" in line for line in lines)
    pid = place.mount()
    succeed(unionfs("umount", place.merged))
    if log != "syslog":
        lines = [line for line in Path(log).read_text().splitlines() if f"unionfs[{pid}]" in line]
        assert lines
        assert not any("DEBUG" in line for line in lines)


def test_diff_of_a_missing_upper(place: Place) -> None:
    said = refused(unionfs("diff", "-u", place.root / "nosuch", "-l", place.lower), "does not exist")
    assert "mkdir" not in said


def _libfuse() -> str:
    """The version of the libfuse that pyfuse3 loads, by its file's name."""
    script = "import pyfuse3; print(open('/proc/self/maps').read())"
    maps = succeed(cli_calls.call((sys.executable, "-c", script)))
    path = next(word for word in maps.split() if "/libfuse3.so" in word)
    return os.path.realpath(path).rpartition(".so.")[2]


def test_doctor(area: Path) -> None:
    done = unionfs("doctor", "--json", "--dir", area)
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert done.returncode == (0 if found["mounting_is_possible"] else 1)
    facts = {fact["name"]: fact for fact in found["findings"]}
    for name in (
        "/dev/fuse", "kernel", "fusermount3", "user_allow_other", "user xattrs", "trusted xattrs",
        "whiteouts", "RENAME_WHITEOUT", "RENAME_EXCHANGE", "O_TMPFILE", "reflink", "kernel overlayfs",
        "passthrough", "user namespaces", "pyfuse3", "open files",
    ):  # fmt: skip
        assert facts[name]["state"] in ("ok", "limited", "missing")
        assert facts[name]["detail"]
        if facts[name]["state"] != "ok":
            assert facts[name]["cure"]
    assert os.listdir(area) == []
    assert f"libfuse {_libfuse()}" in facts["pyfuse3"]["detail"]
    passthrough = facts["passthrough"]["detail"]
    if fuseprobe.init_offer() is not None and not passthrough.startswith("not in Linux"):
        assert "as the kernel's FUSE_INIT says" in passthrough
    text = unionfs("doctor", "--dir", area).stdout
    assert "/dev/fuse" in text
    assert max(map(len, text.splitlines())) <= 80
    assert " ".join(text.replace("-> ", "").split()).count(" ".join(facts["kernel"]["detail"].split())) == 1


def test_doctor_where_mounting_is_impossible(root: None) -> None:
    hide = "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    done = cli_calls.call(
        ("unshare", "-m", "sh", "-c", f'{hide}; exec "$@"', "sh", *cli_calls.UNIONFS), "doctor"
    )
    assert done.returncode == 1
    assert "modprobe fuse" in done.stdout


def test_doctor_on_a_filesystem_that_lacks_things(root: None, area: Path) -> None:
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", area], check=False, capture_output=True).returncode:
        pytest.skip("ramfs cannot be mounted here")
    try:
        facts = {f["name"]: f for f in listed(unionfs("doctor", "--json", "--dir", area))["findings"]}
        assert facts["user xattrs"]["state"] == facts["trusted xattrs"]["state"] == "limited"
        assert "ramfs" in facts["user xattrs"]["detail"]
    finally:
        subprocess.run(["umount", area], check=True)


def test_doctor_in_a_directory_that_cannot_be_written() -> None:
    refused(unionfs("doctor", "--dir", "/nowhere"), "/nowhere", "--dir")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command: str) -> None:
    text = succeed(unionfs(command, "--help"))
    assert text.startswith(f"Usage: unionfs {command}")
    assert "Example" in text
    assert succeed(unionfs(command, "-h")) == text


def test_help_of_all() -> None:
    text = succeed(unionfs("--help"))
    assert "Example" in text
    assert all(f"\n  {command}" in text for command in COMMANDS)
    assert succeed(unionfs()) == text


def test_version() -> None:
    assert succeed(unionfs("--version")).startswith("unionfs ")


def test_completion_of_what_is_there(place: Place) -> None:
    place.mount()
    containers = place.root / "storage/containers"
    for name in ("first", "second"):
        (containers / name).mkdir(parents=True)
    containers.chmod(0o700)
    containers.parent.chmod(0o700)

    def complete(words: str) -> list[str]:
        environment = {
            "_UNIONFS_COMPLETE": "bash_complete", "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")), "UNIONFS_ROOT": str(containers.parent),
        }  # fmt: skip
        return succeed(unionfs(env=environment)).split()

    merged = str(place.merged)
    for command in ("umount", "inspect", "stats", "sync", "refresh", "diff"):
        assert complete(f"unionfs {command} {merged[:-3]}") == [f"plain,{merged}"], command
    # Directories, where no mount matches.
    assert complete("unionfs umount /nowhere") == ["dir,/nowhere"]
    assert complete("unionfs ls -f st") == ["plain,state="]
    assert complete("unionfs ls -f state=d") == ["plain,state=detached", "plain,state=dead"]
    assert complete("unionfs run --name f") == ["plain,first"]
    assert complete("unionfs mount -v /etc") == ["file,/etc"]
    assert complete("unionfs mount -o ro,io=c") == ["plain,ro,io=cached"]
    assert complete("unionfs mount -o lowerdir=/a:/b") == ["dir,/b"]
    text = succeed(unionfs("mount", "--help"))
    assert all(word.removeprefix("plain,") in text for word in complete("unionfs mount -o "))
    assert complete("unionfs volume ls --filter l") == ["plain,label=", "plain,label!="]
    assert complete("unionfs rm f") == ["plain,first"]
    assert complete("unionfs rm first ") == ["plain,second"]


def test_shell_completion() -> None:
    script = succeed(unionfs(env={"_UNIONFS_COMPLETE": "bash_source"}))
    assert "complete" in script
    words = {"_UNIONFS_COMPLETE": "bash_complete", "COMP_WORDS": "unionfs ", "COMP_CWORD": "1"}
    found = succeed(unionfs(env=words))
    assert all(f"plain,{command}" in found for command in COMMANDS)
