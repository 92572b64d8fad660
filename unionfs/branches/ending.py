"""Completes a commit, reverts it after an error, and continues either after a kill, by its journal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from unionfs.branches import beneath, journal, seen, sharing
from unionfs.branches.after import reached
from unionfs.branches.apply import Application, ChangedError, step
from unionfs.branches.ids import entered
from unionfs.branches.journal import Journal
from unionfs.branches.mounts import mounted, parent_claimed
from unionfs.branches.parts import Part, part_path
from unionfs.branches.store import Branch, Store
from unionfs.branches.view import viewed
from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.sys import attributes, calls
from unionfs.sys.fds import Owned
from unionfs.sys.trees import remove, remove_path

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Site:
    """A tree that a commit changes."""

    entry: Journal
    """The journal, or one of the others in it."""
    tree: beneath.Beneath
    new: int = -1
    """An fd of the directory of the new objects."""
    old: int = -1
    """An fd of the directory of the replaced ones."""


@contextmanager
def sites(store: Store, entry: Journal, *, make: bool) -> Iterator[list[Site]]:
    """The trees of a commit; with `make` also the directories `new` and `old`. Raises UserError, OSError."""
    with ExitStack() as resources:
        found = []
        for one in entry.every:
            tree = resources.enter_context(_opened(store, one))
            if tree is None:
                continue
            site = Site(one, tree)
            found.append(site)
            if make:
                prepare(store, site, resources)
        yield found


@contextmanager
def _opened(store: Store, entry: Journal) -> Iterator[beneath.Beneath | None]:
    """The tree of one journal; None for the layer of a branch that is gone. Raises UserError, OSError."""
    if not entry.of_layer:
        with beneath.opened(entry.base, entry.inode, entry.filesystem) as tree:
            yield tree
        return
    branch = stayed(store, entry)
    if branch is None:
        yield None
        return
    path = _committed(branch, entry).path
    if not os.path.isdir(path) or os.stat(path).st_ino != entry.inode:
        raise UserError(
            f"the commit of branch {quoted(entry.branch)} cannot be undone: its layer {quoted(path)}, which "
            "changed nothing more, was removed when the branch was used since."
        )
    with Owned(os.open(path, _DIRECTORY)) as fd:
        tree = beneath.Beneath(fd)
        try:
            yield tree
        finally:
            tree.close()


def stayed(store: Store, entry: Journal) -> Branch | None:
    """The branch of a commit that stays, whatever its name is now; None if it is gone."""
    named = store.branch(entry.branch)
    for branch in [*([named] if named.exists() else []), *store.branches()]:
        with suppress(UserError):
            if branch.record().created == entry.made:
                return branch
    return None


def prepare(store: Store, site: Site, resources: ExitStack) -> None:
    """Make the directories of a commit for one tree. Raises OSError."""
    site.new, site.old = make_stage(store, site.entry, site.tree)
    resources.callback(os.close, site.new)
    resources.callback(os.close, site.old)


def make_stage(store: Store, entry: Journal, tree: beneath.Beneath) -> tuple[int, int]:
    """Make the directories `new` and `old`, and return fds of them. Raises OSError."""
    with _stage(store, entry, tree, make=True) as at:
        for name in ("new", "old"):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=at)
                with Owned(os.open(name, _DIRECTORY, dir_fd=at)) as fd:
                    attributes.drop_acls(fd)
        return os.open("new", _DIRECTORY, dir_fd=at), os.open("old", _DIRECTORY, dir_fd=at)


def _stage(store: Store, entry: Journal, tree: beneath.Beneath, *, make: bool = False) -> Owned:
    if entry.of_layer:
        path = journal.layer_stage(store, entry)
        if make:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
        return Owned(os.open(path, _DIRECTORY))
    if not entry.inside:
        return Owned(os.open(journal.directory(store, entry.id), _DIRECTORY))
    with _place(entry, tree) as at:
        if make:
            with suppress(FileExistsError), _times_kept(at):
                os.mkdir(entry.stage, 0o700, dir_fd=at)
        found = Owned(os.open(entry.stage, _DIRECTORY, dir_fd=at))
    st = os.fstat(found.fd)
    if st.st_uid != os.geteuid() or st.st_mode & 0o077:
        found.close()
        raise PermissionError(1, "its directory there belongs to somebody else", os.fsdecode(entry.stage))
    return found


def _place(entry: Journal, tree: beneath.Beneath) -> Owned:
    return Owned(tree.directory(os.fsencode(entry.place)))


@contextmanager
def _times_kept(fd: int) -> Iterator[None]:
    """Restore the times of a directory, which change with the names in it."""
    st = os.fstat(fd)
    yield
    with suppress(PermissionError):
        os.utime(b"/proc/self/fd/%d/." % fd, ns=(st.st_atime_ns, st.st_mtime_ns))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Block the signals that end a command, so that none leaves the tree between old and new."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard(store: Store, found: Sequence[Site]) -> None:
    """Remove the prepared objects, none of which is in place yet. The first site is the journal's. Raises
    OSError.
    """
    entry = found[0].entry
    for site in found:
        if site.entry.inside:
            _remove_stage(site)
    if not all(site.entry.inside for site in found):
        # The journal last: without it a killed undo would be repeated as one of an earlier commit.
        for name in ("new", "old"):
            remove_path(f"{journal.directory(store, entry.id)}/{name}", unlock=True)
        for one in entry.every:
            if one.of_layer:
                remove_path(journal.layer_stage(store, one), unlock=True)
        step("emptied")
    with suppress(FileNotFoundError):
        journal.forget(store, entry.id)


def _remove_stage(site: Site) -> None:
    with suppress(FileNotFoundError), _place(site.entry, site.tree) as at, _times_kept(at):
        remove(at, site.entry.stage, unlock=True)


def go_on(store: Store, found: Sequence[Site]) -> None:
    """Apply a journal and complete the commit; revert everything after an error. Raises UserError.

    A commit to a parent needs `end_in_parent` in addition, after the parent was unmounted.
    """
    with _uninterrupted():
        _go_on(store, found)


def _go_on(store: Store, found: Sequence[Site]) -> None:
    entry = found[0].entry
    try:
        for site in found:
            with sharing.opened(layer_of(store, site.entry)) as layer:
                Application(site.entry, site.tree, site.new, site.old, layer).forward()
    except (OSError, ChangedError) as error:
        entry.turns(journal.BACK)
        with suppress(OSError):  # on a full disk; killed now it goes forward
            journal.mark(store, entry)
        go_back(store, found)
        if isinstance(error, ChangedError):
            raise
        at = f"{quoted(os.fsdecode(error.filename))}: " if error.filename else ""
        raise UserError(
            f"branch {quoted(entry.branch)} cannot be committed: {at}{reason(error)}; everything was "
            "put back."
        ) from error
    with on_failure(
        f"all changes of branch {quoted(entry.branch)} are in place, but its commit cannot end",
        "the next `unionfs branch commit` ends it; free space, or check the permissions",
    ):
        step("applied")
        for site in found:
            with sharing.opened(layer_of(store, site.entry)) as layer:
                sharing.let_go(site.entry, layer)
        step("let go")
        for site in found:
            calls.syncfs(site.tree.fd)
            site.entry.has_reached(reached(site.entry, site.tree) if entry.can_undo else {})
        entry.is_applied()
        journal.write_after(store, entry)
        step("ending")
        if entry.parent is None:
            _end(store, found)


def end_in_parent(store: Store, entry: Journal, parent: Branch) -> None:
    """Complete a commit to a parent, which is claimed and not mounted: move the replaced objects out of its
    layer."""
    with Owned(os.open(parent.upper, _DIRECTORY)) as layer, suppress(FileNotFoundError), _times_kept(layer):
        os.rename(entry.stage, _kept_stage(store, entry), src_dir_fd=layer)
    step("stage moved")
    branch = store.branch(entry.branch)
    if branch.exists() and branch.record().created == entry.made and entry.keep:
        _accept(store, branch, entry)
    _keep(store, entry)


def _kept_stage(store: Store, entry: Journal) -> bytes:
    return os.fsencode(f"{journal.directory(store, entry.id)}/stage")


def _end(store: Store, found: Sequence[Site]) -> None:
    """Keep the replaced objects for `undo`, or remove them, and remove the branch. All is in place."""
    entry = found[0].entry
    branch = store.branch(entry.branch)
    is_there = branch.exists() and branch.record().created == entry.made
    if is_there and entry.keep:
        _accept(store, branch, entry)
    if not entry.can_undo:
        if is_there and not entry.keep:
            branch.remove()
        step("branch removed")
        discard(store, found)
        return
    _keep(store, entry)


def _keep(store: Store, entry: Journal) -> None:
    """Keep the replaced objects for `undo`, and drop those of an earlier commit to the same tree."""
    branch = store.branch(entry.branch)
    if branch.exists() and branch.record().created == entry.made and not entry.keep:
        os.rename(branch.path, f"{journal.directory(store, entry.id)}/branch")
        step("branch moved")
    entry.turns(journal.DONE)
    journal.mark(store, entry)
    step("ended")
    others = [journal.read(store, id) for id in store.commit_ids() if id != entry.id]
    kept = [other for other in others if other is not None]
    branches = store.made() | {other.made for other in (entry, *kept)}
    for other in kept:
        is_former = other.id < entry.id and other.base == entry.base
        # Without its parent it cannot be undone.
        if is_former or (other.parent is not None and other.parent_made not in branches):
            _forget(store, other)


def _forget(store: Store, other: Journal) -> None:
    """Remove what a former commit keeps. Raises OSError."""
    if any(one.stays for one in other.all):
        try:
            with sites(store, other, make=False) as found:
                for site in found:
                    if site.entry.stays:
                        _remove_stage(site)
        except UserError:
            return  # its filesystem is not mounted: the next commit tries again
    journal.forget(store, other.id)


def layer_of(store: Store, entry: Journal) -> str | None:
    """The layer of a journal's branch, in the commit's or in the branch's directory; None if it is gone."""
    if entry.of_layer:
        return None
    kept = f"{journal.directory(store, entry.id)}/branch"
    if os.path.isdir(kept):
        return os.path.join(kept, part_path(entry.key), "upper")
    branch = stayed(store, entry)
    return None if branch is None else _committed(branch, entry).upper


