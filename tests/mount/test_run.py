"""`unionfs run`: a command with a union as its root, its storage, its exit code, signals and terminal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import refused, succeed, wait_for
from tests.mount.run_calls import PROGRAMS, Containers, Terminal
from tests.support.patience import patient
from unionfs.containers import bubblewrap, oci
from unionfs.containers.runtimes import choose_runtime
from unionfs.errors import UserError


def test_the_union_is_the_root(box: Containers) -> None:
    out = box.say("--rm", "--", "sh", "-c", "id -u; cat /data/seed; echo new > /data/new; ls /data; ls /")
    lines = out.split()
    assert lines[:4] == ["0", "seed", "new", "seed"]
    assert set(lines[4:]) == {"bin", "data", "dev", "etc", "proc", "root", "sys", "tmp"}
    assert sorted(os.listdir(box.base / "data")) == ["seed"]
    assert box.kept() == []
    assert box.is_over()


def test_namespaces(box: Containers) -> None:
    out = box.say(
        "--rm", "--hostname", "the-host", "--net", "none", "--", "sh", "-c",
        "hostname; echo $HOSTNAME; echo $$; for n in pid uts ipc mnt net; do ls -l /proc/self/ns/$n; done;"
        "ip -o link; ls /proc | cat",
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[:2] == ["the-host", "the-host"]
    assert int(lines[2]) < 5
    for name, line in zip(("pid", "uts", "ipc", "mnt", "net"), lines[3:8], strict=True):
        assert os.readlink(f"/proc/self/ns/{name}") not in line
    assert [line.split(": ")[1] for line in lines if line.startswith("1: ")] == ["lo"]
    assert not any(line.startswith("2: ") for line in lines)
    # No process of the host is visible.
    assert str(os.getpid()) not in lines
    net = box.say("--rm", "--", "ls", "-l", "/proc/self/ns/net")
    assert os.readlink("/proc/self/ns/net") in net


def test_environment_and_workdir(box: Containers) -> None:
    out = box.run(
        "--rm", "-e", "A=1", "-e", "B=x=y", "-e", "PASSED", "-e", "UNSET_HERE",
        "--workdir", "/not/../made/here",
        "--", "sh", "-c", "pwd; env",
        PASSED="from outside", OTHER="not passed", TERM="dumb",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    first, *rest = out.stdout.splitlines()
    assert first == "/made/here"
    values = dict(line.split("=", 1) for line in rest)
    assert values["A"] == "1"
    assert values["B"] == "x=y"
    assert values["PASSED"] == "from outside"
    assert values["HOME"] == "/root"
    assert values["TERM"] == "dumb"
    assert "/usr/bin" in values["PATH"]
    assert not {"OTHER", "UNSET_HERE", "UNIONFS_ROOT", "PYTHONPATH"} & set(values)


def test_a_workdir_that_is_a_file(box: Containers) -> None:
    out = box.run("--rm", "--workdir", "/etc/passwd", "--", "pwd")
    assert out.returncode == 125
    assert out.stderr.startswith("unionfs: --workdir /etc/passwd cannot be used: not a directory")
    assert box.kept() == []


def test_secrets_in_the_environment_are_not_on_a_command_line(box: Containers) -> None:
    script = "echo up-$TOKEN; sleep 60"
    process = box.start("--rm", "-e", "TOKEN", "--", "sh", "-c", script, TOKEN="open-sesame")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up-open-sesame\n"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                assert b"open-sesame" not in path.read_bytes()
    finally:
        process.terminate()
        process.communicate(timeout=patient(20))


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_exit_code(box: Containers, code: int) -> None:
    done = box.run("--rm", "--", "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")
    assert box.is_over()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_exit_code_of_a_signal(box: Containers, number: signal.Signals) -> None:
    assert box.run("--rm", "--", "sh", "-c", f"kill -{number} $$").returncode == 128 + number


def test_what_cannot_be_started(box: Containers) -> None:
    done = box.run("--", "nothing-like-this")
    assert done.returncode == 127
    assert "nothing-like-this is not in the union's PATH" in done.stderr
    for command in ("/etc/passwd", "/etc"):
        done = box.run("--", command)
        assert done.returncode == 126
        assert f"{command} in the union is not executable" in done.stderr
    assert box.run("--", "./nothing").returncode == 127
    for first in ("#!/bin/no-such-shell -e", "#! bin/nor-this"):
        script = box.base / "script"
        script.write_text(f"{first}\necho started\n")
        script.chmod(0o755)
        done = box.run("--", "/script")
        assert (done.returncode, done.stdout) == (127, "")
        interpreter = first[2:].split()[0]
        assert f"/script is a script for {interpreter}, which cannot be found in the union" in done.stderr
    # No container of these is kept, because no command has run.
    assert box.kept() == []
    assert box.is_over()


def test_a_command_by_its_path(box: Containers) -> None:
    (box.base / "data/script").write_text("#!/bin/sh\necho script\n")
    (box.base / "data/script").chmod(0o755)
    (box.base / "data/link").symlink_to("/data/script")
    assert box.say("--rm", "--workdir", "/data", "--", "./script") == "script\n"
    assert box.say("--rm", "--", "/data/link") == "script\n"
    assert box.say("--rm", "-e", "PATH=/data", "--", "script") == "script\n"


def test_kept_and_thrown_away(box: Containers) -> None:
    """The tutorial: files written in a container are removed with it, but not those in a volume."""
    box.say("--name", "writer", "-v", "vol:/vol", "--", "sh", "-c", "echo mine > /root/note; echo v > /vol/x")
    assert box.kept() == ["writer"]
    # The same name finds the files again, over the recorded lowers.
    assert box.say("--name", "writer", "--", "cat", "/root/note", lower=False) == "mine\n"
    assert box.say("--name", "writer", "-v", "vol:/vol", "--", "cat", "/vol/x", lower=False) == "v\n"
    # Another container sees only the volume.
    assert box.say("--rm", "-v", "vol:/vol", "--", "sh", "-c", "ls /root; cat /vol/x") == "v\n"
    assert cli_calls.unionfs("rm", "writer", env=box.environment()).returncode == 0
    assert box.kept() == []
    assert box.say("--name", "writer", "--", "ls", "/root") == ""
    assert (box.root / "volumes/vol/_data/x").read_text() == "v\n"
    # An upper has the kernel's format; `diff` reads it without a mount.
    box.say("--name", "writer", "--", "rm", "/data/seed")
    upper = box.root / "containers/writer/upper"
    diff = cli_calls.unionfs("diff", "--upper", upper, "--lower", box.base)
    assert "D /data/seed\n" in diff.stdout
    assert cli_calls.unionfs("rm", "writer", env=box.environment()).returncode == 0


def test_anonymous_volumes_go_with_the_container(box: Containers) -> None:
    volumes = box.root / "volumes"
    box.say("--rm", "-v", "/anon", "-v", "named:/n", "--", "touch", "/anon/x")
    assert os.listdir(volumes) == ["named"]
    box.say("--name", "kept", "-v", "/anon", "--", "touch", "/anon/x")
    (anonymous,) = [name for name in os.listdir(volumes) if name != "named"]
    assert (volumes / anonymous / "_data/x").exists()
    # Nor is one left by a failed mount.
    refused(box.run("-v", "/anon", "-v", "other:/data/seed/x", "--", "true"), "target /data/seed/x")
    assert sorted(os.listdir(volumes)) == sorted([anonymous, "named", "other"])


def test_first_use_of_a_volume(box: Containers) -> None:
    assert box.say("--rm", "-v", "filled:/data", "--", "ls", "/data") == "seed\n"
    assert (box.root / "volumes/filled/_data/seed").read_text() == "seed\n"


def test_storage(box: Containers) -> None:
    (box.host / "conf").write_text("from the host\n")
    out = box.say(
        "--rm", "-v", f"{box.host}:/host", "-v", f"{box.host}/conf:/etc/conf:ro", "--tmpfs", "/t:size=64k",
        "--tmpfs", "/dev/shm:size=1m", "--mount", f"type=bind,src={box.host},dst=/ro,readonly", "--",
        "sh", "-c",
        "cat /etc/conf; echo written > /host/new; (echo x > /etc/conf) 2>/dev/null || echo refused; "
        "touch /ro/x 2>/dev/null || echo refused; "
        "dd if=/dev/zero of=/t/f bs=1k count=128 2>/dev/null || echo full;"
        "df -k /dev/shm | cat",
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[:4] == ["from the host", "refused", "refused", "full"]
    assert lines[-1].split()[1] == "1024"
    assert (box.host / "new").read_text() == "written\n"
    assert (box.host / "conf").read_text() == "from the host\n"
    assert box.is_over()



def test_upper_elsewhere(box: Containers) -> None:
    out = box.say("--rm", "-u", "tmpfs:size=2m", "--", "sh", "-c", "echo x > /f; df -k / | cat")
    assert out.splitlines()[-1].split()[1] == "2048"
    for name in ("u", "w"):
        (box.area / name).mkdir()
    box.say("-u", box.area / "u", "--work", box.area / "w", "--", "touch", "/made")
    assert (box.area / "u/made").exists()
    assert box.kept() == []


def test_capabilities(box: Containers) -> None:
    """The capabilities of root in Docker: it may use files of others, but not mount."""
    assert box.run("--rm", "--", "mount", "-t", "tmpfs", "none", "/tmp").returncode != 0
    status = box.say("--rm", "--", "cat", "/proc/self/status")
    (effective,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    assert int(effective, 16) == 0xA80425FB


def test_kernel_settings_are_read_only(box: Containers) -> None:
    """As in Docker: files in /proc/sys require uid 0 but no capability, and most affect the whole machine."""
    # The current value is written back, so that nothing changes if it is writable.
    again = "value=$(cat /proc/sys/kernel/core_pattern); echo \"$value\" > /proc/sys/kernel/core_pattern"
    for network in ("host", "none"):
        out = box.run("--rm", "--net", network, "--", "sh", "-c", again)
        assert out.returncode != 0
        assert "Read-only file system" in out.stderr


def test_open_files_of_the_caller_stay_outside(box: Containers) -> None:
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(fd, True)
    try:
        done = cli_calls.unionfs(
            *box.words("--rm", "--", "ls", f"/proc/self/fd/{fd}/root"), env=box.environment(), pass_fds=[fd]
        )
    finally:
        os.close(fd)
    assert done.returncode != 0


# -- signals and terminals ----------------------------------------------------------------------------

_TRAPS = (
    "for s in TERM INT HUP USR1 QUIT; do trap \"echo got $s\" $s; done; "
    "trap 'echo bye; exit 5' USR2; echo up; while true; do sleep 0.02; done"
)


def test_signals_are_handed_on(box: Containers) -> None:
    process = box.start("--rm", "--", "sh", "-c", _TRAPS)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        for name in ("TERM", "INT", "HUP", "USR1", "QUIT"):
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert process.stdout.readline() == f"got {name}\n"
        process.send_signal(signal.SIGUSR2)
        assert process.communicate(timeout=patient(20))[0] == "bye\n"
        assert process.returncode == 5
    finally:
        process.kill()
        process.communicate()
    assert box.is_over()
    assert box.kept() == []


def processes_in(box: Containers) -> list[str]:
    """The command lines of all processes with a root below the area."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace")
            if str(box.area) in words or "81.5" in words:
                found.append(words.replace("\0", " "))
    return found


