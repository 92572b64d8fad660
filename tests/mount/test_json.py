"""The output of --json is as docs/json.md says: every key, with its type, and no other."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place

_PAGE = cli_calls.REPOSITORY / "docs/json.md"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "boolean": (bool,), "map": (dict,), "object": (dict,),
    "null": (type(None),), "number": (int, float),
}  # fmt: skip


def _documented() -> dict[str, dict[str, str]]:
    """By command: the types of its keys."""
    found: dict[str, dict[str, str]] = {}
    command = ""
    for line in _PAGE.read_text().splitlines():
        if heading := re.fullmatch(r"### `unionfs (.*)`", line):
            command = heading[1]
            found[command] = {}
        elif row := re.fullmatch(r"\| `([^`]+)` \| ([a-z ]+) \|.*", line):
            found[command][row[1]] = row[2]
    return found


def _paths(value: Any, at: str, types: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Every documented level of a value; what is below a map or an object is not looked at."""
    if at in types and not (isinstance(value, list) and f"{at}[]" in types):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{at}.{key}" if at else key, types)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, f"{at}[]", types)
    else:
        yield at, value


def _agrees(command: str, value: Any) -> None:
    types = {key.rstrip("?"): kind for key, kind in _documented()[command].items()}
    optional = {key.rstrip("?") for key in _documented()[command] if key.endswith("?")}
    seen = set()
    for path, inner in _paths(value, "", types):
        if inner is None and path not in types and any(key.startswith(f"{path}[") for key in types):
            continue  # a list that is not known
        assert path in types, f"{command}: {path} is not documented"
        allowed = tuple(one for word in types[path].split(" or ") for one in _TYPES[word])
        assert isinstance(inner, allowed), (command, path, inner)
        assert not (isinstance(inner, bool) and bool not in allowed), (command, path, inner)
        seen.add(path)
    empty = {key for key in types if "[]" in key}  # of lists without an item
    missing = set(types) - seen - optional - empty
    assert not missing, f"{command}: {missing} is documented, but not there"


