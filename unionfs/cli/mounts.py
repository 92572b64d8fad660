"""`unionfs ls` and `inspect`: the mounts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from unionfs.cli.common import print_json, print_table
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.listing import list_options, print_list
from unionfs.daemon.dead import dead_mounts, dead_mounts_of_others
from unionfs.daemon.described import copying_up, io_reasons, setting_rows, shown
from unionfs.daemon.detached import Detached, detached_mounts
from unionfs.daemon.live import LiveMount, held_mounts, live_mounts, waiting_mounts
from unionfs.daemon.others import mounts_of_others
from unionfs.errors import quoted
from unionfs.settings.filters import parse_filters
from unionfs.settings.words import in_table, moment
from unionfs.sys.mountinfo import MountEntry

_KEYS = ("mountpoint", "state", "session", "layer")
_VALUES = {"state": ("active", "waiting", "detached", "dead"), "session": ("direct", "pyfuse3")}
_FIELDS = ("Mountpoint", "State", "Pid", "Layers", "Session", "Since", "HeldBy")


@click.command(
    epilog="""\b
Examples:
  unionfs ls --json
  unionfs ls -f state=dead -q
  unionfs ls --format '{{.Mountpoint}} {{.Pid}}'
""",
)
@list_options("Print mountpoints only.", _KEYS, _VALUES)
def ls(quiet: bool, filters: tuple[str, ...], template: str | None, as_json: bool) -> None:
    """List mounts: mountpoint, state, the daemon's pid, layers, session and start time.

    The state is active; dead if the daemon has died (`unionfs cleanup` unmounts those); waiting if it
    has, and another one is to take over or to mount the union anew (`unionfs umount` ends that);
    detached if it is unmounted here but still in use (its users are listed) or still mounted elsewhere
    (`unionfs umount --force` ends those). Root sees the mounts of all users, others see their own. If a
    user's daemon does not answer root, only the mountpoint is shown. A container with another storage
    driver than union has no such mount: `unionfs ps` lists it.

    A template has the fields .Mountpoint .State .Pid .Layers .Session .Since .HeldBy; the filters layer and
    mountpoint take a path. `--format json` prints one object per line.
    """
    wanted = parse_filters(filters, _KEYS, _VALUES)
    summaries = [one for one in _summaries() if all(_holds(one, key, value) for key, value in wanted)]
    if as_json:
        print_json(summaries)
        return
    rows = [
        (
            quoted(summary["mountpoint"]),
            _shown_state(summary),
            str(summary["pid"] or "-"),
            "-" if summary["layers"] is None else str(len(summary["layers"])),
            summary["session"] or "-",
            in_table(summary["since"]),
        )
        for summary in summaries
    ]
    table = ("MOUNTPOINT", "STATE", "PID", "LAYERS", "SESSION", "SINCE") if rows else (), rows
    print_list(
        summaries if template == "json" else [_fields(summary) for summary in summaries],
        table,
        {name: name.upper() for name in _FIELDS},
        template,
        names=[summary["mountpoint"] for summary in summaries] if quiet else None,
    )


def _summaries() -> list[dict[str, Any]]:
    others = mounts_of_others()
    dead = [*dead_mounts_of_others(others.silent), *dead_mounts()]
    known = {found.mount.mount_id for found in dead}
    without = {found.mount.device for found in dead}
    held = [mount for mount in held_mounts() if mount.device not in without]
    return [
        *(_of_living(mount) for mount in (*live_mounts(), *others.answered)),
        *({**_summary(mount), "state": "waiting"} for mount in waiting_mounts()),
        *(_held(mount) for mount in held),
        *(_of_detached(found) for found in detached_mounts()),
        *(_unknown(mount, None) for mount in others.silent if mount.mount_id not in known),
        *(_unknown(found.mount, "dead", found.entry) for found in dead),
    ]


def _holds(summary: Mapping[str, Any], key: str, value: str) -> bool:
    if key == "layer":
        return summary["layers"] is not None and os.path.abspath(value) in summary["layers"]
    return bool(summary[key] == (os.path.abspath(value) if key == "mountpoint" else value))


def _fields(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a template."""
    return {name: summary["held_by" if name == "HeldBy" else name.lower()] for name in _FIELDS}


