"""The HTML report: it stands alone, nothing in the results becomes markup, and its numbers are right."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import lab
from benchmarks.perf import commands, page, results
from benchmarks.perf.figures import Figure
from benchmarks.perf.results import ContestantFacts, Run, WorkloadFacts
from tests.perf.runs import READ, UNTAR, run_of

_VOID = {"meta", "br", "hr", "img", "input", "link"}
_LOADS = {"src", "srcset", "href", "action", "data", "poster", "background"}
#: Markup, quotes, TeX, and what XML and terminals can't have.
HOSTILE = "<script>alert(1)</script>\"'&amp;${x}$_{\\frac}$ {{ 7*7 }} \x00\x1b[31m\u202e\N{SNOWMAN}"


class _Reader(HTMLParser):
    """Elements, their text, and whether all are closed in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += " " + " ".join(data.split())

    def row(self, first: str) -> list[str]:
        """The cells of the first row that begins with this."""
        return next(
            [" ".join(cell.split()) for cell in row] for row in self.rows if row[0].split()[:1] == [first]
        )


def _full() -> Run:
    run = run_of(
        {
            UNTAR: {
                "plain": [50.0, 50.0, 50.0], "overlayfs": [100.0, 90.0, 110.0],
                "fuse-overlayfs": [800.0, 820.0, 790.0], "mergerfs": [1000.0, 1000.0, 1000.0],
                "hybrid": [400.0, 410.0, 390.0], "cached": [1600.0, 1500.0, 1700.0],
            },
            READ: {"overlayfs": [1000.0] * 3, "hybrid": [2000.0, 1800.0, 2200.0], "mergerfs": [500.0] * 3},
        },
        requests=[{"lookup": 30, "write": 15}, {"lookup": 30, "write": 15}],
        operations=[10.0, 10.0],
    )  # fmt: skip
    run.results.failures["lower-seqread", "cached"] = "the disk is on fire"
    return run


def _assert_alone(reader: _Reader, text: str) -> None:
    assert not reader.open
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert re.search(r"url\((?!#)", text) is None
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in reader.elements:
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in _LOADS & attributes.keys():
            target = attributes[name]
            assert target.startswith(("#", "data:application/json;base64,"))
            if target.startswith("#"):
                assert target[1:] in ids


def test_it_stands_alone() -> None:
    text = page.render(_full(), name="x.json")
    reader = _Reader(text)
    _assert_alone(reader, text)
    policy = [each for tag, each in reader.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none'")


def test_plots_can_be_read_without_seeing_them() -> None:
    reader = _Reader(page.render(_full()))
    hidden = "aria-hidden"
    pictures = [
        each for tag, each in reader.elements if tag == "svg" and "viewbox" in each and hidden not in each
    ]
    pictures = [each for each in pictures if each.get("width") != "12"]  # the markers, drawn once
    assert len(pictures) >= 8  # two of the summary, two groups, the requests; each wide and narrow
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    # the text under the pointer has the ratio and the figure
    assert "hybrid, untar: ×0.25 (0.22 to 0.28) of overlayfs, 400 ms" in reader.text  # noqa: RUF001


def test_colours_are_those_of_the_page() -> None:
    text = page.render(_full())
    assert re.search(r"#f[cde]00[0-9a-f]{2}", text) is None
    style = text[text.index("<style>") : text.index("</style>")]
    used = set(re.findall(r"var\(--(\w+)\)", text))
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    assert {name for name in used if f"--{name}:" not in light} == set()
    assert {name for name in used if f"--{name}:" not in dark} == set()


def test_ratios_are_right() -> None:
    reader = _Reader(page.render(_full()))
    # the columns: overlayfs, hybrid, cached, fuse-overlayfs, mergerfs, plain
    untar = reader.row("untar")
    assert untar[2] == "400 390–410 ×0.25 · ×2.00"  # noqa: RUF001
    assert untar[5] == "1,000 1,000–1,000 ×0.10 · ×0.80"  # noqa: RUF001
    read = reader.row("lower-seqread")
    assert read[0] == "lower-seqread cold MiB/s"
    assert read[2] == "2,000 1,800–2,200 ×2.00 · ×4.00"  # noqa: RUF001
    # geometric means: of 0.25 and 2.0 beside overlayfs
    hybrid = reader.row("hybrid")
    assert hybrid[1:] == ["×0.71", "×2.00", "×0.25"]  # noqa: RUF001
    assert "×0.71of kernel overlayfs" in reader.text.replace("\n", "")  # noqa: RUF001
    assert "better in 1, within 5 % in 0, worse in 1 of 2 figures" in reader.text
    assert [row[5] for row in reader.rows if row[0].split()[:1] == ["untar"] and "hybrid" in row[1]] == [
        " 4.50"
    ]


def test_a_failure_is_told_with_its_reason() -> None:
    reader = _Reader(page.render(_full()))
    assert "the disk is on fire" in reader.text
    assert "1 failure:" in " ".join(reader.text.split())


def test_the_data_are_in_it() -> None:
    run = _full()
    reader = _Reader(page.render(run, name="/some/where/x.json"))
    (link,) = [each for tag, each in reader.elements if tag == "a" and "download" in each]
    assert link["download"] == "x.json"
    content = base64.b64decode(link["href"].partition("base64,")[2])
    again = results.parse(content, "the page")
    assert again.results.samples == run.results.samples
    assert again.machine == run.machine


def test_hostile_names_stay_text() -> None:
    figure = Figure(HOSTILE, HOSTILE, HOSTILE, more_is_better=True)
    run = run_of({figure: {HOSTILE: [1.0, 2.0], "overlayfs": [3.0, 4.0], "mergerfs": [1.0, 1.0]}})
    run.contestants.append(ContestantFacts(HOSTILE, HOSTILE, "ours", HOSTILE))
    run.workloads = [WorkloadFacts(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), HOSTILE, HOSTILE)]
    run.groups = {HOSTILE: HOSTILE}
    run.machine = {HOSTILE: HOSTILE, "cpu": HOSTILE, "kernel": HOSTILE}
    run.settings = {HOSTILE: [HOSTILE]}
    run.missing = {"cached": HOSTILE}
    run.made = HOSTILE
    run.results.failures[HOSTILE, HOSTILE] = HOSTILE
    run.results.skipped[HOSTILE, None] = HOSTILE
    run.results.add_daemon(HOSTILE, HOSTILE, 0.1, {HOSTILE: 5}, 2.0)
    text = page.render(run, name=HOSTILE)
    reader = _Reader(text)
    _assert_alone(reader, text)
    assert "{{ 7*7 }}" in reader.text
    assert "alert(1)</script>" in reader.text  # as text


