"""The seccomp filter of a container, compiled by libseccomp; seccomp(2)."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from unionfs.containers.profile import ALLOW, LOG, Condition, Profile, Rule, read_profile
from unionfs.errors import UserError, on_failure, quoted

BUILT_IN = os.path.join(os.path.dirname(__file__), "seccomp.json")
"""A profile equivalent to Docker's default (moby/profiles, seccomp/default.json)."""

_RET_ENOSYS = 0x00050000 | 38
# linux/filter.h; struct seccomp_data has the number of the call at 0 and the architecture at 4
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_X32_BIT = 0x40000000  # __X32_SYSCALL_BIT, asm/unistd.h


def compile_profile(path: str, capabilities: Collection[str]) -> bytes:
    """Compile a profile and a container's capabilities to struct sock_filter[]. Raises UserError.

    As in runc, names unknown to this libseccomp are skipped, and system calls newer than all that the profile
    names fail with ENOSYS: with EPERM, programs would not fall back to an older call.
    """
    profile = read_profile(path, capabilities)
    library = _library()
    with on_failure(
        f"seccomp profile {quoted(path)} cannot be compiled",
        "correct it as Docker documents its seccomp profiles",
    ):
        made = library.SyscallFilter(profile.default)
        tokens = _add_architectures(library, made, profile)
        for rule in profile.rules:
            if rule.action != profile.default:
                _add(library, made, rule)
        program = _exported(made)
    if profile.default in (ALLOW, LOG):
        return program
    return b"".join(_newer_calls(library, tokens, profile)) + program


def _library() -> Any:
    """Return the module pyseccomp, whose import loads the library. Raises UserError."""
    try:
        # For start-up time, and because the library may be missing.
        import pyseccomp
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            "libseccomp is missing, and the container's system calls are filtered with it; install the "
            "package libseccomp2, or write --security-opt seccomp=unconfined to do without a filter."
        ) from error
    return pyseccomp


def _add_architectures(library: Any, made: Any, profile: Profile) -> list[int]:
    native = library.system_arch()
    tokens = [native]
    for name in profile.architectures:
        token = getattr(library.Arch, name.removeprefix("SCMP_ARCH_"), None)
        if token is None:
            raise UserError(f"seccomp profile: unknown architecture {quoted(name)}; remove it.")
        if token not in tokens:
            made.add_arch(token)
            tokens.append(token)
    return tokens


def _add(library: Any, made: Any, rule: Rule) -> None:
    counts = Counter(condition.index for condition in rule.conditions)
    # libseccomp compares an argument once per rule; several comparisons of one are alternatives, as in runc.
    several = any(count > 1 for count in counts.values())
    groups: list[tuple[Condition, ...]] = [rule.conditions]
    if several:
        groups = [(one,) for one in rule.conditions]
    for name in rule.names:
        number = library.resolve_syscall(library.Arch.NATIVE, name)
        if number == -1:
            continue
        for group in groups:
            made.add_rule(
                rule.action, number,
                *(library.Arg(one.index, one.operator, one.value, one.second) for one in group),
            )  # fmt: skip


def _exported(made: Any) -> bytes:
    with os.fdopen(os.memfd_create("seccomp", os.MFD_CLOEXEC), "rb") as memory:
        made.export_bpf(memory)
        memory.seek(0)
        return memory.read()


def _newer_calls(library: Any, tokens: Collection[int], profile: Profile) -> Iterator[bytes]:
    """Yield instructions before the filter: ENOSYS for numbers above all that the profile names."""
    for token in tokens:
        if token == library.Arch.X32:
            continue  # seccomp_data has x86-64's architecture and a marked number
        newest = max((library.resolve_syscall(token, name) for name in profile.known), default=-1)
        if newest < 0:
            continue
        yield _instruction(_LOAD, _ARCHITECTURE)
        yield _instruction(_EQUAL, token, otherwise=4)
        yield _instruction(_LOAD, _NUMBER)
        yield _instruction(_AT_LEAST, _X32_BIT, then=2)
        yield _instruction(_GREATER, newest, otherwise=1)
        yield _instruction(_RETURN, _RET_ENOSYS)


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """struct sock_filter; `then` and `otherwise` are the instructions to skip."""
    return struct.pack("=HBBI", code, then, otherwise, value)
