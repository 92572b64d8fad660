"""A mount's statistics in Prometheus's text format, version 0.0.4.

Source: prometheus.io/docs/instrumenting/exposition_formats. Each metric is a group of lines with HELP and
TYPE first; label values escape backslash, double quote and line feed; a histogram has a bucket `+Inf` equal
to its count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from unionfs.daemon.live import LiveMount
from unionfs.daemon.stats import Sample
from unionfs.fuse.latency import Histogram

SCRAPE_SECONDS: Final = 150.0
"""How long latencies are measured after each scrape: longer than two scrape intervals of Prometheus (one
minute by default), in case a scrape is missed."""

_BOUNDS: Final = range(12, 35)
"""Upper bounds of the buckets: these powers of two, in nanoseconds (4 µs to 17 s)."""

_DURATION: Final = "unionfs_request_duration_seconds"
# Figure, name, type, help.
_METRICS: Final = (
    ("read_bytes", "read_bytes_total", "counter",
     "Bytes of files that the daemon gave to the kernel; neither what passes through nor what is cached."),
    ("written_bytes", "written_bytes_total", "counter",
     "Bytes that the daemon wrote to files for the kernel; what passes through is not among them."),
    ("copy_ups", "copy_ups_total", "counter", "Objects that were copied up."),
    ("copied_bytes", "copy_up_bytes_total", "counter", "Bytes of the files that were copied up."),
    ("copy_up_seconds", "copy_up_seconds_total", "counter", "Time spent on copy-ups."),
    ("opened_with_backing_file", "passthrough_opens_total", "counter",
     "Opens whose file the kernel reads and writes by itself."),
    ("backing_files_refused", "passthrough_refused_total", "counter",
     "Opens that were to pass through, which the kernel refused."),
    ("backing_files", "passthrough_files", "gauge", "Files that the kernel reads and writes by itself now."),
    ("backing_files_kept", "passthrough_files_kept", "gauge",
     "Programs whose file stays open for the next start."),
    ("nodes", "nodes", "gauge", "Files and directories that the daemon knows of."),
    ("open_files", "open_files", "gauge", "Open files."),
    ("listed_directories", "listed_directories", "gauge", "Directories whose listing is kept."),
    ("directory_fds", "directory_fds", "gauge", "Directories of layers that are kept open."),
    ("resident_bytes", "resident_memory_bytes", "gauge", "The daemon's resident set."),
)  # fmt: skip


def exposition(mount: LiveMount, now: Sample) -> str:
    return "".join(f"{line}\n" for line in _lines(mount, now))


def label_value(value: str) -> str:
    """Escape a label value. Bytes that are not valid UTF-8 become `\\xNN`."""
    text = os.fsencode(value).decode("utf-8", "backslashreplace")
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _lines(mount: LiveMount, now: Sample) -> Iterator[str]:
    where = f'mountpoint="{label_value(mount.settings.mountpoint)}"'
    yield from _head("unionfs_mount_info", "gauge", "Always 1; what serves the mount, and its way of data.")
    yield f'unionfs_mount_info{{{where},session="{now.session}",io="{now.io}"}} 1'
    yield from _head("unionfs_mount_start_time_seconds", "gauge", "When the mount could be used, since 1970.")
    yield f"unionfs_mount_start_time_seconds{{{where}}} {mount.since!r}"
    yield from _head("unionfs_requests_total", "counter", "Requests of the kernel, by kind.")
    for kind, count in sorted(now.requests.items()):
        yield f'unionfs_requests_total{{{where},kind="{label_value(kind)}"}} {count}'
    if now.latencies:
        yield from _head(
            _DURATION,
            "histogram",
            "From reading a request to writing its answer. Only requests of the "
            f"{SCRAPE_SECONDS:.0f} seconds after each scrape are measured.",
        )
        for kind, histogram in sorted(now.latencies.items()):
            yield from _histogram(f'{where},kind="{label_value(kind)}"', histogram)
    for figure, name, type_, text in _METRICS:
        value = now.figures.get(figure)
        if isinstance(value, int | float):
            yield from _head(f"unionfs_{name}", type_, text)
            yield f"unionfs_{name}{{{where}}} {value!r}"


def _head(name: str, type_: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {type_}"


def _histogram(labels: str, histogram: Histogram) -> Iterator[str]:
    for power in _BOUNDS:
        yield f'{_DURATION}_bucket{{{labels},le="{(1 << power) / 1e9!r}"}} {histogram.up_to(1 << power)}'
    yield f'{_DURATION}_bucket{{{labels},le="+Inf"}} {histogram.count}'
    yield f"{_DURATION}_sum{{{labels}}} {histogram.total_ns / 1e9!r}"
    yield f"{_DURATION}_count{{{labels}}} {histogram.count}"
