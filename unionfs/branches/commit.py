"""Commits a branch to what lies below it: all of it or nothing.

Everything new is prepared first, beside the base or, if the store is on another filesystem, in a directory
of the base. So a full disk is found before anything has changed. Then the journal is written, and names are
exchanged. After a kill the next commit or undo of any branch continues by the journal. An error reverts
everything.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from unionfs.branches import beneath, journal, links, seen, writers
from unionfs.branches.apply import at_path, look, step
from unionfs.branches.covered import Fixed
from unionfs.branches.ending import discard, end_in_parent, ends_later, go_on, recover
from unionfs.branches.journal import Journal, Move, Setting
from unionfs.branches.leaving import Leaving
from unionfs.branches.merging import Merged, merged
from unionfs.branches.mounts import has_daemon, in_use, mounted, parent_claimed, unmounted
from unionfs.branches.parts import Part, all_of
from unionfs.branches.plan import Drop, Plan, Planner, Put, Rename, hazards, with_subordinate_owners
from unionfs.branches.renaming import renames_directories, with_renames
from unionfs.branches.selection import Selection, relative
from unionfs.branches.sharing import Sharing
from unionfs.branches.sites import Site, prepare
from unionfs.branches.staging import Stager
from unionfs.branches.store import Store
from unionfs.branches.together import Viewed, all_viewed
from unionfs.errors import UserError, cure_for, on_failure, path_in, quoted, reason_at
from unionfs.sys import calls
from unionfs.sys.attributes import attributes
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import mount_id_of_fd
from unionfs.union.diff import in_order

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
STOP, OURS, THEIRS, MERGE = "stop", "ours", "theirs", "merge"


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of a commit."""

    into: str | None = None
    """The branch that must be the parent."""
    only: Sequence[str] = ()
    leave: Sequence[str] = ()
    dry_run: bool = False
    conflicts: str = STOP
    """`ours`: take the branch's version; `theirs`: keep the version below; `merge`: merge texts, other
    conflicts remain."""


@dataclass(slots=True)
class Result:
    """The result of a commit, or of a dry run."""

    target: str
    """The base, or `branch NAME`."""
    done: bool = False
    changes: list[tuple[str, bytes]] = field(default_factory=list)
    conflicts: list[tuple[str, bytes]] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    skipped: list[bytes] = field(default_factory=list)
    merged: list[bytes] = field(default_factory=list)
    """Texts that were changed below, too, and merged."""
    undo: bool = False
    """Whether it can be undone."""
    went_on: bool = False
    """Whether only an interrupted commit of the branch was completed."""
    before: int = 0
    """When the branch had been committed before, so that there was nothing to do, in ns; 0: it had not."""

    @property
    def stopped(self) -> bool:
        """Whether conflicts prevented it."""
        return bool(self.conflicts) and not self.done


def commit(store: Store, name: str, wish: Wish) -> Result:
    """Commit a branch. Raises UserError; nothing has changed then, unless its text states what has."""
    with store.committing():
        finished = recover(store, name)
        branch = store.branch(name)
        done = finished.get(name)
        if done is not None and not (branch.exists() and branch.record().created != done.made):
            return Result(done.target, done=True, went_on=True, undo=done.can_undo)
        if not branch.exists() and (former := _committed(store, name)) is not None:
            return Result(former.target, done=True, before=former.ended, undo=former.can_undo)
        branch = store.existing(name)
        with branch.claimed("committed"), ExitStack() as resources:
            branch.refuse_frozen("be committed")
            for one in all_of(branch):
                unmounted(one)
            record = branch.record()
            if wish.into not in (None, record.parent):
                below = "the base" if record.parent is None else f"branch {quoted(record.parent)}"
                raise UserError(
                    f"branch {quoted(name)} lies over {below}, not over {quoted(str(wish.into))}; a "
                    "branch is "
                    "committed to what lies below it."
                )
            return _Commit(store, resources.enter_context(all_viewed(branch)), wish).run()


def _committed(store: Store, name: str) -> Journal | None:
    """The last commit, if it was of that branch."""
    ids = store.commit_ids()
    entry = journal.read(store, ids[-1]) if ids else None
    return entry if entry is not None and entry.branch == name else None


