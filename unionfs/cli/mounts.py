"""`unionfs ls` and `inspect`: the mounts."""

from __future__ import annotations

import json
from typing import Any

import click

from unionfs.cli.finding import find_mount
from unionfs.cli.run import moment, print_table
from unionfs.daemon.dead import dead_mounts, dead_mounts_of_others
from unionfs.daemon.live import LiveMount, live_mounts
from unionfs.daemon.others import mounts_of_others
from unionfs.errors import quoted
from unionfs.sys.mountinfo import MountEntry


@click.command(epilog="Example: unionfs ls --json")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def ls(as_json: bool) -> None:
    """List mounts: mountpoint, state, the daemon's pid, layers, session and start time.

    The state is active, or dead if the daemon has died; `unionfs cleanup` unmounts those. Root sees the
    mounts of all users, others see their own. If a user's daemon does not answer root, only the mountpoint
    is shown.
    """
    others = mounts_of_others()
    dead = [*dead_mounts_of_others(others.silent), *dead_mounts()]
    summaries = [_summary(mount) for mount in (*live_mounts(), *others.answered)]
    known = {found.mount.mount_id for found in dead}
    summaries += [_unknown(mount, None) for mount in others.silent if mount.mount_id not in known]
    summaries += [_unknown(found.mount, "dead", found.entry) for found in dead]
    if as_json:
        print(json.dumps(summaries, indent=2))
        return
    if not summaries:
        return
    print_table(
        ("MOUNTPOINT", "STATE", "PID", "LAYERS", "SESSION", "SINCE"),
        [
            (
                quoted(summary["mountpoint"]),
                summary["state"] or "-",
                str(summary["pid"] or "-"),
                "-" if summary["layers"] is None else str(len(summary["layers"])),
                summary["session"] or "-",
                (summary["since"] or "-").replace("T", " ")[:19],
            )
            for summary in summaries
        ],
    )


@click.command(epilog="Example: unionfs inspect --json /mnt")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("mountpoint")
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
        "figures": figures if isinstance(figures, dict) else None,
    }
    if as_json:
        print(json.dumps(whole, indent=2))
        return
    rows = [(name, _shown(value)) for name, value in whole["settings"].items() if name != "storage"]
    rows += [("storage", _shown_storage(spec)) for spec in whole["settings"]["storage"]]
    rows += [(name, _shown(whole[name])) for name in ("pid", "device", "since")]
    print_table(("SETTING", "VALUE"), rows)
    for reason in _reasons(whole["io"]):
        print(reason)
    if whole["figures"] is None:
        print("\nThe daemon does not answer; its figures are unknown.")
        return
    print()
    counts = []
    for name, value in whole["figures"].items():
        if isinstance(value, dict):
            counts += [(_shown(f"{name}.{kind}"), _shown(count)) for kind, count in value.items()]
        else:
            counts.append((_shown(name), _shown(value)))
    print_table(("FIGURE", "VALUE"), counts)


def _reasons(io: object) -> list[str]:
    """Return sentences: why this I/O mode, why not the others, and what the kernel lacks."""
    if not isinstance(io, dict):
        return []
    more = [values for name in ("why_not", "missing") if isinstance(values := io.get(name), dict)]
    sentences = [io.get("why"), *(sentence for values in more for sentence in values.values())]
    found = [str(sentence) for sentence in sentences if sentence]
    return ["", *found] if found else []


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
    }


def _unknown(mount: MountEntry, state: str | None, entry: LiveMount | None = None) -> dict[str, Any]:
    """Return the summary of a mount without a daemon that answers, as far as its registry entry tells."""
    rest = dict.fromkeys(("state", "pid", "layers", "session", "since")) if entry is None else _summary(entry)
    return {"mountpoint": mount.mountpoint, **rest, "state": state, "pid": None}


def _shown_storage(spec: dict[str, Any]) -> str:
    what = {"volume": "name", "bind": "path"}.get(spec["type"])
    source = spec["type"] if what is None else f"{spec['type']} {quoted(spec[what])}"
    return f"{source} at {quoted(spec['target'])}{' (read-only)' if spec['read_only'] else ''}"


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(_shown(item) for item in value) or "-"
        case dict():
            given = {name: item for name, item in value.items() if item not in (None, (), [])}
            return ", ".join(f"{name}={item}" for name, item in given.items()) or "yes"
        case str():
            return quoted(value) if value else "-"
        case _:
            return str(value)
