"""`-o max_nodes`: the kernel forgets unused files when it knows more than that."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, place, refused, session_words, succeed, wait_for
from tests.mount.cli_calls import unionfs as command

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
LIMIT, DIRECTORIES, FILES = 400, 20, 100


@contextmanager
def limited(area: Path, session: str, *options: str) -> Iterator[Place]:
    """A mount with the limit, over more files than that."""
    with place(area) as found:
        for one in range(DIRECTORIES):
            directory = found.lower / f"d{one:02d}"
            directory.mkdir()
            for other in range(FILES):
                (directory / f"f{other:03d}").write_text(f"{one} {other}")
        words = session_words(session)
        succeed(command("mount", "-o", f"max_nodes={LIMIT}", *options, *found.layers, *words, found.merged))
        yield found
        succeed(command("umount", found.merged))


def figures(found: Place) -> dict[str, object]:
    """The daemon's figures."""
    shown: dict[str, object] = json.loads(succeed(command("inspect", "--json", found.merged)))["figures"]
    return shown


def expected(found: Place) -> int:
    """The number of names in the layers."""
    layers = (found.lower, found.root / "lower2", found.upper)
    return len({path.relative_to(layer) for layer in layers for path in (layer, *layer.rglob("*"))})


def walk(found: Place) -> int:
    """Look up everything, by another process, whose working directory holds nothing; the number of names."""
    listed = subprocess.run(["find", found.merged, "-printf", "%s\n"], stdout=subprocess.PIPE, check=True)
    return listed.stdout.count(b"\n")


@pytest.fixture
def prunes(session: str) -> None:
    """The session and the kernel can give nodes back."""
    if session == "pyfuse3":
        pytest.skip("libfuse cannot send this notification")
    if KERNEL < (6, 18):
        pytest.skip("FUSE_NOTIFY_PRUNE needs Linux 6.18")


@pytest.mark.slow_on("direct-passthrough")
@pytest.mark.parametrize("options", [(), ("-o", "outlive")])
def test_unused_nodes_are_given_back(
    root: None, area: Path, session: str, prunes: None, options: tuple[str, ...]
) -> None:
    """The number of nodes stays about the limit, however much is looked up; all names stay right."""
    with limited(area, session, *options) as found:
        names = expected(found)
        for _ in range(3):
            assert walk(found) == names
            assert wait_for(lambda: figures(found)["nodes"] <= LIMIT)  # type: ignore[operator]
        asked = figures(found)["node_limit"]
        assert isinstance(asked, dict)
        assert asked["max_nodes"] == LIMIT
        assert asked["asked_for"] > 3 * (DIRECTORIES * FILES - LIMIT) // 2


@pytest.mark.slow_on("direct-passthrough")
def test_what_is_used_stays(root: None, area: Path, session: str, prunes: None) -> None:
    """Open and mapped files, removed ones, working directories and inode numbers outlast the notices."""
    with limited(area, session) as found, ExitStack() as stack:
        merged = found.merged
        reading = stack.enter_context((merged / "d00/f000").open("rb"))
        writing = stack.enter_context((merged / "d00/f001").open("r+b"))
        removed = stack.enter_context((merged / "d00/f002").open("r+b"))
        os.unlink(merged / "d00/f002")
        with (merged / "d00/f003").open("r+b") as file:
            mapped = stack.enter_context(mmap.mmap(file.fileno(), 0))
        inside = subprocess.Popen(
            ["sh", "-c", "read line; cat f004; echo; ls | wc -l"], cwd=merged / "d01",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(inside.communicate)
        numbers = {name: os.stat(merged / name).st_ino for name in ("d02", "d02/f005", "d00/f000")}
        for _ in range(3):
            walk(found)
            assert wait_for(lambda: figures(found)["nodes"] <= LIMIT)  # type: ignore[operator]
        assert reading.read() == b"0 0"
        writing.seek(0, os.SEEK_END)
        writing.write(b" more")
        writing.flush()
        assert (merged / "d00/f001").read_bytes() == b"0 1 more"
        assert removed.read() == b"0 2"
        mapped[:1] = b"9"
        mapped.flush()
        assert (merged / "d00/f003").read_bytes() == b"9 3"
        assert inside.communicate("\n")[0].split() == ["1", "4", str(FILES)]
        assert {name: os.stat(merged / name).st_ino for name in numbers} == numbers


@pytest.mark.slow_on("direct-passthrough")
def test_more_is_used_than_the_limit(root: None, area: Path, session: str, prunes: None) -> None:
    """Everything works, and the notices stop until more is looked up."""
    if session == "direct-cached":
        pytest.skip("it sends no OPEN, so no file is known to be open")
    with limited(area, session) as found, ExitStack() as stack:
        for one in range(6):
            for other in range(FILES):
                stack.enter_context((found.merged / f"d{one:02d}/f{other:03d}").open("rb"))
        asked = figures(found)["node_limit"]["asked_for"]  # type: ignore[index]
        for _ in range(20):
            assert (found.merged / "d00/f000").read_bytes() == b"0 0"
        assert figures(found)["node_limit"]["asked_for"] == asked  # type: ignore[index]
        assert figures(found)["nodes"] > LIMIT  # type: ignore[operator]
        walk(found)
        assert wait_for(lambda: figures(found)["node_limit"]["asked_for"] > asked)  # type: ignore[index]


def test_without_a_way_to_ask(root: None, area: Path, session: str) -> None:
    """The mount works, and says why the limit has no effect."""
    if session != "pyfuse3":
        pytest.skip("of libfuse only")
    with limited(area, session) as found:
        assert walk(found) == expected(found)
        assert "libfuse" in figures(found)["node_limit"]["none_because"]  # type: ignore[index]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e6", "٣", "9" * 5000, "=", ""])
def test_bad_numbers(root: None, area: Path, value: str) -> None:
    """A sentence."""
    with place(area) as found:
        refused(command("mount", "-o", f"max_nodes={value}", *found.layers, found.merged), "option max_nodes")
