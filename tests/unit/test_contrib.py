"""The files in contrib/: systemd and docker take them, and they name the same socket as the command."""

from __future__ import annotations

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


def test_all_name_the_same_socket() -> None:
    assert _unit("unionfs-plugin.socket")["Socket"]["ListenStream"] == SYSTEM_SOCKET
    assert (CONTRIB / "unionfs.spec").read_text() == f"unix://{SYSTEM_SOCKET}\n"


def test_the_mounts_are_made_where_containers_see_them_and_outlive_the_service() -> None:
    service = _unit("unionfs-plugin.service")["Service"]
    assert service["KillMode"] == "process"
    own_namespace = ("PrivateTmp", "PrivateMounts", "PrivateDevices", "ProtectSystem", "ProtectHome",
                     "ProtectKernelTunables", "ReadOnlyPaths", "MountFlags", "DynamicUser")  # fmt: skip
    assert not set(own_namespace) & set(service)
