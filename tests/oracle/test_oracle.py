"""Random operations on the union and on kernel overlayfs at once, over copies of the same lowers.

``UNIONFS_ORACLE=thorough`` makes long random runs (``UNIONFS_ORACLE_EXAMPLES`` of them); without it the runs
are bounded and always the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.oracle.machine import Machine
from tests.oracle.pair import Pair
from tests.oracle.replay import report

THOROUGH = os.environ.get("UNIONFS_ORACLE") == "thorough"

# A failing sequence is shortened by tests.oracle.replay, which knows that steps do not depend on each other.
_common = settings(
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
)
PROFILES = {
    2: settings(_common, max_examples=10, stateful_step_count=40, derandomize=True),
    3: settings(_common, max_examples=25, stateful_step_count=40, derandomize=True),
}
LONG = settings(
    _common,
    max_examples=int(os.environ.get("UNIONFS_ORACLE_EXAMPLES", "400")),
    stateful_step_count=80,
)
SECONDS = 100_000 if THOROUGH else 900


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("lowers", sorted(PROFILES))
@pytest.mark.slow
def test_same_as_kernel_overlayfs(kernel_overlay: None, area: Path, session: str, lowers: int) -> None:
    """Results, errnos, whole trees equal after each step; uppers exchangeable; lowers untouched."""
    pair = Pair(area, session, lowers)
    machine = type("OracleMachine", (Machine,), {"pair": pair})
    try:
        try:
            run_state_machine_as_test(machine, settings=LONG if THOROUGH else PROFILES[lowers])
        except Exception:
            failure = machine.failure  # type: ignore[attr-defined]
            if failure is None:
                raise
            raise AssertionError(report(pair, *failure, seconds=120)) from None
        pair.close()
    finally:
        pair.destroy()