class _Commit:
    """`parts`: what is committed of the branch itself, first, and of its parts."""

    def __init__(self, store: Store, views: Sequence[Viewed], wish: Wish) -> None:
        self._store = store
        self._branch = views[0].branch
        self._wish = wish
        self._record = self._branch.record()
        self._parts = [_Part(store, one, wish, self._record.base) for one in views]

    def run(self) -> Result:
        record, wish = self._record, self._wish
        result = Result(record.base if record.parent is None else f"branch {record.parent}")
        for part in self._parts:
            part.compare(result)
        if any(part.is_partial for part in self._parts):
            for part in self._parts:
                part.lets_branch_stay()
        is_empty = all(part.plan.is_empty for part in self._parts)
        if (wish.only or wish.leave) and is_empty and not (result.conflicts or result.skipped):
            name = quoted(self._branch.name)
            where = f"in {', '.join(map(quoted, wish.only))}" if wish.only else "but those in --except"
            raise UserError(
                f"branch {name} has no changes {where}; `unionfs branch diff {name}` lists them, with paths "
                "below the base."
            )
        if wish.dry_run or (result.conflicts and wish.conflicts in (STOP, MERGE)):
            for part in self._parts:
                result.hazards += part.owners()
            return result
        for sentence in [sentence for part in self._parts for sentence in part.owners()]:
            raise UserError(f"branch {quoted(self._branch.name)} is not committed: {sentence}")
        if record.parent is None:
            result.undo = self._apply(record.base, record.base_inode).can_undo
        else:
            with parent_claimed(self._store, self._branch.name, record.created, record.parent) as parent:
                with mounted(parent) as place:
                    entry = self._apply(place, os.stat(place).st_ino, parent.record().created)
                with ends_later(entry):
                    end_in_parent(self._store, entry, parent)
            result.undo = True
        result.done = True
        return result

    def _apply(self, base: str, inode: int, parent_made: int = 0) -> Journal:
        """Apply the plans to the trees: the base or the mounted parent, and filesystems below. Raises
        UserError.
        """
        with ExitStack() as resources:
            whole, *others = self._parts
            keep = any(part.is_partial for part in self._parts)
            values = {"made": self._record.created, "keep": keep, "parent_made": parent_made}
            sites = [whole.site(resources, journal.new_id(), base, inode, values)]
            entry = sites[0].entry
            for part in others:
                if not part.plan.is_empty:
                    record = part.record
                    sites.append(part.site(resources, entry.id, record.base, record.base_inode, values))
            entry.joins([site.entry for site in sites[1:]])
            sites += self._layers(resources, entry)
            try:
                self._prepare(resources, entry, sites)
            except OSError as error:
                with suppress(OSError, UserError):  # else the next command does it
                    discard(self._store, sites)
                raise UserError(
                    f"branch {quoted(self._branch.name)} cannot be committed: "
                    f"{reason_at(error)}; nothing was changed. {_cure(error)}"
                ) from error
            except BaseException:
                discard(self._store, sites)
                raise
            go_on(self._store, sites)
            return entry

    def _layers(self, resources: ExitStack, entry: Journal) -> list[Site]:
        """The layers that something is taken out of, if the branch stays."""
        found = []
        for one in entry.all if entry.keep else ():
            part = self._part(one)
            if part.leaves_layer:
                found.append(part.layer_site(resources, one))
        return found

    def _part(self, entry: Journal) -> _Part:
        return next(part for part in self._parts if part.key == entry.key)

    def _prepare(self, resources: ExitStack, entry: Journal, sites: Sequence[Site]) -> None:
        """Prepare all new objects, and write the journal. Raises OSError."""
        os.mkdir(journal.directory(self._store, entry.id), 0o700)
        journal.write(self._store, entry)
        step("begun")
        for site in sites:
            prepare(self._store, site, resources)
            part = self._part(site.entry)
            part.prepare_layer(site) if site.entry.of_layer else part.prepare(site)
        entry.turns(journal.ON)
        step("prepared")
        journal.write(self._store, entry)


