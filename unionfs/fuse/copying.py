"""Copy-up on behalf of requests: once for all that wait for it, in a thread if it takes long."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import Final, NamedTuple

import trio

from unionfs.core.copyup import SmallCopyUps
from unionfs.core.files import OpenFile
from unionfs.core.node import Attributes, Node
from unionfs.core.opening import may_copy_up
from unionfs.core.setting import Change
from unionfs.fuse.fence import Fence
from unionfs.fuse.inline import in_thread, may_wait
from unionfs.sys.fds import Owned
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import DataCopy, FileCopy, small_copy_ups
from unionfs.union.tree import Union, path_of

log = logging.getLogger(__name__)

Check = Callable[[], None]

#: At most so many large files are copied up from slow layers at once.
_PATIENT: Final = 16


class _Running(NamedTuple):
    """A copy-up in a thread."""

    copy: FileCopy | DataCopy
    began: int
    """In nanoseconds, of `perf_counter_ns`."""
    over: trio.Event


class CopyUps:
    """Copies objects up, and counts them."""

    def __init__(self, union: Union, copy_up: CopyUp, fence: Fence | None = None) -> None:
        self.union = union
        self._fence = fence
        self._copy_up = copy_up
        self._small = small_copy_ups(copy_up)
        self._count = 0
        self._copied_bytes = 0
        self._nanoseconds = 0
        #: The nodes that are being copied up in a thread.
        self.running: dict[Node, _Running] = {}
        #: For threads that may never end; others must not wait for them.
        self._patient = trio.CapacityLimiter(_PATIENT)

    def figures(self) -> dict[str, object]:
        """JSON-able. The durations may overlap."""
        small, now = self._small, perf_counter_ns()
        return {
            "copy_ups": self._count + (small.count if small else 0),
            "copied_bytes": self._copied_bytes + (small.copied_bytes if small else 0),
            "copy_up_seconds": (self._nanoseconds + (small.nanoseconds if small else 0)) / 1e9,
            "copying_up": [
                {
                    "path": os.fsdecode(path_of(node)),
                    "copied": one.copy.copied,
                    "size": one.copy.size,
                    "seconds": (now - one.began) / 1e9,
                }
                for node, one in self.running.items()
            ],
        }

    def silent(self) -> dict[str, float]:
        """For how many seconds the slow layers have given no data to copy-ups, by their paths."""
        now = perf_counter_ns()
        found: dict[str, float] = {}
        for node, one in self.running.items():
            if node.layer.slow:
                seconds = (now - max(one.began, one.copy.moved)) / 1e9
                found[node.layer.path] = max(seconds, found.get(node.layer.path, 0.0))
        return found

    def is_running(self, node: Node) -> bool:
        """Whether the node is being copied up in a thread."""
        return node in self.running

    def change(self, node: Node, change: Change, uid: int) -> Attributes | None:
        """Copy a small file up and change its attributes, except its size, which it returns.

        ``uid``: see :meth:`ensure`. None if the case is not a plain one; then nothing has changed.
        """
        small = self.of_attributes
        if small is None or node in self.running:
            return None
        may_copy_up(node, uid)
        return small.copy(node, change)

    @property
    def of_attributes(self) -> SmallCopyUps | None:
        """What copies up small files for changes of attributes; None if their metadata alone is copied up, or
        they need a sync."""
        return self._copies_small(data=False)

    def _copies_small(self, *, data: bool) -> SmallCopyUps | None:
        """What copies small files, if they need no sync; ``data``: if not their metadata alone is wanted."""
        stack = self.union.stack
        return None if stack.durable or (stack.features.metacopy == "on" and not data) else self._small

    async def ensure(
        self,
        node: Node,
        uid: int,
        mode: int | None = None,
        *,
        changed: bool = False,
        keep: bool = False,
        check: Check = lambda: None,
    ) -> OpenFile | None:
        """Copy the node up if it is not in the upper; with `metacopy`, only its metadata.

        ``uid``: the user who changes it; EMFILE if the file is open, and the copy takes one fd more than that
        user may have open files hold (`Handles`).
        ``keep``: lend a regular file copied with its data to the caller (`OpenFiles`), with the permission
        bits ``mode``, if set. ``changed``: after :meth:`change` has returned None. ``check``: raises OSError
        if the node's flags forbid the change; it is called when that takes the fewest system calls. Raises
        ``OSError``; then nothing is left of the copy.
        """
        node.territory.require_writable()
        while await self._waited(node):
            pass
        if node.in_place:
            check()
            self._copy_up.link_up_known(node)
            return None
        may_copy_up(node, uid)
        if node.kind == stat.S_IFREG:
            small = None if changed else self.of_attributes
            if small is not None and small.copy(node, keep=keep) is not None:
                return _lent(node) if keep else None
            data = self.union.stack.features.metacopy != "on"
            try:
                copy = FileCopy(self._copy_up, node, None, mode, data=data)
            except PermissionError as error:
                return self._unreadable(node, check, error, mode, keep=keep)
            return await self._copied(copy, check, keep=keep)
        check()
        began = perf_counter_ns()
        if node.is_dir:
            self._copy_up.directory(node)
        else:
            self._copy_up.special(node)
        self._counts(began)
        return None

    async def ensure_data(
        self,
        node: Node,
        uid: int,
        limit: int | None = None,
        *,
        keep: bool = False,
        check: Check = lambda: None,
    ) -> OpenFile | None:
        """Copy the data of a regular file up too, unless it is in the upper.

        ``limit``: copy only that many bytes (truncation). ``keep``: lend the file, open for writing.
        ``uid``, ``check``: see :meth:`ensure`.
        """
        if node.kind != stat.S_IFREG:
            return await self.ensure(node, uid, check=check)
        node.territory.require_writable()
        while await self._waited(node):
            pass
        may_copy_up(node, uid)
        if not node.in_place:
            small, size = self._copies_small(data=True), -1 if limit is None else limit
            if small is not None and small.copy(node, limit=size, keep=keep) is not None:
                return _lent(node) if keep else None
            try:
                copy = FileCopy(self._copy_up, node, limit)
            except PermissionError as error:
                return self._unreadable(node, check, error, keep=keep)
            return await self._copied(copy, check, keep=keep)
        self._copy_up.link_up_known(node)
        file = self.union.files.lend_for_writing(node)
        if file is None:
            return await self._copied(DataCopy(self._copy_up, node, limit), check, keep=keep)
        try:
            check()
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                self.union.files.take_back(node, file)
        return file if keep else None

    def _unreadable(
        self, node: Node, check: Check, refused: PermissionError, mode: int | None = None, *, keep: bool
    ) -> OpenFile | None:
        """Copy up a file that was `refused`, as in `ensure`."""
        check()
        began = perf_counter_ns()
        self._copy_up.unreadable(node, refused)
        self._counts(began)
        if mode is not None:
            with Owned(self.union.open_path(node)) as fd:
                os.chmod(b"/proc/self/fd/%d" % fd, mode)
        return self.union.files.lend_for_writing(node) if keep else None

    async def _waited(self, node: Node) -> bool:
        """Wait for a copy-up of the node; returns False if there is none."""
        running = self.running.get(node)
        if running is None:
            return False
        await may_wait()
        await running.over.wait()
        return True

    def _counts(self, began: int) -> None:
        self._count += 1
        self._nanoseconds += perf_counter_ns() - began

    async def _copied(self, new: FileCopy | DataCopy, check: Check, *, keep: bool) -> OpenFile | None:
        began = perf_counter_ns()
        with new as copy:
            check()
            if copy.is_quick:
                copy.copy()
            else:
                self._copy_directories(copy.node)
                await self._in_thread(copy)
            # Waiting requests continue only after that.
            kept = copy.finish(keep=keep)
        self._counts(began)
        self._copied_bytes += copy.size
        return kept

    def _copy_directories(self, node: Node) -> None:
        """Copy up the directories of a node before its data, if they lie in slow layers: a request that asks
        these has to begin anew."""
        if any(layer.slow for layer in self.union.stack.layers):
            for parent, _ in node.names():
                self._copy_up.directory(parent)

    async def _in_thread(self, copy: FileCopy | DataCopy) -> None:
        waits_for_server = copy.waits_for_server  # may fail, with nothing to undo yet
        done = trio.Event()
        self.running[copy.node] = _Running(copy, perf_counter_ns(), done)
        if waits_for_server:
            await self._in_abandoned_thread(copy, done)
            return
        try:
            # Ends early if the request is cancelled.
            await in_thread(copy.copy, trio.from_thread.check_cancelled)
            await self._may_finish(copy)
        finally:
            self._ended(copy, done)

    async def _in_abandoned_thread(self, copy: FileCopy | DataCopy, done: trio.Event) -> None:
        """The same from a slow layer. A request that is cancelled does not wait for the thread, which keeps
        what it uses open until its call has returned."""
        await may_wait()
        token = trio.lowlevel.current_trio_token()
        #: Taken by the thread when it begins, or by the request that is cancelled before.
        claim = threading.Lock()
        over = abandoned = False

        def run() -> None:
            nonlocal over
            if not claim.acquire(blocking=False):
                return
            try:
                copy.copy(trio.from_thread.check_cancelled)
            finally:
                over = True
                if abandoned:
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(self._left, copy, done)

        copy.begins()
        try:
            await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=self._patient)
            await self._may_finish(copy)
        except BaseException:
            abandoned = True
            if over or claim.acquire(blocking=False):
                self._left(copy, done)
            raise
        self._ended(copy, done)

    async def _may_finish(self, copy: FileCopy | DataCopy) -> None:
        """The upper's lease may have run out while the data was copied: wait until it is renewed. Raises
        OSError (EIO) if it was lost."""
        if self._fence is not None and isinstance(copy, FileCopy):  # the other is complete, in its place
            await self._fence.must_pass()

    def _left(self, copy: FileCopy | DataCopy, done: trio.Event) -> None:
        """The thread of a copy has ended, and its request before it. Both may find that out."""
        if not done.is_set():
            try:
                copy.settle()
            except OSError:
                log.exception("a copy cannot be used")
            finally:
                self._ended(copy, done)

    def _ended(self, copy: FileCopy | DataCopy, done: trio.Event) -> None:
        """The thread of a copy has ended."""
        del self.running[copy.node]
        done.set()
        copy.ends()


def _lent(node: Node) -> OpenFile | None:
    assert node.use is not None
    return node.use.file
