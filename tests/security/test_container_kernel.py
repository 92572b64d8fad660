"""Kernel interfaces in a container: keys, system calls, devices, and the kernel's files."""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, refused
from tests.security.container_calls import Prison
from tests.support.patience import patient
from unionfs.containers import seccomp
from unionfs.containers.capabilities import DEFAULT
from unionfs.errors import UserError
from unionfs.sys.mountinfo import read_mountinfo

# -- keys ---------------------------------------------------------------------------------------------


@pytest.fixture
def key(root: None) -> Iterator[str]:
    """A key in the keyring of uid 0, accessible to all possessors."""
    if shutil.which("keyctl") is None:
        pytest.skip("keyctl is not installed")
    name = f"unionfs-test-{os.getpid()}"
    add = ["keyctl", "add", "user", name, "secret-of-the-host", "@u"]
    number = subprocess.run(add, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["keyctl", "setperm", number, "0x3f3f3f3f"], check=True)
    yield name
    subprocess.run(["keyctl", "unlink", number, "@u"], capture_output=True)


def test_keys_of_the_host(inmate: Prison, key: str) -> None:
    number = subprocess.run(
        ["keyctl", "search", "@u", "user", key], check=True, capture_output=True, text=True
    ).stdout.strip()
    done = inmate.sh(
        f"keyctl search @u user {key}; keyctl search @s user {key}; keyctl print {number}; "
        f"keyctl link @u @s; keyctl unlink {number} @u; keyctl show @u; cat /proc/keys"
    )
    assert number not in done.stdout
    assert "secret-of-the-host" not in done.stdout
    assert done.stderr.count("Operation not permitted") >= 5, done.stderr
    found = subprocess.run(["keyctl", "print", number], capture_output=True, text=True)
    assert found.stdout == "secret-of-the-host\n"


def test_the_session_keyring_is_new_without_a_filter(inside: Prison, key: str) -> None:
    """Without the filter, the caller's session keyring still stays outside."""
    script = (
        f"keyctl new_session >/dev/null; keyctl add user {key}-s session-secret @s >/dev/null; "
        '"$@"; echo; keyctl print %user:' + f"{key}-s"
    )
    words = [*map(str, inside.words("--rm", "--security-opt", "seccomp=unconfined", "--", "/usr/bin/bash"))]
    words += ["-c", f"keyctl search @s user {key}-s; keyctl show @s; echo over"]
    done = subprocess.run(
        ["keyctl", "session", "-", "bash", "-c", script, "bash", *UNIONFS, *words],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    inner, _, outer = done.stdout.partition("over")
    assert "session-secret" in outer, done
    assert f"{key}-s" not in inner


# -- system calls -------------------------------------------------------------------------------------

_CALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def ask(name, number, *words):
    words = [ctypes.c_char_p(w) if isinstance(w, bytes) else ctypes.c_long(w) for w in words]
    done = libc.syscall(ctypes.c_long(number), *words)
    print(name, "done" if done >= 0 else errno.errorcode[ctypes.get_errno()])
libc.syscall.restype = ctypes.c_long
ask("keyctl", 250, 0, -4, 0)
ask("add_key", 248, b"user", b"x", b"y", 1, -3)
ask("request_key", 249, b"user", b"x", 0, -4)
ask("bpf", 321, 5, 0, 0)
ask("kexec_load", 246, 0, 0, 0, 0)
ask("kexec_file_load", 320, -1, -1, 0, 0, 0)
ask("mount", 165, b"none", b"/tmp", b"tmpfs", 0, 0)
ask("umount2", 166, b"/proc", 2)
ask("pivot_root", 155, b"/", b"/tmp")
ask("unshare user", 272, 0x10000000)
ask("unshare mount", 272, 0x20000)
ask("setns", 308, 0, 0)
ask("clone user", 56, 0x10000000 | 17, 0, 0, 0, 0)
ask("clone3", 435, 0, 0)
ask("open_by_handle_at", 304, 0, 0, 0)
ask("perf_event_open", 298, 0, 0, 0, 0, 0)
ask("userfaultfd", 323, 0)
ask("io_uring_setup", 425, 0, 0)
ask("init_module", 175, 0, 0, b"")
ask("delete_module", 176, b"x", 0)
ask("reboot", 169, 0, 0, 0, 0)
ask("swapon", 167, b"/x", 0)
ask("settimeofday", 164, 0, 0)
ask("quotactl", 179, 0, 0, 0, 0)
ask("acct", 163, 0)
ask("syslog", 103, 3, 0, 0)
ask("iopl", 172, 3)
ask("open_tree", 428, -100, b"/", 1)
ask("move_mount", 429, -100, b"/", -100, b"/tmp", 0)
ask("fsopen", 430, b"tmpfs", 0)
ask("mount_setattr", 442, -100, b"/", 0, 0, 0)
ask("fanotify_init", 300, 0, 0)
ask("personality", 135, 0x0400000)
ask("socket vsock", 41, 40, 1, 0)
ask("socket alg", 41, 38, 5, 0)
ask("newer than the profile", 9999)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_system_calls(inmate: Prison) -> None:
    """The results of Docker's default profile: EPERM, and ENOSYS where programs should fall back."""
    lines = inmate.out(inmate.python(_CALLS)).splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines)
    missing = {"clone3", "newer than the profile"}
    assert len(found) == _CALLS.count("\nask(")
    assert {name: answer for name, answer in found.items() if name not in missing and answer != "EPERM"} == {}
    assert {found[name] for name in missing} == {"ENOSYS"}


