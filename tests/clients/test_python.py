"""A virtual environment on the mount, and pip with a wheel and a source archive (no network)."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.clients.support import run, union_over

pytestmark = pytest.mark.usefixtures("root")

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
MODULE = "def main():\n    print('hello from {name}')\n"
SCRIPTS = "[console_scripts]\n{name}={name}:main\n"


def make_wheel(directory: Path, name: str) -> Path:
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": MODULE.format(name=name),
        f"{info}/METADATA": METADATA.format(name=name),
        f"{info}/WHEEL": WHEEL,
        f"{info}/entry_points.txt": SCRIPTS.format(name=name),
    }
    files |= {f"{name}/data/{number}.txt": str(number) * 1000 for number in range(50)}
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


#: A build backend inside the source archive itself, without dependencies.
BACKEND = """
import zipfile
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = {files!r}
    name = "{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel_directory + "/" + name, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return name
"""


def make_source_archive(directory: Path, name: str) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": MODULE.format(name=name),
        f"{info}/METADATA": METADATA.format(name=name),
        f"{info}/WHEEL": WHEEL,
        f"{info}/entry_points.txt": SCRIPTS.format(name=name),
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = directory / f"{name}-1.0.tar.gz"
    members = {
        "PKG-INFO": METADATA.format(name=name),
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.format(files=files, name=name),
    }
    with tarfile.open(path, "w:gz") as archive:
        for file, text in members.items():
            member = tarfile.TarInfo(f"{name}-1.0/{file}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.watchdog(280)
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_environment_and_installations(area: Path, session: str) -> None:
    """The environment is created on the union, then changed in a second union over the first one's upper."""
    (area / "lower").mkdir()
    wheel, archive = make_wheel(area, "fromwheel"), make_source_archive(area, "fromsource")
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir")
    environment = {"PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "", "TMPDIR": str(area)}

    with union_over(area / "lower", area, session) as merged:
        run(sys.executable, "-m", "venv", merged / "env", env=environment)
        python = merged / "env/bin/python"
        run(python, *pip, "install", "--no-index", wheel, env=environment)
        assert run(merged / "env/bin/fromwheel") == "hello from fromwheel\n"
        run(python, *pip, "check", env=environment)
    for name in ("upper", "work"):
        (area / name).rename(area / f"first-{name}")

    with union_over(area / "first-upper", area, session) as merged:
        python = merged / "env/bin/python"
        run(python, *pip, "install", "--no-index", archive, env=environment)
        assert run(merged / "env/bin/fromsource") == "hello from fromsource\n"
        run(python, *pip, "install", "--no-index", "--force-reinstall", wheel, env=environment)
        run(python, *pip, "uninstall", "-y", "fromwheel", env=environment)
        listed = run(python, *pip, "list", env=environment)
        assert "fromsource" in listed
        assert "fromwheel" not in listed
        assert not (merged / "env/bin/fromwheel").exists()
        assert not list(merged.glob("env/lib/*/site-packages/fromwheel*"))
        run(python, "-m", "compileall", "-q", merged / "env/lib", env=environment)
