"""The daemon's side of `unionfs snapshot`: changes the layers of its mount."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from unionfs.core.places import Layer
from unionfs.daemon.serving import Serving
from unionfs.daemon.syncing import write_back
from unionfs.errors import UserError, cure_for, on_failure, quoted, reason, with_cure
from unionfs.fuse.operations import Operations
from unionfs.settings.mount import MountSettings
from unionfs.settings.names import check_name
from unionfs.storage.snapshot_record import Record, added
from unionfs.storage.snapshots import Store, base, has_some, is_beside, path_of
from unionfs.union.layers import LayerStack
from unionfs.union.stacking import Copied, lacking_names

LACKS_NAMES: Final = "links"
"""The key of an answer: names of hard links must be copied up before, see `Stacking`."""
_MANAGED: Final = ("link", "branch.json", "container.json", "volume.json")
_MOST_FILES: Final = 100
_NOT_CLEANED: Final = "what snapshots have left cannot be removed: %s"

log = logging.getLogger(__name__)


class Snapshotting:
    """Takes and restores the snapshots of one mount."""

    def __init__(
        self, operations: Operations, stack: LayerStack, serving: Serving, publish: Callable[[], None]
    ) -> None:
        """`publish`: called when the settings of `serving` have changed."""
        self._operations = operations
        self._stack = stack
        self._serving = serving
        self._publish = publish
        self._one = trio.Lock()

    async def clean(self) -> None:
        """Remove what no snapshot needs any more. An error is logged."""
        settings, upper = self._serving.settings, self._stack.upper
        if upper is None or settings.upper is None:
            return
        try:
            some = has_some(upper.root_fd, settings.upper)
        except OSError as error:
            log.warning(_NOT_CLEANED, error)
            return
        if some:  # a daemon without them stays without threads, for `share_memory`
            await trio.to_thread.run_sync(_clean, self._stack, settings, abandon_on_cancel=True)

    # -- orders ---------------------------------------------------------------------------------------------

    async def obey(self, order: str, question: dict[str, Any]) -> dict[str, Any]:
        """Carry out the order `snapshot` or `restore`. Raises UserError."""
        try:
            return await self._carried_out(order, question)
        except OSError as error:
            why = with_cure(reason(error), cure_for(error, "try again"))
            place = quoted(self._serving.settings.mountpoint)
            raise UserError(f"{place} cannot change its layers: {why}.") from error

    async def _carried_out(self, order: str, question: dict[str, Any]) -> dict[str, Any]:
        name = question.get("name")
        if not isinstance(name, str | None):
            raise UserError("the name of a snapshot must be text; give another one.")
        if name is not None:
            check_name(name, "snapshot")
        settings = self._serving.settings
        self._refuse(settings)
        assert settings.upper is not None
        assert self._stack.upper is not None
        async with self._one:
            with Store(self._stack.upper.root_fd, settings.upper) as store:
                store.open(make=order == "snapshot")
                if order == "restore":
                    if name is None:
                        raise UserError("no snapshot is named; give its name.")
                    if store.fd < 0:
                        Record().named(name, settings.upper)
                    return await self._restore(store, name)
                if lacking_names(self._operations.union):
                    return {LACKS_NAMES: True}
                return await self._take(store, name, still=question.get("still") is True)

    def _refuse(self, settings: MountSettings) -> None:
        cause = _why_not(settings, self._stack, possible=self._operations.snapshots.possible)
        if cause:
            place = quoted(settings.mountpoint)
            raise UserError(f"{place} can have no snapshots: {cause}.")

    async def _take(self, store: Store, name: str | None, *, still: bool) -> dict[str, Any]:
        """`still`: all processes that have files open for writing are stopped."""
        settings, stack, upper = self._serving.settings, self._stack, store.upper
        await write_back(self._serving.locate())
        with store.locked():
            new, id_ = added(store.record(), name)
            layer = path_of(upper, id_)
            with store.staged(id_) as fd:
                stack.claim(fd, upper)
                store.announce(new, fd)
                former = stack.upper
                assert former is not None
                copied, seconds = await self._operations.snapshots.take(
                    fd, upper, partial(store.exchange, id_)
                )
            former.is_moved_to(layer)
            stack.protect(former.root_fd)
            files = tuple(_shown(one) for one in copied if one.changed or (one.mapped and not still))
            one = replace(new.layers[id_], files=files[:_MOST_FILES])
            with trio.CancelScope(shield=True), _recorded(f"snapshot {quoted(one.name)} was taken"):
                self._changed(replace(settings, lowers=(layer, *settings.lowers)))
                if stack.durable:
                    await trio.to_thread.run_sync(stack.sync_upper)
                await trio.to_thread.run_sync(store.finish, new.with_layer(one))
        return {
            "done": True, "name": one.name, "layer": layer, "created": one.created, "seconds": seconds,
            "open_files": len(copied), "files": list(one.files),
        }  # fmt: skip

    async def _restore(self, store: Store, name: str) -> dict[str, Any]:
        settings, stack, upper = self._serving.settings, self._stack, store.upper
        with store.locked():
            record = store.record()
            one, id_ = record.named(name, upper), record.next_id()
            new = replace(record, head=one.id, last=int(id_))
            lowers = [
                *(path_of(upper, layer) for layer in record.chain(one.id)),
                *base(upper, settings.lowers),
            ]
            with store.staged(id_) as fd:
                stack.claim(fd, upper)
                store.announce(new, fd)
                await self._operations.snapshots.replace(
                    fd, upper, [self._layer(store, path) for path in lowers], partial(store.exchange, id_)
                )
            with _recorded(f"snapshot {quoted(one.name)} was restored"):
                self._changed(replace(settings, lowers=tuple(lowers)))
                store.finish(new)
        if settings.io != "cached":  # else files may be open without an fd here
            trio.lowlevel.spawn_system_task(self.clean)
        return {"done": True, "name": one.name, "lowers": lowers}

    def _layer(self, store: Store, path: str) -> Layer | tuple[str, int]:
        """The layer of the mount with that path, or an fd of it."""
        for layer in self._stack.layers:
            if layer.path == path and not layer.is_upper:
                return layer
        return path, self._stack.own_lower(store.open_layer(os.path.basename(path)))

    def _changed(self, settings: MountSettings) -> None:
        self._serving.changed(settings)
        self._publish()


def recover(stack: LayerStack, settings: MountSettings) -> None:
    """Finish or forget a change of a daemon that was killed. Call it before a union uses the index. Raises
    UserError, OSError."""
    with _store(stack, settings) as store:
        if store is not None:
            with store.locked() as forgotten:
                if forgotten:
                    stack.renew_index()


@contextmanager
def _store(stack: LayerStack, settings: MountSettings) -> Iterator[Store | None]:
    """The snapshots of a mount's upper, if it has some."""
    upper, path = stack.upper, settings.upper
    if upper is None or path is None or not has_some(upper.root_fd, path):
        yield None
        return
    with Store(upper.root_fd, path) as store:
        yield store if store.open(make=False) else None


