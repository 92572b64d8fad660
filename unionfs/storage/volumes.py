"""The volumes below one storage root: create, list, use and remove them.

    ROOT/volumes/NAME/volume.json    the volume's record; each user has a file beside it
    ROOT/volumes/NAME/_data          its files, in Docker's layout
    ROOT/locks/                      locks for one operation at a time on a volume

A volume exists while its directory has its final name, set and removed by one rename.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.names import anonymous_name, check_name, is_name
from unionfs.storage import locks, records
from unionfs.storage.configured import configuration
from unionfs.storage.drivers import Driver, find_driver
from unionfs.storage.drivers.base import Forced
from unionfs.storage.drivers.replacing import finish_in_place
from unionfs.storage.holds import Engine, Hold
from unionfs.storage.model import ANONYMOUS_LABEL, Volume, VolumeUser
from unionfs.storage.removing import refuse_bound, refuse_locked, refuse_mounted, remove_all
from unionfs.storage.root import check_directory, is_own_directory, make_directory, open_root
from unionfs.sys.trees import remove_path

__all__ = ["Volume", "VolumeUser", "Volumes"]

_log = logging.getLogger(__name__)


class NoVolumeError(UserError):
    """No volume has the given name."""


class Volumes:
    """The volumes of one storage root. Every method may raise UserError.

    `tell` receives sentences about repairs; by default they are logged as warnings. Any number of processes
    may work on one root.
    """

    def __init__(self, root: str, *, tell: Callable[[str], object] = _log.warning) -> None:
        self.root = root
        self._tell = tell
        self._checked = False

    # -- looking ------------------------------------------------------------------------------------------

    def all(self) -> list[Volume]:
        """All volumes, sorted by name; `tell` receives the reason for each record that cannot be read."""
        found = []
        for directory in self._directories():
            try:
                volume = self._read(directory)
            except UserError as error:
                self._tell(str(error))
                continue
            if volume is not None:
                found.append(volume if volume.recorded else self._adopt(volume))
        return found

    def get(self, name: str) -> Volume:
        found = self._find(check_name(name))
        if found is None:
            raise NoVolumeError(
                f"there is no volume {quoted(name)}; `unionfs volume ls` lists the existing ones."
            )
        return found

    def _find(self, name: str) -> Volume | None:
        self._check_root()
        directory = self._directory(name)
        check_directory(directory)
        return self._read(directory)

    def _directory(self, name: str) -> str:
        return f"{self.root}/volumes/{name}"

    def _directories(self) -> Iterator[str]:
        """The directories that may be volumes, sorted."""
        self._check_root()
        try:
            names = sorted(os.listdir(f"{self.root}/volumes"))
        except FileNotFoundError:
            return
        for name in names:
            if is_name(name) and is_own_directory(self._directory(name)):
                yield self._directory(name)

    def _check_root(self) -> None:
        if self._checked:
            return
        open_root(self.root)
        for name in ("volumes", "containers", "locks"):
            check_directory(f"{self.root}/{name}")
        self._checked = True
        if os.path.lexists(f"{self.root}/registry.db"):
            # start-up time: only the first command after an earlier version needs it
            from unionfs.storage.earlier import take_over

            try:
                take_over(self.root, self._directories(), self._tell)
            except UserError as error:
                self._tell(str(error))

    def _read(self, directory: str) -> Volume | None:
        found = records.find(directory)
        registry = f"{self.root}/registry.db"
        if found is not None and not found.recorded and os.path.lexists(registry):
            raise UserError(
                f"the record of volume {quoted(found.name)} is lost, and {quoted(registry)}, which may have "
                "it, could not be read; fix that and try again."
            )
        return found

    def _adopt(self, volume: Volume) -> Volume:
        """Write a record for a local volume without a readable one."""
        with suppress(UserError, OSError), locks.state(self.root, volume.name):
            known = records.find(volume.directory)
            if known is not None and not known.recorded:
                records.keep_damaged(volume.directory)
                records.write(volume)
                self._tell(
                    f"the directory of volume {quoted(volume.name)} had no record; it was entered as local."
                )
        return volume

    def users(self, name: str) -> list[VolumeUser]:
        self._check_root()
        return [user for user in records.users(self._directory(check_name(name))) if not user.is_gone]

    def all_users(self) -> dict[str, list[VolumeUser]]:
        """Who uses volumes now, by the volumes' names; of what cannot be read `tell` gets the reason."""
        found = {}
        for directory in self._directories():
            try:
                alive = [user for user in records.users(directory) if not user.is_gone]
            except UserError as error:
                self._tell(str(error))
                continue
            if alive:
                found[os.path.basename(directory)] = alive
        return found

    # -- making -------------------------------------------------------------------------------------------

    def create(
        self,
        name: str | None = None,
        *,
        driver: str | None = None,
        options: Mapping[str, str] = {},
        labels: Mapping[str, str] = {},
        anonymous: bool = False,
    ) -> Volume:
        """Create a volume, or return the existing one if its driver, options and labels match.

        As in Docker, a name alone selects an existing volume whatever its settings.
        """
        anonymous = anonymous or name is None
        name = anonymous_name() if name is None else check_name(name)
        found = self._find(name)
        if found is None:
            configured = configuration()
            chosen = driver or configured.get("volume-driver")
            maker = find_driver(chosen)
            options = maker.spelled_out({**configured.volume_options(chosen), **options})
            maker.check(options)
            with locks.state(self.root, name):
                found = self._find(name)
                if found is None:
                    made = {**labels, ANONYMOUS_LABEL: ""} if anonymous else dict(labels)
                    return self._make(name, maker, chosen, options, made, anonymous)
        if options and driver in (None, found.driver):
            options = find_driver(found.driver).spelled_out(options)
        _check_same(found, driver, options, labels)
        return found

    def _make(
        self, name: str, maker: Driver, driver: str, options: Mapping[str, str], labels: Mapping[str, str],
        anonymous: bool,
    ) -> Volume:  # fmt: skip
        place = self._directory(name)
        parent = make_directory(os.path.dirname(place))
        self._sweep(parent)
        temporary = f"{parent}/.new-{name[:64]}-{os.getpid()}-{os.urandom(8).hex()}"
        volume = Volume(
            name, driver, "", anonymous, dict(options), dict(labels), time.time(), maker.scope, temporary
        )
        failure = on_failure(
            f"volume {quoted(name)} cannot be made in {quoted(parent)}",
            "free space, check the permissions, or give another storage root",
        )
        try:
            with failure:
                os.mkdir(temporary, 0o700)
                os.chmod(temporary, 0o700)
                maker.create(volume)
                volume = replace(volume, mountpoint=maker.mountpoint(replace(volume, directory=place)))
                records.write(volume)
                try:
                    os.rename(temporary, place)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    raise UserError(
                        f"volume {quoted(name)} cannot be made: {quoted(place)} is in the way and is not a "
                        "volume; move it away."
                    ) from error
        except BaseException:
            with suppress(Exception):
                maker.remove(volume)
            with suppress(OSError):
                remove_path(temporary)
            raise
        return replace(volume, directory=place)

    def _sweep(self, parent: str) -> None:
        """Remove leftovers of killed processes and of failed removals."""
        for entry in os.listdir(parent):
            kind, _, rest = entry.partition("-")
            if kind not in (".new", ".gone"):
                continue
            pid = rest.rsplit("-", 2)[1:2]
            if kind == ".new" and pid and pid[0].isdigit() and os.path.exists(f"/proc/{pid[0]}"):
                continue
            path = f"{parent}/{entry}"
            if is_own_directory(path):
                with suppress(OSError):
                    remove_path(path, unlock=True)

    # -- using --------------------------------------------------------------------------------------------

    def attach(self, name: str, user: str, *, engine: Engine | None = None) -> str:
        """Record a user and return the absolute path of the volume's data for it.

        `user` is a text as in `VolumeUser`. The first user mounts the volume. `engine` counts how often it
        attaches the user; then as many detach it.
        """
        with locks.state(self.root, name):
            volume = self.get(name)
            driver = find_driver(volume.driver)
            # An engine that begins a hold anew knows of no earlier one.
            begun = None if engine is None else lambda known: known.text == user and known.is_unused()
            users = self._without_the_dead(volume, driver, unused=begun, tolerant=True)
            for known in users:
                if known.text == user:
                    if engine is not None and known.hold is not None:
                        held = replace(known, hold=known.hold.again(engine))
                        records.add_user(volume.directory, held)
                    return known.path
            # For later users too: the volume may have been unmounted by hand.
            path = driver.mount(volume, user)
            try:
                finish_in_place(volume, path)
                hold = None if engine is None else Hold(engine)
                records.add_user(volume.directory, VolumeUser(user, path, hold))
            except BaseException:
                if driver.one_mount_each(volume) or not users:
                    with suppress(UserError):
                        driver.unmount(volume, user)
                raise
            return path

    def detach(self, name: str, user: str) -> None:
        """Remove a user; the last one unmounts the volume. Of a hold, undo one `attach`."""
        with locks.state(self.root, name):
            volume = self.get(name)
            driver = find_driver(volume.driver)
            users = self._without_the_dead(volume, driver, besides=user, tolerant=True)
            found = next((known for known in users if known.text == user), None)
            if found is None:
                return
            if found.hold is not None and found.hold.count > 1:
                records.add_user(volume.directory, replace(found, hold=found.hold.less()))
                return
            if driver.one_mount_each(volume) or len(users) == 1:
                try:
                    driver.unmount(volume, user)
                except UserError:
                    if found.hold is not None:
                        # The engine does not ask again, so the next caller unmounts what is busy now.
                        records.add_user(volume.directory, replace(found, hold=found.hold.less()))
                    raise
            records.remove_user(volume.directory, user)

    def _without_the_dead(
        self, volume: Volume, driver: Driver, *, besides: str = "",
        unused: Callable[[VolumeUser], bool] | None = None, tolerant: bool = False,
    ) -> list[VolumeUser]:  # fmt: skip
        """Detach users that are gone, or `unused`, and return the others.

        `tolerant`: a storage that cannot be unmounted now stays mounted until the next call.
        """
        alive: list[VolumeUser] = []
        dead: list[VolumeUser] = []
        for user in records.users(volume.directory, sweeps=True):
            gone = user.text != besides and (user.is_gone or (unused is not None and unused(user)))
            (dead if gone else alive).append(user)
        for user in dead:
            if driver.one_mount_each(volume) or (not alive and user is dead[-1]):
                try:
                    driver.unmount(volume, user.text)
                except UserError:
                    if tolerant:
                        continue
                    raise
            records.remove_user(volume.directory, user.text)
        return alive

    def settle(self) -> None:
        """Detach users whose process has ended from all volumes."""
        for directory in self._directories():
            name = os.path.basename(directory)
            with suppress(UserError):
                if any(user.is_gone for user in records.users(directory)):
                    with locks.state(self.root, name):
                        volume = self.get(name)
                        self._without_the_dead(volume, find_driver(volume.driver).hurried())

    @contextmanager
    def used(self, name: str, kind: str) -> Iterator[str]:
        """The path of a volume's data, in use by this process within the context; `kind` is e.g. `backup`."""
        user = VolumeUser.of_this_process(kind, f"#{os.urandom(4).hex()}")
        path = self.attach(name, user)
        try:
            yield path
        except BaseException:
            with suppress(UserError):  # the first error counts
                self.detach(name, user)
            raise
        try:
            self.detach(name, user)
        except UserError as error:  # what was done stays done
            self._tell(f"the {kind} of volume {quoted(name)} is done, but stays recorded: {error}")

    @contextmanager
    def working_on(self, name: str, what: str) -> Iterator[Volume]:
        """Exclude other long operations and removal. `what` names this one, such as `a backup`."""
        self.get(name)
        with locks.work(self.root, name, what):
            yield self.get(name)

    @contextmanager
    def still(self, name: str, what: str, *, besides: str = "") -> Iterator[None]:
        """Exclude new users while the volume is `what` ("restored"). Raises UserError if it has users other
        than `besides`.
        """
        with locks.state(self.root, name):
            volume = self.get(name)
            driver = find_driver(volume.driver)
            if users := [user for user in self._without_the_dead(volume, driver) if user.text != besides]:
                raise UserError(f"volume {quoted(name)} cannot be {what}: {_in_use(users)}; stop that first.")
            yield

    def exists(self, name: str) -> bool:
        return self._find(check_name(name)) is not None

    # -- changing and removing ----------------------------------------------------------------------------

    def resize(self, name: str, size: str) -> Volume:
        with self.working_on(name, "a resize"), locks.state(self.root, name):
            volume = self.get(name)
            driver = find_driver(volume.driver)
            options = driver.resize(volume, size, mounted=bool(self._without_the_dead(volume, driver)))
            changed = replace(volume, options=dict(options))
            records.write(changed)
            return changed

    def remove(
        self, name: str, *, force: bool = False, missing_ok: bool = False, engine: Engine | None = None
    ) -> bool:
        """Remove a volume and its data. Raises UserError while it has users; `engine` knows its own best.

        Returns False if it does not exist, with `missing_ok` or `force`. `force` also removes one whose
        driver is missing or fails, or whose record cannot be read, and files that chattr(1) made immutable or
        append-only.
        """

        def find() -> Volume | None:
            try:
                return self._find(name)
            except records.UnreadableRecordError:
                if not force:
                    raise
                return Volume(name, "", "", anonymous=False, directory=self._directory(name))

        if (force or missing_ok) and (not is_name(name) or find() is None):
            return False
        if not force:
            self.get(name)
        with locks.work(self.root, name, "a removal", spare=True), locks.state(self.root, name):
            volume = find() or self.get(name)
            try:
                driver = find_driver(volume.driver) if volume.driver else Driver()
            except UserError:
                if not force:
                    raise
                driver = Driver()
            if force or missing_ok:  # the answer is not needed, or this is one of many removals
                driver = driver.hurried()
            if force:
                driver = Forced(driver, self._tell)
            complaint = f"volume {quoted(name)} cannot be removed"
            if users := self._without_the_dead(volume, driver, unused=lambda user: user.is_unused(engine)):
                raise UserError(f"{complaint}: {_in_use(users)}; stop that first.")
            refuse_bound(volume.directory, complaint)
            if not force:
                refuse_locked(volume.directory, complaint)
            driver.remove(volume)
            refuse_mounted(volume.directory, complaint)
            aside = f"{self.root}/volumes/.gone-{name[:64]}-{os.getpid()}-{os.urandom(8).hex()}"
            failure = on_failure(f"{complaint} from {quoted(self.root)}", "check the permissions")
            with failure, suppress(FileNotFoundError):
                os.rename(volume.directory, aside)
            locks.forget(self.root, name)
        if os.path.lexists(aside):
            remove_all(aside, f"volume {quoted(name)} is removed, but not all of its files", unlock=force)
        return True


def _in_use(users: list[VolumeUser]) -> str:
    return "it is in use by " + ", ".join(map(str, users))


def _check_same(
    found: Volume, driver: str | None, options: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    if driver is not None and driver != found.driver:
        raise UserError(
            f"volume {quoted(found.name)} already exists with the driver {quoted(found.driver)}; choose "
            "another name, or remove it first."
        )
    for kind, wanted, known in (("option", options, found.options), ("label", labels, found.labels)):
        if not wanted:
            continue
        for key in sorted({*wanted, *known} - {ANONYMOUS_LABEL}):
            if wanted.get(key) != known.get(key):
                has = f"{key}={known[key]}" if key in known else f"no {key}"
                raise UserError(
                    f"volume {quoted(found.name)} already exists with other {kind}s ({quoted(has)}); choose "
                    "another name, or remove it first."
                )