def _committed(branch: Branch, entry: Journal) -> Branch:
    """What of a branch is committed: itself, or a part of it."""
    return Part(branch, entry.key) if entry.key else branch


def _accept(store: Store, branch: Branch, entry: Journal) -> None:
    """Record the present state of the committed paths as the state that the branch was made from."""
    for one in entry.all:
        part = _committed(branch, one)
        with viewed(part) as view:
            seen.accept(part, view, *_accepted(one), journal.former_states(store, one))


def _accepted(entry: Journal) -> tuple[list[str], list[str]]:
    """The paths that a commit has changed with all below them, and directories that stay."""
    paths = [move.path for move in entry.moves]
    paths += [move.source for move in entry.moves if move.source is not None]
    return paths, [setting.former for setting in entry.settings]


def _accept_returned(store: Store, branch: Branch, entry: Journal) -> None:
    """Record the states before the commit, and the new ctimes of the objects that its revert has renamed."""
    for one in entry.all:
        part = _committed(branch, one)
        seen.restore(part, *_accepted(one), journal.former_states(store, one))
        sources = {move.path: move.source for move in one.moves if move.source is not None}
        with viewed(part) as view:
            seen.returned(part, view, [_former(move.path, sources) for move in one.moves])


def _former(path: str, sources: Mapping[str, str]) -> str:
    """The path before the commit of the object at `path` after it."""
    above = path
    while above:
        if above in sources:
            return sources[above] + path[len(above) :]
        above = above.rpartition("/")[0]
    return path