def _clean(stack: LayerStack, settings: MountSettings) -> None:
    try:
        with _store(stack, settings) as store:
            if store is not None:
                store.discard_waste(settings.lowers)
    except (OSError, UserError) as error:
        log.warning(_NOT_CLEANED, error)


def _recorded(done: str) -> on_failure:
    """For what follows the exchange, which makes the change, and the record of it valid."""
    cure = "check the disk, and take or restore another one to complete it"
    return on_failure(f"{done}, but could not be recorded", cure)


def _shown(one: Copied) -> dict[str, Any]:
    state = "changed" if one.changed else "mapped"
    return {"path": os.fsdecode(one.path), "size": one.size, "state": state}


def _why_not(settings: MountSettings, stack: LayerStack, *, possible: bool) -> str:
    """Why a mount can have no snapshots, with the cure; "" if it can."""
    if stack.upper is None or settings.upper is None:
        what = "its upper is in memory" if settings.upper_tmpfs is not None else "it has no upper"
        return f"{what}; mount it with an upper on a disk"
    if settings.read_only:
        return "it is read-only; mount it again without ro"
    if not possible:
        return (
            "its session is pyfuse3, which cannot wait between two requests; mount it with --session direct"
        )
    for wanted, option in (
        (settings.outlive, "outlive"), (bool(settings.storage), "storage (-v, --mount, --tmpfs)"),
        (settings.watch_lower, "--watch-lower"), (stack.keeps_permissions, "xattr_permissions"),
        (stack.owners is not None, "other owners (uidmapping, gidmapping, squash_to_*)"),
        (settings.lives_with is not None, "a command in it (`unionfs run`, `unionfs try`)"),
    ):  # fmt: skip
        if wanted:
            return f"it has {option}; mount it without"
    if any(is_beside(stack.upper.root_fd, name) for name in _MANAGED):
        return "its upper belongs to a branch, volume or container, which would not find them; use another"
    return ""
