"""Plots for the HTML report: SVG that takes its colours and fonts from the page, in a wide and a narrow form.

matplotlib draws with unique colours, which are then replaced by the page's CSS variables, so that one drawing
serves light and dark pages and paper. All text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar
from warnings import catch_warnings, simplefilter
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

_DPI = 72  # matplotlib's SVG has one unit per point
_WIDE, _NARROW = 960, 350
_LABELS = 232
"""Pixels for the labels at the left of a wide plot."""
_LANE = 8.0
_HEAD = 40.0
_HEADING = 30.0
_WORDS = 80.0
"""Pixels for the words at each side of 1.0."""
_LONGEST = 10
"""Rows per piece."""

TIMES = "\N{MULTIPLICATION SIGN}"

# Colours that stand for CSS variables.
_INK, _MUTED, _GRID, _BAND, _PAPER = "#fd0001", "#fd0002", "#fd0003", "#fd0004", "#fd0005"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _BAND: "band", _PAPER: "paper"}
_COLOUR = re.compile(r"#f[cde]00[0-9a-f]{2}")
_PLACES = {"d", "x", "y", "transform"}
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_ids = count()

#: Assigned in this order to contestants of a kind; shapes differ as well as colours.
MARKERS_OURS = ("o", "D", "s", "^", "p", "h")
MARKERS_OTHERS = ("X", "P", "v", "<", ">", "8")


@dataclass(frozen=True)
class Style:
    """A contestant's style: the CSS variable --cN, and a marker of matplotlib."""

    colour: int
    marker: str


@dataclass(frozen=True)
class Dot:
    """A ratio with its spread. `text` is its tooltip."""

    contestant: str
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Row:
    """A row of a plot of ratios, or without dots a heading of those below."""

    label: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Bar:
    """A stack: lengths by part. `text` is printed at its end."""

    label: str
    parts: Mapping[str, float]
    text: str


@dataclass(frozen=True)
class Stack:
    """The bars of one workload. `what` they measure is printed below its label, or behind it."""

    label: str
    what: str
    bars: Sequence[Bar]


_Part = TypeVar("_Part", Row, Stack)


@dataclass(frozen=True)
class Plot:
    """Both forms of a plot, as SVG to embed in a page: one or, for a long plot, several."""

    wide: str
    narrow: str


def _standin(colour: int, series: str = "e") -> str:
    return f"#f{series}00{colour:02x}"


def _pieces(rows: Sequence[_Part]) -> list[list[_Part]]:
    """The pieces of a long plot, each short enough for a sheet of paper and for its axes to stay in sight."""
    size = math.ceil(len(rows) / math.ceil(len(rows) / _LONGEST)) if rows else 1
    pieces: list[list[_Part]] = [[]]
    for row in rows:
        if len(pieces[-1]) >= size:
            # a heading stays with its rows
            last = pieces[-1][-1]
            pieces.append([pieces[-1].pop()] if isinstance(last, Row) and not last.dots else [])
        pieces[-1].append(row)
    return pieces


def _both(
    draw: Callable[[Sequence[_Part], bool], tuple[Canvas, dict[str, str]]], rows: Sequence[_Part], label: str
) -> Plot:
    pieces = _pieces(rows)
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "-", "font.size": 12, "text.parse_math": False}),
        catch_warnings(),
    ):
        # The browser has its own fonts, so glyphs missing from matplotlib's do not matter.
        simplefilter("ignore", UserWarning)
        return Plot(
            *("".join(_svg(*draw(piece, narrow), label) for piece in pieces) for narrow in (False, True))
        )


def _label(text: str, longest: int = 36) -> str:
    """The text cut to fit, without characters that XML forbids."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _canvas(width: float, height: float) -> Canvas:
    canvas = Canvas(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasSVG(canvas)
    canvas.patch.set_visible(False)
    return canvas


def _svg(canvas: Canvas, titles: Mapping[str, str], label: str) -> str:
    """matplotlib's drawing as an HTML element: no namespaces, no sizes, unique ids."""
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)
    prefix = f"p{next(_ids)}"
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#(\w+)", values))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None  # white space
        if element.text is not None and not element.text.strip():
            element.text = None
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            name = key.rpartition("}")[2]
            if name == "id":
                if value in titles:
                    ElementTree.SubElement(element, "title").text = titles[value]
                    element.insert(0, element[-1])
                    del element[-1]
                if value not in used:
                    continue
                value = f"{prefix}{value}"
            elif name == "href":
                value = f"#{prefix}{value[1:]}"
            elif "url(#" in value:
                value = value.replace("url(#", f"url(#{prefix}")
            elif name in _PLACES:
                value = _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value)
            element.set(name, _COLOUR.sub(lambda found: f"var(--{_variable(found[0])})", value))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", _label(label, 300))
    return ElementTree.tostring(root, encoding="unicode")