def go_back(store: Store, found: Sequence[Site]) -> None:
    """Revert a commit, and forget it. Raises UserError if that fails; the next command continues then."""
    with _uninterrupted():
        _go_back(store, found)


def _go_back(store: Store, found: Sequence[Site]) -> None:
    entry = found[0].entry
    try:
        for site in reversed(found):
            with sharing.opened(layer_of(store, site.entry)) as layer:
                Application(site.entry, site.tree, site.new, site.old, layer).backward()
                sharing.give_back(site.entry, layer, site.new)
        step("given back")
    except OSError as error:
        raise UserError(
            f"the commit of branch {quoted(entry.branch)} cannot be taken back: {reason(error)}; its files "
            f"are in {quoted(journal.directory(store, entry.id))}. The next `unionfs branch commit` goes on."
        ) from error
    kept = f"{journal.directory(store, entry.id)}/branch"
    if os.path.isdir(kept):
        os.rename(kept, free_name(store, entry.branch).path)
        step("branch back")
    if (branch := stayed(store, entry)) is not None:
        if entry.parent is None:
            _accept_returned(store, branch, entry)
        else:
            # Nothing else changes it meanwhile, and what is in its layer now has other inode numbers.
            _accept(store, branch, entry)
    discard(store, found)


def free_name(store: Store, name: str) -> Branch:
    """The first branch that does not exist of NAME, NAME-2, NAME-3 and so on."""
    branch, count = store.branch(name), 1
    while branch.exists():
        count += 1
        branch = store.branch(f"{name}-{count}")
    return branch


