"""The compiled core for a machine: built in its image's root, at the host's speed, once for each source."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tomllib
from pathlib import Path

from scripts.lib.vm import host, image

_BUILD = """
cd {source}
/opt/venv/bin/python -m pip install -q {requirements}
/opt/venv/bin/python setup.py -q build_ext --inplace
"""


def compiled(kernel: image.Kernel) -> Path:
    """A tar of the core's modules for the image's Python; built by root if missing. Raises VmError."""
    requirements, sources = _requirements(), _sources()

    def make(work: Path) -> Path:
        tree = work / "upper" / image.SOURCE[1:]
        tree.mkdir(parents=True)
        subprocess.run(["cp", "--parents", *sources, tree], cwd=image.REPOSITORY, check=True)
        environment, paths = host.pip_settings()
        script = _BUILD.format(source=image.SOURCE, requirements=shlex.join(requirements))
        image.chroot_over(kernel, work, script, doing="compiling the core", env=environment, paths=paths)
        made = sorted(str(path.relative_to(tree)) for path in tree.glob("unionfs/core/*.so"))
        words: list[str | Path] = ["tar", "-c", "--owner=0", "--group=0", "-f", work / "core.tar", *made]
        subprocess.run(words, cwd=tree, check=True)
        return work / "core.tar"

    target = kernel.root.with_name(f"core-{_key(requirements, sources)}.tar")
    return image.made_once(target, "the core", make)


def _sources() -> list[str]:
    core = image.REPOSITORY / "unionfs/core"
    names = [*core.glob("*.p[yx]*"), core.parent / "__init__.py"]
    rest = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "launcher/fuse-unionfs.c")
    return [*rest, *sorted(str(path.relative_to(image.REPOSITORY)) for path in names)]


def _requirements() -> list[str]:
    project = tomllib.loads((image.REPOSITORY / "pyproject.toml").read_text())
    found: list[str] = project["build-system"]["requires"]
    return found


def _key(requirements: list[str], sources: list[str]) -> str:
    digest = hashlib.sha256("\0".join(requirements).encode())
    for name in sources:
        if name.startswith(("setup.py", "unionfs/core/")):
            digest.update(name.encode() + b"\0" + (image.REPOSITORY / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]
