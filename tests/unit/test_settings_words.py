"""Values as words."""

from __future__ import annotations

import time

import pytest

from unionfs.settings.words import in_table, moment


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_moments(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON with the offset, in tables without it; both in local time, as strftime(3)."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for seconds in (0.0, 1_700_000_000.9, 1_750_000_000.0):
            local = time.localtime(seconds)
            offset = time.strftime("%z", local)
            assert moment(seconds) == time.strftime("%Y-%m-%dT%H:%M:%S", local) + f"{offset[:3]}:{offset[3:]}"
            assert in_table(moment(seconds)) == time.strftime("%Y-%m-%d %H:%M:%S", local)
        assert in_table(None) == "-"
    finally:
        monkeypatch.undo()
        time.tzset()
