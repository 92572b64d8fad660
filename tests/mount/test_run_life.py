"""The life of containers: detached ones, ps, logs, stop, kill, rm -f, prune; variables from files."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest

from tests.mount.cli_calls import refused, wait_for
from tests.mount.run_calls import Life, containers
from unionfs.sys.fds import Owned

_LOOP = "trap 'echo term; exit 3' TERM; trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done"


@pytest.fixture
def box(root: None, area: Path, runtime: str) -> Iterator[Life]:
    with containers(Life, area, runtime) as found:
        yield found


def test_from_run_to_rm(box: Life) -> None:
    box.detached("web", _LOOP)
    assert wait_for(lambda: box.said("web", "up\n"))
    state = box.state("web")
    assert (state["state"], state["code"], state["lowers"]) == ("running", None, [str(box.base)])
    assert state["command"] == ["sh", "-c", _LOOP]
    assert box.ok("ps", "-q") == "web\n"
    assert box.ok("ps", "--format", "{{.Names}} {{.Status}}").startswith("web Up ")
    assert box.ok("kill", "-s", "SIGHUP", "web") == "web\n"
    assert wait_for(lambda: box.said("web", "up\nhup\n"))
    refused(box.call("run", "--name", "web", "--", "true"), "container web is running")
    refused(box.call("rm", "web"), "container web is running; stop it by `unionfs stop web`, or use")
    assert box.ok("stop", "web") == "web\n"
    assert box.ok("logs", "web") == "up\nhup\nterm\n"
    assert box.is_over()
    assert (box.state("web")["state"], box.state("web")["code"]) == ("exited", 3)
    assert box.ok("ps", "-q") == ""
    assert box.ok("ps", "-a", "--format", "{{.Status}}").startswith("Exited (3) ")
    # Another run adds to the output, and finds the files.
    assert box.ok("run", "-d", "--name", "web", "--", "echo", "again") == "web\n"
    assert wait_for(lambda: box.state("web")["state"] == "exited")
    assert box.ok("logs", "web").endswith("term\nagain\n")
    assert box.ok("rm", "web") == "web\n"
    assert box.kept() == []


@pytest.mark.parametrize("driver", ["union", "overlay2"])
def test_a_mount_that_a_container_uses(box: Life, driver: str) -> None:
    """`umount` names the container and changes nothing, `ls` names it when the mount is detached."""
    merged = box.area / "merged"
    merged.mkdir()
    box.ok("mount", "-l", box.base, merged)
    words = ("-l", box.base, "-v", f"{merged}:/mnt", "--storage-driver", driver)
    box.ok("run", "-d", "--name", "user", *words, "--", "sleep", "100")
    refused(
        box.call("umount", merged), f"{merged} is busy: used by container user; run `unionfs stop user` first"
    )
    assert box.ok("exec", "user", "cat", "/mnt/data/seed") == "seed\n"
    assert (merged / "data/seed").read_text() == "seed\n"
    box.ok("umount", "--lazy", merged)
    [listed] = [one for one in json.loads(box.ok("ls", "--json")) if one["mountpoint"] == str(merged)]
    assert listed["state"] == "detached"
    if driver == "union":  # it is in the host's mount namespace
        assert listed["mounted_at"] == [str(box.root / "containers/user/merged/mnt")]
    else:
        assert {one["container"] for one in listed["held_by"]} == {"user"}
        assert "detached, used by container user " in box.ok("ls")
    box.ok("stop", "-t", "0.2", "user")
    assert wait_for(lambda: str(merged) not in box.ok("ls", "-q"))


def test_what_does_not_end_by_itself(box: Life) -> None:
    deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    for name in ("first", "second", "third"):
        box.detached(name, deaf)
        assert wait_for(lambda name=name: box.said(name, "up"))  # type: ignore[misc]
    assert box.ok("stop", "-t", "0.2", "first") == "first\n"
    assert box.state("first")["code"] == 128 + signal.SIGKILL
    assert box.ok("kill", "second") == "second\n"
    assert box.state("second")["code"] == 128 + signal.SIGKILL
    assert box.ok("rm", "-f", "third", "second") == "third\nsecond\n"
    assert box.kept() == ["first"]
    assert box.is_over()


def test_output_is_followed_to_the_end(box: Life) -> None:
    box.detached("talks", "for n in 1 2 3; do echo $n; sleep 0.3; done; echo error >&2")
    assert box.ok("logs", "-f", "talks") == "1\n2\n3\nerror\n"
    assert oct((box.root / "containers/talks/output").stat().st_mode & 0o777) == "0o600"


def test_a_detached_container_that_cannot_start(box: Life) -> None:
    done = box.call("run", "-d", "-l", box.base, "--", "nosuch")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr.startswith("unionfs: nosuch is not in the union's PATH")
    refused(box.call("run", "-d", "-l", "/nowhere", "--", "true"), "lower /nowhere does not exist")
    refused(box.call("run", "-d", "--name", "new", "--", "true"), "no container new yet")
    assert box.kept() == []
    assert box.is_over()


def test_one_that_is_not_kept(box: Life) -> None:
    name = box.ok("run", "-d", "--rm", "-l", box.base, "--", "sleep", "0.3").strip()
    assert len(name) == 12
    assert wait_for(lambda: box.kept() == [])
    assert box.is_over()


def test_prune_spares_what_runs(box: Life) -> None:
    box.detached("runs", "echo up; sleep 60")
    for name in ("over", "other"):
        box.say("--name", name, "--", "true")
    assert box.state("over")["state"] == "exited"
    pruned = json.loads(box.ok("container", "prune", "-f", "--json"))
    assert pruned == {"removed": ["other", "over"], "bases": []}
    assert box.ok("ps", "-aq") == "runs\n"
    assert box.ok("rm", "-f", "runs") == "runs\n"


def test_one_whose_process_was_killed(box: Life) -> None:
    box.detached("shot", "echo up; sleep 60")
    state = box.state("shot")
    os.kill(int(str(state["pid"])), signal.SIGKILL)
    assert wait_for(lambda: box.state("shot")["state"] == "dead")
    assert wait_for(box.is_over)
    assert box.ok("ps", "-a", "--format", "{{.Status}}") == "Dead\n"
    assert box.say("--name", "shot", "--", "echo", "again", lower=False) == "again\n"


def test_bad_calls(box: Life) -> None:
    box.say("--name", "over", "--", "true")
    for command in ("stop", "kill"):
        refused(box.call(command, "none"), "no container none")
        refused(box.call(command, "over"), "container over is not running")
    refused(box.call("logs", "over"), "no output on record")
    refused(box.call("logs", "none"), "no container none")
    box.detached("runs", "sleep 60")
    refused(box.call("kill", "-s", "STOP", "runs"), "signal STOP is not forwarded")
    box.ok("rm", "-f", "runs")
    refused(box.call("run", "-t", "--rm", "-l", box.base, "--", "true"), "-t is given", "not a terminal")
    refused(box.call("run", "-d", "-l", box.base), "COMMAND")


def test_variables_from_files(box: Life) -> None:
    (box.area / "env").write_text("# comment\nA=from file\nB=x=y\n\nPASSED\nUNSET_HERE\n")
    done = box.call(
        "run", "--rm", "-l", box.base, "--env-file", box.area / "env", "-e", "B=given", "--", "sh", "-c",
        "echo $A/$B/$PASSED/${UNSET_HERE-none}", PASSED="outside",
    )  # fmt: skip
    assert done.stdout == "from file/given/outside/none\n"
    refused(
        box.call("run", "--rm", "-l", box.base, "--env-file", "/none", "--", "true"), "--env-file /none"
    )
    (box.area / "bad").write_text("=x\n")
    refused(box.call("run", "--rm", "-l", box.base, "--env-file", box.area / "bad", "--", "true"), "no name")


def test_a_read_only_root(box: Life) -> None:
    script = "for d in / /root /data /vol /bound /scratch; do touch $d/new && echo $d; done; ls /data"
    (box.host / "bound").mkdir()
    words = (
        "run", "--rm", "-l", box.base, "-v", "vol:/vol", "-v", f"{box.host}/bound:/bound",
        "--tmpfs", "/scratch", "--read-only",
    )  # fmt: skip
    assert box.call(*words, "--", "sh", "-c", script).stdout.split() == ["/vol", "/bound", "/scratch", "seed"]
    assert box.ok(*words, "--user", "7", "--", "sh", "-c", "touch /tmp/x 2>&1; true").count("Read-only") == 1
    assert (box.host / "bound/new").exists()


def test_the_next_run_waits_for_the_end_of_the_last(box: Life) -> None:
    """`ps` says that it has exited, but its process still unmounts the union, and has the lock."""
    box.ok("run", "-d", "--name", "again", "-l", box.base, "--", "true")
    assert wait_for(lambda: box.state("again")["state"] == "exited")
    for words in (("run", "--name", "again", "--", "true"), ("rm", "again")):
        with Owned(os.open(box.root / "containers/again", os.O_RDONLY)) as fd:
            assert wait_for(lambda fd=fd: _locked(fd))
            timer = Timer(3, fcntl.flock, (fd, fcntl.LOCK_UN))
            timer.start()
            box.ok(*words)
            timer.join()
    assert box.kept() == []


def _locked(fd: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_bad_filters_and_templates_without_containers(box: Life) -> None:
    refused(box.call("ps", "--format", "{{.Names"), "invalid template")
    refused(box.call("ps", "-f", "state=up"), "unknown state up", "running, restarting, exited")
    refused(box.call("ls", "-f", "state=up"), "unknown state up", "active, waiting, detached, dead")
    assert box.ok("ps", "-f", "state=exited", "-q") == ""