@pytest.mark.parametrize("how", ["exit", "signal", "terminal"])
def test_what_the_command_leaves_running_is_killed(box: Containers, how: str) -> None:
    """The exit code is the command's, immediate; a background process neither delays it nor outlives it."""
    background = "(trap '' INT TERM HUP; sleep 81.5; sleep 81.5) & "
    if how == "exit":
        done = box.run("--rm", "--", "sh", "-c", f"{background} exit 6")
        assert (done.returncode, done.stderr) == (6, "")
    elif how == "signal":
        process = box.start("--rm", "--", "sh", "-c", f"{background} trap 'exit 7' TERM; echo up; wait")
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.communicate(timeout=patient(20)) == ("", "")
        assert process.returncode == 7
    else:
        terminal = Terminal(box, "--rm", "--", "sh", "-c", f"{background} trap 'exit 8' INT; echo up; wait")
        terminal.wait_for(b"up")
        terminal.type(b"\x03")
        assert terminal.end() == 8
        assert b"unionfs:" not in terminal.seen
    assert box.is_over()
    assert wait_for(lambda: processes_in(box) == []), processes_in(box)
    assert box.kept() == []


def test_a_signal_that_ends_the_command(box: Containers) -> None:
    process = box.start("--name", "web", "--", "sh", "-c", "echo up; sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    process.communicate(timeout=patient(20))
    assert process.returncode == 128 + signal.SIGTERM
    assert box.is_over()
    assert box.kept() == ["web"]


def test_the_runner_is_killed(box: Containers) -> None:
    """The command ends, the union is removed, and so is a temporary container."""
    process = box.start("--rm", "--name", "doomed", "--tmpfs", "/t", "--", "sh", "-c", "echo up; sleep 61.25")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.communicate(timeout=patient(20))
    assert wait_for(box.is_over)
    assert wait_for(lambda: box.kept() == [])
    assert not any(
        b"61.25" in path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.parent.exists() and not cli_calls.gone(int(path.parent.name))
    )


def test_one_at_a_time(box: Containers) -> None:
    process = box.start("--name", "one", "--", "sh", "-c", "echo up; sleep 60")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        refused(box.run("--name", "one", "--", "true"), "container one is running")
        refused(cli_calls.unionfs("rm", "one", env=box.environment()), "container one is running")
    finally:
        process.terminate()
        process.communicate(timeout=patient(20))
    assert box.say("--name", "one", "--", "echo", "again") == "again\n"


def test_a_terminal(box: Containers) -> None:
    terminal = Terminal(box, "--rm", "--", "sh")
    terminal.wait_for(b"# ")
    terminal.type(b"tty; stty size; read word; echo got-$word-here\n")
    terminal.wait_for(b"/dev/")
    terminal.type(b"typed\n")
    terminal.wait_for(b"got-typed-here")
    # Ctrl-C ends the program in the shell, not the shell or the container.
    terminal.type(b"sleep 60\n")
    assert wait_for(lambda: terminal.runs("sleep"))
    terminal.type(b"\x03")
    terminal.wait_for(b"# ")
    terminal.type(b"exit 9\n")
    assert terminal.end() == 9
    assert box.is_over()


def test_ctrl_c_reaches_the_command_once(box: Containers) -> None:
    """A command that handles it continues, though the runtime dies of it; its exit code is still returned."""
    script = "trap 'echo caught' INT; trap 'exit 4' TERM; echo up; while true; do sleep 0.05; done"
    terminal = Terminal(box, "--rm", "--name", "ctrl", "--", "sh", "-c", script)
    terminal.wait_for(b"up")
    terminal.type(b"\x03")
    terminal.wait_for(b"caught")
    terminal.type(b"\x03")
    terminal.wait_for(b"caught")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end() == 4
    assert terminal.seen.count(b"caught") == 0
    assert wait_for(box.is_over)
    assert box.kept() == []


def test_ctrl_c_ends_a_command_that_does_not_handle_it(box: Containers) -> None:
    terminal = Terminal(box, "--rm", "--", "sh", "-c", "echo up; exec sleep 60")
    terminal.wait_for(b"up")
    assert wait_for(lambda: terminal.runs("sleep"))
    terminal.type(b"\x03")
    assert terminal.end() == 128 + signal.SIGINT
    assert wait_for(box.is_over)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--", "true"], ["no lower is given"]),
        (["--name", "new", "--", "true"], ["no container new yet", "-l DIR"]),
        (["--name", "x", "--", "true"], ["invalid container name 'x'"]),
        (["--name", "../up", "--", "true"], ["invalid container name '../up'"]),
        (["-l", "/nowhere", "--", "true"], ["lower /nowhere does not exist"]),
        (["-l", "/", "--workdir", "rel", "--", "true"], ["--workdir rel", "absolute"]),
        (["-l", "/", "-e", "=x", "--", "true"], ["-e =x", "no name"]),
        (["-l", "/", "--hostname", "h" * 65, "--", "true"], ["--hostname", "64"]),
        (["-l", "/", "-v", "vol:rel", "--", "true"], ["target rel"]),
        (["-l", "/", "-u", "tmpfs:size=x", "--", "true"], ["size=x"]),
        (["-l", "", "--", "true"], ["empty path"]),
        (["-l", "/"], ["COMMAND"]),
        (["--net", "bridge", "-l", "/", "--", "true"], ["--net", "bridge"]),
    ],
)
def test_bad_input(box: Containers, arguments: list[str], parts: list[str]) -> None:
    done = box.run(*arguments, lower=False)
    sentence = done.stderr.lower()
    assert done.returncode == 125
    assert done.stdout == ""
    assert sentence.count("\n") == 1
    for part in parts:
        assert part.lower() in sentence
    assert box.kept() == []
    assert box.is_over()


