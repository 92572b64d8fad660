"""A child that runs as another user has all modules it needs: it may not be able to read their files."""

from __future__ import annotations

import subprocess
import sys

import pytest

_RUN = """
import importlib, sys
from unittest.mock import patch
{setup}
class Unreadable:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("unionfs"):
            raise PermissionError(name)
def run_as(uid, action, *, modules=(), **_):
    for name in modules:
        importlib.import_module(name)
    sys.meta_path.insert(0, Unreadable())
    {work}
    print("done")
    return 0
{call}
"""
_DIFF = {
    "setup": "from unionfs.cli import diff; from unittest.mock import Mock",
    "work": "from unionfs.settings.specs import from_json, to_json, TmpfsOptions",
    "call": "with patch.object(diff, 'run_as', run_as): diff._of_other(Mock(pid=1), 1000, False)",
}
_CLEAR = {
    "setup": "from unionfs.daemon import dead; from unittest.mock import Mock",
    "work": "from unionfs.storage import drivers, earlier, users; from unionfs.storage.drivers import "
    "plugin_request; [drivers.find_driver(name) for name in drivers._BUILT_IN]",
    "call": "with patch.object(dead, 'run_as', run_as): dead.clear_abandoned_of(1000)",
}
_CLEAN = {
    **_CLEAR,
    "work": _CLEAR["work"] + "; assert {'importlib.metadata', 'subprocess', 'xxhash'} <= set(sys.modules)",
    "call": "with patch.object(dead, 'run_as', run_as): dead.clean(dead.DeadMount(Mock(), None, 1000))",
}


@pytest.mark.parametrize("parts", [_DIFF, _CLEAR, _CLEAN], ids=["diff", "umount", "cleanup"])
def test_late_imports_come_before(parts: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN.format(**parts)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
