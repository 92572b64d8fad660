"""The store of branches below the storage root, which only its owner can enter.

    ROOT/branches/NAME/branch.json    the record
    ROOT/branches/NAME/seen.json      what the base had where the branch changes it; see `seen`
    ROOT/branches/NAME/upper, work    its layer
    ROOT/branches/NAME/merged         where it is mounted if no other place is given
    ROOT/branches/NAME/below/K/       the same of a filesystem that is mounted below the base; see `parts`
    ROOT/commits/ID/                  a commit that goes on, or the last one, for `undo`; see `journal`
    ROOT/commits/last.json            which one was the last; see `last`
    ROOT/commits/lock                 held while something is committed

A branch exists while its directory has its name, which it gets and loses by one rename. A branch that
others lie over is frozen, since it is a lower of theirs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.branches.covered import hide_in, refuse_inside
from unionfs.branches.ids import Ids, entered, overflow
from unionfs.branches.record import Record
from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.names import check_name, is_name
from unionfs.storage import jsonfiles
from unionfs.storage.removing import refuse_locked, remove_all
from unionfs.storage.root import check_directory, is_own_directory, make_directory, open_root, storage_root
from unionfs.sys import attributes, filelocks
from unionfs.sys.capabilities import may_use_trusted_xattrs, uid_outside
from unionfs.sys.fds import Owned, is_directory
from unionfs.sys.trees import remove_path
from unionfs.union import leases

_RECORD = "branch.json"
STATE_FILE = "state.json"
"""In the directory of a commit: how far it is; see `journal`."""
LAST_FILE = "last.json"
"""Beside the commits: see `last`."""
_PENDING = ("on", "back", "ending")
_STAYS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM)
"""Errors of a damaged record; others may pass."""
_DOOMED = ".removed-"


class UnreadableError(UserError):
    """The record of a branch cannot be read at the moment."""


class Store:
    """All branches below one storage root."""

    def __init__(self, root: str | None = None) -> None:
        """`root`: as `--root`. Raises UserError."""
        self.root = storage_root(root)
        self.path = f"{self.root}/branches"
        self.commits = f"{self.root}/commits"

    def branch(self, name: str) -> Branch:
        """The branch of that name, which need not exist. Raises UserError for an invalid name."""
        return Branch(self, check_name(name, "branch"))

    def existing(self, name: str) -> Branch:
        """Like `branch`. Raises UserError if it does not exist."""
        branch = self.branch(name)
        if not branch.exists():
            raise UserError(f"there is no branch {quoted(name)}; `unionfs branch ls` lists them.")
        return branch

    def branches(self) -> list[Branch]:
        """All branches, sorted by name. Raises UserError."""
        self.check()
        with suppress(FileNotFoundError):
            return [self.branch(name) for name in sorted(os.listdir(self.path)) if is_name(name, "branch")]
        return []

    def children(self, name: str) -> list[str]:
        """The names of the branches that lie over a branch."""
        found = []
        for other in self.branches():
            try:
                if other.record().parent == name:
                    found.append(other.name)
            except UnreadableError:
                raise  # it may be one
            except UserError:
                continue  # a damaged one must not stop the others
        return found

    def check(self, *, make: bool = False) -> None:
        """Refuse a store that others could change; with `make` create it. Raises UserError."""
        if make or os.path.lexists(self.root):
            open_root(self.root)
        for path in (self.path, self.commits):
            if make:
                make_directory(path)
            else:
                check_directory(path)

    def commit_ids(self) -> list[str]:
        """The commits that are kept or go on, the oldest first."""
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.commits) if name.isdigit())
        return []

    def create(
        self, name: str, base: str, parent: str | None = None, ids: Ids | None = None
    ) -> Branch:
        """Make an empty branch over the directory `base`, or over the branch `parent`. Raises UserError.

        `ids`: those of the user namespace in which it is used, if it has no parent.
        """
        branch = self.branch(name)
        self.check(make=True)
        below = None
        if parent is not None:
            below = self.existing(parent)
            base, ids = below.record().base, below.record().ids
        real = _base(base)
        with Owned(real[1]) as fd:
            refuse_inside(real[0], self.root)
            st = os.fstat(fd)
            userxattr = not may_use_trusted_xattrs()
            record = Record(
                real[0], st.st_ino, time.time_ns(), uid_outside(os.geteuid()), parent,
                userxattr=userxattr, ids=ids,
            )  # fmt: skip
            with ExitStack() as locks, on_failure(f"branch {quoted(name)} cannot be created", "free space"):
                if below is not None:
                    locks.enter_context(below.claimed("made the base of another"))
                    fd = locks.enter_context(Owned(os.open(below.upper, os.O_RDONLY | os.O_DIRECTORY)))
                self.put(branch, record, fd)
        return branch

    def put(self, branch: Branch, record: Record, below: int) -> None:
        """Make the directory of a branch, and rename it to its name; `below`: an fd of the root below.

        Raises UserError if there is one, OSError.
        """
        new = f"{os.path.dirname(branch.path)}/.new-{os.urandom(8).hex()}"
        os.mkdir(new, 0o700)
        try:
            for part in ("work", "merged"):
                os.mkdir(f"{new}/{part}", 0o700)
            _make_root(f"{new}/upper", below)
            hide_in(f"{new}/upper", record, self.root)
            jsonfiles.write(f"{new}/{_RECORD}", record.to_json(), sync=False)
            os.rename(new, branch.path)
        except OSError as error:
            remove_path(new)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(
                    f"branch {quoted(branch.name)} already exists; choose another name, or discard it by "
                    f"`unionfs branch discard {quoted(branch.name)}`."
                ) from error
            raise

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Wait until nothing else is committed, and hold the lock. Raises UserError, OSError."""
        self.check(make=True)
        path = f"{self.commits}/lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = filelocks.take(lambda: os.open(path, flags, 0o600), path, operation=fcntl.LOCK_EX)
        assert fd is not None
        with Owned(fd):
            yield