def test_refusals_of_containers(box: Containers) -> None:
    box.say("--name", "kept", "--", "touch", "/x")
    refused(box.run("--rm", "--name", "kept", "--", "true"), "kept already exists", "--rm")
    (box.area / "other").mkdir()
    done = box.run("--name", "kept", "-l", box.area / "other", "--", "true", lower=False)
    refused(done, "created with other lowers", str(box.base))
    refused(cli_calls.unionfs("rm", "gone", env=box.environment()), "no container gone")
    # A failure of its storage keeps it, and leaves no mounts.
    done = box.run("--name", "kept", "-v", "vol:/bin/sh/x", "--", "true")
    refused(done, "target /bin/sh/x")
    assert box.kept() == ["kept"]
    assert box.is_over()
    facts = json.loads((box.root / "containers/kept/container.json").read_text())
    assert facts == {"lowers": [str(box.base)]}
    assert stat.S_IMODE((box.root / "containers/kept").stat().st_mode) == 0o700
    # A missing one does not keep the others.
    done = cli_calls.unionfs("rm", "gone", "kept", env=box.environment())
    assert (done.returncode, done.stdout) == (1, "kept\n"), done.stderr
    assert box.kept() == []


def test_the_choice_of_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bubblewrap, then crun; what is named is not replaced by another one."""
    monkeypatch.setattr(bubblewrap, "PATH", "/nowhere")
    monkeypatch.setattr(oci, "PATH", "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("auto", "bubblewrap"):
        with pytest.raises(UserError, match="install the package bubblewrap"):
            choose_runtime(name)
    with pytest.raises(UserError, match="crun is missing; install the package crun"):
        choose_runtime("crun")
    for program, title in (("crun", "crun"), ("bwrap", "bubblewrap")):
        (tmp_path / program).symlink_to("/bin/true")
        assert choose_runtime("auto").title == title
    monkeypatch.setattr(oci, "INIT", "/nowhere/init")
    with pytest.raises(UserError, match="crun needs /nowhere/init, which this installation lacks; "):
        choose_runtime("crun")


def test_the_configured_runtime(box: Containers) -> None:
    """Pid 1 shows which one it is; the option replaces the configuration."""
    configuration = box.area / "configuration/unionfs/config.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(f'runtime = "{box.runtime}"\n')
    name = {"bubblewrap": "bwrap", "crun": "/proc/self/fd"}
    words = ("run", "--rm", "-l", box.base)
    look = ("--", "head", "-c", "30", "/proc/1/cmdline")
    environment = box.environment(XDG_CONFIG_HOME=str(box.area / "configuration"))
    assert name[box.runtime] in succeed(cli_calls.unionfs(*words, *look, env=environment))
    other = next(one for one in PROGRAMS if one != box.runtime)
    if shutil.which(PROGRAMS[other]) is not None:
        out = succeed(cli_calls.unionfs(*words, "--runtime", other, *look, env=environment))
        assert name[other] in out
