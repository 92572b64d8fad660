"""Files of results: what is saved is what is loaded, and what can't be used is one sentence."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.perf.results import BadResults, join, load, parse, save
from tests.perf.runs import READ, UNTAR, run_of

_REPOSITORY = Path(__file__).parents[2]

#: As scripts/perf wrote it before there were schemas.
_SCHEMA_1 = {
    "machine": {"kernel": "6.18.1", "python": "3.11.7", "cpus": 2, "cpu": "AMD EPYC"},
    "settings": {"rounds": 2, "seconds": 0.3, "size": 256, "entries": 100000},
    "complete": True,
    "versions": {"overlayfs": "6.18.1", "fuse-overlayfs": "1.10", "hybrid": "0.1.0"},
    "missing": {"unionfs-fuse": "unionfs-fuse is not installed"},
    "figures": [
        {
            "group": "fio", "name": "lower-seqread cold", "unit": "MiB/s", "better": "more",
            "contestants": {
                "overlayfs": {"samples": [4000.0, 5000.0], "median": 4500.0, "ratios": {"overlayfs": 1.0}},
                "hybrid": {"samples": [2250.0, 2250.0], "median": 2250.0, "ratios": {"overlayfs": 0.5}},
            },
        }
    ],
    "daemons": {
        "lower-seqread": {
            "hybrid": {"cpu_ms": 30.0, "cpu_us_per_request": 100.0, "requests": {"read": 290, "open": 10}},
            "fuse-overlayfs": {"cpu_ms": 10.0, "cpu_us_per_request": None, "requests": None},
        }
    },
    "failures": [{"workload": "rm", "contestant": "fuse-overlayfs", "reason": "Directory not empty"}],
}  # fmt: skip


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    run = run_of(
        {
            UNTAR: {"overlayfs": [100.0, 120.0, 110.0], "hybrid": [900.0, 1000.0, 950.0]},
            READ: {"hybrid": [3000.5], "plain": [9000.25]},
        },
        requests=[{"lookup": 10, "write": 5}, {"lookup": 12}],
        operations=[5.0, 6.0],
        missing={"mergerfs": "not \N{SNOWMAN} installed"},
    )
    run.results.failures["rm", "hybrid"] = 'it "failed" </script>'
    run.results.skipped["copy-up", None] = "no room"
    save(run, tmp_path / "x.json")
    again = load(tmp_path / "x.json")
    for each in ("samples", "daemons", "failures", "skipped"):
        assert getattr(again.results, each) == getattr(run.results, each)
    for each in vars(run):
        if each != "results":
            assert getattr(again, each) == getattr(run, each)


def test_other_readers_find_what_can_be_computed(tmp_path: Path) -> None:
    own, other, peer = [900.0, 1000.0, 990.0], [100.0, 130.0, 110.0], [500.0, 400.0]
    run = run_of({UNTAR: {"overlayfs": other, "hybrid": own, "mergerfs": peer, "fuse-overlayfs": [700.0]}})
    save(run, tmp_path / "x.json")
    (figure,) = json.loads((tmp_path / "x.json").read_text())["figures"]
    assert figure["best_peer"] == "mergerfs"
    row = figure["contestants"]["hybrid"]
    assert (row["median"], row["low"], row["high"]) == (990.0, 900.0, 1000.0)
    # less is better, so the other's median is divided by one's own
    assert row["ratios"]["overlayfs"] == pytest.approx(110 / 990)
    assert row["ratio_to_best_peer"] == pytest.approx(statistics.median(peer) / 990)


def test_ratios_within_rounds_enclose_that_of_medians() -> None:
    run = run_of({UNTAR: {"overlayfs": [1.0, 8.0, 3.0], "hybrid": [2.0, 8.0, 12.0]}})
    rounds = run.round_ratios(UNTAR, "hybrid", "overlayfs")
    assert rounds == [0.5, 1.0, 0.25]
    assert run.results.ratio(UNTAR, "hybrid", "overlayfs") == 3 / 8


def test_unequal_rounds_are_held_against_the_median() -> None:
    run = run_of({READ: {"overlayfs": [100.0, 200.0, 300.0], "hybrid": [50.0, 400.0]}})
    assert run.round_ratios(READ, "hybrid", "overlayfs") == [0.25, 2.0]


def test_schema_1_is_understood() -> None:
    run = parse(json.dumps(_SCHEMA_1).encode(), "old.json")
    assert run.results.samples[READ] == {"overlayfs": [4000.0, 5000.0], "hybrid": [2250.0, 2250.0]}
    assert {each.name: each.kind for each in run.contestants} == {
        "overlayfs": "kernel", "fuse-overlayfs": "peer", "hybrid": "ours", "unionfs-fuse": "peer",
    }  # fmt: skip
    workload = run.workload_of(READ)
    assert workload is not None
    assert workload.name == "lower-seqread"
    daemon = run.results.daemons["lower-seqread"]["hybrid"]
    assert daemon.request_medians() == {"read": 290, "open": 10}
    assert daemon.microseconds_each() == pytest.approx(100.0)
    assert run.results.daemons["lower-seqread"]["fuse-overlayfs"].requests == []
    assert run.results.failures == {("rm", "fuse-overlayfs"): "Directory not empty"}


def _changed(**changes: object) -> bytes:
    return json.dumps({**_SCHEMA_1, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "no result of scripts/perf", id="empty"),
        pytest.param(b"\x7fELF\xff", "no result of scripts/perf", id="binary"),
        pytest.param(b"[1, 2]", "no result of scripts/perf", id="other JSON"),
        pytest.param(b"{}", "no result of scripts/perf", id="an empty object"),
        pytest.param(b"[" * 200_000, "no result of scripts/perf", id="deep"),
        pytest.param(_changed()[:-30], "no result of scripts/perf", id="cut off"),
        pytest.param(_changed(schema=99), "newer scripts/perf", id="of tomorrow"),
        pytest.param(_changed(figures=_SCHEMA_1["figures"] * 2), "twice", id="twice"),  # type: ignore[operator]
        pytest.param(_changed(versions={"hybrid": 1}), "$.versions", id="a number for a version"),
        pytest.param(
            _changed(figures=[{**_SCHEMA_1["figures"][0], "better": "maybe"}]),  # type: ignore[index]
            "$.figures[0].better", id="neither more nor less",
        ),
        pytest.param(
            _changed(figures=[{**_SCHEMA_1["figures"][0],  # type: ignore[index]
                               "contestants": {"hybrid": {"samples": [1, "NaN"]}}}]),
            "samples[1]", id="no number",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(content: bytes, says: str) -> None:
    with pytest.raises(BadResults) as caught:
        parse(content, "some/file")
    sentence = str(caught.value)
    assert sentence.startswith("some/file ")
    assert says in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("kind", ["missing", "directory", "other"])
def test_commands_refuse_with_one_line_and_exit_code_1(tmp_path: Path, command: str, kind: str) -> None:
    bad, page = tmp_path / "bad.json", tmp_path / "page.html"
    if kind == "directory":
        bad.mkdir()
    elif kind == "other":
        bad.write_text("{")
    words = [str(bad), "-o", str(page)] if command == "report" else [str(bad), str(bad)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.perf", command, *words], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(_REPOSITORY)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(bad) in done.stderr
    assert not page.exists()


def test_runs_of_different_workloads_are_joined() -> None:
    names = run_of(
        {UNTAR: {"hybrid": [1.0], "overlayfs": [2.0]}},
        settings={"only": ["metadata"], "rounds": 3, "size": 256},
    )
    data = run_of({READ: {"hybrid": [7.0]}}, settings={"only": ["fio"], "rounds": 5, "size": 256})
    data.results.failures["lower-seqread", "cached"] = "why"
    both = join([names, data])
    assert both.results.samples == {**names.results.samples, **data.results.samples}
    assert both.results.failures == data.results.failures
    assert both.settings == {"only": ["metadata", "fio"], "rounds": "3, 5", "size": 256}
    assert both.seconds == 180.0
    assert both.contestants == names.contestants
    assert join([names]).results.samples == names.results.samples


def test_what_is_no_part_of_the_same_is_not_joined() -> None:
    names = run_of({UNTAR: {"hybrid": [1.0]}})
    with pytest.raises(BadResults, match="untar"):
        join([names, names])
    elsewhere = run_of({READ: {"hybrid": [1.0]}}, machine={"kernel": "7.0"})
    with pytest.raises(BadResults, match="machines"):
        join([names, elsewhere])
