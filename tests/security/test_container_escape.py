"""Container escapes of runc and Docker: each is tried here, and must fail."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount import cli_calls, user_calls
from tests.mount.cli_calls import REPOSITORY, UNIONFS, refused, wait_for
from tests.mount.run_calls import PROGRAMS
from tests.security.container_calls import PYTHON, Prison, prison
from tests.support import areas
from tests.support.patience import patient
from unionfs.sys import calls

RACE_SECONDS = 10.0


def state(path: str | Path) -> tuple[object, ...]:
    """The attributes of a host file that must not change."""
    st = os.stat(path)
    return st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, hashlib.sha256(Path(path).read_bytes()).digest()


# -- the host's programs: CVE-2019-5736 ---------------------------------------------------------------

_OVERWRITE = """
import errno, os
names = [f'/proc/{pid}/exe' for pid in (1, 2, 3, 'self')]
for name in names:
    if os.path.realpath(name) == os.path.realpath('/proc/self/exe') and name != '/proc/1/exe': continue
    held = None
    try: held = os.open(name, os.O_PATH)
    except OSError: continue
    for path in (name, f'/proc/self/fd/{held}'):
        for what, deed in {
            'write': lambda: os.open(path, os.O_WRONLY),
            'trunc': lambda: os.open(path, os.O_RDWR | os.O_TRUNC),
            'truncate': lambda: os.truncate(path, 0), 'chmod': lambda: os.chmod(path, 0o4777),
            'chown': lambda: os.chown(path, 1, 1), 'utime': lambda: os.utime(path, (0, 0)),
            'setxattr': lambda: os.setxattr(path, 'user.x', b'x'),
        }.items():
            try: deed(); print(what, 'done')
            except OSError as error: print(what, errno.errorcode[error.errno])
"""


def test_the_runtime_cannot_be_written(inmate: Prison) -> None:
    """bubblewrap is pid 1 in the container, and its file is the host's: root's, or the user's own."""
    program = inmate.copy_runtime()
    before = state(program)
    done = inmate.python(_OVERWRITE)
    assert before == state(program)
    answers = inmate.out(done).splitlines()
    assert len(answers) >= 14
    if inmate.is_root and inmate.is_bubblewrap:
        assert {answer.split()[1] for answer in answers} <= {"EROFS", "ETXTBSY"}
    else:  # the mode of a copy in memory does not matter
        name = "bwrap" if inmate.is_bubblewrap else "unionfs-init"
        assert f"memfd:{name}" in inmate.sh("ls -l /proc/1/exe").stdout
        writes = {answer.split()[1] for answer in answers if answer.startswith(("write", "trunc"))}
        assert writes <= {"EPERM", "ETXTBSY", "EACCES"}


def test_the_command_is_the_runtime_itself(inside: Prison) -> None:
    """The original: the command /proc/self/exe is the runtime, with libraries of the container."""
    program = inside.copy_runtime()
    before = state(program)
    (inside.box.base / "proc/self").mkdir(parents=True)
    shutil.copy(inside.box.base / "bin/busybox", inside.box.base / "proc/self/exe")
    done = inside.call("--rm", "--", "/proc/self/exe", "--bind", "/", "/", PYTHON, "-c", _OVERWRITE)
    assert "done" not in done.stdout
    assert before == state(program)