_PROGRAM_32 = """
.globl _start
_start: mov $4, %eax; mov $1, %ebx; mov $text, %ecx; mov $8, %edx; int $0x80
        mov $288, %eax; mov $0, %ebx; mov $-4, %ecx; mov $0, %edx; int $0x80   # keyctl
        neg %eax; mov %eax, %ebx; mov $1, %eax; int $0x80
text:   .ascii "32 bits\\n"
"""


_SOCKETCALL_32 = """
.globl _start
_start: mov $102, %eax; mov $1, %ebx; mov $words, %ecx; int $0x80     # socket(AF_UNIX, SOCK_STREAM, 0)
        neg %eax; mov %eax, %ebx; mov $1, %eax; int $0x80
words:  .long 1, 1, 0
"""


def make_32(program: Path, source: str, *, prints: bytes) -> None:
    """Build a 32-bit program that prints this outside a container; skip the test if that fails."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built = subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-x", "assembler", "-", "-o", program],
        input=source, text=True, capture_output=True,
    )  # fmt: skip
    if built.returncode != 0 or subprocess.run([program], capture_output=True).stdout != prints:
        pytest.skip("32-bit programs cannot be made or run here")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs of x86")
def test_32_bit_programs(inmate: Prison) -> None:
    """They run, under the same filter."""
    make_32(inmate.box.base / "bin/p32", _PROGRAM_32, prints=b"32 bits\n")
    done = inmate.call("--rm", "--", "/bin/p32")
    assert (done.stdout, done.returncode) == ("32 bits\n", 1), done


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs of x86")
def test_socketcall_can_be_refused(inside: Prison) -> None:
    """32-bit programs need it; a profile with a rule for it refuses it, though it allows sockets."""
    make_32(inside.box.base / "bin/p32", _SOCKETCALL_32, prints=b"")
    allowed = inside.call("--rm", "--", "/bin/p32").returncode
    assert allowed > 200  # the negative of a file descriptor
    profile = json.loads(Path(seccomp.BUILT_IN).read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "socketcall"]
    refuse = {"names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    profile["syscalls"].insert(0, refuse)
    path = inside.box.host / "profile.json"
    path.write_text(json.dumps(profile))
    assert inside.call("--rm", "--security-opt", f"seccomp={path}", "--", "/bin/p32").returncode == 38


def test_ordinary_programs_run(inmate: Prison) -> None:
    """Threads, processes, pipes, sockets, and clocks."""
    script = (
        "import threading, subprocess, socket, time, multiprocessing as m, tempfile, os\n"
        "t = threading.Thread(target=time.sleep, args=(0.01,)); t.start(); t.join()\n"
        "assert subprocess.check_output(['sh', '-c', 'echo a | cat']) == b'a\\n'\n"
        "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "f = tempfile.NamedTemporaryFile(dir='/dev/shm'); os.chmod(f.name, 0o600)\n"
        "print('well')"
    )
    assert inmate.out(inmate.python(script)) == "well\n"


def test_ptrace_of_the_own_children_alone(inmate: Prison) -> None:
    """Docker allows ptrace since Linux 4.8; processes of the host have no pid in the container."""
    done = inmate.python(
        "import os\n"
        f"for pid in ({os.getpid()}, 2, 3, 4, 5, 6, 7, 8, 9):\n"
        "    try: print(os.readlink(f'/proc/{pid}/root'), open(f'/proc/{pid}/comm').read().strip())\n"
        "    except OSError: pass\n"
    )
    for line in inmate.out(done).splitlines():
        assert line in ("/ python3", "/ bwrap")


# -- capabilities and devices -------------------------------------------------------------------------


def capabilities(done: str) -> int:
    return int(done.split()[1], 16)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], 0xA80425FB), (["--cap-drop", "ALL"], 0), (["--cap-drop", "all", "--cap-add", "Chown"], 1),
        (["--cap-drop", "CAP_MKNOD"], 0xA80425FB & ~(1 << 27)),
        (["--cap-add", "cap_sys_ptrace"], 0xA80425FB | 1 << 19),
        (["--cap-add", "ALL", "--cap-drop", "SYS_ADMIN"], None),
    ],
)  # fmt: skip
def test_capabilities(inside: Prison, options: list[str], expected: int | None) -> None:
    lines = inside.out(inside.sh("grep Cap /proc/self/status", *options)).splitlines()
    sets = {line.split(":")[0]: capabilities(line) for line in lines}
    found = sets["CapEff"]
    assert sets["CapBnd"] == sets["CapPrm"] == found
    assert sets["CapInh"] & ~found == sets["CapAmb"] & ~found == 0
    if expected is None:
        with open("/proc/self/status", encoding="ascii") as status:
            held = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
        expected = held & ~(1 << 21)
    assert found == expected
    assert len(DEFAULT) == (0xA80425FB).bit_count()


def test_a_user_has_none_and_gets_none(inmate: Prison) -> None:
    if inmate.is_root:
        refused(inmate.call("--cap-add", "sys_admn", "--", "true"), "sys_admn", "nearest one is SYS_ADMIN")
        refused(inmate.call("--cap-drop", "CAP_X", "--", "true"), "--cap-drop CAP_X", "unknown")
        return
    assert capabilities(inmate.out(inmate.sh("grep CapEff /proc/self/status", "--cap-drop", "ALL"))) == 0
    refused(inmate.call("--cap-add", "chown", "--", "true"), "--cap-add chown", "run it as root")
    refused(inmate.call("--privileged", "--", "true"), "--privileged", "run it as root")
    assert inmate.box.kept() == []


def test_devices_of_the_host(inmate: Prison) -> None:
    """Root can create a device file, as in Docker, but not open it."""
    disk = os.stat("/").st_dev
    done = inmate.sh(
        "mkdir -p /mk; for d in /mk /tmp /dev /dev/shm /data /v /t; do "
        f"mknod $d/disk b {os.major(disk)} {os.minor(disk)} && echo made && "
        "{ head -c 1 $d/disk && echo opened; : >> $d/disk && echo opened; } ; "
        "mknod $d/mem c 1 1 && { head -c 1 $d/mem && echo opened; }; rm -f $d/disk $d/mem; done; ls /dev",
        "-v", "vol:/v", "--tmpfs", "/t",
    )  # fmt: skip
    assert "opened" not in done.stdout
    assert ("made" in done.stdout) == inmate.is_root
    assert not {"kmem", "kmsg", "fuse", "vda", "sda", "loop-control", "mem"} & set(done.stdout.split())


def test_device_files_keep_their_mode(inside: Prison) -> None:
    """Those in /dev are the host's inodes."""
    names = ("null", "zero", "full", "random", "urandom", "tty")
    before = [(os.stat(f"/dev/{name}").st_mode, os.stat(f"/dev/{name}").st_uid) for name in names]
    script = f"cd /dev; chmod 666 {' '.join(names)}; chown 0 {' '.join(names)}; echo x > null && echo well"
    done = inside.sh(script)
    assert done.stdout == "well\n"
    assert done.stderr.count("Read-only file system") == 2 * len(names), done.stderr
    assert before == [(os.stat(f"/dev/{name}").st_mode, os.stat(f"/dev/{name}").st_uid) for name in names]