@pytest.mark.parametrize("without", [("overlayfs",), ("fuse-overlayfs", "mergerfs"), ("hybrid", "cached"),
                                     ("overlayfs", "fuse-overlayfs", "mergerfs", "plain")])  # fmt: skip
def test_a_run_without_some_contestants(without: tuple[str, ...]) -> None:
    run = _full()
    for by_name in run.results.samples.values():
        for name in without:
            by_name.pop(name, None)
    text = page.render(run)
    _assert_alone(_Reader(text), text)


def test_a_group_without_other_unions_has_its_medians(tmp_path: Path) -> None:
    """Files of single benchmarks, beside one of scripts/perf."""
    tests = {("create", "s"): {"unionfs": [0.1, 0.2, 0.3], "cp": [0.8]}, ("diff", "s"): {"unionfs": [0.7]}}
    contestants = [ContestantFacts("unionfs", "branches", "ours"), ContestantFacts("cp", "copies", "plain")]
    for filesystem in ("xfs", "btrfs"):
        lab.write(
            tmp_path / f"{filesystem}.json", f"branches-{filesystem}", f"Branches on {filesystem}",
            contestants, {"create": "make a branch", "diff": ""}, tests, failures={("diff", "cp"): "wrong"},
        )  # fmt: skip
    results.save(run_of({UNTAR: {"hybrid": [1.0], "overlayfs": [2.0]}}, machine=lab.machine()),
                 tmp_path / "perf.json")  # fmt: skip
    paths = [str(tmp_path / f"{name}.json") for name in ("xfs", "btrfs", "perf")]
    assert commands.main(["report", *paths, "-o", str(tmp_path / "page.html")]) == 0
    found = _Reader((tmp_path / "page.html").read_text())
    assert not found.open
    assert found.row("create") == ["create s", "0.20 0.10\N{EN DASH}0.30", "0.80"]
    assert found.row("diff") == ["diff s", "0.70", "failed"]
    none = "\N{EN DASH}"
    assert found.row("untar")[1:] == [f"2.00 \u00d71.00 \u00b7 {none}", f"1.00 \u00d72.00 \u00b7 {none}"]
    labels = [values["aria-label"] for tag, values in found.elements if "aria-label" in values]
    for title in ("Branches on xfs", "Branches on btrfs"):
        assert title in found.text
        assert labels.count(f"{title}: medians; the table below has them.") == 2
    assert any(label.startswith("Names: ratios to kernel overlayfs") for label in labels)
    assert "make a branch" in found.text


def test_an_empty_run_is_a_page() -> None:
    run = run_of({}, complete=False)
    text = page.render(run)
    reader = _Reader(text)
    _assert_alone(reader, text)
    assert "interrupted" in reader.text


def test_requests_an_operation_are_the_median_of_the_turns() -> None:
    run = run_of({}, requests=[{"read": 10}, {"read": 90, "open": 3}, {"read": 40}], operations=[10, 30, 10])
    assert run.results.daemons["untar"]["hybrid"].rates() == {"read": 3.0}


def test_report_command_writes_the_page(tmp_path: Path) -> None:
    from benchmarks.perf import commands

    results.save(_full(), tmp_path / "x.json")
    assert commands.main(["report", str(tmp_path / "x.json"), "-o", str(tmp_path / "x.html")]) == 0
    text = (tmp_path / "x.html").read_text()
    assert json.dumps("x.json") in text


def test_the_page_does_not_take_the_place_of_its_results(tmp_path: Path) -> None:
    from benchmarks.perf import commands

    path = tmp_path / "x.json"
    results.save(_full(), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="another name"):
        commands.main(["report", str(path), "-o", str(tmp_path / "." / "x.json")])
    assert path.read_bytes() == before
