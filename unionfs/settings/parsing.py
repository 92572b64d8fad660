"""Parses `-v` and `--mount` in Docker's syntax.

Sources of the rules: docker/cli opts/mount.go (the keys of `--mount`), moby volume/mounts/linux_parser.go
(the parts of `-v`, and valid combinations). A relative source is relative to the caller's directory.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from unionfs.errors import UserError, quoted
from unionfs.settings.names import check_name
from unionfs.settings.sizes import parse_size
from unionfs.settings.specs import (
    PROPAGATIONS,
    BindSpec,
    Spec,
    TmpfsOptions,
    TmpfsSpec,
    VolumeSpec,
)
from unionfs.settings.tmpfs import octal, parse_tmpfs, target_of, value_of

_CONSISTENCIES = ("default", "consistent", "cached", "delegated")
_BOOLEANS = {
    "1": True, "t": True, "T": True, "true": True, "TRUE": True, "True": True,
    "0": False, "f": False, "F": False, "false": False, "FALSE": False, "False": False,
}  # fmt: skip


def parse_all(volumes: Iterable[str], mounts: Iterable[str], tmpfs: Iterable[str]) -> tuple[Spec, ...]:
    """Parse all storage arguments of a call. Returns the specs in mount order.

    Like Docker, sorts by the number of directories in the target, so that /a comes before /a/b. Raises
    UserError for invalid arguments and duplicate targets.
    """
    found: list[Spec] = [parse_volume(text) for text in volumes]
    found += [parse_mount(text) for text in mounts]
    found += [parse_tmpfs(text) for text in tmpfs]
    return in_order(found)


def in_order(found: Iterable[Spec]) -> tuple[Spec, ...]:
    """Return the specs in mount order. Raises UserError for duplicate targets."""
    order = sorted(found, key=lambda spec: spec.target.count("/"))
    taken: set[str] = set()
    for spec in order:
        if spec.target in taken:
            raise UserError(f"target {quoted(spec.target)} is given twice; mount one thing at each target.")
        taken.add(spec.target)
    return tuple(order)


def parse_storage_option(name: str, value: str) -> Spec:
    """Parse `volume=` or `tmpfs=` of `-o`: as `-v` or `--tmpfs`, also with colons for the commas.

    So fstab(5) needs no commas in an option, at which mount(8) splits. Raises UserError.
    """
    parts = value.split(":")
    paths = 2 if name == "volume" and len(parts) > 1 else 1
    text = ":".join([*parts[:paths], ",".join(parts[paths:])] if len(parts) > paths else parts)
    option = f"option {name}={quoted(value)}"
    return parse_tmpfs(text, option) if name == "tmpfs" else parse_volume(text, option)


def _host_path(option: str, text: str) -> str:
    if text == "." or text.startswith(("./", "../")) or text == "..":
        try:
            return os.path.abspath(text)
        except FileNotFoundError as error:  # of getcwd
            raise UserError(
                f"{option}: {quoted(text)} is a relative path, but the current directory is gone; give an "
                "absolute path."
            ) from error
    if not text.startswith("/"):
        raise UserError(
            f"{option}: bind source {quoted(text)} is a relative path; give an absolute one, or begin it "
            "with ./ ."
        )
    return "/" + os.path.normpath(text).strip("/")


# -- -v -----------------------------------------------------------------------------------------------


def parse_volume(text: str, option: str = "") -> VolumeSpec | BindSpec:
    """Parse a `-v`: /target, NAME:/target[:mode,...] or /host/path:/target[:mode,...].

    `option` names it in errors, by default as `-v`. Raises UserError.
    """
    option = option or f"-v {quoted(text)}"
    parts = text.split(":")
    if len(parts) > 3:
        raise UserError(
            f"{option}: more than two colons; a path with a colon in it is given by --mount "
            "type=bind,source=...,target=..."
        )
    if not parts[0]:
        raise UserError(f"{option}: the source is empty; write SOURCE:/target, or /target alone.")
    if len(parts) == 1:
        return VolumeSpec(target_of(option, parts[0]), anonymous=True)
    source, target = parts[0], parts[1]
    if len(parts) == 2 and target and all(word in _WORDS for word in target.split(",")):
        raise UserError(
            f"{option}: `{target}` is in the place of the target; write SOURCE:/target:{target}."
        )
    modes = _modes(option, parts[2] if len(parts) == 3 else "")
    target = target_of(option, target)
    if source.startswith(("/", ".")):
        for word in ("nocopy", "copy"):
            if modes.get("copy") == word:
                raise UserError(f"{option}: `{word}` is for volumes, but the source is a host path; drop it.")
        return BindSpec(
            target,
            _host_path(option, source),
            read_only=modes.get("access") == "ro",
            propagation=modes.get("propagation", "rprivate"),
            create=True,
        )
    if "propagation" in modes:
        raise UserError(
            f"{option}: `{modes['propagation']}` is for bind mounts, but the source is a volume; drop it."
        )
    return VolumeSpec(
        target,
        check_name(source),
        read_only=modes.get("access") == "ro",
        copy=modes.get("copy") != "nocopy",
    )


_WORDS = {
    "ro": "access", "rw": "access",
    "z": "label", "Z": "label",
    "copy": "copy", "nocopy": "copy",
    "consistent": "consistency", "cached": "consistency", "delegated": "consistency",
    **dict.fromkeys(PROPAGATIONS, "propagation"),
}  # fmt: skip


def _modes(option: str, text: str) -> dict[str, str]:
    """Return the modes after the second colon, by category. One per category, as in Docker."""
    found: dict[str, str] = {}
    for word in text.split(",") if text else ():
        sort = _WORDS.get(word)
        if sort is None:
            raise UserError(
                f"{option}: unknown mode {quoted(word)}; there are ro, rw, nocopy, z, Z and "
                f"{', '.join(PROPAGATIONS)}."
            )
        if sort in found:
            raise UserError(f"{option}: `{found[sort]}` and `{word}` exclude each other; keep one of them.")
        found[sort] = word
    return found


# -- --mount ------------------------------------------------------------------------------------------

_KEYS = (
    "type", "source", "src", "target", "dst", "destination", "readonly", "ro", "consistency",
    "volume-driver", "volume-opt", "volume-nocopy", "volume-subpath",
    "bind-propagation", "bind-create-src", "bind-nonrecursive", "bind-recursive",
    "tmpfs-size", "tmpfs-mode",
)  # fmt: skip
_SAME = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
_FLAGS = ("readonly", "volume-nocopy", "bind-nonrecursive", "bind-create-src")


def parse_mount(text: str) -> Spec:
    """Parse a `--mount`: key=value pairs in CSV form. Raises UserError."""
    option = f"--mount {quoted(text)}"
    given, driver_options = _pairs(option, text)
    kind = str(given.pop("type", "volume")).lower()
    if kind not in ("volume", "bind", "tmpfs"):
        raise UserError(f"{option}: unknown type {quoted(kind)}; the types are volume, bind and tmpfs.")
    for key in (*given, *(["volume-opt"] if driver_options else [])):
        prefix = key.partition("-")[0]
        if "-" in key and prefix != kind:
            raise UserError(f"{option}: {key} cannot go with type {kind}; drop it, or write type={prefix}.")
    if "target" not in given:
        raise UserError(f"{option}: target is missing; add target=/path/in/the/union.")
    target = target_of(option, str(given["target"]))
    read_only = bool(given.get("readonly", False))
    match kind:
        case "bind":
            return _bind(option, target, given, read_only=read_only)
        case "tmpfs":
            if "source" in given:
                raise UserError(f"{option}: source cannot go with type tmpfs; drop it.")
            return TmpfsSpec(target, _tmpfs_of_mount(option, given), read_only=read_only)
    return _volume(option, target, given, driver_options, read_only=read_only)


def _pairs(option: str, text: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        raise UserError(f"{option}: invalid CSV ({error}); check the double quotes.") from error
    given: dict[str, Any] = {}
    driver_options: dict[str, str] = {}
    for pair in rows[0] if rows else []:
        name, equals, value = pair.partition("=")
        key = _SAME.get(name.lower(), name.lower())
        if name.lower() not in _KEYS:
            if not equals:
                raise UserError(f"{option}: {quoted(pair)} is not a key=value pair; write KEY=VALUE.")
            raise UserError(f"{option}: unknown key {quoted(name)}; there are {', '.join(_KEYS)}.")
        if key in _FLAGS:
            given[key] = _boolean(option, name, value) if equals else True
        elif not equals:
            raise UserError(f"{option}: {quoted(name)} has no value; write {name}=VALUE.")
        elif key == "volume-opt":
            option_name, _, option_value = value.partition("=")
            if not option_name:
                raise UserError(f"{option}: volume-opt has no name; write volume-opt=NAME=VALUE.")
            driver_options[option_name] = option_value
        elif key == "consistency":
            _one_of(option, name, value.lower(), _CONSISTENCIES)
        else:
            given[key] = value
    return given, driver_options


def _boolean(option: str, name: str, value: str) -> bool:
    if value not in _BOOLEANS:
        raise UserError(f"{option}: invalid value {name}={quoted(value)}; write true or false.")
    return _BOOLEANS[value]


def _one_of(option: str, name: str, value: str, values: Sequence[str]) -> str:
    if value not in values:
        raise UserError(f"{option}: {name}={quoted(value)} is unknown; write one of {', '.join(values)}.")
    return value


def _bind(option: str, target: str, given: dict[str, Any], *, read_only: bool) -> BindSpec:
    if not given.get("source"):
        raise UserError(f"{option}: source is missing; add source=/host/path.")
    propagation = _one_of(
        option, "bind-propagation", str(given.get("bind-propagation", "rprivate")).lower(), PROPAGATIONS
    )
    recursive = not given.get("bind-nonrecursive", False)
    below = True
    if "bind-recursive" in given:
        words = ("enabled", "disabled", "writable", "readonly")
        word = _one_of(option, "bind-recursive", str(given["bind-recursive"]).lower(), words)
        if word == "readonly" and not read_only:
            raise UserError(f"{option}: bind-recursive=readonly needs readonly; add it.")
        recursive = recursive and word != "disabled"
        below = word != "writable"
    return BindSpec(
        target,
        _host_path(option, str(given["source"])),
        read_only=read_only,
        propagation=propagation,
        create=bool(given.get("bind-create-src", False)),
        recursive=recursive,
        read_only_below=below,
    )


def _volume(
    option: str, target: str, given: dict[str, Any], driver_options: dict[str, str], *, read_only: bool
) -> VolumeSpec:
    name = given.get("source") or None
    subpath = str(given.get("volume-subpath", ""))
    if subpath:
        if name is None:
            raise UserError(f"{option}: an anonymous volume has no volume-subpath; add source=NAME.")
        clean = os.path.normpath(subpath)
        if subpath.startswith("/") or clean == ".." or clean.startswith("../"):
            raise UserError(
                f"{option}: volume-subpath {quoted(subpath)} leads out of the volume; give a relative path "
                "within it."
            )
        subpath = "" if clean == "." else clean
    if name is None and read_only:
        raise UserError(
            f"{option}: an anonymous volume that is read-only holds nothing and never will; name the volume, "
            "or drop readonly."
        )
    return VolumeSpec(
        target,
        None if name is None else check_name(str(name)),
        read_only=read_only,
        anonymous=name is None,
        driver=str(given.get("volume-driver") or "local"),
        options=tuple(sorted(driver_options.items())),
        copy=not given.get("volume-nocopy", False),
        subpath=subpath,
    )


def _tmpfs_of_mount(option: str, given: dict[str, Any]) -> TmpfsOptions:
    options = TmpfsOptions(mode=0o1777)
    if "tmpfs-size" in given:
        size = value_of(option, "tmpfs-size", str(given["tmpfs-size"]), parse_size, "a size as 64m")
        options = replace(options, size=str(size) if size else None)
    if "tmpfs-mode" in given:
        mode = value_of(option, "tmpfs-mode", str(given["tmpfs-mode"]), octal, "an octal mode as 1777")
        options = replace(options, mode=mode)
    return options