# -- the kernel's files -------------------------------------------------------------------------------


def test_masked_and_read_only_paths(inmate: Prison) -> None:
    """The list of moby, daemon/pkg/oci/defaults.go: files and directories are empty."""
    masked = ("acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi",
              "timer_list", "timer_stats")  # fmt: skip
    paths = [*(f"/proc/{name}" for name in masked), "/sys/firmware", "/sys/devices/virtual/powercap"]
    script = (
        "for p in " + " ".join(paths) + "; do if [ -d $p ]; then echo $p:$(ls -A $p); "
        "touch $p/x 2>/dev/null && echo written; elif [ -e $p ]; then echo $p:$(head -c 9 $p); fi; done"
    )
    lines = inmate.out(inmate.sh(script + "; true")).split()
    assert lines == [f"{path}:" for path in paths if os.path.exists(path)]


def test_nothing_of_the_kernel_is_written(inmate: Prison) -> None:
    script = """
        for p in /proc/sysrq-trigger /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe \\
                 /proc/irq/default_smp_affinity /proc/sys/vm/swappiness /proc/sys/kernel/hostname \\
                 /sys/kernel/uevent_helper /sys/power/pm_async /sys/class/net/lo/mtu \\
                 /sys/kernel/mm/transparent_hugepage/enabled; do
            [ -e $p ] && : >> $p && echo written $p; done
        mkdir /sys/fs/cgroup/x && echo written; touch /proc/bus/x /proc/fs/x && echo written
        find /sys -maxdepth 4 -writable -type f 2>/dev/null | head -3 | while read p; do
            (: >> $p) 2>/dev/null && echo written $p; done; true
    """
    assert "written" not in inmate.sh(script).stdout