class Branch:
    """One branch. The record and the layer on disk are the only state."""

    def __init__(self, store: Store, name: str, path: str | None = None) -> None:
        """`path`: its directory, by default the one of that name."""
        self.store = store
        self.name = name
        self.path = path or f"{store.path}/{name}"
        self.upper, self.work, self.merged = (f"{self.path}/{part}" for part in ("upper", "work", "merged"))

    def exists(self) -> bool:
        """Raises UserError if that cannot be found out."""
        with on_failure(f"branch {quoted(self.name)} cannot be used", "check the store"):
            return is_directory(self.path)

    def record(self) -> Record:
        """Raises UserError if it is missing or damaged."""
        path = f"{self.path}/{_RECORD}"
        try:
            return Record.from_json(jsonfiles.read(path))
        except FileNotFoundError as error:
            raise UserError(
                f"there is no branch {quoted(self.name)}; `unionfs branch ls` lists them."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = reason(error) if isinstance(error, OSError) else str(error)
            passes = isinstance(error, OSError) and error.errno not in _STAYS
            raise (UnreadableError if passes else UserError)(
                f"branch {quoted(self.name)} cannot be used: {quoted(path)} cannot be read ({cause}); "
                f"its files are in {quoted(self.upper)}."
            ) from error

    def save(self, record: Record) -> None:
        """Replace the record. Raises UserError."""
        with on_failure(f"the record of branch {quoted(self.name)} cannot be written", "free space"):
            jsonfiles.write(f"{self.path}/{_RECORD}", record.to_json(), sync=False)

    def lowers(self) -> tuple[str, ...]:
        """What lies below it, topmost first. Raises UserError."""
        record, found = self.record(), []
        above = {self.name}
        while record.parent is not None:
            below = self.store.existing(record.parent)
            if below.name in above:
                raise UserError(
                    f"branch {quoted(self.name)} lies over itself by its record; repair `parent` there."
                )
            above.add(below.name)
            found.append(below.upper)
            record = below.record()
        return (*found, record.base)

    def is_untouched(self) -> bool:
        """Whether nothing was written to it: false also if that takes a closer look. Raises UserError."""
        lowers = self.lowers()
        with on_failure(f"branch {quoted(self.name)} cannot be read", "check its base and its layer"):
            if os.listdir(self.upper):
                return False
            below = os.stat(lowers[0], follow_symlinks=False)
            now, before = (_root_attributes(path, below) for path in (self.upper, lowers[0]))
            return now == before

    def refuse_frozen(self, what: str) -> None:
        """Raise UserError if other branches lie over it; `what` as in "be removed"."""
        if children := self.store.children(self.name):
            names = ", ".join(quoted(name) for name in children)
            raise UserError(
                f"branch {quoted(self.name)} cannot {what}, since others lie over it ({names}); commit or "
                "discard those first."
            )

    @contextmanager
    def claimed(self, what: str) -> Iterator[None]:
        """Hold the branch's lock. Raises UserError if another command does; `what` as in "committed"."""
        self.store.check()
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no branch {quoted(self.name)}; `unionfs branch ls` lists them."
            ) from error
        with Owned(fd):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"branch {quoted(self.name)} is in use by another command, so it cannot be {what}; wait "
                    "for that to end."
                ) from error
            with on_failure(f"branch {quoted(self.name)} cannot be {what}", "check its directory"):
                self._refuse_pending(what)
                leases.refuse_if_led(self.upper, alone=True)
            yield

    def _refuse_pending(self, what: str) -> None:
        """Refuse a branch whose commit was interrupted: its layer may have what the base had before."""
        try:
            made = self.record().created
        except UserError:
            return  # a damaged one can be discarded
        for id in self.store.commit_ids():
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                state = jsonfiles.read(f"{self.store.commits}/{id}/{STATE_FILE}")
                if state["made"] == made and state["state"] in _PENDING:
                    raise UserError(
                        f"a commit of branch {quoted(self.name)} was interrupted, so it cannot be {what}; "
                        f"`unionfs branch commit {quoted(self.name)}` goes on with it."
                    )

    def rename(self, name: str) -> None:
        """Give it another name. Raises UserError, also if it has children, which name it."""
        other = self.store.branch(name)
        self.refuse_frozen("be renamed")
        with on_failure(f"branch {quoted(self.name)} cannot be renamed", "check the permissions"):
            try:
                # A directory of a branch is never empty, so none is replaced.
                os.rename(self.path, other.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise UserError(
                        f"branch {quoted(name)} already exists; choose another name."
                    ) from error
                raise

    def remove(self) -> None:
        """Remove it with its changes. Raises UserError; an immutable file in it prevents any removal."""
        complaint = f"branch {quoted(self.name)} cannot be removed"
        self.refuse_frozen("be removed")
        refuse_locked(self.path, complaint)
        sweep(self.store.path)
        doomed = f"{self.store.path}/{_DOOMED}{os.urandom(8).hex()}"
        with on_failure(complaint, "check the permissions"):
            os.rename(self.path, doomed)
        remove_all(doomed, f"branch {quoted(self.name)} is removed, but not all of its files")


def sweep(directory: str) -> None:
    """Remove what interrupted commands left of removed and unfinished branches."""
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            if name.startswith(_DOOMED) and is_own_directory(path):
                with suppress(OSError):
                    remove_path(path, unlock=True)


def _base(path: str) -> tuple[str, int]:
    """The real path of a base, and an fd of it. Raises UserError."""
    with on_failure(f"the base {quoted(path)} cannot be used", "name an existing directory"):
        real = os.path.realpath(path, strict=True)
        return real, os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _make_root(path: str, below: int) -> None:
    """Make the root of an upper with the attributes of the root below, so that only changes differ."""
    os.mkdir(path, 0o700)
    st = os.fstat(below)

    def failed(name: bytes, error: OSError) -> None:
        if name != attributes.OWNER or error.errno != errno.EPERM:
            attributes.unsupported(name, error)

    xattrs = attributes.read_xattrs(below, _is_kept, failed)
    with Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        attributes.drop_acls(fd)
        attributes.write(fd, None, attributes.attributes(st, xattrs), failed)


def _is_kept(name: bytes) -> bool:
    """Whether the root of an upper gets this xattr of the root below."""
    return b".overlay." not in name and name != b"security.selinux"


def may_own(uid: int, gid: int) -> bool:
    """Whether this user's files can have an owner and group."""
    user = os.geteuid()
    if user == 0 and entered() is not None:
        return uid != overflow("uid") and gid != overflow("gid")
    return user == 0 or (uid == user and gid in (os.getegid(), *os.getgroups()))


def _root_attributes(path: str, below: os.stat_result) -> tuple[int, int, int, dict[bytes, bytes]]:
    st = os.stat(path, follow_symlinks=False)
    owner = (st.st_uid, st.st_gid) if may_own(below.st_uid, below.st_gid) else (below.st_uid, below.st_gid)
    xattrs = attributes.read_xattrs(os.fsencode(path), _is_kept, attributes.unsupported, follow=False)
    return st.st_mode, *owner, xattrs
