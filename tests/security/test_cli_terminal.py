"""Control characters in others' texts do not reach a terminal; piped output stays byte for byte."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, refused
from tests.security.test_plugin_answers import Hostile, says
from tests.security.test_plugin_answers import hostile as hostile
from tests.support.terminals import read_to_end
from tests.volumes.conftest import Store

NAMES = [
    b"plain", "grün".encode(), b"two words", b"it's", b'"', b"back\\slash", b"\x1b]0;title\x07", b"\x1b[2J",
    b"line\nA forged", b"tab\t", b"cr\r", b"\xff\xfe", b"\xc2\x9b31m", b"$HOME", b"`id`", b"-n", b"\x7f'\\",
    "\u202egnp.exe".encode(),
]  # fmt: skip
EVIL = "\x1b]0;title\x07\x1b[31mred\nforged \x9b2J"


def _on_terminal(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """The output of a command on a terminal, without the terminal's line ends."""
    controller, terminal = os.openpty()
    done = subprocess.Popen(
        [*UNIONFS, *map(str, arguments)],
        stdout=terminal, stderr=terminal, cwd=REPOSITORY, env={**os.environ, **(env or {})},
    )  # fmt: skip
    os.close(terminal)
    text = read_to_end(controller)
    assert done.wait(20) == 0, text
    return text.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def _is_clean(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_diff(area: Path) -> None:
    upper, lower = area / "upper", area / "lower"
    lower.mkdir()
    for name in NAMES:
        (upper / os.fsdecode(name)).mkdir(parents=True)
    layers = ("--upper", upper, "--lower", lower, "--userxattr")
    shown = _on_terminal("diff", *layers)
    assert _is_clean(shown)
    found = []
    for line in shown.splitlines():
        assert line.startswith("A ")
        done = subprocess.run(["bash", "-c", f"printf %s {line[2:]}"], capture_output=True, check=True)
        found.append(done.stdout)
    assert found == sorted(b"/" + name for name in NAMES)
    assert "A /plain\n" in shown
    assert "A /grün\n" in shown
    done = subprocess.run([*UNIONFS, "diff", *layers], capture_output=True, cwd=REPOSITORY, check=True)
    assert done.stdout == b"".join(b"A /" + name + b"\n" for name in sorted(NAMES))


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "-f", "{{.Status}}|{{.Status.a}}\\t{{lower .Status.a}}", "data"),
        ("inspect", "-f", '{{index .Status "a"}} {{.Mountpoint}}', "data"),
        ("ls", "--format", "{{.Name}} {{.Mountpoint}} {{.Labels}} {{.Label \"a\"}}"),
        ("ls", "--format", "table {{.Name}}\\t{{.Mountpoint}}\\t{{.Labels}}"),
        ("ls", "--json"), ("ls", "--format", "json"), ("inspect", "data"), ("ls",), ("ls", "-q"),
    ],
    ids=lambda command: " ".join(command)[:30],
)  # fmt: skip
def test_words_of_plugins(store: Store, hostile: Hostile, command: tuple[str, ...]) -> None:
    volume = {"Name": "data", "Mountpoint": f"/{EVIL}", "Status": {"a": EVIL, EVIL: [EVIL]}}
    hostile.scripts["VolumeDriver.Get"] = says({"Volume": volume})
    store.ok("create", "-d", "p", "--label", f"a={EVIL}", "data")
    env = {"UNIONFS_ROOT": str(store.root), **store.env}
    shown = _on_terminal("volume", *command, env=env)
    text = re.sub(r"\x1b\[[0-9;]*m(?!red)", "", shown)  # the headings of tables are bold
    assert _is_clean(text.replace("\t", ""))
    assert "\nforged" not in text
    if "{{" in str(command):
        assert EVIL in store.ok(*command)


def test_words_of_plugins_in_an_error(store: Store, hostile: Hostile) -> None:
    hostile.scripts["VolumeDriver.Get"] = says({"Err": EVIL})
    said = refused(store("create", "-d", "p", "data"), "refuses")
    assert _is_clean(said)


def test_verify(store: Store, area: Path) -> None:
    store.create("data")
    store.ok("backup", "data", "-o", area / "b.tar")
    (store.data("data") / "\x1b[31mred\r").touch()
    shown = _on_terminal("volume", "verify", "data", env={"UNIONFS_ROOT": str(store.root)})
    assert "\x1b[31mred" not in shown  # the progress has its own codes
    assert "added \\x1b[31mred" in shown
    assert "added \x1b[31mred\\r\n" in store.ok("verify", "data")