def test_owner_and_mode_of_the_kernel_s_files(inside: Prison) -> None:
    """They are the same in every procfs: the host sees a container's changes."""
    script = (
        "for p in /proc/[a-z]* /proc/tty/drivers /proc/driver/rtc /proc/sysvipc/shm; do "
        "if [ -f $p ] && ! [ -L $p ]; then chmod $(stat -c %a $p) $p && echo changed $p; "
        "chown 0:0 $p && echo changed $p; fi; done 2>/dev/null; echo 100 >/proc/self/oom_score_adj; "
        "cat /proc/self/oom_score_adj; head -n 1 /proc/meminfo /proc/cpuinfo /proc/mounts /proc/net/dev"
    )
    lines = inside.out(inside.sh(script)).splitlines()
    assert [line for line in lines if line.startswith("changed")] == []
    assert "100" in lines
    assert any(line.startswith("MemTotal") for line in lines)


def test_sys_is_read_only(inmate: Prison) -> None:
    """Including the host's mounts below it, none of which is shown."""
    table = inmate.out(inmate.sh("cat /proc/self/mountinfo")).splitlines()
    found = {line.split()[4]: line.split()[5].split(",") for line in table}
    below = {path: options for path, options in found.items() if path == "/sys" or path.startswith("/sys/")}
    assert below
    assert [path for path, options in below.items() if "ro" not in options] == []
    there = [entry for entry in read_mountinfo() if entry.mountpoint.startswith("/sys/")]
    hidden = [entry.mountpoint for entry in there if entry.fstype != "cgroup2"]
    script = "for p in " + " ".join(hidden) + "; do ls -A $p 2>/dev/null; done; true"
    assert inmate.out(inmate.sh(script)) == ""


