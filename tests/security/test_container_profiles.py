"""Seccomp profiles: supported content, and one sentence for a bad file."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import operator
import os
import platform
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pyseccomp
import pytest

from unionfs.containers.capabilities import DEFAULT
from unionfs.containers.profile import ALLOW, read_profile
from unionfs.containers.seccomp import BUILT_IN, compile_profile
from unionfs.errors import UserError
from unionfs.sys.callfilter import filter_calls
from unionfs.sys.capabilities import no_new_privileges

_ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW"}


def rule(**more: Any) -> dict[str, Any]:
    """A profile that allows everything except one rule."""
    return {**_ALLOW_ALL, "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", **more}]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[]", "not an object"),
        (b"null", "not an object"), ({}, "no defaultAction"),
        ({"defaultAction": "ALLOW"}, "unknown defaultAction"),
        ({"defaultAction": 1}, "unknown defaultAction"), ({**_ALLOW_ALL, "syscalls": {}}, "not a list"),
        ({**_ALLOW_ALL, "syscalls": [1]}, "entry 1 of syscalls is not an object"),
        ({**_ALLOW_ALL, "syscalls": [{}]}, "no action"), (rule(names="mkdir"), "not a list"),
        (rule(names=[1]), "not a string"), (rule(name="mkdir"), "both name and names"),
        (rule(errnoRet="EPERM"), "not a number"), (rule(errnoRet=-1), "between 0 and 65535"),
        (rule(errnoRet=True), "not a number"), (rule(action="SCMP_ACT_KILL", errnoRet=1), "does not take"),
        (rule(action="SCMP_ACT_NOTIFY"), "unknown action"), (rule(args={}), "not a list"),
        (rule(args=[1]), "an item of args in entry 1 of syscalls is not an object"),
        (json.dumps(_ALLOW_ALL).ljust((1 << 22) + 1).encode(), "larger than 4 MiB"),
        (rule(args=[{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]), "between 0 and 5"),
        (rule(args=[{"index": 0, "value": 1 << 64, "op": "SCMP_CMP_EQ"}]), "between 0 and"),
        (rule(args=[{"index": 0, "value": 0, "op": "=="}]), "unknown op"),
        (rule(args=[{"index": 0, "op": "SCMP_CMP_EQ"}]), "not a number"),
        (rule(args=[{"index": 0, "value": 0, "op": []}]), "unknown op"),
        (rule(includes=[]), "not an object"), (rule(includes={"minKernel": "4"}), "minKernel"),
        (rule(excludes={"minKernel": 4}), "not a string"), (rule(includes={"caps": "CAP_X"}), "not a list"),
        ({**_ALLOW_ALL, "architectures": ["SCMP_ARCH_X86_64"], "archMap": [{}]}, "architectures and archMap"),
        ({**_ALLOW_ALL, "architectures": ["SCMP_ARCH_VAX"]}, "unknown architecture SCMP_ARCH_VAX"),
        ({**_ALLOW_ALL, "listenerPath": "/x"}, "listenerPath"),
        ({**_ALLOW_ALL, "archMap": [[]]}, "not an object"),
    ],
)  # fmt: skip
def test_a_bad_profile(tmp_path: Path, content: Any, part: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as raised:
        compile_profile(str(path), ())
    sentence = str(raised.value)
    assert part in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("path", ["/nowhere/p.json", "/", "/dev/zero"])
def test_a_file_that_is_no_profile(path: str) -> None:
    with pytest.raises(UserError, match=f"profile {path} cannot be"):
        compile_profile(path, ())


def test_the_largest_values(tmp_path: Path) -> None:
    condition = {"index": 5, "value": (1 << 64) - 1, "valueTwo": (1 << 64) - 1, "op": "SCMP_CMP_MASKED_EQ"}
    text = json.dumps(rule(errnoRet=0xFFFF, args=[condition]))
    path = tmp_path / "p.json"
    path.write_text(text.ljust(1 << 22))
    (found,) = read_profile(str(path), ()).rules
    assert (found.action & 0xFFFF, found.conditions[0].index) == (0xFFFF, 5)


MAJOR, MINOR = map(int, os.uname().release.split("-")[0].split(".")[:2])


@pytest.mark.parametrize(
    ("condition", "capabilities", "holds"),
    [
        ({"includes": {"caps": ["CAP_CHOWN", "CAP_KILL"]}}, ["CAP_CHOWN"], False),
        ({"includes": {"caps": ["CAP_CHOWN", "CAP_KILL"]}}, ["CAP_CHOWN", "CAP_KILL"], True),
        ({"excludes": {"caps": ["CAP_CHOWN", "CAP_KILL"]}}, ["CAP_CHOWN"], False),
        ({"excludes": {"caps": ["CAP_CHOWN"]}}, [], True),
        ({"includes": {"arches": ["vax"]}}, [], False), ({"excludes": {"arches": ["vax"]}}, [], True),
        ({"includes": {"minKernel": "3.0"}}, [], True), ({"includes": {"minKernel": "99.0"}}, [], False),
        ({"excludes": {"minKernel": "3.0"}}, [], False), ({"excludes": {"minKernel": "99.0"}}, [], True),
        ({"includes": None, "excludes": {}}, [], True),
        ({"includes": {"minKernel": f"{MAJOR}.{MINOR}"}}, [], True),
        ({"includes": {"minKernel": f"{MAJOR}.{MINOR + 1}"}}, [], False),
        ({"includes": {"minKernel": f"{MAJOR + 1}.0"}}, [], False),
    ],
)  # fmt: skip
def test_conditions(tmp_path: Path, condition: Any, capabilities: list[str], holds: bool) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rule(**condition)))
    profile = read_profile(str(path), capabilities)
    assert bool(profile.rules) == holds
    assert profile.default == ALLOW


def answers(path: Path, profile: dict[str, Any], calls: list[tuple[int | str, ...]]) -> list[int]:
    """What the kernel answers under a profile to each call, a name or number and its arguments: the errno,
    0, or the negative number of the signal that it sends."""
    path.write_text(json.dumps(profile))
    program = compile_profile(str(path), ())
    found = []
    for name, *words in calls:
        number = name if isinstance(name, int) else pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        libc = ctypes.CDLL(None, use_errno=True)
        pid = os.fork()
        if pid == 0:
            no_new_privileges()
            filter_calls(program)
            done = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, words))
            os._exit(ctypes.get_errno() if done < 0 else 0)
        found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return found


REFUSED = 77


def test_several_comparisons(tmp_path: Path) -> None:
    """Of one argument they are alternatives, since libseccomp has one comparison per argument and rule;
    those of several arguments must all hold. As in runc."""

    def compared(*values: tuple[int, int]) -> dict[str, Any]:
        conditions = [{"index": index, "value": value, "op": "SCMP_CMP_EQ"} for index, value in values]
        content = rule(args=conditions, errnoRet=REFUSED)
        content["syscalls"][0]["names"] = ["getpriority"]
        return content

    calls = [("getpriority", which, who) for which, who in product((0, 1, 2), (0, 9999))]
    unfiltered = answers(tmp_path / "p", _ALLOW_ALL, calls)
    assert REFUSED not in unfiltered
    for content, refused in (
        (compared((0, 0)), lambda which, who: which == 0),
        (compared((0, 0), (0, 1)), lambda which, who: which in (0, 1)),
        (compared((0, 1), (1, 9999)), lambda which, who: (which, who) == (1, 9999)),
        (compared((0, 1), (1, 9999), (0, 2)), lambda which, who: which in (1, 2) or who == 9999),
    ):
        expected = [
            REFUSED if refused(*call[1:]) else otherwise
            for call, otherwise in zip(calls, unfiltered, strict=True)
        ]
        assert answers(tmp_path / "p", content, calls) == expected


@pytest.mark.parametrize("name", ["NE", "LT", "LE", "EQ", "GE", "GT"])
def test_operators(tmp_path: Path, name: str) -> None:
    content = rule(args=[{"index": 1, "value": 7, "op": f"SCMP_CMP_{name}"}], errnoRet=REFUSED)
    content["syscalls"][0]["names"] = ["mkdir"]
    found = answers(tmp_path / "p", content, [("mkdir", 0, value) for value in (6, 7, 8)])
    holds = getattr(operator, name.lower())
    assert found == [REFUSED if holds(value, 7) else errno.EFAULT for value in (6, 7, 8)]


def test_a_masked_comparison(tmp_path: Path) -> None:
    compared = {"index": 1, "value": 0xF0, "valueTwo": 0x30, "op": "SCMP_CMP_MASKED_EQ"}
    calls = [("mkdir", 0, value) for value in (0x3A, 0x4A)]
    found = answers(tmp_path / "p", rule(args=[compared], errnoRet=REFUSED), calls)
    assert found == [REFUSED, errno.EFAULT]


def test_actions(tmp_path: Path) -> None:
    """Calls that the profile does not name get its default; those newer than all that it names ENOSYS."""
    call = [("mkdir", 0, 0)]
    for action, answer in (
        ("ERRNO", errno.EPERM), ("ALLOW", errno.EFAULT), ("LOG", errno.EFAULT), ("TRAP", -signal.SIGSYS),
        ("KILL_PROCESS", -signal.SIGSYS), ("TRACE", errno.ENOSYS),  # without a tracer, seccomp(2)
    ):
        assert answers(tmp_path / "p", rule(action=f"SCMP_ACT_{action}"), call) == [answer]
    # What an interpreter needs to end. Of these exit_group has the greatest number on x86-64.
    names = ["exit_group", "mmap", "munmap", "brk", "futex", "rt_sigaction", "madvise", "getpriority"]
    content = {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": REFUSED,
        "syscalls": [{"names": [*names, "no_such_call"], "action": "SCMP_ACT_ALLOW"}],
    }
    asked = [("mkdir", 0, 0), ("getpriority", 0, 0)]
    assert answers(tmp_path / "p", content, asked) == [REFUSED, 0]
    newest = max(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in names)
    assert answers(tmp_path / "p", content, [(newest + 1,), (9999,)]) == [errno.ENOSYS] * 2
    if platform.machine() == "x86_64":  # a call of x32, an architecture that the profile does not have
        assert answers(tmp_path / "p", content, [(0x40000000 + 39,)]) == [-signal.SIGSYS]


#: push rbx; mov eax, edi; xor ebx, ebx; int 0x80; pop rbx; ret
_CALL_32 = b"\x53\x89\xf8\x31\xdb\xcd\x80\x5b\xc3"


def call_32(program: bytes | None, number: int) -> int:
    """The errno of a system call of a 32-bit program, under a filter, with 0 for its first argument; the
    negative number of the signal, if it is ended by one."""
    pid = os.fork()
    if pid == 0:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as code:
            code.write(_CALL_32)
            address = ctypes.addressof(ctypes.c_char.from_buffer(code))
            call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(address)
            if program is not None:
                no_new_privileges()
                filter_calls(program)
            os._exit(-call(number))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs of x86")
def test_architectures(tmp_path: Path) -> None:
    """Calls of an architecture that the profile has are judged by their own numbers; others are fatal."""
    mkdir, rmdir, newer = 39, 40, 9999  # arch/x86/entry/syscalls/syscall_32.tbl
    if call_32(None, mkdir) != errno.EFAULT:
        pytest.skip("32-bit programs cannot run here")
    path = tmp_path / "p.json"
    allowed = ["exit_group", "mmap", "munmap", "brk", "futex", "rt_sigaction", "madvise", "rmdir"]
    content = {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": REFUSED, "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}],
    }
    path.write_text(json.dumps(content))
    program = compile_profile(str(path), ())
    found = [call_32(program, number) for number in (mkdir, rmdir, newer)]
    assert found == [REFUSED, errno.EFAULT, errno.ENOSYS]
    del content["architectures"]
    path.write_text(json.dumps(content))
    assert call_32(compile_profile(str(path), ()), rmdir) == -signal.SIGSYS


def test_the_built_in_profile() -> None:
    """It compiles for no capabilities and for the default ones, and fits into the kernel's limit."""
    for capabilities in ((), DEFAULT, (*DEFAULT, "CAP_SYS_ADMIN")):
        assert 0 < len(compile_profile(BUILT_IN, capabilities)) // 8 <= 4096  # BPF_MAXINSNS
