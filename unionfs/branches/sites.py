"""The trees that a commit changes, each with a directory for the new and one for the replaced objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from unionfs.branches import beneath, journal
from unionfs.branches.journal import Journal
from unionfs.branches.parts import Part, part_path
from unionfs.branches.store import Branch, Store, UnreadableError
from unionfs.errors import UserError, quoted
from unionfs.sys import attributes
from unionfs.sys.fds import Owned, close_quietly, is_directory
from unionfs.sys.trees import remove

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
def sites(
    store: Store, entry: Journal, *, make: bool, only: Callable[[Journal], bool] = lambda _: True
) -> Iterator[list[Site]]:
    """The trees of a commit, or `only` those of some of its journals; with `make` also the directories `new`
    and `old`. Raises UserError, OSError.
    """
    with ExitStack() as resources:
        found = []
        for one in filter(only, entry.every):
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
    path = committed(branch, entry).path
    if not is_directory(path) or os.stat(path).st_ino != entry.inode:
        raise UserError(
            f"the commit of branch {quoted(entry.branch)} cannot be undone: its layer {quoted(path)}, which "
            "changed nothing more, was removed when the branch was used since."
        )
    with Owned(os.open(path, _DIRECTORY)) as fd, closing(beneath.Beneath(fd)) as tree:
        yield tree


def stayed(store: Store, entry: Journal) -> Branch | None:
    """The branch of a commit, whatever its name is now; None if it is gone. Raises UserError if that is not
    known.
    """
    named, unreadable = store.branch(entry.branch), None
    for branch in [*([named] if named.exists() else []), *store.branches()]:
        try:
            if branch.record().created == entry.made:
                return branch
        except UnreadableError as error:
            unreadable = error
        except UserError:
            continue
    if unreadable is not None:
        raise unreadable
    return None


def prepare(store: Store, site: Site, resources: ExitStack) -> None:
    """Make the directories of a commit for one tree. Raises OSError."""
    site.new, site.old = make_stage(store, site.entry, site.tree)
    resources.callback(close_quietly, site.new)
    resources.callback(close_quietly, site.old)


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
            with suppress(FileExistsError), times_kept(at):
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
def times_kept(fd: int) -> Iterator[None]:
    """Restore the times of a directory, which change with the names in it."""
    st = os.fstat(fd)
    yield
    with suppress(PermissionError):
        os.utime(b"/proc/self/fd/%d/." % fd, ns=(st.st_atime_ns, st.st_mtime_ns))


def remove_stage(site: Site) -> None:
    """Remove the directory of a commit in the tree. Raises OSError."""
    with suppress(FileNotFoundError), _place(site.entry, site.tree) as at, times_kept(at):
        remove(at, site.entry.stage, unlock=True)


def layer_of(store: Store, entry: Journal) -> str | None:
    """The layer of a journal's branch, in the commit's or in the branch's directory; None if it is gone.

    Raises UserError, OSError.
    """
    if entry.of_layer:
        return None
    kept = f"{journal.directory(store, entry.id)}/branch"
    if is_directory(kept):
        return os.path.join(kept, part_path(entry.key), "upper")
    branch = stayed(store, entry)
    return None if branch is None else committed(branch, entry).upper


def committed(branch: Branch, entry: Journal) -> Branch:
    """What of a branch is committed: itself, or a part of it."""
    return Part(branch, entry.key) if entry.key else branch
