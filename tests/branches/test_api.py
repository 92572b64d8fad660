"""Branches for programs: `unionfs.branches`, with and without trio."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.branches.branching import Branching
from tests.mount import cli_calls
from tests.mount.cli_calls import place, wait_for
from tests.mount.user_calls import UID, ordinary_user
from tests.support import areas
from unionfs.branches import BranchError, ConflictError, branch, trio_branch


@pytest.fixture
def filled(branching: Branching) -> Iterator[Branching]:
    for name in ("a", "b"):
        (branching.base / name).write_text(f"{name}\n")
    former = os.environ.get("UNIONFS_ROOT")
    os.environ["UNIONFS_ROOT"] = str(branching.root)
    yield branching
    if former is None:
        del os.environ["UNIONFS_ROOT"]
    else:
        os.environ["UNIONFS_ROOT"] = former


def test_a_branch(filled: Branching) -> None:
    with branch(filled.base, root=str(filled.root)) as found:
        assert found.run(["sh", "-c", "cat a; echo new > n"], capture_output=True).stdout == "a\n"
        assert [(item["change"], item["path"]) for item in found.diff()] == [("A", "n")]
        found.run(["sh", "-c", "cat > from"], input="given\n", check=True)
        assert found.commit()["done"]
    assert (filled.base / "from").read_text() == "given\n"
    assert filled.stored()[0].startswith("commits/")


def test_it_is_discarded(filled: Branching) -> None:
    with branch(filled.base) as found, pytest.raises(subprocess.CalledProcessError):
        found.run(["sh", "-c", "echo x >> a; exit 2"], check=True)
    with pytest.raises(ZeroDivisionError), branch(filled.base) as found:  # noqa: PT012
        found.run(["sh", "-c", "echo x >> a"])
        raise ZeroDivisionError
    assert filled.stored() == []
    with pytest.raises(BranchError, match="cannot be used"):
        branch(filled.base / "none").__enter__()


def test_a_failed_commit_keeps_it(filled: Branching) -> None:
    with pytest.raises(ConflictError) as caught, branch(filled.base) as found:  # noqa: PT012
        found.run(["sh", "-c", "echo x >> a"])
        (filled.base / "a").write_text("base\n")
        found.commit()
    assert caught.value.conflicts == [("changed", "a")]
    name = caught.value.branch
    assert name == found.name
    assert f"branch {name}" in str(caught.value)
    assert filled.stored() == [f"branches/{name}"]
    # Also one that is caught in the block, and one with another cause.
    with branch(filled.base, name=name) as found, pytest.raises(ConflictError):
        found.commit()
    with pytest.raises(BranchError) as other, branch(filled.base, name="other") as found:  # noqa: PT012
        found.run(["touch", "n"])
        shutil.move(filled.base, filled.area / "elsewhere")
        found.commit()
    assert other.value.branch == "other"
    assert filled.stored() == [f"branches/{name}", "branches/other"]


def test_decided_after_a_conflict(filled: Branching) -> None:
    with branch(filled.base) as found:
        found.run(["sh", "-c", "echo x >> a; echo y > b"])
        (filled.base / "a").write_text("base\n")
        with pytest.raises(ConflictError):
            found.commit()
        assert found.commit(conflicts="theirs")["done"]
    assert (filled.base / "a").read_text() == "base\n"
    assert (filled.base / "b").read_text() == "y\n"
    assert [name for name in filled.stored() if name.startswith("branches/")] == []
    # A dry run decides nothing: the branch is kept only if its error ends the block.
    with branch(filled.base, name="dry") as found:
        found.run(["sh", "-c", "echo x >> a"])
        (filled.base / "a").write_text("again\n")
        with pytest.raises(ConflictError):
            found.commit(dry_run=True)
    assert not (filled.root / "branches/dry").exists()
    with pytest.raises(ConflictError), branch(filled.base, name="dry") as found:  # noqa: PT012
        found.run(["sh", "-c", "echo x >> a"])
        (filled.base / "a").write_text("once more\n")
        found.commit(dry_run=True)
    assert (filled.root / "branches/dry").exists()


def test_it_is_continued(filled: Branching) -> None:
    with branch(filled.base, name="br") as found:
        found.run(["sh", "-c", "echo 1 > n"])
        found.keep()
    for other in (filled.root, filled.base / "none"):
        with pytest.raises(BranchError, match=f"branch br lies over {filled.base}, not over {other}"):
            branch(other, name="br").__enter__()
    with pytest.raises(BranchError, match="not over branch x; choose"):
        branch(parent="x", name="br").__enter__()
    with branch(parent="br", name="child"), pytest.raises(BranchError, match="lies over branch br"):
        branch(filled.base, name="child").__enter__()
    with pytest.raises(ZeroDivisionError), branch(f"{filled.base}/.", name="br") as found:  # noqa: PT012
        found.run(["sh", "-c", "echo 2 >> n"])
        raise ZeroDivisionError
    with branch(filled.base, name="br") as found:
        assert found.run(["cat", "n"], capture_output=True).stdout == "1\n2\n"
        found.commit()
    assert (filled.base / "n").read_text() == "1\n2\n"


# -- trio -------------------------------------------------------------------------------------------------


def test_trio(filled: Branching) -> None:
    async def main() -> None:
        async with trio_branch(filled.base) as found:
            done = await found.run(["sh", "-c", "cat > n; cat a"], input="given\r\n", capture_output=True)
            assert (done.returncode, done.stdout, done.stderr) == (0, "a\n", "")
            with pytest.raises(subprocess.CalledProcessError) as caught:
                await found.run(["sh", "-c", "echo bad >&2; exit 4"], check=True, capture_output=True)
            assert (caught.value.returncode, caught.value.stderr) == (4, "bad\n")
            assert len(await found.diff()) == 1
            assert (await found.commit())["done"]
        with pytest.raises(ConflictError) as stopped:  # noqa: PT012
            async with trio_branch(filled.base, name="br") as found:
                await found.run(["sh", "-c", "echo x >> a"])
                (filled.base / "a").write_text("base\n")
                await found.commit()
        assert stopped.value.branch == "br"

    trio.run(main)
    assert (filled.base / "n").read_bytes() == b"given\r\n"
    assert "branches/br" in filled.stored()


def is_running(words: list[str]) -> bool:
    """Whether there is a process with this command line."""
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == line:
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("script", [
    "exec sleep 1070", pytest.param("trap '' TERM; sleep 1070; sleep 1070", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_cancelled_run_ends(filled: Branching, script: str) -> None:
    """The command has ended when the block has, and the branch is gone."""
    words = ["sh", "-c", f"echo > started; {script}", str(filled.area)]

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with trio_branch(filled.base, name="br") as found, trio.open_nursery() as nursery:
                nursery.start_soon(stop, scope)
                await found.run(words)
        assert scope.cancelled_caught

    async def stop(scope: trio.CancelScope) -> None:
        while not (filled.root / "branches/br/upper/started").exists():  # noqa: ASYNC110
            await trio.sleep(0.02)
        scope.cancel()

    trio.run(main)
    assert not is_running(words)
    assert filled.stored() == []
    assert areas.mounts_below(filled.area) == []


CANCELLED = """
import sys, trio, unionfs.branches
async def main():
    with trio.move_on_after(5) as scope:
        async with unionfs.branches.trio_branch(sys.argv[1]) as b:
            await b.run(["sleep", "1070"])
    print(scope.cancelled_caught)
