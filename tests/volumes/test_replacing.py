"""Content exchanged entry by entry, and a process killed at every step of it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unionfs.errors import UserError
from unionfs.storage import workspace
from unionfs.storage.drivers.replacing import finish_in_place, in_place, recover_sibling, sibling
from unionfs.storage.model import Volume
from unionfs.sys import calls

Restore = Callable[[Path], None]

STEPS = ("mkdir", "rename", "unlink", "rmdir", "chown", "chmod", "utime")


def _fill(root: Path, word: str, *own: str) -> None:
    for name in ("both", *own):
        (root / name).write_text(word)
    (root / "both dirs").mkdir()
    (root / "both dirs" / word).write_text(word)


def _tree(root: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not name.startswith(".unionfs-"):
            found[name] = path.read_text() if path.is_file() else None
    return found


def _volume(data: Path) -> Volume:
    """The volume with that directory: its records are in a directory beside it."""
    home = data.parent / f"records of {data.name}"
    home.mkdir(exist_ok=True)
    return Volume("vol", "local", str(data), False, directory=str(home))


def _restore(data: Path) -> None:
    with in_place(_volume(data), str(data)) as replacement:
        _fill(Path(replacement.path), "new", "only new")
        replacement.commit()


def _restore_beside(data: Path) -> None:
    with sibling(str(data)) as replacement:
        _fill(Path(replacement.path), "new", "only new")
        replacement.commit()


def _killed_at(step: int, data: Path, restore: Restore) -> bool:
    """Restore in a process that is killed before its `step`th change; False if there are fewer."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def stop_or_call(*args: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **named)

            return stop_or_call

        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            restore(data)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_each_step(area: Path) -> None:
    """The content is either the old or the new one, and the new one from the deciding step on."""
    old, new = area / "old", area / "new"
    for place, word in ((old, "old"), (new, "new")):
        place.mkdir()
        _fill(place, word, f"only {word}")
    seen = []
    for step in range(200):
        data = area / f"data {step}"
        data.mkdir()
        _fill(data, "old", "only old")
        killed = _killed_at(step, data, _restore)
        finish_in_place(_volume(data), str(data))
        found = _tree(data)
        assert found in (_tree(old), _tree(new)), step
        assert sorted(os.listdir(data)) == sorted(os.listdir(new if found == _tree(new) else old))
        left = os.listdir(_volume(data).directory)
        assert all(name.endswith(".json.new") for name in left), left
        seen.append(found == _tree(new))
        _restore(data)  # the leftovers do not interfere
        assert _tree(data) == _tree(new)
        assert sorted(os.listdir(data)) == sorted(os.listdir(new))
        if not killed:
            break
    else:
        pytest.fail("there is no end of steps")
    assert seen == sorted(seen)
    assert not seen[0]
    assert seen[-1]


def test_a_workspace_of_a_living_process_is_left_alone(area: Path) -> None:
    data = area / "data"
    data.mkdir()
    _fill(data, "old")
    with in_place(_volume(data), str(data)) as replacement:
        _fill(Path(replacement.path), "new")
        finish_in_place(_volume(data), str(data))
        (workspace,) = [name for name in os.listdir(data) if name.startswith(".unionfs-")]
        assert (data / workspace).stat().st_mode & 0o777 == 0o700
        replacement.commit()
    assert (data / "both").read_text() == "new"
    assert not os.listdir(_volume(data).directory)


def test_a_name_that_another_process_makes_again_and_again(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new content waits in the workspace until that process has ended."""
    data = area / "data"
    data.mkdir()
    _fill(data, "old")
    real = workspace._move_away

    def moved_in_vain(name: str, aside: str, root: int, old: int) -> None:
        real(name, aside, root, old)
        (data / "both dirs/in the way").mkdir(parents=True, exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_move_away", moved_in_vain)
        with pytest.raises(UserError, match="only a part of the volume's new content"):
            _restore(data)
    # As if that process, this one, had ended.
    monkeypatch.setattr(workspace.VolumeUser, "is_gone", True)
    finish_in_place(_volume(data), str(data))
    assert (data / "both dirs/new").read_text() == "new"
    assert sorted(os.listdir(data)) == ["both", "both dirs", "only new"]


def test_only_content_that_was_set_aside_is_moved_back(area: Path) -> None:
    for name in ("precious.old", ".restore-x", "x.old.restore-"):
        (area / name).mkdir()
    assert not recover_sibling(str(area / "data"))
    (area / ".restore-x.old").mkdir()
    assert recover_sibling(str(area / "data"))
    assert sorted(os.listdir(area)) == [".restore-x", "data", "precious.old", "x.old.restore-"]
    (area / ".restore-y.old").mkdir()
    assert not recover_sibling(str(area / "data"))


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_each_step_beside(area: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """The same for content beside it, on filesystems with and without RENAME_EXCHANGE."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "renameat2")

    if not exchanges:
        monkeypatch.setattr(calls, "renameat2", refuse)
    old, new = area / "old", area / "new"
    for place, word in ((old, "old"), (new, "new")):
        place.mkdir()
        _fill(place, word, f"only {word}")
    for step in range(100):
        data = area / f"volume {step}" / "data"
        data.mkdir(parents=True)
        _fill(data, "old", "only old")
        killed = _killed_at(step, data, _restore_beside)
        recover_sibling(str(data))
        assert _tree(data) in (_tree(old), _tree(new)), step
        _restore_beside(data)
        assert _tree(data) == _tree(new)
        assert os.listdir(data.parent) == ["data"]
        if not killed:
            break
    else:
        pytest.fail("there is no end of steps")
