"""A lower with failing names: the others are listed and used, as on kernel overlayfs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.security.failing_lower import ERRORS, KINDS
from tests.security.serving import serving
from tests.support.mounting import kernel_mounted, mounted
from unionfs.union.diff import diff

SERVER = Path(__file__).with_name("failing_lower.py")


@pytest.fixture
def failing(area: Path, root: None) -> Iterator[Path]:
    """The lower, mounted."""
    place = area / "failing"
    with serving(SERVER, place):
        yield place


def _tried(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@contextmanager
def _mounted(place: Path, failing: Path, session: str, *, merged: bool) -> Iterator[Path]:
    lowers = [place / "above", failing] if merged else [failing]
    for path in (place / "above", place / "upper", place / "work"):
        path.mkdir(parents=True)
    (place / "above/mine").touch()
    (place / "above/dir").mkdir()
    chosen: dict[str, Any] = {"lowers": lowers, "upper": place / "upper", "work": place / "work"}
    with (
        kernel_mounted(place, **chosen) if session == "kernel" else mounted(place, session=session, **chosen)
    ) as mount:
        yield mount.mountpoint


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
def test_names_that_fail(
    kernel_overlay: None, area: Path, failing: Path, session: str, merged: bool
) -> None:
    found = []
    for which in ("kernel", session):
        with _mounted(area / which, failing, which, merged=merged) as top:
            facts: dict[str, Any] = {"": sorted(os.listdir(top))}
            for name in KINDS:
                st = _tried(os.lstat, top / name)
                facts[name] = st if isinstance(st, str) else oct(st.st_mode)
            facts["again"] = sorted(os.listdir(top))
            for name in ("EIO", "ESTALE"):
                for call in (os.unlink, os.rmdir, os.mkdir, os.listdir):
                    facts[f"{call.__name__} {name}"] = _tried(call, top / name)
            (top / "new").touch()
            facts["new"] = sorted(os.listdir(top))
            found.append(facts)
    kernel, ours = found
    # overlayfs lists a directory of only one layer unchanged
    assert ours == kernel
    assert set(ERRORS) <= set(ours[""])


def test_diff(area: Path, failing: Path) -> None:
    upper = area / "upper"
    upper.mkdir()
    for name in ("EIO", "file", "new"):
        (upper / name).touch()
    found = list(diff(str(upper), [str(failing)], b"trusted.overlay."))
    assert found == [("C", b"/EIO"), ("C", b"/file"), ("A", b"/new")]