trio.run(main)
"""


def test_an_ordinary_user_s_cancelled_run(root: None, area: Path) -> None:
    with place(area) as found, ordinary_user(found) as host:
        base = area / "base"
        base.mkdir()
        for path in (area, base):
            os.chown(path, UID, UID)
        done = host.run(
            "env", f"UNIONFS_ROOT={area}/storage", host.command[0], "-c", CANCELLED, base, cwd=base,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
        assert [name for name in os.listdir(area / "storage/branches") if not name.startswith(".")] == []
        assert wait_for(lambda: areas.mounts_below(area) == [])


# -- types ------------------------------------------------------------------------------------------------

USE = """
from unionfs.branches import Snapshots, branch, trio_branch

def use() -> None:
    with branch("/srv/site", name="fix") as found:
        reveal_type(found.run(["make"], check=True).stdout)
        reveal_type(found.commit()["done"])
    reveal_type(Snapshots("/mnt").ls())

async def use_trio() -> None:
    async with trio_branch("/srv/site", parent="fix") as found:
        reveal_type(await found.run(["make"], capture_output=True))
        await found.commit(conflicts="none")
"""


def test_the_package_has_its_types() -> None:
    import unionfs

    assert (Path(unionfs.__file__).parent / "py.typed").read_bytes() == b""


@pytest.mark.slow
def test_types_of_a_user_s_code(area: Path) -> None:
    pytest.importorskip("mypy")
    (area / "use.py").write_text(USE)
    words = ["-m", "mypy", "--strict", "--cache-dir", str(area / "cache"), "use.py"]
    done = cli_calls.call((sys.executable, *words), cwd=area)
    found = [line.partition(": ")[2].partition("  [")[0] for line in done.stdout.splitlines()]
    assert found[:-1] == [
        'note: Revealed type is "str"', 'note: Revealed type is "Any"',
        'note: Revealed type is "list[dict[str, Any]]"',
        'note: Revealed type is "subprocess.CompletedProcess[str]"',
        'error: Argument "conflicts" has incompatible type "Literal[\'none\']"; '
        'expected "Literal[\'stop\', \'ours\', \'theirs\', \'merge\']"',
    ], done.stdout  # fmt: skip
