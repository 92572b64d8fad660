"""A part of the faults of `scripts/faults`, another one for each commit.

Errors on the default session are tried with each; all else is slow.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.faults import branches, commands, images, injecting, plan, snapshots
from tests.faults.batch import Report
from tests.faults.deaths import resends
from tests.faults.operations import OPERATIONS
from tests.faults.plan import Selection
from tests.support.worker import REPOSITORY

pytestmark = [
    pytest.mark.usefixtures("kernel_overlay"), pytest.mark.timeout(600), pytest.mark.watchdog(550)
]  # fmt: skip

_DEFAULT: Final = "direct-hybrid"
_OTHERS: Final = "the others"


def _turn() -> int:
    """The number of commits; ``UNIONFS_FAULTS`` is another number."""
    if chosen := os.environ.get("UNIONFS_FAULTS"):
        return int(chosen)
    done = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return int(done.stdout) if done.returncode == 0 else 0


def _run(area: Path, kind: plan.Kind, on: str) -> Report:
    """All come in turn: the sessions, the tenths of the faults, then the operations."""
    if reason := injecting.reason():
        pytest.skip(reason)
    possible = plan.OUTLIVING if kind == "deaths" else plan.SESSIONS
    sessions = [one for one in possible if (one == _DEFAULT) is (on == _DEFAULT)]
    turn, number = divmod(_turn(), len(sessions))
    some = Selection(turn)
    # of the operations, too, since each kill takes a mount
    step = 4 if kind == "kills" else 3
    operations = OPERATIONS[turn // some.every % step :: step]
    return plan.run(area, sessions[number], operations=operations, kind=kind, some=some)


_ON: Final = pytest.mark.parametrize("on", [_DEFAULT, _OTHERS])


@pytest.mark.parametrize("on", [_DEFAULT, pytest.param(_OTHERS, marks=pytest.mark.slow)])
def test_errors_of_system_calls(area: Path, on: str) -> None:
    """The caller gets them or none, the tree is the old or the new one, and nothing is left."""
    report = _run(area, "errors", on)
    assert report.tried > 100
    assert not report.problems, "\n".join(report.problems)


@pytest.mark.slow
@_ON
def test_kills_between_system_calls(area: Path, on: str) -> None:
    """The tree is the old or the new one, and the next mount leaves nothing of it in the work directory."""
    report = _run(area, "kills", on)
    assert report.tried > 10
    assert not report.problems, "\n".join(report.problems)


@pytest.mark.skipif(not resends(), reason="FUSE_NOTIFY_RESEND needs Linux 6.9")
@pytest.mark.slow
@_ON
def test_deaths_of_daemons(area: Path, on: str) -> None:
    """The caller gets success, and the tree is the new one."""
    report = _run(area, "deaths", on)
    assert report.tried > 10
    assert not report.problems, "\n".join(report.problems)


@pytest.mark.slow
def test_branches(area: Path) -> None:
    """The tree below is the old or the new one, as the command says, and the same command then succeeds."""
    if reason := injecting.reason():
        pytest.skip(reason)
    turn = _turn()
    scenario = branches.SCENARIOS[turn % len(branches.SCENARIOS)]
    report = branches.run_all(area, scenarios=[scenario], some=Selection(turn, 100))
    assert report.tried > 20
    assert not report.problems, "\n".join(report.problems)


@pytest.mark.slow
def test_commands(area: Path) -> None:
    """They say what failed, leave nothing, and the same command then succeeds."""
    if reason := injecting.reason():
        pytest.skip(reason)
    scenarios = [*commands.SCENARIOS, *images.SCENARIOS]
    report = commands.run_all(area, scenarios=scenarios, some=Selection(_turn(), 100))
    assert report.tried > 50
    assert not report.problems, "\n".join(report.problems)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [False, True], ids=["errors", "kills"])
@pytest.mark.parametrize("order", snapshots.ORDERS)
def test_snapshots(area: Path, order: str, kills: bool) -> None:
    """The mount shows the same tree, or the restored one, and each snapshot stays what it was."""
    if reason := injecting.reason():
        pytest.skip(reason)
    turn = _turn()
    session = snapshots.SESSIONS[turn % len(snapshots.SESSIONS)]
    report = snapshots.run(area, session, order, kills=kills, some=Selection(turn))
    assert report.tried > 3
    assert not report.problems, "\n".join(report.problems)