@pytest.fixture
def call(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("UNIONFS_ROOT", str(place.root / "storage"))

    def run(*words: str | Path) -> Any:
        done = cli_calls.unionfs(*words, cwd=place.root)
        return json.loads(done.stdout)

    return run


def test_mounts(place: Place, call: Any) -> None:
    place.mount()
    (place.merged / "base").write_text("changed")
    (place.merged / os.fsdecode(b"\xff")).touch()
    _agrees("ls --json", call("ls", "--json"))
    _agrees("inspect --json MOUNTPOINT", call("inspect", "--json", place.merged))
    changes = call("diff", "--json", place.merged)
    _agrees("diff --json MOUNTPOINT", changes)
    assert changes == [{"change": "C", "path": "/base"}, {"change": "A", "path": "/\udcff"}]
    _agrees("top --json", call("top", "--json", "--seconds", "0.1"))
    _agrees("stats --json MOUNTPOINT", call("stats", "--json", place.merged))
    with (place.merged / "base").open() as held:
        cli_calls.succeed(cli_calls.unionfs("umount", "--lazy", place.merged))
        listed = call("ls", "--json")
        assert any(one["held_by"] for one in listed)
        _agrees("ls --json", listed)
        held.read()


def test_snapshots(place: Place, call: Any) -> None:
    place.mount("--session", "direct")
    with (place.merged / "base").open("w") as file:
        file.write("changed")
        file.flush()
        mapped = os.open(place.merged / "base", os.O_RDWR)
        taken = call("snapshot", "create", "--json", place.merged, "first")
        _agrees("snapshot create --json MOUNTPOINT", taken)
        os.close(mapped)
    _agrees("snapshot ls --json MOUNTPOINT", call("snapshot", "ls", "--json", place.merged))
    (place.merged / "deep").write_text("changed")
    os.rename(place.merged / "base", place.merged / "renamed")
    words = "snapshot", "diff", "--json", "--content", place.merged, "first"
    _agrees("snapshot diff --json MOUNTPOINT NAME", call(*words))
    restored = call("snapshot", "restore", "--json", place.merged, "first")
    _agrees("snapshot restore --json MOUNTPOINT NAME", restored)
    _agrees("snapshot rm --json MOUNTPOINT NAME", call("snapshot", "rm", "--json", place.merged, "first"))


def test_volumes(place: Place, call: Any) -> None:
    cli_calls.succeed(cli_calls.unionfs("volume", "create", "--label", "a=b", "data"))
    (place.root / "storage/volumes/data/_data/file").write_text("content")
    _agrees("volume ls --json", call("volume", "ls", "--json", "--size"))
    _agrees("volume inspect NAME", call("volume", "inspect", "data"))
    backup = call("volume", "backup", "--json", "data", "-o", "x.tar")
    _agrees("volume backup --json NAME", backup)
    assert (backup["volume"], backup["archive"], backup["entries"], backup["size"]) == ("data", "x.tar", 2, 7)
    _agrees("volume restore --json NAME", call("volume", "restore", "--json", "data", "-i", "x.tar"))
    _agrees("volume export --json NAME", call("volume", "export", "--json", "data", "-o", "y.tar"))
    _agrees("volume restore --json NAME", call("volume", "import", "--json", "data", "y.tar"))
    _agrees("volume clone --json SRC DST", call("volume", "clone", "--json", "data", "other"))
    _agrees("volume verify --json NAME", call("volume", "verify", "--json", "data"))
    _agrees("volume verify --json FILE", call("volume", "verify", "--json", "./x.tar"))
    _agrees("system df --json", call("system", "df", "--json"))
    pruned = call("volume", "prune", "--json", "-af")
    _agrees("volume prune --json", pruned)
    assert pruned["removed"] == ["data", "other"]


def test_images(place: Place, call: Any) -> None:
    upper, layer = ("-u", place.upper), place.root / "layer.tar.gz"
    (place.upper / "new").write_text("content")
    exported = call("layer", "export", "--json", *upper, "-o", layer)
    _agrees("layer export --json", exported)
    with tarfile.open(layer) as tar:
        assert exported["entries"] == len(tar.getnames())
    assert (exported["size"], exported["whiteouts"]) == (7, 0)
    assert exported["blob_size"] == layer.stat().st_size
    imported = call("layer", "import", "--json", layer, place.root / "unpacked")
    _agrees("layer import --json LAYER DIR", imported)
    assert imported["diff_id"] == exported["diff_id"]
    squashed = call("layer", "squash", "--json", layer, layer, "-o", place.root / "both.tar")
    _agrees("layer export --json", squashed)
    assert squashed["digest"] == squashed["diff_id"]
    place.mount()
    archive = f"oci-archive:{place.root}/image.tar:web:2"
    committed = call("commit", "--json", place.merged, "--image", archive)
    _agrees("commit --json MOUNTPOINT", committed)
    assert len(committed["layers"]) == 3  # two lowers and the upper
    added = call("image", "import", "--json", archive)
    _agrees("image import --json IMAGE", added)
    assert added["id"] == committed["id"]


def test_containers(place: Place, call: Any) -> None:
    (place.root / "storage/containers/made").mkdir(parents=True)
    for path in (place.root / "storage", place.root / "storage/containers"):
        path.chmod(0o700)
    _agrees("ps --json", call("ps", "-a", "--json"))
    pruned = call("container", "prune", "-f", "--json")
    _agrees("container prune --json", pruned)
    assert pruned == {"removed": ["made"], "bases": []}


def test_the_host(place: Place, call: Any) -> None:
    _agrees("info --json", call("info", "--json"))
    _agrees("config show --json", call("config", "show", "--json"))
    _agrees("cleanup --json", call("cleanup", "--dry-run", "--json"))
    _agrees("doctor --json", call("doctor", "--json", "--dir", place.root))
    (place.upper / "x").touch()
    os.setxattr(place.upper / "x", "trusted.overlay.opaque", b"y")
    found = call("check", "--json", "-u", place.upper, "-l", place.lower)
    _agrees("check --json", found)


def test_branches(place: Place, call: Any) -> None:
    """Without a mount, but for the one command of `try`."""
    base = place.root / "base"
    base.mkdir()
    (base / "old").write_text("line\n")
    made = call("branch", "create", "--json", "--no-mount", "--base", base, "br")
    _agrees("branch create --json NAME", made)
    script = "mv old new; echo more > more; ln -s x link; chmod 0700 ."
    report = place.root / "report"
    words = ["try", "-q", "--keep", "-n", "br", "--report", report, "--", "sh", "-c", script]
    cli_calls.unionfs(*words, cwd=base)
    _agrees("try --report FILE", json.loads(report.read_text()))
    _agrees("branch ls --json", call("branch", "ls", "--json"))
    changes = call("branch", "diff", "--json", "--content", "br")
    _agrees("branch diff --json NAME", changes)
    assert [(one["change"], one["path"]) for one in changes] == [
        ("C", "."), ("A", "link"), ("A", "more"), ("R", "new"),
    ]  # fmt: skip
    done = call("branch", "commit", "--json", "br")
    _agrees("branch commit --json NAME", done)
    assert done["changes"] == [["C", "."], ["A", "link"], ["A", "more"], ["A", "new"], ["D", "old"]]
    undone = call("branch", "undo", "--json")
    _agrees("branch undo --json", undone)
    assert undone == {"name": "br", "base": str(base), "parent": None}
    _agrees("branch rename --json NAME NEW", call("branch", "rename", "--json", "br", "other"))
    _agrees("branch discard --json NAME", call("branch", "discard", "--json", "other"))


def test_every_command_with_json_is_documented() -> None:
    """But those whose subject is a group documented once."""
    from unionfs.cli.main import cli
    from unionfs.cli.manual import commands

    documented = {re.sub(r" --json.*| [A-Z].*", "", command) for command in _documented()}
    have = {path for path, command in commands(cli) if any("--json" in p.opts for p in command.params)}
    known = {
        "volume import", "container ls", "image ls", "image prune", "image inspect", "branch mount",
        "branch rm", "layer squash",
    }  # fmt: skip
    assert have - documented - known == set()