def _variable(colour: str) -> str:
    if colour in _VARIABLES:
        return _VARIABLES[colour]
    return f"{'c' if colour[2] == 'e' else 'k'}{int(colour[-2:], 16)}"


def _plain_axes(axes: Axes) -> None:
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(
        axis="both", length=0, labelcolor=_MUTED, labeltop=True, labelbottom=True, labelleft=False, pad=4
    )
    axes.set_yticks([])


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The limits of the logarithmic axis: all dots with a margin, and 1.0; a long spread may be cut off."""
    values = [dot.value for row in rows for dot in row.dots]
    lows = [max(dot.low, dot.value / 3) for row in rows for dot in row.dots]
    highs = [min(dot.high, dot.value * 3) for row in rows for dot in row.dots]
    return min(0.8, *values, *lows) / 1.15, max(1.25, *values, *highs) * 1.15


def _with_room(low: float, high: float, width: float) -> tuple[float, float]:
    """Wider limits, if the words would not fit on both sides of 1.0."""
    share = _WORDS / (width - _WORDS)
    high = max(high, low**-share)
    return min(low, high**-share), high


def _ticks(low: float, high: float, width: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    room = width / math.log10(high / low)  # pixels per decade
    steps = (1, 2, 5) if room > 120 else (1, 3) if room > 75 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    margin = (high / low) ** (14 / width)  # a label needs so many pixels to each side
    return [tick for tick in ticks if low * margin <= tick <= high / margin or tick == 1.0]


def ratios(rows: Sequence[Row], styles: Mapping[str, Style], reference: str, label: str) -> Plot:
    """Dots on a logarithmic axis, better to the right; every contestant has its own lane in each row."""
    names = [name for name in styles if any(dot.contestant == name for row in rows for dot in row.dots)]
    lanes = {name: lane for lane, name in enumerate(names)}
    least, greatest = _limits(rows)

    def draw(rows: Sequence[Row], narrow: bool) -> tuple[Canvas, dict[str, str]]:
        width = _NARROW if narrow else _WIDE
        left, above = (8, 20.0) if narrow else (_LABELS, 0.0)
        row_height = above + len(names) * _LANE + 9
        heights = [row_height if row.dots else _HEADING for row in rows]
        height = 2 * _HEAD + sum(heights)
        canvas = _canvas(width, height)
        across = width - left - 14
        axes = canvas.add_axes((left / width, _HEAD / height, across / width, 1 - 2 * _HEAD / height))
        _plain_axes(axes)
        low, high = _with_room(least, greatest, across)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(sum(heights), 0)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high, across)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{TIMES}{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", color=_GRID, linewidth=1)
        axes.set_axisbelow(True)
        axes.axvline(1.0, color=_INK, linewidth=1.5, zorder=1.5)
        _direction(axes, reference, narrow)
        titles = {}
        beside = blended_transform_factory(canvas.transFigure, axes.transData)
        stripe = False
        for index, (row, row_height) in enumerate(zip(rows, heights, strict=True)):
            top = sum(heights[:index])
            stripe = bool(row.dots) and not stripe
            if not row.dots:
                where = (left / width, "left") if narrow else ((left - 10) / width, "right")
                axes.text(where[0], top + _HEADING / 2 + 3, _label(row.label, 46), transform=beside,
                          ha=where[1], va="center", color=_INK, fontweight="bold")  # fmt: skip
                continue
            if stripe:
                axes.axhspan(top, top + row_height, color=_BAND, linewidth=0, zorder=0)
            if narrow:
                axes.text(left / width, top + 12, _label(row.label, 46), transform=beside, va="center",
                          color=_INK)  # fmt: skip
            else:
                axes.text((left - 10) / width, top + row_height / 2, _label(row.label), transform=beside,
                          ha="right", va="center", color=_INK)  # fmt: skip
            for dot in row.dots:
                style = styles[dot.contestant]
                colour = _standin(style.colour)
                y = top + above + 4.5 + (lanes[dot.contestant] + 0.5) * _LANE
                if dot.high > dot.low:
                    axes.plot([max(dot.low, low), min(dot.high, high)], [y, y], color=colour, linewidth=2.2,
                              alpha=0.45, solid_capstyle="round", zorder=2)  # fmt: skip
                key = f"dot{index}x{lanes[dot.contestant]}"
                axes.plot([dot.value], [y], linestyle="", marker=style.marker, markersize=7.5,
                          markerfacecolor=colour, markeredgecolor=_PAPER, markeredgewidth=0.8, gid=key,
                          clip_on=False, zorder=3)  # fmt: skip
                titles[key] = _label(dot.text, 300)
        return canvas, titles

    return _both(draw, rows, label)


def _direction(axes: Axes, reference: str, narrow: bool) -> None:
    """Label the two sides of 1.0."""
    at = blended_transform_factory(axes.transData, axes.transAxes)
    offset = 26.0
    for side, words, place in ((-1, "◂ worse", "right"), (1, "better ▸", "left")):
        axes.annotate(words, (1.0, 1.0), xycoords=at, xytext=(side * (8 if narrow else 10), offset - 2),
                      textcoords="offset points", ha=place, va="center", color=_MUTED)  # fmt: skip
    axes.annotate(f"1.0 = {reference}", (1.0, 0.0), xycoords=at, xytext=(0, -offset),
                  textcoords="offset points", ha="center", va="center", color=_INK)  # fmt: skip


def stacks(stacks: Sequence[Stack], parts: Sequence[str], label: str) -> Plot:
    """Horizontal bars of `parts` in the colours --k0, --k1 ... of the page.

    The longest bar of each stack has the full width: comparisons are within a stack.
    """

    def draw(stacks: Sequence[Stack], narrow: bool) -> tuple[Canvas, dict[str, str]]:
        width = _NARROW if narrow else _WIDE
        left, above = (8.0, 20.0) if narrow else (_LABELS, 0.0)
        begin, thick = left + (86 if narrow else 100), 15.0
        heights = [above + len(stack.bars) * thick + 10 for stack in stacks]
        canvas = _canvas(width, sum(heights))
        axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(sum(heights), 0))
        axes.axis("off")
        titles = {}
        top = 0.0
        for index, stack in enumerate(stacks):
            if index % 2 == 0:
                axes.axhspan(top, top + heights[index], xmin=0 if narrow else left / width, color=_BAND,
                             linewidth=0)  # fmt: skip
            if narrow:
                words = f"{_label(stack.label)}, {stack.what}"
                axes.text(left, top + 12, _label(words, 48), va="center", color=_INK)
            else:
                middle = top + heights[index] / 2
                axes.text(left - 10, middle - 7, _label(stack.label), ha="right", va="center", color=_INK)
                axes.text(left - 10, middle + 8, _label(stack.what), ha="right", va="center", color=_MUTED,
                          fontsize=11)  # fmt: skip
            longest = max((sum(bar.parts.values()) for bar in stack.bars), default=0.0) or 1.0
            pixels = (width - begin - 54) / longest
            for number, bar in enumerate(stack.bars):
                y = top + above + 5 + (number + 0.5) * thick
                axes.text(begin - 8, y, _label(bar.label, 14), ha="right", va="center", color=_MUTED,
                          fontsize=11)  # fmt: skip
                start = begin
                for colour, part in enumerate(parts):
                    length = bar.parts.get(part, 0.0) * pixels
                    if length < 0.5:  # too short to see
                        start += length
                        continue
                    key = f"bar{index}x{number}x{colour}"
                    (piece,) = axes.barh(y, length, height=thick - 4, left=start, linewidth=0, clip_on=False,
                                         color=_standin(colour, "c"))  # fmt: skip
                    piece.set_gid(key)
                    titles[key] = _label(f"{stack.label}, {bar.label}: {part} {bar.parts[part]:.3g}", 300)
                    start += length
                axes.text(start + 5, y, bar.text, va="center", color=_INK, fontsize=11)
            top += heights[index]
        return canvas, titles

    return _both(draw, stacks, label)


def swatch(style: Style) -> str:
    """A contestant's marker, 12 by 12, for legends and tables."""
    canvas = _canvas(12, 12)
    axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    colour = _standin(style.colour)
    axes.plot([0.5], [0.5], marker=style.marker, markersize=9, color=colour, markeredgewidth=0)
    return _svg(canvas, {}, "").replace('role="img" aria-label=""', 'width="12" height="12"')