def test_the_environment_is_the_command_s_alone(inmate: Prison) -> None:
    """Variables of ld.so(8) change the libraries of a program, and the runtime itself is still outside."""
    for variable in ("LD_TRACE_LOADED_OBJECTS=1", "LD_PRELOAD=/nowhere/x.so", "GLIBC_TUNABLES=glibc.x=1"):
        done = inmate.call("--rm", "-e", variable, "--", "/bin/busybox", "env")
        assert variable in inmate.out(done).splitlines()
        assert done.stderr == ""
    script = "echo up; sleep 82.5; exec true"
    process = inmate.start("--rm", "-e", "PASSWORD=in-the-environment", "--", "sh", "-c", script)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        shown = {path: read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        name = PROGRAMS[inmate.box.runtime].encode()
        runtimes = [words for words in shown.values() if words.partition(b"\0")[0].endswith(name)]
        assert any(b"82.5" in words or not inmate.is_bubblewrap for words in runtimes)
        assert all(b"in-the-environment" not in words for words in runtimes)
    finally:
        process.terminate()
        process.communicate(timeout=patient(20))


def read(path: Path) -> bytes:
    """The content of a file; empty if it is gone."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


# -- open files of the host: CVE-2024-21626 -----------------------------------------------------------


def test_open_files(inmate: Prison) -> None:
    """The container has none of the caller's or bubblewrap's."""
    done = inmate.python(
        "import os\n"
        "for pid in ('self', 1):\n"
        "    for fd in os.listdir(f'/proc/{pid}/fd'):\n"
        "        try: print(pid, fd, os.readlink(f'/proc/{pid}/fd/{fd}'))\n"
        "        except OSError: pass\n"
        "print('cwd', os.getcwd(), os.readlink('/proc/1/root'), os.readlink('/proc/1/cwd'))\n"
    )
    *files, last = inmate.out(done).splitlines()
    for line in files:
        pid, fd, target = line.split(" ", 2)
        assert int(fd) <= 2 or (pid == "1" and target.startswith("anon_inode:")), line
    assert last == "cwd / / /"


@pytest.mark.parametrize("prefix", ["/proc/self/fd/", "/proc/thread-self/fd/", "/link"])
def test_a_workdir_that_is_an_open_file(inmate: Prison, prefix: str) -> None:
    """`--workdir /proc/self/fd/N`, and a symlink of the image that leads there."""
    for number in range(31) if inmate.is_root and prefix == "/proc/self/fd/" else (3, 7):
        if prefix == "/link":
            (inmate.box.base / f"link{number}").symlink_to(f"/proc/self/fd/{number}")
        done = inmate.call("--rm", "--workdir", f"{prefix}{number}", "--", "ls", "-d", ".", "../..", "sys")
        refused(done, f"--workdir {prefix}{number}", "could leave the container")
    assert not (inmate.box.base / "proc").exists()


@pytest.mark.parametrize("path", ["/proc", "/proc/1/root", "/dev", "/dev/fd", "/sys/kernel", "/x/../proc/1"])
def test_a_workdir_in_the_kernel_s_trees(inside: Prison, path: str) -> None:
    refused(inside.call("--rm", "--workdir", path, "--", "true"), "--workdir", "choose another directory")


_WORKDIR_SWAPPED = """
import sys
from dataclasses import replace
from unionfs.cli.main import main
from unionfs.containers import bubblewrap, oci
number, *sys.argv[1:] = sys.argv[1:]
# The swap: the path that was checked leads to an open file of the runtime's.
swapped = f"/proc/self/fd/{number}"
for module, name in ((bubblewrap, "arguments"), (oci, "configuration")):
    def render(container, *words, original=getattr(module, name), **more):
        return original(replace(container, workdir=swapped), *words, **more)
    setattr(module, name, render)
sys.exit(main())
"""


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_workdir_that_is_swapped_in_time(root: None, area: Path, who: str, runtime: str) -> None:
    """A symlink in a volume may appear after the check: open directories of the runtime must be useless.

    The runtime receives the target of the swapped path here; everything else is unchanged.
    """
    victim = area / "victim"
    victim.mkdir()
    victim.chmod(0o777)
    (victim / "secret").write_text("secret")
    script = (
        "up=..; for n in 1 2 3 4 5 6; do ls -A $up | sed 's/^/up /'; "
        f"cat $up{victim}/secret && echo read; touch $up{victim}/made $up/tmp/made && echo written; "
        "head -c 1 $up/etc/passwd >/dev/null && ! [ $up/etc/passwd -ef /etc/passwd ] && echo read; "
        "for p in sys/kernel/core_pattern sys/vm/swappiness; do "
        ": >> $p && echo written; done; "
        "for p in sys/kernel/uevent_helper sys/power/pm_async; do [ -e $up/$p ] && "
        ": >> $up/$p && echo written; done; up=$up/..; done 2>/dev/null; "
        f"ls {os.getpid()}/root {os.getpid()}/fd 2>/dev/null && echo process; true"
    )
    seen = set()
    with prison(area, who, runtime) as inmate:
        for number in range(3, 12):
            words = [str(number), *map(str, inmate.words("--rm", "--workdir", "/v/w", "-v", "vol:/v", "--"))]
            words += ["/usr/bin/bash", "-c", script]
            if inmate.host is None:
                done = cli_calls.call((UNIONFS[0], "-c", _WORKDIR_SWAPPED), *words)
            else:
                done = inmate.host.run(inmate.host.command[0], "-c", _WORKDIR_SWAPPED, *words)
            lines = done.stdout.splitlines()
            assert [line for line in lines if not line.startswith("up ")] == [], (number, done)
            seen |= {line[3:] for line in lines}
    assert os.listdir(victim) == ["secret"]
    # The reachable tree is the small root: if not, the runtime has improved.
    assert "usr" in seen or runtime == "crun"
    assert not seen & {"root", "home", "var", "boot", "run"}


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_swapped_workdir_shows_no_other_process(root: None, area: Path, who: str, runtime: str) -> None:
    """Through an open /proc of the runtime: PID/root of a process it may trace would be the host's tree."""
    (area / "secret").write_text("secret\n")
    (area / "secret").chmod(0o644)
    script = (
        f"for q in [0-9]*; do cat $q/root{area}/secret $q/cwd/secret && echo read; "
        "ls $q/root/other && echo other; head -c 20 $q/environ | grep SECRET && echo read; "
        "tr '\\0' ' ' <$q/cmdline | grep '81[.]25' && echo process; done 2>/dev/null; ls; true"
    )
    seen = set()
    with prison(area, who, runtime) as inmate:
        caller = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
        if inmate.host is not None:
            caller = ["setpriv", "--reuid", str(user_calls.UID), "--clear-groups"]
        process = subprocess.Popen(["env", "SECRET=1", *caller, "sleep", "81.25"], cwd=area)
        other = inmate.start("--rm", "--", "sh", "-c", "mkdir /other; echo up; exec sleep 81.25")
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "up\n"
            for number in (3, 4, 5):
                words = [str(number), *map(str, inmate.words("--rm", "--workdir", "/v/w", "-v", "vol:/v"))]
                words += ["--", "/usr/bin/bash", "-c", script]
                if inmate.host is None:
                    done = cli_calls.call((UNIONFS[0], "-c", _WORKDIR_SWAPPED), *words)
                else:
                    done = inmate.host.run(inmate.host.command[0], "-c", _WORKDIR_SWAPPED, *words)
                lines = done.stdout.splitlines()
                seen.update(lines)
                assert not {"read", "other", "process"} & set(lines), done
                assert not {str(process.pid), str(other.pid), str(os.getpid())} & set(lines)
        finally:
            other.terminate()
            process.kill()
            process.wait()
            other.communicate(timeout=patient(20))
    # The reachable directory is the /proc of bubblewrap's own namespace.
    assert "uptime" in seen or runtime == "crun"


# -- targets of mounts: CVE-2019-16884, CVE-2021-30465, CVE-2024-23651 ----------------------------------


@pytest.mark.parametrize("name", ["proc", "dev", "sys"])
@pytest.mark.parametrize("kind", ["link", "file", "oldroot"])
def test_the_kernel_s_trees_lead_elsewhere(inside: Prison, name: str, kind: str) -> None:
    """A container or image whose /proc is a symlink: bubblewrap would mount at its target."""
    victim = inside.area / "victim"
    victim.mkdir()
    place = inside.box.base / name
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to("data" if kind == "link" else f"/oldroot{victim}")
    done = inside.call("--rm", "--", "true")
    refused(done, f"/{name} in the union is not a directory", "remove it from the layers")
    assert os.listdir(victim) == []
    assert inside.box.kept() == []


def test_name_resolution_leads_elsewhere(inside: Prison) -> None:
    victim = inside.area / "victim"
    victim.mkdir()
    etc = inside.box.base / "etc"
    (etc / "resolv.conf").symlink_to(f"/oldroot{victim}/resolv.conf")
    (etc / "hosts").symlink_to(f"../../../../..{victim}/hosts")
    inside.out(inside.sh("true"))
    shutil.rmtree(etc)
    etc.symlink_to(f"/oldroot{victim}")
    inside.out(inside.sh("true"))
    assert os.listdir(victim) == []


def test_targets_that_the_container_has_changed(inside: Prison) -> None:
    """Between two runs: mounts stay inside, wherever the container's symlinks lead."""
    victim = inside.area / "victim"
    (victim / "sub").mkdir(parents=True)
    inside.out(inside.call(
        "--name", "kept", "--", "/usr/bin/bash", "-c",
        f"rm -rf /data; ln -s ../../../../../..{victim} /data; ln -s /proc/1/root{victim} /second; "
        f"ln -s /proc/self/cwd /third; mkdir -p {victim}/sub; ln -s {victim} /fourth",
    ))  # fmt: skip
    for target in ("/data/sub", "/second/sub", "/third/sub", "/fourth/sub", "/data/new"):
        done = inside.call("--name", "kept", "-v", f"vol:{target}", "--", "touch", f"{target}/made")
        # crun refuses /proc/1/root.
        assert done.returncode in ((0, 1) if inside.is_bubblewrap else (0, 1, 125)), done
        assert sorted(p.name for p in victim.rglob("*")) == ["sub"]
    assert not [where for _, where, _ in areas.mounts_below(victim)]


@contextmanager
def swapping(directory: Path, name: str, link: str) -> Iterator[list[int]]:
    """Within the context, `name` alternates between a directory and a symlink; a list has the swap count."""
    other = directory / ".other"
    (directory / name).mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        other.unlink()
    other.symlink_to(link)
    count, over = [0], threading.Event()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)

    def swap() -> None:
        while not over.is_set():
            with suppress(OSError):
                calls.renameat2(fd, name.encode(), fd, b".other", calls.RENAME_EXCHANGE)
                count[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()
        os.close(fd)


@pytest.mark.parametrize("how", ["absolute", "dots", "oldroot"])
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("/dev/shm", "/dev/shm/sub"),
        pytest.param("/v", "/v/sub", marks=pytest.mark.slow),
        pytest.param("/v", "/v/sub/deep", marks=pytest.mark.slow),
    ],
)
def test_a_target_in_a_volume_that_is_swapped(inside: Prison, outer: str, inner: str, how: str) -> None:
    """A container with a shared volume changes a target while another one starts."""
    victim = inside.area / "victim"
    (victim / "deep").mkdir(parents=True)
    above = {"absolute": "", "dots": "../../../../../../../..", "oldroot": "/oldroot"}[how]
    volumes = inside.box.root / "volumes"
    inside.out(inside.sh("true", "-v", "shared:/v", "-v", "second:/w"))
    deadline, runs, well = time.monotonic() + patient(RACE_SECONDS / 3), 0, 0
    with swapping(volumes / "shared/_data", "sub", f"{above}{victim}") as swaps:
        while time.monotonic() < deadline or runs < 3:
            done = inside.sh("touch " + inner + "/made", "-v", f"shared:{outer}", "-v", f"second:{inner}")
            runs, well = runs + 1, well + (done.returncode == 0)
            assert not done.stderr.startswith("Traceback")
            assert sorted(p.name for p in victim.rglob("*")) == ["deep"]
            assert not areas.mounts_below(victim)
    assert swaps[0] > 1000
    assert wait_for(lambda: areas.mounts_below(inside.box.area) == [])


