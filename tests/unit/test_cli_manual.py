"""Help and man pages, which are made from the same source."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from unionfs.cli.fuse_unionfs import HELP
from unionfs.cli.main import cli
from unionfs.cli.manual import commands, main, pages

EVERY = {"": cli, **dict(commands(cli))}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("man")
    main(str(found))
    return found


def _shown(page: Path) -> str:
    """A page as man(1) shows it."""
    done = subprocess.run(
        ["man", "--warnings", "-l", page], capture_output=True, text=True, check=True,
        env={"MANWIDTH": "1000", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "MAN_KEEP_FORMATTING": ""},
    )  # fmt: skip
    assert done.stderr == "", page
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("path", EVERY)
def test_help_has_an_example_and_80_columns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(cli, [*path.split(), "--help"], prog_name="unionfs").output
    assert "Example" in text
    # Commands of `container` are also commands of their own, and `container ls` is `ps`.
    examples = text.partition("Example")[2]
    assert f"unionfs {path}".strip() in examples or f"unionfs {EVERY[path].name}" in examples
    assert max(map(len, text.splitlines())) <= 80


def test_every_command_has_a_page() -> None:
    names = {f"man1/unionfs{'-' if path else ''}{path.replace(' ', '-')}.1" for path in EVERY}
    assert set(pages()) == {*names, "man1/fuse-unionfs.1", "man8/mount.fuse.unionfs.8"}


def test_the_pages_are_as_the_help(directory: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    for path in ("", "mount", "volume", "volume ls", "run", "umount"):
        command = EVERY[path]
        text = _shown(directory / f"man1/unionfs{'-' if path else ''}{path.replace(' ', '-')}.1")
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"):
            assert section in text, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert max(parameter.opts, key=len) in text, (path, parameter.name)
                assert " ".join((parameter.help or "").split()) in text, (path, parameter.name)
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                assert f"unionfs {path} {name}".replace("  ", " ") in text


def test_the_options_of_mount_are_in_the_page_of_the_helper(directory: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    text = _shown(directory / "man8/mount.fuse.unionfs.8")
    for word in ("lowerdir=A:B:C", r"write \: and \,", "xattr_permissions=2|1", "passthrough", "/etc/fstab"):
        assert word in text
    assert "--tmpfs" not in text


def test_no_page_starts_a_line_with_a_request_by_mistake() -> None:
    known = {".TH", ".SH", ".PP", ".TP", ".B", ".BR", ".nf", ".fi", ".sp"}
    for path, page in pages().items():
        requests = {line.split(" ")[0] for line in page.splitlines() if line.startswith((".", "'"))}
        assert requests <= known, path


def test_the_page_of_the_launcher_is_its_help(directory: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    text = _shown(directory / "man1/fuse-unionfs.1")
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"):
        assert section in text
    for words in HELP.removeprefix("usage: ").replace("Example: ", "").split("\n"):
        assert " ".join(words.split()) in text
