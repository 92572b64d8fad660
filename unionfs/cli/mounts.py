"""`unionfs umount`, `ls` and `inspect`: the mounts that live now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from unionfs.daemon.live import LiveMount
    from unionfs.sys.mountinfo import MountEntry


@click.command(short_help="Unmount, and wait until all is on disk.", epilog="Example: unionfs umount /mnt")
@click.option("--lazy", is_flag=True, help="Detach a mount that is in use; it ends when its last user ends.")
@click.argument("mountpoint")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, and return when its daemon is gone and all changes are on disk.

    A mount whose daemon has died is cleared away too.
    """
    from unionfs.daemon.unmount import umount as end

    end(mountpoint, lazy=lazy)


@click.command(short_help="List the mounts that live now.", epilog="Example: unionfs ls --json")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def ls(as_json: bool) -> None:
    """List the mounts that live now: mountpoint, daemon's pid, layers, session and since when.

    Root sees the mounts of all users, others see their own. Where a user's daemon does not answer root, only
    the mountpoint is shown.
    """
    from unionfs.daemon.live import live_mounts
    from unionfs.daemon.others import mounts_of_others

    others = mounts_of_others()
    summaries = [_summary(mount) for mount in (*live_mounts(), *others.answered)]
    summaries += [_unknown(mount) for mount in others.silent]
    if as_json:
        print(json.dumps(summaries, indent=2))
        return
    if not summaries:
        return
    from unionfs.cli.run import print_table
    from unionfs.errors import quoted

    print_table(
        ("MOUNTPOINT", "PID", "LAYERS", "SESSION", "SINCE"),
        [
            (
                quoted(summary["mountpoint"]),
                str(summary["pid"] or "-"),
                "-" if summary["layers"] is None else str(len(summary["layers"])),
                summary["session"] or "-",
                (summary["since"] or "-").replace("T", " ")[:19],
            )
            for summary in summaries
        ],
    )


@click.command(
    short_help="Show a mount's settings and figures.", epilog="Example: unionfs inspect --json /mnt"
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("mountpoint")
def inspect(mountpoint: str, as_json: bool) -> None:
    """Show all settings of the mount at MOUNTPOINT, and its figures: requests, nodes, copy-ups and so on."""
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
    from unionfs.cli.run import print_table

    rows = [(name, _shown(value)) for name, value in whole["settings"].items() if name != "storage"]
    rows += [("storage", _shown_storage(spec)) for spec in whole["settings"]["storage"]]
    rows += [(name, _shown(whole[name])) for name in ("pid", "device", "since")]
    print_table(("SETTING", "VALUE"), rows)
    for reason in _reasons(whole["io"]):
        print(reason)
    if whole["figures"] is None:
        print("\nThe daemon does not answer; its figures are not known.")
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
    """Why data flows as it does, why not otherwise, and what the kernel lacks: a sentence each."""
    if not isinstance(io, dict):
        return []
    more = [values for name in ("why_not", "missing") if isinstance(values := io.get(name), dict)]
    sentences = [io.get("why"), *(sentence for values in more for sentence in values.values())]
    found = [str(sentence) for sentence in sentences if sentence]
    return ["", *found] if found else []


def find_mount(mountpoint: str) -> LiveMount:
    """The live mount at `mountpoint`. Raises UserError when there is none."""
    from unionfs.daemon import live
    from unionfs.daemon.others import mounts_of_others
    from unionfs.daemon.settings import absolute_mountpoint
    from unionfs.errors import UserError, quoted
    from unionfs.sys.mountinfo import mounted_at

    path = absolute_mountpoint(mountpoint)
    mounted = mounted_at(path)
    known = live.live_mounts()
    found = None if mounted is None else live.find_by_device(mounted.device, known)
    if found is None:
        known = [*known, *mounts_of_others().answered]
        found = None if mounted is None else live.find_by_device(mounted.device, known)
    if found is None:
        # It may be mounted in another mount namespace, where the daemon is.
        found = next((mount for mount in reversed(known) if mount.settings.mountpoint == path), None)
    if found is None:
        raise UserError(f"{quoted(path)} is no live unionfs mount{_why_not(path, mounted)}.")
    return found


def upper_in_memory(mount: LiveMount) -> str:
    """A way to the upper that has no path: by its daemon's fd. Raises UserError."""
    from unionfs.errors import UserError, quoted

    answer = mount.ask()
    number = None if answer is None else answer.get("upper_fd")
    if not isinstance(number, int):
        raise UserError(
            f"the daemon of {quoted(mount.settings.mountpoint)} (pid {mount.pid}) does not answer, and only "
            "it knows the way to an upper in memory; try again later."
        )
    return f"/proc/{mount.pid}/fd/{number}"


def _why_not(path: str, mounted: MountEntry | None) -> str:
    """The cause and the cure, as the end of a sentence, for there being no live mount of ours at a path."""
    import os

    from unionfs.daemon import live
    from unionfs.daemon.others import owner_of
    from unionfs.errors import quoted

    if mounted is not None and mounted.fstype == "fuse.unionfs":
        owner = mounted.super_option("user_id")
        if (other := owner_of(mounted)) is not None:
            return f" of root, but one of uid {other} whose daemon does not answer root; ask as that user"
        if os.geteuid() != 0 and owner != str(os.geteuid()):
            return f" of this user, but one of uid {owner}; ask as that user or as root"
        entry = live.find_by_device(mounted.device)
        if entry is not None and not entry.is_alive():
            return f": its daemon (pid {entry.pid}) has died; `unionfs umount {quoted(path)}` clears it away"
    return "; `unionfs ls` shows those there are"


def _layers(mount: LiveMount) -> list[str]:
    settings = mount.settings
    upper = [] if settings.upper is None else [settings.upper]
    if settings.upper_tmpfs is not None:
        upper = ["tmpfs"]
    return [*upper, *mount.settings.lowers]


def _moment(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _unknown(mount: MountEntry) -> dict[str, Any]:
    """A mount of another user whose daemon does not answer root: what the kernel says."""
    return {"mountpoint": mount.mountpoint, "pid": None, "layers": None, "session": None, "since": None}


def _summary(mount: LiveMount) -> dict[str, Any]:
    return {
        "mountpoint": mount.settings.mountpoint,
        "pid": mount.pid,
        "layers": _layers(mount),
        "session": mount.settings.session,
        "since": _moment(mount.since),
    }


def _shown_storage(spec: dict[str, Any]) -> str:
    from unionfs.errors import quoted

    what = {"volume": "name", "bind": "path"}.get(spec["type"])
    source = spec["type"] if what is None else f"{spec['type']} {quoted(spec[what])}"
    return f"{source} at {quoted(spec['target'])}{' (read-only)' if spec['read_only'] else ''}"


def _shown(value: object) -> str:
    from unionfs.errors import quoted

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