class _Part:
    """What is committed to one tree."""

    def __init__(self, store: Store, found: Viewed, wish: Wish, base: str) -> None:
        self._store = store
        self._branch = found.branch
        self._view = found.view
        self._above = found.above
        self._wish = wish
        self._texts: dict[bytes, Merged] = {}
        self._selection = Selection(
            [relative(item, base) for item in wish.only], [relative(item, base) for item in wish.leave],
            found.above,
        )  # fmt: skip
        self.record = self._branch.record()
        self.key = self._branch.key if isinstance(self._branch, Part) else ""
        self.plan = Plan()
        self._leaving: Leaving | None = None

    @property
    def is_partial(self) -> bool:
        """Whether something stays in the branch."""
        return not self._selection.is_all or bool(self.plan.skipped)

    def compare(self, result: Result) -> None:
        """Find conflicts and make the plan, and add to the result. Raises UserError."""
        wish, above = self._wish, self._above
        known, conflicts = seen.look(self._branch, self._view)
        conflicts = [item for item in conflicts if self._selection.has(item.path)]
        if wish.conflicts == MERGE:
            self._texts, refused = merged(self._branch, self._view, conflicts, known)
            result.merged += [above + path for path in sorted(self._texts)]
            conflicts = [
                replace(item, what=refused.get(item.path, item.what))
                for item in conflicts if item.path not in self._texts
            ]  # fmt: skip
        result.conflicts += [(item.what, above + item.path) for item in conflicts]
        stay = [item.path for item in conflicts] if wish.conflicts == THEIRS else []
        with self._reading():
            self.plan = self._plan(stay, is_whole=self._selection.is_all and not stay)
        if self.record.parent is None:
            self._fixed(self.plan)
        result.skipped += [above + path for path in self.plan.skipped]
        if self._view.root_differs and self._selection.has(b"/"):
            result.changes.append(("C", above or b"/."))
        result.changes += [
            (change.kind, above + path)
            for path, change in in_order(self._view.root) if self._selection.has(path)
        ]  # fmt: skip
        result.hazards += [*hazards(self._view, self.plan, above), *in_use(self._branch, self.record.base)]
        if self.record.parent is None:
            result.hazards += writers.hazards(self._view, self.plan, self.record.base, above)

    def lets_branch_stay(self) -> None:
        """Also take what is committed out of the layer if all of it is: another part keeps the branch. Raises
        UserError.
        """
        if not self.is_partial:
            with self._reading():
                self.plan = self._plan([], is_whole=False)

    def _plan(self, stay: Sequence[bytes], *, is_whole: bool) -> Plan:
        plan = Planner(self._view, self._selection, links.whole(self._view, stay)).plan()
        if is_whole and self.record.parent is None and renames_directories(self.record.base):
            return with_renames(self._view, plan)
        if not is_whole and not plan.is_empty:
            self._leaving = Leaving(self._view, plan, self._selection, self._above)
        return plan

    def _reading(self) -> on_failure:
        return on_failure(f"branch {quoted(self._branch.name)} cannot be read", "nothing was changed")

    def owners(self) -> list[str]:
        """A sentence if objects belong to ids which only root could give them. Raises OSError."""
        # A parent's layer may have any owner.
        paths = with_subordinate_owners(self._view, self.plan) if self.record.parent is None else []
        if not paths:
            return []
        belong = f" and {len(paths) - 1} more belong" if len(paths) > 1 else " belongs"
        return [
            f"{quoted((self._above + paths[0])[1:])}{belong} to other ids of the branch's user "
            "namespace, and a user's commit can only make files of that user; leave out what has another "
            "owner by --except, or change the owner in the branch."
        ]

    def _fixed(self, plan: Plan) -> None:
        """Refuse to replace or remove mountpoints. Raises UserError."""
        gone = [
            step.source if isinstance(step, Rename) else step.path
            for step in plan.steps if step.old is not None
        ]  # fmt: skip
        Fixed(self.record.base, self._store.root, os.fsdecode(self._above)).refuse(gone)

    def site(
        self, resources: ExitStack, id: str, base: str, inode: int, values: Mapping[str, Any]
    ) -> Site:
        """The tree at `base`, with an empty journal that has also `values`. Raises UserError."""
        record = self.record
        tree = resources.enter_context(beneath.opened(base, inode, record.filesystem))
        lowest = self._view.merge.roots[-1].layer.root_fd
        if record.parent is None and not os.path.sameopenfile(lowest, tree.fd):
            raise UserError(f"the base {quoted(base)} was replaced meanwhile; nothing was changed.")
        inside = bool(self.plan.steps) and not _same_mount(self._store.commits, tree.fd)
        place = _common(self.plan) if inside and not _may_write(tree.fd) else b""
        entry = Journal(
            id=id, branch=self._branch.name, parent=record.parent, base=base, inode=inode, inside=inside,
            command=list(record.command), ids=record.ids, key=self.key, filesystem=record.filesystem,
            place=os.fsdecode(place), **values,
        )  # fmt: skip
        return Site(entry, tree)

    def prepare(self, site: Site) -> None:
        """Prepare the new objects, and describe the operations in the journal. Raises OSError."""
        entry, new = site.entry, site.new
        base = self._view.merge.roots[-1].layer if self.record.parent is None else None
        sharing = Sharing(self._view, entry) if base is not None and self._may_share(entry, new) else None
        stager = Stager(self._view, new, self._selection.has, base, self._texts, sharing)
        for number, item in enumerate(self.plan.steps):
            try:
                step(f"prepare {os.fsdecode(item.path)}")
                self._prepare_one(site, stager, number, item)
            except OSError as error:
                raise at_path(os.fsdecode(self._above + item.path), error) from error
        for change in self.plan.sets:
            path = os.fsdecode(change.path)
            former = path if change.former is None else os.fsdecode(change.former)
            entry.settings.append(Setting(path, change.new, change.old, former))
        calls.syncfs(new)

    def _prepare_one(self, site: Site, stager: Stager, number: int, item: Put | Drop | Rename) -> None:
        entry = site.entry
        if isinstance(item, Rename):
            assert item.old.st is not None
            path, source = os.fsdecode(item.path), os.fsdecode(item.source)
            entry.moves.append(Move(path, number, item.old.st.st_ino, None, source=source))
            return
        before = self._before(item, site.tree)
        inode, known = (None, None) if before is None else (before.st_ino, look(before))
        if isinstance(item, Put):
            staged = stager.put(b"%d" % number, item)
            mode = staged.mode if staged.is_directory else None
            path, shared = os.fsdecode(item.path), [*staged.shared]
            entry.moves.append(
                Move(path, number, staged.inode, inode, mode, known, own=staged.own, shared=shared)
            )
        else:
            entry.moves.append(Move(os.fsdecode(item.path), number, None, inode, None, known))

    @property
    def leaves_layer(self) -> bool:
        """Whether the branch's layer loses something, if the branch stays."""
        return self._leaving is not None

    def layer_site(self, resources: ExitStack, entry: Journal) -> Site:
        """The branch's directory, with an empty journal. Raises OSError."""
        fd = resources.enter_context(Owned(os.open(self._branch.path, _DIRECTORY)))
        tree = beneath.Beneath(fd)
        resources.callback(tree.close)
        return Site(entry.of_rest(os.fstat(fd).st_ino), tree)

    def prepare_layer(self, site: Site) -> None:
        """Describe in the journal what leaves the layer. Raises OSError."""
        leaving, tree = self._leaving, site.tree
        assert leaving is not None
        for number, path in enumerate(leaving.paths):
            at, name = tree.parent(path)
            st = os.stat(name, dir_fd=at, follow_symlinks=False)
            site.entry.moves.append(Move(os.fsdecode(path), number, None, st.st_ino, None, look(st)))
        opaque = self._view.merge.markers.opaque
        for path, is_opaque in leaving.directories.items():
            with Owned(tree.directory(path)) as fd:
                where = b"/proc/self/fd/%d/." % fd
                new = attributes(os.fstat(fd), {})
                old = new._replace(xattrs={opaque: os.getxattr(where, opaque)}) if is_opaque else new
            text = os.fsdecode(path)
            site.entry.settings.append(Setting(text, new, old, text))

    def _may_share(self, entry: Journal, new: int) -> bool:
        """Whether files of the layer may be moved to the base: no daemon may still write to them."""
        if entry.inside or entry.keep or has_daemon(self._branch):
            return False
        return _same_mount(self._branch.upper, new)

    def _before(self, item: Put | Drop, tree: beneath.Beneath) -> os.stat_result | None:
        """The attributes at a path before the commit. A mounted parent shows other inode numbers than its
        layers have."""
        if self.record.parent is None or item.old is None:
            return None if item.old is None else item.old.st
        at, name = tree.parent(item.path)
        return os.stat(name, dir_fd=at, follow_symlinks=False)


def _cure(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "Check the permissions, or leave it out by --except."
    otherwise = "leave it out by --except" if path_in(error) else "check the disk of the store"
    return f"{cure_for(error, otherwise).capitalize()}."


def _may_write(fd: int) -> bool:
    return os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)


def _common(plan: Plan) -> bytes:
    """The deepest directory that has all names that a plan changes; empty for the root."""
    paths = [step.path for step in plan.steps]
    paths += [step.source for step in plan.steps if isinstance(step, Rename)]
    return os.path.commonpath([os.path.dirname(path) for path in paths]).rstrip(b"/")


def _same_mount(directory: str, fd: int) -> bool:
    """Whether names can be renamed from a directory to another, an fd."""
    with Owned(os.open(directory, _DIRECTORY)) as other:
        return os.fstat(other).st_dev == os.fstat(fd).st_dev and mount_id_of_fd(other) == mount_id_of_fd(fd)
