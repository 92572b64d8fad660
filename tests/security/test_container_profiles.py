"""Seccomp profiles: supported content, and one sentence for a bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unionfs.containers.capabilities import DEFAULT
from unionfs.containers.profile import ALLOW, read_profile
from unionfs.containers.seccomp import BUILT_IN, compile_profile
from unionfs.errors import UserError

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
    ],
)  # fmt: skip
def test_conditions(tmp_path: Path, condition: Any, capabilities: list[str], holds: bool) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rule(**condition)))
    profile = read_profile(str(path), capabilities)
    assert bool(profile.rules) == holds
    assert profile.default == ALLOW


def test_several_comparisons_of_one_argument(tmp_path: Path) -> None:
    """libseccomp accepts one comparison per argument and rule: they become alternatives, as in runc."""
    compared = [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in (1, 2)]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rule(args=compared)))
    assert len(compile_profile(str(path), ())) % 8 == 0


def test_the_built_in_profile() -> None:
    """It compiles for no capabilities and for the default ones, and fits into the kernel's limit."""
    for capabilities in ((), DEFAULT, (*DEFAULT, "CAP_SYS_ADMIN")):
        assert 0 < len(compile_profile(BUILT_IN, capabilities)) // 8 <= 4096  # BPF_MAXINSNS
