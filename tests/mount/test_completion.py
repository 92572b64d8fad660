"""Completion in real interactive shells on a terminal: what the program receives after Tab and Enter."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.mount.cli_calls import Place, succeed, unionfs, wait_for
from tests.support.patience import patient
from tests.support.terminals import read_to_end
from tests.support.worker import REPOSITORY

_SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ". {script}"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; . {script}"),
    "fish": (["fish", "--private", "-i"], "source {script}"),
}
# Completes as unionfs, and otherwise writes its arguments.
_PROGRAM = """#!/bin/sh
if [ -n "$_UNIONFS_COMPLETE" ]; then
    cd {repository} && exec {python} -c \
        'import sys; sys.argv = ["unionfs"]; from unionfs.cli.main import main; main()'
fi
printf '%s\\n' "$@" > {place}/arguments.new
mv {place}/arguments.new {place}/arguments
"""
Typing = Callable[[str], list[str]]


@pytest.fixture(params=_SHELLS)
def typing(request: pytest.FixtureRequest, place: Place) -> Iterator[Typing]:
    """Types a line into an interactive shell, and returns the arguments that the program got."""
    words, load = _SHELLS[request.param]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    area = place.root / "shell"
    (area / "bin").mkdir(parents=True)
    # Where this directory is missing, fish makes completions of all manual pages, for half a minute.
    for data in (".local/share", ".cache"):  # of fish 3, and of fish 4
        (area / data / "fish/generated_completions").mkdir(parents=True)
    program = area / "bin/unionfs"
    program.write_text(_PROGRAM.format(repository=REPOSITORY, python=sys.executable, place=area))
    program.chmod(0o755)
    (area / "script").write_text(succeed(unionfs("completion", request.param)))
    controller, terminal = pty.openpty()
    environment = {
        "HOME": str(area), "PATH": f"{area}/bin:{os.environ['PATH']}", "TERM": "xterm", "LC_ALL": "C.UTF-8",
        "UNIONFS_ROOT": str(place.root / "storage"),
    }  # fmt: skip
    shell = subprocess.Popen(
        ["setsid", "-c", *words], stdin=terminal, stdout=terminal, stderr=terminal, cwd=area, env=environment
    )
    os.close(terminal)
    shown: list[bytes] = []
    reader = threading.Thread(target=lambda: shown.append(read_to_end(controller)))
    reader.start()

    def typed(line: str) -> list[str]:
        arguments = area / "arguments"
        arguments.unlink(missing_ok=True)
        os.write(controller, line.encode() + b"\r")
        assert wait_for(arguments.exists, patient(20)), line
        return arguments.read_text().splitlines()

    try:
        os.write(controller, f"{load.format(script=area / 'script')}\r".encode())
        typed("unionfs ready")
        yield typed
    finally:
        shell.kill()
        shell.wait()
        reader.join()


def test_names_of_what_exists(typing: Typing, place: Place) -> None:
    place.mount()
    containers = place.root / "storage/containers"
    (containers / "first").mkdir(parents=True)
    containers.chmod(0o700)
    containers.parent.chmod(0o700)
    environment = {"UNIONFS_ROOT": str(containers.parent)}
    for name in ("alpha", "beta"):
        succeed(unionfs("volume", "create", name, env=environment))
    merged = str(place.merged)
    assert typing("unionfs conv\t") == ["convert"]
    assert typing(f"unionfs umount {merged[:-3]}\t") == ["umount", merged]
    assert typing("unionfs rm fi\t") == ["rm", "first"]
    assert typing("unionfs volume inspect al\t") == ["volume", "inspect", "alpha"]
    assert typing("unionfs run -v be\t/data") == ["run", "-v", "beta:/data"]


def test_values_after_an_equals_sign(typing: Typing) -> None:
    """Bash has words of its own there, and none of the shells ends a word that goes on."""
    assert typing("unionfs ls --filter st\tdet\t") == ["ls", "--filter", "state=detached"]
    assert typing("unionfs ls -f state=de\tad") == ["ls", "-f", "state=dead"]
    assert typing("unionfs ls --filter=state=det\t -q") == ["ls", "--filter=state=detached", "-q"]
    assert typing("unionfs mount -o ro,ses\tdir\t") == ["mount", "-o", "ro,session=direct"]


def test_paths(typing: Typing, place: Place) -> None:
    layers = place.root / "layers"
    (layers / "other").mkdir(parents=True)
    (layers / "order").touch()

    def last(line: str) -> str:
        return typing(line)[-1].removesuffix("/")  # zsh takes it off again

    assert last(f"unionfs mount -l {layers}/oth\t") == f"{layers}/other"
    assert last(f"unionfs mount --work={layers}/oth\t") == f"--work={layers}/other"
    assert last(f"unionfs mount {layers}/oth\t") == f"{layers}/other"
    assert last(f"unionfs mount {layers}/ord\t") == f"{layers}/ord"  # no directory
    option = f"ro,lowerdir={layers}/other:{layers}/oth"
    assert last(f"unionfs mount -o {option}\t") == f"{option}er"
    assert last(f"unionfs volume import x {layers}/ord\t") == f"{layers}/order"
    assert last(f"unionfs run -v {layers}/ord\t") == f"{layers}/order"
