"""The configuration files: precedence, sources, errors; who may have written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings.configuration import KEYS
from unionfs.storage import configured
from unionfs.storage.configured import configuration
from unionfs.storage.root import storage_root
from unionfs.storage.volumes import Volumes


class Files:
    """The two files, which do not exist yet."""

    def __init__(self, tmp_path: Path) -> None:
        self.host = tmp_path / "etc/config.toml"
        self.user = tmp_path / "home/unionfs/config.toml"
        for path in (self.host, self.user):
            path.parent.mkdir(parents=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    found = Files(tmp_path)
    monkeypatch.setattr(configured, "SYSTEM", str(found.host))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("UNIONFS_ROOT", raising=False)
    return found


def _shown() -> dict[str, tuple[object, str | None]]:
    return {key: (value.value, value.source) for key, value in configuration().values.items()}


def test_the_defaults(files: Files) -> None:
    assert _shown() == {key: (default, None) for key, (default, _) in KEYS.items()}


def test_the_user_s_values_replace_the_host_s(files: Files) -> None:
    files.host.write_text(
        'io = "cached"\nsession = "direct"\n[volume-options.local]\nsize = "1g"\nfs = "xfs"'
    )
    files.user.write_text('io = "hybrid"\n[volume-options.local]\nsize = "2g"\nreserve = 3\nshared = true')
    found = _shown()
    assert found["io"] == ("hybrid", str(files.user))
    assert found["session"] == ("direct", str(files.host))
    assert found["log-level"] == ("info", None)
    assert found["volume-options.local.fs"] == ("xfs", str(files.host))
    assert configuration().volume_options("local") == {
        "size": "2g", "fs": "xfs", "reserve": "3", "shared": "true",
    }  # fmt: skip
    assert configuration().volume_options("sshfs") == {}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('log-lvl = "info"', ["unknown key log-lvl", "did you mean log-level?"]),
        ("zzz = 1", ["unknown key zzz", "the known ones are root, session, io"]),
        ('io = "fast"', ["invalid io = 'fast'", "the known ones are auto, hybrid, passthrough, cached"]),
        ("io = 3", ["invalid io = 3"]),
        ('root = "relative"', ["invalid root", "an absolute path"]),
        ('volume-driver = ""', ["invalid volume-driver"]),
        ("io = ", ["is not TOML"]),
        ("\udcff", ["is not TOML"]),
        ('volume-options = "x"', ["[volume-options.local]"]),
        ('[volume-options]\nsize = "1g"', ["[volume-options.local]"]),
        ("[volume-options.local]\nsize = [1]", ["invalid size = [1] of local"]),
    ],
)
def test_mistakes(files: Files, content: str, parts: list[str]) -> None:
    files.user.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        configuration()
    for part in (str(files.user), *parts):
        assert part in str(caught.value)


def test_mounts(files: Files, tmp_path: Path) -> None:
    files.user.write_text('io = "passthrough"\nsession = "direct"\nlog-level = "error"')

    def mounted(**more: str) -> tuple[str, str, str]:
        found = settle(str(tmp_path), lowers=["/"], **more)  # type: ignore[arg-type]
        return found.session, found.io, found.log_level

    assert mounted() == ("direct", "passthrough", "error")
    assert mounted(io="auto", session="auto", log_level="info") == ("auto", "auto", "info")
    assert mounted(options=["io=cached"]) == ("direct", "cached", "error")  # type: ignore[arg-type]
    assert mounted(options=["io=cached,session=direct"], io="auto") == ("direct", "cached", "error")  # type: ignore[arg-type]
    # The configured mode is for the session that has modes.
    assert mounted(session="pyfuse3") == ("pyfuse3", "auto", "error")


def test_the_storage_root(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.user.write_text('root = "/srv/from-the-file"')
    assert storage_root() == "/srv/from-the-file"
    monkeypatch.setenv("UNIONFS_ROOT", "/srv/from-the-environment")
    assert storage_root() == "/srv/from-the-environment"
    assert storage_root("/srv/given") == "/srv/given"


def test_new_volumes(files: Files, tmp_path: Path) -> None:
    files.user.write_text(
        'volume-driver = "union"\n[volume-options.union]\nlower = "/usr"\nshared = true\n'
        '[volume-options.local]\ntmpfs = ""'
    )
    volumes = Volumes(str(tmp_path / "root"))
    made = volumes.create("by-default")
    assert (made.driver, made.options["lower"], made.options["shared"]) == ("union", "/usr", "true")
    assert volumes.create("given", options={"lower": "/etc"}).options["lower"] == "/etc"
    assert volumes.create("named", driver="local").options["type"] == "tmpfs"
    # They are for new ones: a volume that exists is the same without them.
    files.user.unlink()
    assert volumes.create("by-default").driver == "union"


def test_another_user_s_file_is_refused(files: Files) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    files.user.write_text('io = "cached"')
    os.chown(files.user, 1001, 1001)
    with pytest.raises(UserError, match="belongs to uid 1001"):
        configuration()
    # A home of another user, as that of sudo -E, is not searched.
    os.chown(files.user, 0, 0)
    os.chown(files.user.parent.parent, 1001, 1001)
    assert _shown()["io"] == ("auto", None)
    os.chown(files.user.parent.parent, 0, 0)
    files.user.parent.chmod(0o777)
    with pytest.raises(UserError, match="can be written by its group or others"):
        configuration()


def test_what_is_no_file(files: Files) -> None:
    os.mkfifo(files.user)
    with pytest.raises(UserError, match="not a regular file"):
        configuration()