def _shown_state(summary: Mapping[str, Any]) -> str:
    users = [
        f"container {user['container']}" if user["container"]
        else f"{user['command']} (pid {user['pid']}, {user['how']})"
        for user in summary["held_by"]
    ]  # fmt: skip
    used = ", ".join(dict.fromkeys(users))
    at = ", ".join(map(quoted, summary["mounted_at"]))
    return f"{summary['state'] or '-'}{used and f', used by {used}'}{at and f', mounted at {at}'}"


@click.command(epilog="Example: unionfs inspect --json /mnt")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def inspect(mountpoint: str, as_json: bool) -> None:
    """Show all settings of the mount at MOUNTPOINT, and its figures: requests, nodes, copy-ups and more."""
    mount = find_mount(mountpoint)
    answer = mount.ask()
    figures = None if answer is None else answer.get("figures")
    whole: dict[str, Any] = {
        **_summary(mount),
        "device": mount.device,
        "settings": mount.settings.to_json(),
        "io": answer.get("io") if answer is not None else None,
        "log": answer.get("log") if answer is not None else None,
        "figures": figures if isinstance(figures, dict) else None,
    }
    if as_json:
        print_json(whole)
        return
    rows = setting_rows(whole["settings"])
    rows += [(name, shown(whole[name])) for name in ("pid", "device", "since", "log")]
    print_table(("SETTING", "VALUE"), rows)
    if reasons := io_reasons(whole["io"]):
        print("", *reasons, sep="\n")
    if whole["figures"] is None:
        print("\nThe daemon does not answer; its figures are unknown.")
        return
    print()
    counts = []
    for name, value in whole["figures"].items():
        if name == "copying_up":
            counts += [("copying up", line) for line in copying_up(whole["figures"])]
        elif isinstance(value, dict):
            counts += [(shown(f"{name}.{kind}"), shown(count)) for kind, count in value.items()]
        else:
            counts.append((shown(name), shown(value)))
    print_table(("FIGURE", "VALUE"), counts)


def _layers(mount: LiveMount) -> list[str]:
    settings = mount.settings
    upper = settings.upper if settings.upper_tmpfs is None else "tmpfs"
    return [*([] if upper is None else [upper]), *settings.lowers]


def _summary(mount: LiveMount) -> dict[str, Any]:
    return {
        "mountpoint": mount.settings.mountpoint,
        "state": "active",
        "pid": mount.pid,
        "layers": _layers(mount),
        "session": mount.settings.session,
        "since": moment(mount.since),
        "held_by": [],
        "mounted_at": [],
    }


def _of_living(mount: LiveMount) -> dict[str, Any]:
    """It may have been unmounted at its mountpoint, and still be mounted elsewhere, as in a container."""
    places = [one.mountpoint for one in mount.mounts()]
    summary = _summary(mount)
    if not places or mount.settings.mountpoint in places:
        return summary
    return {**summary, "state": "detached", "mounted_at": places}


def _held(mount: LiveMount) -> dict[str, Any]:
    """As for a union that is about to be mounted anew, the pid is that of the holder."""
    return {**_summary(mount), "state": "waiting", "pid": None if mount.holder is None else mount.holder[0]}


def _of_detached(found: Detached) -> dict[str, Any]:
    # For start-up time: few mounts are detached.
    from unionfs.containers.naming import container_of

    users = [{**asdict(user), "container": container_of(user.pid)} for user in found.users]
    return {**_summary(found.entry), "state": "detached", "held_by": users}


def _unknown(mount: MountEntry, state: str | None, entry: LiveMount | None = None) -> dict[str, Any]:
    """Return the summary of a mount without a daemon that answers, as far as its registry entry tells."""
    names = ("state", "pid", "layers", "session", "since")
    rest = {**dict.fromkeys(names), "held_by": [], "mounted_at": []} if entry is None else _summary(entry)
    return {"mountpoint": mount.mountpoint, **rest, "state": state, "pid": None}
