"""Prometheus's text format, parsed by Prometheus's own client."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from unionfs.daemon.exposition import exposition
from unionfs.daemon.live import LiveMount
from unionfs.daemon.settle import settle
from unionfs.daemon.stats import Sample
from unionfs.fuse.latency import Histogram

TIMES = [1, 4096, 4097, 20_000, 1_000_000, 30_000_000_000]


def _mount(mountpoint: str) -> LiveMount:
    settings = settle("/mnt", lowers=["/"], trusted_xattrs=True)
    settings = replace(settings, mountpoint=mountpoint)
    return LiveMount(settings, 1, 2, "0:50", 1700000000.25, ())


def _sample() -> Sample:
    histogram = Histogram()
    for ns in TIMES:
        histogram.record(ns)
    figures = {"nodes": 7, "open_files": 1, "read_bytes": 5, "written_bytes": 6, "copy_ups": 2,
               "copied_bytes": 9, "copy_up_seconds": 0.5, "resident_bytes": 1 << 20}  # fmt: skip
    return Sample(1, "direct", "hybrid", {"lookup": 10, "read": 3}, figures, {"lookup": histogram})


@pytest.mark.parametrize(
    ("mountpoint", "shown"),
    [
        ("/mnt", "/mnt"),
        ('/a "b" \\c\nd, e={f}', '/a "b" \\c\nd, e={f}'),
        ("/tab\tand\rreturn", "/tab\tand\rreturn"),
        ("/grün/日本", "/grün/日本"),
        (os.fsdecode(b"/not\xffutf8"), "/not\\xffutf8"),
    ],
)
def test_is_what_the_parser_takes(mountpoint: str, shown: str) -> None:
    text = exposition(_mount(mountpoint), _sample())
    text.encode("utf-8")
    assert text.endswith("\n")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation and family.type != "unknown" for family in families.values())
    samples = [sample for family in families.values() for sample in family.samples]
    assert {sample.labels["mountpoint"] for sample in samples} == {shown}
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in samples}) == len(samples)
    # the client's counter names lack the _total
    assert families["unionfs_requests"].type == "counter"
    assert {s.labels["kind"]: s.value for s in families["unionfs_requests"].samples} == {
        "lookup": 10, "read": 3,
    }  # fmt: skip
    assert families["unionfs_copy_up_seconds"].samples[0].value == 0.5
    assert families["unionfs_nodes"].type == "gauge"
    assert families["unionfs_mount_start_time_seconds"].samples[0].value == 1700000000.25


def test_the_histogram_counts_what_is_at_most_its_bound() -> None:
    text = exposition(_mount("/mnt"), _sample())
    families = {family.name: family for family in text_string_to_metric_families(text)}
    family = families["unionfs_request_duration_seconds"]
    assert family.type == "histogram"
    buckets = [s for s in family.samples if s.name.endswith("_bucket")]
    bounds = [float(s.labels["le"]) for s in buckets]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")
    for sample, bound in zip(buckets, bounds, strict=True):
        assert sample.value == sum(ns <= round(bound * 1e9) if bound < 1e9 else True for ns in TIMES)
    values = {s.name.rpartition("_")[2]: s.value for s in family.samples if not s.name.endswith("_bucket")}
    assert values == {"count": len(TIMES), "sum": pytest.approx(sum(TIMES) / 1e9)}


def test_each_metric_is_one_group_with_help_and_type_first() -> None:
    seen: list[str] = []
    for line in exposition(_mount("/mnt"), _sample()).splitlines():
        name = line.split()[2] if line.startswith("#") else re.split(r"[{ ]", line)[0]
        name = re.sub(r"_(bucket|sum|count)$", "", name)
        if not seen or seen[-1] != name:
            assert line.startswith("# HELP"), line
            assert name not in seen
            seen.append(name)
