"""Reads seccomp profiles in Docker's JSON form, and selects the rules that apply on this host.

Source of the form: moby's profiles/seccomp, and the OCI runtime specification, config-linux.md, "Seccomp".
The numbers of actions and operators are the kernel's (linux/seccomp.h) and libseccomp's (seccomp.h).
"""

from __future__ import annotations

import errno
import json
import platform
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from unionfs.errors import on_failure, quoted
from unionfs.sys.kernel import kernel_version

ALLOW = 0x7FFF0000
LOG = 0x7FFC0000
_ERRNO, _TRACE = 0x00050000, 0x7FF00000
_ACTIONS = {
    "SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_LOG": LOG, "SCMP_ACT_ERRNO": _ERRNO, "SCMP_ACT_TRACE": _TRACE,
    "SCMP_ACT_TRAP": 0x00030000, "SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
}  # fmt: skip
_OPERATORS = {
    "SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7,
}  # fmt: skip
#: uname(2)'s machine → Docker's name in `arches`, the OCI's name of the architecture.
_MACHINES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"), "i686": ("x86", "SCMP_ARCH_X86"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"), "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"), "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"), "loongarch64": ("loongarch64", "SCMP_ARCH_LOONGARCH64"),
}  # fmt: skip
_MOST_ARGUMENTS = 6
_LARGEST_FILE = 1 << 22


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of one argument of a system call: index, operator, and its one or two values."""

    index: int
    operator: int
    value: int
    second: int


@dataclass(frozen=True, slots=True)
class Rule:
    """The action for system calls for which all conditions hold."""

    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile, reduced to this host and a container's capabilities."""

    default: int
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    known: frozenset[str]
    """All names in the profile, also those of rules that do not apply here."""


class _Bad(Exception):
    """An error in a profile, as a part of a sentence."""


def read_profile(path: str, capabilities: Collection[str]) -> Profile:
    """Read a profile from a file. Raises UserError."""
    with on_failure(
        f"seccomp profile {quoted(path)} cannot be read",
        "check the path, or write --security-opt seccomp=unconfined to do without a filter",
    ), open(path, "rb") as source:
        data = source.read(_LARGEST_FILE + 1)
    with on_failure(
        f"seccomp profile {quoted(path)} cannot be used",
        "correct it as Docker documents its seccomp profiles",
        _Bad,
    ):
        if len(data) > _LARGEST_FILE:
            raise _Bad("it is larger than 4 MiB")
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError) as error:
            text = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
            raise _Bad(f"it is not JSON{text}") from error
        return _profile(tree, capabilities)


def _profile(tree: Any, capabilities: Collection[str]) -> Profile:
    _check(tree, dict, "the profile")
    if tree.get("listenerPath"):
        raise _Bad("listenerPath is not supported")
    machine, native = _MACHINES.get(platform.machine(), ("", ""))
    architectures = tuple(_texts(tree, "architectures", "the profile"))
    maps = _list(tree, "archMap", "the profile")
    if architectures and maps:
        raise _Bad("it has both architectures and archMap")
    for entry in maps:
        _check(entry, dict, "an entry of archMap")
        if entry.get("architecture") == native:
            architectures = (native, *_texts(entry, "subArchitectures", "archMap"))
    rules, known = [], set[str]()
    for number, entry in enumerate(_list(tree, "syscalls", "the profile"), 1):
        where = f"entry {number} of syscalls"
        _check(entry, dict, where)
        names = _texts(entry, "names", where)
        if "name" in entry:
            if names:
                raise _Bad(f"{where} has both name and names")
            names = [_check(entry["name"], str, f"name in {where}")]
        known.update(names)
        action = _action(entry, "action", "errnoRet", where)
        conditions = tuple(_condition(item, where) for item in _list(entry, "args", where))
        included, excluded = (
            _check({} if entry.get(key) is None else entry[key], dict, f"{key} in {where}")
            for key in ("includes", "excludes")
        )
        if _holds(included, machine, capabilities, all) and not _holds(excluded, machine, capabilities, any):
            rules.append(Rule(tuple(names), action, conditions))
    default = _action(tree, "defaultAction", "defaultErrnoRet", "the profile")
    return Profile(default, architectures, tuple(rules), frozenset(known))


def _check(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a string", int: "a number"}
        raise _Bad(f"{where} is not {names[kind]}")
    return value


def _list(tree: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = tree.get(key)
    return [] if found is None else list(_check(found, list, f"{key} in {where}"))


def _texts(tree: Mapping[str, Any], key: str, where: str) -> list[str]:
    return [_check(item, str, f"an item of {key} in {where}") for item in _list(tree, key, where)]


def _number(value: Any, most: int, where: str) -> int:
    found = int(_check(value, int, where))
    if not 0 <= found <= most:
        raise _Bad(f"{where} is {found}, and not between 0 and {most}")
    return found


def _action(tree: Mapping[str, Any], key: str, data_key: str, where: str) -> int:
    name = tree.get(key)
    if not isinstance(name, str) or name not in _ACTIONS:
        raise _Bad(f"{where} has no {key}" if name is None else f"{where} has the unknown {key} {name!r}")
    action, data = _ACTIONS[name], tree.get(data_key)
    if data is not None:
        number = _number(data, 0xFFFF, f"{data_key} in {where}")
        if action not in (_ERRNO, _TRACE):
            raise _Bad(f"{where} has {data_key}, which {name} does not take")
        return action | number
    return action | errno.EPERM if action in (_ERRNO, _TRACE) else action


def _condition(item: Any, where: str) -> Condition:
    _check(item, dict, f"an item of args in {where}")
    operator = item.get("op")
    if not isinstance(operator, str) or operator not in _OPERATORS:
        raise _Bad(f"{where} has the unknown op {operator!r} in args")
    most = (1 << 64) - 1
    index = _number(item.get("index"), _MOST_ARGUMENTS - 1, f"index in args of {where}")
    value = _number(item.get("value"), most, f"value in args of {where}")
    second = _number(item.get("valueTwo", 0), most, f"valueTwo in args of {where}")
    return Condition(index, _OPERATORS[operator], value, second)


def _holds(
    part: Mapping[str, Any],
    machine: str,
    capabilities: Collection[str],
    combine: Callable[[list[bool]], bool],
) -> bool:
    """Combine the conditions of `includes` (`all`) or `excludes` (`any`): one of its arches, each of its
    capabilities, and at least its kernel.
    """
    arches = _texts(part, "arches", "a rule")
    held = [machine in arches] if arches else []
    held += [name in capabilities for name in _texts(part, "caps", "a rule")]
    if minimum := part.get("minKernel"):
        found = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", _check(minimum, str, "minKernel"))
        if found is None:
            raise _Bad(f"minKernel {minimum!r} is not of the form 4.8")
        held.append(kernel_version() >= (int(found[1]), int(found[2])))
    return combine(held)