# -- processes of the host ----------------------------------------------------------------------------


def test_processes_of_the_host(inmate: Prison) -> None:
    """No pid in the container refers to one, and none of their namespaces can be entered."""
    me = os.getpid()
    done = inmate.sh(
        f"kill -0 {me} && echo reached; ls /proc/{me}/root && echo reached; "
        f"nsenter -t {me} -m true && echo reached; nsenter -t 1 -m true && echo entered; "
        "for p in /proc/[0-9]*; do cat $p/comm; ls -d $p/root/etc/shadow 2>/dev/null; done; true"
    )
    assert "reached" not in done.stdout
    assert "entered" not in done.stdout
    assert "/etc/shadow" not in done.stdout
    assert "pytest" not in done.stdout


def test_signals_to_its_process_group(inside: Prison) -> None:
    """kill(2) with pid 0 reaches the whole process group, also outside the pid namespace."""
    script = "kill -KILL 0; kill -TERM 0; sleep 60"
    words = map(str, inside.words("--rm", "--", "/usr/bin/bash", "-c", script))
    done = subprocess.run(
        ["bash", "-c", '"$@" | cat; echo alive ${PIPESTATUS[0]}', "bash", *UNIONFS, *words],
        start_new_session=True, capture_output=True, text=True, timeout=patient(60), cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout == "alive 137\n", done


def test_the_session_s_leader_is_not_seen(inside: Prison) -> None:
    """It is a process of the host with open files of the host."""
    done = inside.sh("cat /proc/[0-9]*/comm; echo sid $(cut -d' ' -f6 /proc/self/stat)")
    assert "unionfs" not in done.stdout
    # With crun, the session is that of the container's init.
    assert f"sid {'0' if inside.is_bubblewrap else '1'}\n" in done.stdout


def test_errno_of_a_read_only_mount(inside: Prison) -> None:
    """The read-only mount protects the file from uid 0, not its mode by accident."""
    inside.copy_runtime()
    done = inside.python(
        "import os\ntry: os.chmod('/proc/1/exe', 0o755)\nexcept OSError as error: print(error.errno)"
    )
    # Of a copy in memory, the mode does not matter.
    assert inside.out(done).strip() == (str(errno.EROFS) if inside.is_bubblewrap else "")


def test_other_uids_of_a_container(inside: Prison) -> None:
    """A container's root that changes to another user gets no more rights on the host's files."""
    secret = inside.box.host / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    script = "setpriv --reuid 65534 --regid 65534 --clear-groups cat /host/secret"
    assert "Permission denied" in inside.sh(script, "-v", f"{inside.box.host}:/host:ro").stderr
