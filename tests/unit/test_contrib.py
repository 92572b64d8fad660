"""The files in contrib/: systemd and docker take them, and they name the same socket as the command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from unionfs.cli.plugin import SYSTEM_SOCKET

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"


def _unit(name: str) -> ConfigParser:
    unit = ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(CONTRIB / name)
    return unit


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = Path(sys.executable).with_name("unionfs")
    if not program.exists():
        pytest.skip(f"{program} is missing: install the package into the environment that runs the tests")
    names = ("unionfs-plugin.socket", "unionfs-plugin.service", "unionfs@.service")
    units = [tmp_path / name for name in names]
    for unit in units:
        text = (CONTRIB / unit.name).read_text()
        unit.write_text(text.replace("ExecStart=unionfs", f"ExecStart={program}"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "unionfs" in line]) == (0, [])


def test_systemd_makes_a_unit_of_the_line_for_fstab(tmp_path: Path) -> None:
    """That of docs/install.md."""
    generator = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")
    if not generator.exists() or shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    page = (CONTRIB.parent / "docs/install.md").read_text()
    (line,) = re.findall(r"^ {4}(none .*)$", page, re.MULTILINE)
    (tmp_path / "fstab").write_text(f"{line}\n")
    made = tmp_path / "units"
    made.mkdir()
    subprocess.run([generator, made, made, made], check=True, env={"SYSTEMD_FSTAB": str(tmp_path / "fstab")})
    mount = (made / "mnt.mount").read_text()
    assert "\nType=fuse.unionfs\n" in mount
    assert "\nWhere=/mnt\n" in mount
    assert f"\nOptions={line.split()[3]}\n" in mount
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", made / "mnt.mount"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_services_are_watched() -> None:
    """A service that hangs is started again; to start, one may take as long as it has volumes to fill."""
    for name in ("unionfs@.service", "unionfs-plugin.service"):
        service = _unit(name)["Service"]
        assert service["Type"] == "notify"
        assert int(service["WatchdogSec"]) > 0
        assert service["Restart"] in ("on-failure", "on-watchdog", "always")
    assert _unit("unionfs@.service")["Service"]["TimeoutStartSec"] == "infinity"


def test_all_name_the_same_socket() -> None:
    assert _unit("unionfs-plugin.socket")["Socket"]["ListenStream"] == SYSTEM_SOCKET
    assert (CONTRIB / "unionfs.spec").read_text() == f"unix://{SYSTEM_SOCKET}\n"


def test_the_mounts_are_made_where_containers_see_them_and_outlive_the_service() -> None:
    service = _unit("unionfs-plugin.service")["Service"]
    assert service["KillMode"] == "process"
    own_namespace = ("PrivateTmp", "PrivateMounts", "PrivateDevices", "ProtectSystem", "ProtectHome",
                     "ProtectKernelTunables", "ReadOnlyPaths", "MountFlags", "DynamicUser")  # fmt: skip
    assert not set(own_namespace) & set(service)