def recover(store: Store, name: str | None = None) -> dict[str, Journal]:
    """Complete the commits and undos of killed commands. The caller holds the store's lock.

    Returns the branches whose commit was completed, with its journal. One that cannot be completed is left;
    raises UserError for one of the branch `name`.
    """
    finished: dict[str, Journal] = {}
    for id in store.commit_ids():
        try:
            entry = journal.read(store, id)
            if entry is None:
                journal.forget(store, id)
            elif entry.ids != entered():
                continue  # a command with that branch's ids does it
            elif entry.state != journal.DONE and finish(store, entry):
                finished[entry.branch] = entry
        except (UserError, OSError) as error:
            if entry is not None and entry.branch != name:
                continue
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"an interrupted commit cannot be finished: {reason(error)}; its files are in "
                f"{quoted(journal.directory(store, id))}."
            ) from error
    return finished


def finish(store: Store, entry: Journal) -> bool:
    """Complete or revert a commit. Returns whether it was completed. Raises UserError, OSError."""
    if entry.parent is None:
        return _settle(store, entry)
    with parent_claimed(store, entry.branch, entry.parent) as parent:
        if parent.record().created != entry.parent_made:
            raise UserError(
                f"the branch that {quoted(entry.branch)} was committed to is gone, and another has its name "
                f"{quoted(entry.parent)}; move {quoted(journal.directory(store, entry.id))} away."
            )
        done = entry.state == journal.ENDING
        if not done:
            # After an undo it is there.
            with (
                Owned(os.open(parent.upper, _DIRECTORY)) as layer, suppress(FileNotFoundError),
                _times_kept(layer),
            ):  # fmt: skip
                os.rename(_kept_stage(store, entry), entry.stage, dst_dir_fd=layer)
            step("stage back")
            with mounted(parent):
                done = _settle(store, entry)
        if done:
            end_in_parent(store, entry, parent)
        return done


def _settle(store: Store, entry: Journal) -> bool:
    """Complete or revert a commit to the trees at its bases. Returns whether it was completed."""
    goes = entry.state in (journal.ON, journal.BACK)
    with sites(store, entry, make=goes) as found:
        if entry.state == journal.NEW:
            discard(store, found)
            return False
        if entry.state == journal.ENDING:
            _end(store, found)
            return True
        if entry.state == journal.ON:
            go_on(store, found)
            return True
        go_back(store, found)
        return False
