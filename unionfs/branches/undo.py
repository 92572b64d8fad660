"""Undoes the last commit, while nothing has changed since."""

from __future__ import annotations

from contextlib import ExitStack, suppress

from unionfs.branches import beneath, journal
from unionfs.branches import last as note
from unionfs.branches.after import states
from unionfs.branches.apply import step
from unionfs.branches.ending import NotUndoneError, UnfinishedError, finish, recover
from unionfs.branches.journal import Journal
from unionfs.branches.mounts import mounted, parent_claimed, unmounted
from unionfs.branches.parts import all_of
from unionfs.branches.sites import sites, stayed
from unionfs.branches.store import Store
from unionfs.errors import UserError, on_failure, quoted


def undo(store: Store) -> Journal:
    """Undo the last commit of this store, and restore its branch. Returns its journal. Raises UserError."""
    with store.committing():
        pending = _interrupted(store)
        recover(store, None if pending is None else pending.branch)
        if pending is not None and journal.read(store, pending.id) is None:
            return pending
        last = _last(store)
        with ExitStack() as resources, on_failure(
            f"the commit of branch {quoted(last.branch)} cannot be undone", "check the base and the store"
        ):
            if last.keep and (branch := stayed(store, last)) is not None:
                resources.enter_context(branch.claimed("changed by an undo"))
                branch.refuse_frozen("be changed by an undo")
                for one in all_of(branch):
                    unmounted(one)
            if last.parent is not None:
                _refuse_changed_parent(store, last)
            _refuse_all_changed(store, last)
            last.turns(journal.BACK)
            step("undo")
            journal.mark(store, last)
            try:
                finish(store, last, is_new=True)
            except (NotUndoneError, UnfinishedError):
                raise
            except (OSError, UserError):
                _is_not_begun(store, last)
                raise
        return last


def _is_not_begun(store: Store, last: Journal) -> None:
    """Nothing was undone: no other command shall go on with it."""
    last.turns(journal.DONE)
    with suppress(OSError):
        journal.mark(store, last)


def _last(store: Store) -> Journal:
    """The last commit. Raises UserError if it cannot be undone: an earlier one is not undone instead."""
    found = note.read(store)
    if found is not None and (found.is_undone or not found.can_undo):
        cause = (
            "was undone already" if found.is_undone
            else "cannot be undone, since its base is not on the filesystem of the store"
        )  # fmt: skip
        raise UserError(
            f"the last commit, of branch {quoted(found.branch)} to {quoted(found.target)}, {cause}; earlier "
            "ones cannot be undone."
        )
    entries = [journal.read(store, id) for id in store.commit_ids()]
    done = [entry for entry in entries if entry is not None and entry.state == journal.DONE]
    done = [entry for entry in done if found is None or entry.id == found.id]
    if not done:
        raise UserError("there is no commit to undo: none was made, or what it kept is gone.")
    return max(done, key=lambda entry: entry.ended)


def _refuse_all_changed(store: Store, last: Journal) -> None:
    # A parent is not mounted now.
    with sites(store, last, make=False, only=lambda one: last.parent is None or one.of_layer) as found:
        for site in found:
            _refuse_changed(site.entry, site.tree)


def _refuse_changed_parent(store: Store, last: Journal) -> None:
    parent = store.branch(str(last.parent))
    if not parent.exists() or parent.record().created != last.parent_made:
        raise UserError(
            f"the commit of branch {quoted(last.branch)} cannot be undone, since branch "
            f"{quoted(parent.name)}, to which it went, is gone or has another name."
        )
    with (
        parent_claimed(store, last.branch, last.made, parent.name), mounted(parent) as merged,
        beneath.opened(merged, last.inode) as tree,
    ):  # fmt: skip
        _refuse_changed(last, tree)


def _interrupted(store: Store) -> Journal | None:
    """A killed undo, which `recover` continues."""
    for id in store.commit_ids():
        entry = journal.read(store, id)
        if entry is not None and entry.state == journal.BACK and entry.ended:
            return entry
    return None


def _refuse_changed(last: Journal, tree: beneath.Beneath) -> None:
    now = states(last, tree)
    changed = sorted(path for path in {*now, *last.after} if now.get(path) != last.after.get(path))
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"the commit of branch {quoted(last.branch)} cannot be undone: "
            f"{quoted(last.shown(changed[0]))}{more} was "
            f"changed in {quoted(last.target)} since; the former files are in "
            f"{quoted('commits/' + last.id)} of the store."
        )
