"""Random operations on the union and on kernel overlayfs in parallel, over copies of the same lowers.

A run is deterministic (see ``machine``). The environment varies it:

``UNIONFS_ORACLE_SEED``       any text: other operations
``UNIONFS_ORACLE=thorough``   400 examples in the slow test, for hours, instead of 15
``UNIONFS_ORACLE_EXAMPLES``   or this number of them
``UNIONFS_ORACLE_RECORD``     a directory for the operations of each example, in the format of ``replay``
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.oracle.machine import Machine
from tests.oracle.pair import ARENAS, Pair
from tests.oracle.replay import report
from tests.support.mounting import PLAIN, session_reason

SEED = os.environ.get("UNIONFS_ORACLE_SEED", "")
RECORD = os.environ.get("UNIONFS_ORACLE_RECORD")
THOROUGH = os.environ.get("UNIONFS_ORACLE") == "thorough"

EXAMPLES = {2: 1, 3: 3}
"""Examples of a session by the number of lowers, of 40 steps each: each session has different ones, and the
sessions together take less than a minute."""
LONG = int(os.environ.get("UNIONFS_ORACLE_EXAMPLES", "400" if THOROUGH else "15"))
"""Examples of the slow test, of 80 steps each: one takes about five seconds."""
SECONDS, LONG_SECONDS = 900, 100_000
EVERYTHING = ["redirect_dir=on", "metacopy=on", "xino=on"]
"""All features of overlayfs, along with the index."""


def _compare(
    area: Path,
    session: str,
    lowers: int,
    *,
    examples: int,
    steps: int,
    options: Sequence[str] = (),
    index: bool = False,
    push_after: int = 0,
) -> None:
    pair = Pair(area, session, lowers, min(ARENAS, examples), options, index=index)
    try:
        for number in range(examples):
            machine = Machine(pair, " ".join([f"{SEED} {session} {lowers} {steps} {number}", *options]))
            try:
                machine.play(steps, push_after=push_after)
            except (AssertionError, OSError) as error:
                found = report(pair, machine.played, str(error), seconds=120)
                raise AssertionError(f"seed {SEED!r}, example {number}: {found}") from None
            finally:
                if RECORD:
                    text = "".join(f"{op}\n" for op in machine.played)
                    Path(RECORD, f"{session}-{lowers}-{steps}-{number:03}").write_text(text)
        pair.close()
    finally:
        pair.destroy()


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("lowers", sorted(EXAMPLES))
def test_same_as_kernel_overlayfs(kernel_overlay: None, area: Path, session: str, lowers: int) -> None:
    """Results, errnos, whole trees equal after each step; uppers exchangeable; lowers untouched."""
    _compare(area, session, lowers, examples=EXAMPLES[lowers], steps=40)


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
def test_same_with_index(kernel_overlay: None, area: Path, session: str) -> None:
    """The same with ``index=on``, where hard links of lowers outlive copy-up."""
    _compare(area, session, 2, examples=2, steps=40, index=True)


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("plain", [name + PLAIN for name in ("direct-hybrid", "direct-cached")])
def test_same_without_shortcuts(kernel_overlay: None, area: Path, plain: str) -> None:
    """Correctness does not depend on optimizations."""
    if reason := session_reason(plain.removesuffix(PLAIN)):
        pytest.skip(reason)
    _compare(area, plain, 2, examples=2, steps=40)


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
def test_same_without_redirects(kernel_overlay: None, area: Path, session: str) -> None:
    """Directories with lower parts cannot be renamed."""
    _compare(area, session, 2, examples=1, steps=40, options=["redirect_dir=off"])


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
def test_same_with_metacopy(kernel_overlay: None, area: Path, session: str) -> None:
    """Changes of metadata, and other names, copy up metadata alone."""
    _compare(area, session, 2, examples=2, steps=40, options=["metacopy=on"])


@pytest.mark.watchdog(SECONDS)
@pytest.mark.timeout(SECONDS)
def test_same_with_everything(kernel_overlay: None, area: Path, session: str) -> None:
    """All features together, and a new upper after every 15 steps, with the old one as topmost lower."""
    _compare(area, session, 2, examples=2, steps=45, options=EVERYTHING, index=True, push_after=15)


@pytest.mark.watchdog(LONG_SECONDS)
@pytest.mark.timeout(LONG_SECONDS)
@pytest.mark.slow
def test_everything_for_long(kernel_overlay: None, area: Path, session: str) -> None:
    """The same with longer examples, and more of them."""
    _compare(area, session, 3, examples=LONG, steps=80, options=EVERYTHING, index=True, push_after=18)


@pytest.mark.watchdog(LONG_SECONDS)
@pytest.mark.timeout(LONG_SECONDS)
@pytest.mark.parametrize("lowers", sorted(EXAMPLES))
@pytest.mark.slow
def test_same_for_long(kernel_overlay: None, area: Path, session: str, lowers: int) -> None:
    """The same with longer examples, and more of them."""
    _compare(area, session, lowers, examples=LONG, steps=80)