def test_what_the_host_mounts_later(inside: Prison) -> None:
    """It does not appear below /sys, /proc, or /dev, where it would be writable; nor in a private bind."""
    places = ("/sys/kernel", "/proc/fs", "/dev/pts", inside.box.host)
    script = (
        "mount --make-rshared / && mkfifo $0/go && { \"$@\" >$0/out & "
        "for n in $(seq 200); do [ -e $0/up ] && break; sleep 0.05; done; "
        + "".join(f"mount -t tmpfs later {place}; " for place in places)
        + "echo >$0/go; wait $!; }"
    )
    box = inside.box
    words = [*map(str, inside.words("--rm", "-v", f"{box.host}:/host", "-v", f"{box.area}:/area"))]
    words += ["--", "sh", "-c", "echo >/area/up; read x </area/go; cat /proc/self/mountinfo"]
    subprocess.run(
        ["unshare", "-m", "bash", "-c", script, box.area, *UNIONFS, *words], check=True,
        timeout=patient(30), env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    table = (box.area / "out").read_text()
    assert " / / " in table
    assert "later" not in table


def test_cgroups(inmate: Prison) -> None:
    """CVE-2022-0492: no cgroup can be mounted, and release_agent does not exist."""
    here = Path("/proc/self/cgroup").read_text()
    done = inmate.sh(
        "cat /proc/self/cgroup; readlink /proc/self/ns/cgroup; mkdir -p /tmp/c; "
        "mount -t cgroup -o rdma cgroup /tmp/c && echo mounted; "
        "mount -t cgroup -o memory cgroup /tmp/c && echo mounted; "
        "unshare -UrmC mount -t cgroup -o rdma cgroup /tmp/c && echo mounted; "
        "find /sys -name release_agent 2>/dev/null; true"
    )
    *table, namespace = inmate.out(done).splitlines()
    assert namespace != os.readlink("/proc/self/ns/cgroup")
    assert all(line.rsplit(":", 1)[1] == "/" or "/.." in line for line in table), (table, here)
    assert "mounted" not in done.stdout


def test_name_resolution_is_read_only(inmate: Prison) -> None:
    before = {path: Path(path).read_bytes() for path in ("/etc/resolv.conf", "/etc/hosts")}
    done = inmate.sh(
        "for p in /etc/resolv.conf /etc/hosts; do : >> $p && echo written; "
        "chmod $(stat -c %a $p) $p && echo written; rm -f $p && echo written; "
        "mv $p $p.old && echo written; cat $p; done"
    )
    assert "written" not in done.stdout
    assert done.stdout.encode() == b"".join(before.values())
    assert before == {path: Path(path).read_bytes() for path in before}


# -- profiles -----------------------------------------------------------------------------------------


def test_a_profile_of_the_users_own(inmate: Prison) -> None:
    path = inmate.box.host / "profile.json"
    path.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": ['
        '{"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},'
        '{"name": "mkdirat", "action": "SCMP_ACT_ERRNO", "errnoRet": 28},'
        '{"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_CHOWN"]}},'
        '{"names": ["unlink", "unlinkat"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "99.1"}}]}'
    )
    done = inmate.sh("mkdir /new; rmdir /tmp; touch /f && rm /f", "--security-opt", f"seccomp={path}")
    assert "No space left on device" in done.stderr
    assert ("rmdir" in done.stderr) == inmate.is_root
    assert "rm:" not in done.stderr
    unconfined = inmate.sh("grep Seccomp: /proc/self/status", "--security-opt", "seccomp=unconfined")
    assert unconfined.stdout.split() == ["Seccomp:", "0"]


def test_privileged(inside: Prison) -> None:
    """As documented: all protections are off."""
    script = (
        "grep -E 'CapEff|Seccomp:' /proc/self/status; mount -t tmpfs x /tmp && echo mounted; "
        "ls -A /dev | wc -l"
    )
    lines = inside.out(inside.sh(script, "--privileged")).splitlines()
    assert lines[1].split()[1] == "0"
    assert lines[2] == "mounted"
    assert int(lines[3]) >= len(os.listdir("/dev")) - 1
    with open("/proc/self/status", encoding="ascii") as status:
        assert lines[0] in status.read()


def test_without_libseccomp(inside: Prison, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container does not start without the requested filter."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None if name == "seccomp" else "libc.so.6")
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
    with pytest.raises(UserError, match=r"install the package libseccomp2"):
        seccomp.compile_profile(seccomp.BUILT_IN, DEFAULT)
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
