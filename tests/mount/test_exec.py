"""`unionfs exec`: another command in a running container, with the same rights as its first one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, refused, wait_for
from tests.mount.run_calls import Life, Terminal, lives
from tests.support import mounting
from tests.support.patience import patient

_WAIT = "echo up; while :; do sleep 0.05; done"
_RIGHTS = (
    "grep -E '^(Uid|Gid|Groups|Cap|NoNew|Seccomp)' /proc/self/status; cat /proc/self/uid_map "
    "/proc/self/limits /proc/self/cgroup /proc/self/mountinfo; ls -l /proc/self/ns | grep -o '[a-z]*:\\[.*'; "
    "umask; pwd; hostname; env | grep -v SHLVL; ls /proc/self/fd | grep -v 3; cat /proc/self/oom_score_adj"
)


class Execs(Life):
    """Containers that run, and calls of `unionfs exec`."""

    def words(self, *arguments: str | Path, lower: bool = True) -> list[str | Path]:
        return ["exec", *arguments]

    def up(self, name: str, *options: str | Path, script: str = _WAIT) -> None:
        words = ("-d", "--name", name, "-l", self.base, *options, "--", "sh", "-c", script)
        assert self.ok("run", *words) == f"{name}\n"
        assert wait_for(lambda: self.said(name, "up\n"))

    def exec(self, *words: str | Path, **more: str) -> Done:
        return self.call("exec", *words, **more)

    def inside(self, *words: str | Path) -> str:
        return self.ok("exec", *words)


@pytest.fixture
def box(root: None, area: Path, runtime: str) -> Iterator[Execs]:
    with lives(Execs, area, runtime) as found:
        yield found


@pytest.mark.parametrize(
    "options",
    [
        [], ["--user", "7:8"], ["--cap-add", "SYS_PTRACE"], ["--cap-drop", "ALL"], ["--net", "none"],
        ["--security-opt", "seccomp=unconfined"], ["--privileged"], ["--read-only", "-w", "/tmp"],
        ["--hostname", "other", "-e", "A=b c"],
    ],
)  # fmt: skip
def test_it_is_as_the_first_command(box: Execs, options: list[str]) -> None:
    box.up("first", *options, script=f"{{ {_RIGHTS}; }} 2>&1; echo up; {_WAIT}")
    first = box.ok("logs", "first").split("up\n")[0]
    assert "CapEff" in first
    assert box.inside("first", "sh", "-c", f"{{ {_RIGHTS}; }} 2>&1") == first


def test_it_sees_what_the_container_sees(box: Execs) -> None:
    box.up("web", "-v", "vol:/vol", "--tmpfs", "/t", script=f"echo file > /t/x; {_WAIT}")
    assert box.inside("web", "cat", "/t/x") == "file\n"
    box.inside("web", "sh", "-c", "echo new > /root/new; echo v > /vol/v; kill -0 1")
    assert (box.root / "containers/web/upper/root/new").read_text() == "new\n"
    assert (box.root / "volumes/vol/_data/v").read_text() == "v\n"
    assert not (box.base / "root/new").exists()
    assert box.ok("stop", "-t", "0", "web") == "web\n"
    assert not (box.root / "containers/web/entrance.json").exists()
    assert box.is_over()


def test_exit_codes(box: Execs) -> None:
    box.up("web")
    for code in (0, 1, 3, 255):
        done = box.exec("web", "sh", "-c", f"echo out; echo err >&2; exit {code}")
        assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV):
        assert box.exec("web", "sh", "-c", f"kill -{number} $$").returncode == 128 + number
    done = box.exec("web", "nosuch")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr.startswith("unionfs: nosuch is not in the union's PATH")
    assert box.exec("web", "/etc/passwd").returncode == 126
    # What only execve(2) finds out: not a program; an interpreter that is not executable.
    for content in ("\x7fELFnot", "#!/etc/passwd\n"):
        box.inside("web", "sh", "-c", f"printf '{content.strip()}\n' > /odd; chmod 755 /odd")
        done = box.exec("web", "/odd")
        assert done.returncode == 126, done
        assert done.stderr.startswith("unionfs: the command cannot be executed: ")
        assert done.stderr.count("\n") == 1
    assert box.inside("web", "echo", "still") == "still\n"
    # Not a call of mount(8), which has -o.
    assert box.inside("web", "sh", "-o", "errexit", "-c", "echo still") == "still\n"
    assert box.inside("web", "--", "echo", "still") == "still\n"


def test_bad_calls(box: Execs) -> None:
    refused(box.exec("none", "true"), "no container none")
    box.up("web")
    refused(box.exec("web"), "COMMAND")
    refused(box.exec("web", "--"), "COMMAND")
    refused(box.exec("-t", "web", "true"), "-t is given", "not a terminal")
    refused(box.exec("-w", "tmp", "web", "true"), "--workdir tmp is a relative path")
    refused(box.exec("-u", "nobody", "web", "true"), "user nobody is not in /etc/passwd")
    refused(box.exec("-e", "=x", "web", "true"), "no name")
    done = box.exec("-w", "/none", "web", "/bin/true")
    assert done.returncode == 126, done
    assert "the working directory cannot be used: no such file" in done.stderr
    box.ok("kill", "web")
    refused(box.exec("web", "true"), "container web is not running")


def test_variables_workdir_and_user(box: Execs) -> None:
    with (box.base / "etc/passwd").open("a") as passwd:
        passwd.write("www:x:33:34::/data:/bin/sh\n")
    (box.base / "etc/group").write_text("more:x:35:www\n")
    box.up("web", "-e", "A=first", "-e", "B=first", "-w", "/data")
    assert box.inside("web", "sh", "-c", "echo $PWD $A $HOME") == "/data first /root\n"
    (box.area / "env").write_text("C=file\n")
    words = ("-e", "A=x y", "-e", "B", "--env-file", box.area / "env", "-w", "/tmp", "web")
    done = box.exec(*words, "sh", "-c", "echo $PWD/$A/$B/$C", B="caller")
    assert done.stdout == "/tmp/x y/caller/file\n"
    script = "id -u; id -g; id -G; echo $HOME; grep -E 'CapEff|CapBnd' /proc/self/status"
    out = box.inside("-u", "www", "web", "sh", "-c", script).split()
    assert out[:5] == ["33", "34", "34", "35", "/data"]
    # As in docker: no capabilities, and only those of the container after a set-id program without nnp.
    assert out[5:] == ["CapEff:", "0" * 16, "CapBnd:", "00000000a80425fb"]
    assert box.inside("-u", "5:6", "web", "sh", "-c", "id -u; id -g; id -G") == "5\n6\n6\n"
    box.up("other", "--user", "5:6")
    assert box.inside("-u", "5:6", "other", "id", "-u") == "5\n"
    refused(box.exec("-u", "root", "other", "id"), "--user root", "no other ids than 5:6")


def test_input_and_output(box: Execs) -> None:
    box.up("web")
    data = b"\0\xff" * 200_000
    done = subprocess.run(
        [*mounting.command(), "exec", "-i", "web", "cat"], input=data, capture_output=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), **box.environment()}, timeout=patient(60),
    )  # fmt: skip
    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")


def test_what_it_leaves_running_goes_on(box: Execs) -> None:
    box.up("web")
    done = box.exec("web", "sh", "-c", "echo begun; (sleep 2; echo over > /tmp/over) & exit 4")
    assert (done.returncode, done.stdout) == (4, "begun\n")
    assert wait_for(lambda: box.exec("web", "cat", "/tmp/over").stdout == "over\n")


def test_detached(box: Execs) -> None:
    box.up("web")
    assert box.inside("-d", "web", "sh", "-c", "echo lost; cat; echo made > /tmp/made; sleep 60") == ""
    assert wait_for(lambda: box.exec("web", "cat", "/tmp/made").stdout == "made\n")
    assert box.ok("logs", "web") == "up\n"
    box.inside("-d", "web", "sh", "-c", "cat /proc/self/fdinfo/0 >/tmp/info; echo >/tmp/info.over")
    assert wait_for(lambda: box.exec("web", "cat", "/tmp/info.over").returncode == 0)
    native = "exec 0<>/dev/null; cat /proc/self/fdinfo/0"  # opened to read and write
    flags = [line for line in box.inside("web", "sh", "-c", native).splitlines() if "flags" in line]
    assert [line for line in box.inside("web", "cat", "/tmp/info").splitlines() if "flags" in line] == flags
    done = box.exec("-d", "web", "nosuch")
    assert (done.returncode, done.stdout) == (127, "")
    assert box.ok("stop", "-t", "0", "web") == "web\n"
    assert box.is_over()


def test_signals_are_handed_on(box: Execs) -> None:
    box.up("web")
    traps = "trap 'echo got; exit 5' TERM; echo on; while :; do sleep 0.05; done"
    process = box.start("web", "sh", "-c", traps)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.terminate()
    assert process.communicate(timeout=patient(20)) == ("got\n", "")
    assert process.returncode == 5
    # One that is killed takes its command along; a container that ends, all commands in it.
    process = box.start("web", "sh", "-c", "echo on; exec sleep 93.5")
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.kill()
    process.communicate(timeout=patient(20))
    lines = "cat /proc/[0-9]*/cmdline 2>/dev/null; true"
    assert wait_for(lambda: "93.5" not in box.inside("web", "sh", "-c", lines))
    process = box.start("web", "sh", "-c", "trap '' TERM; echo on; sleep 60; sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert box.ok("kill", "web") == "web\n"
    process.communicate(timeout=patient(20))
    assert process.returncode == 128 + signal.SIGKILL
    assert box.is_over()


def test_a_terminal(box: Execs) -> None:
    box.up("web")
    terminal = Terminal(box, "-it", "web", "sh")
    terminal.wait_for(b"# ")
    terminal.type(b"stty size; read word; echo got-$word-here\n")
    terminal.wait_for(b"31 97")
    terminal.type(b"typed\n")
    terminal.wait_for(b"got-typed-here")
    terminal.type(b"sleep 60\n")
    assert wait_for(lambda: terminal.runs("sleep"))
    terminal.type(b"\x03")
    terminal.wait_for(b"# ")
    terminal.type(b"sleep 60 & exit 9\n")
    assert terminal.end() == 9
    # Nothing that was written last is lost, though something keeps the terminal open.
    terminal = Terminal(box, "-it", "web", "sh", "-c", "(trap '' HUP; sleep 30) & seq 1 20000")
    terminal.wait_for(b"\n20000\r\n")
    assert terminal.end() == 0
