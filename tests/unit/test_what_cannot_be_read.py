"""Containers, images and volumes on disk: what cannot be looked at is not missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from unionfs.containers.store import Container
from unionfs.errors import UserError
from unionfs.images.drivers.base import Writable
from unionfs.images.drivers.btrfs import Btrfs
from unionfs.images.drivers.devicemapper import DeviceMapper
from unionfs.images.drivers.snapshots import Snapshots
from unionfs.images.store import Store
from unionfs.storage.drivers import image
from unionfs.storage.model import Volume
from unionfs.sys.fds import exists


@pytest.mark.parametrize("driver", [Btrfs, DeviceMapper])
def test_a_container_whose_files_cannot_be_looked_at(
    tmp_path: Path, driver: type[Snapshots], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be made anew, without its changes."""
    monkeypatch.setattr(driver, "_delete", lambda *_: pytest.fail("its changes were removed"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop") as caught:
        driver(str(tmp_path)).create(Writable(f"{tmp_path}/loop/c", str(tmp_path)))
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("driver", [Btrfs, DeviceMapper])
def test_a_container_whose_base_cannot_be_read(tmp_path: Path, driver: type[Snapshots]) -> None:
    """Its base would be removed."""
    home = tmp_path / "drivers" / driver.name / "key"
    for path in (home, tmp_path / "containers/c", tmp_path / "containers/new"):
        path.mkdir(parents=True, mode=0o700)
    (home / "record.json").write_text("{}")
    (tmp_path / "containers/c/base").symlink_to("base")
    with pytest.raises(OSError, match="base") as caught:
        driver(str(tmp_path)).prune()
    assert caught.value.errno == errno.ELOOP
    assert home.is_dir()


def test_a_volume_whose_image_cannot_be_looked_at(tmp_path: Path) -> None:
    """Its empty mountpoint would be used."""
    (tmp_path / "loop").symlink_to("loop")
    volume = Volume("v", "local", "", anonymous=False, directory=f"{tmp_path}/loop/v")
    with pytest.raises(UserError, match="cannot be used"):
        image.exists(volume)


def test_a_container_whose_record_cannot_be_read(tmp_path: Path) -> None:
    """It keeps its image, and no message advises removing it."""
    container = Container(str(tmp_path), "one")
    assert container.image() is None
    assert container.lowers() == ()
    Path(container.path).mkdir(parents=True)
    Path(container.path, "container.json").symlink_to("container.json")
    for call in (container.image, container.lowers):
        with pytest.raises(UserError, match=r"cannot be read: too many levels.*; check the storage root"):
            call()


def test_an_image_whose_record_cannot_be_read(tmp_path: Path) -> None:
    records = tmp_path / "images/records"
    records.mkdir(parents=True)
    (records / "r.json").symlink_to("r.json")
    with pytest.raises(UserError, match=r"cannot be read: too many levels.*; try again"):
        Store(str(tmp_path)).images()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert not exists(f"{tmp_path}/{256 * 'n'}")
    os.symlink("nothing", tmp_path / "link")
    assert exists(f"{tmp_path}/link")
