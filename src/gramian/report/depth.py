"""The network by depth as SVG: lanes of curves over the places of the forward pass, with culprits marked.

A lane is an inner `<svg>` whose view box is in places, so that the page zooms by setting one attribute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from gramian.errors import InputError

from .axes import Axis, make_axis, shows
from .document import Depth, Lane, Role, Series
from .formatting import MISSING, elide, number, visible
from .palette import colors_of, variable

__all__ = ["draw_depth", "lane_legend", "read_out"]

_LANE, _GAP, _TOP, _FOOT, _LEFT, _RIGHT = 62, 27, 24, 42, 52, 12  # pixels
_MOST_DISCS = 80  # places up to which each value has a disc
_POINTER = 18  # above, where a culprit is named
_TICK_SIZE, _LINE = 11.5, 14.0
_TICK_NAME, _TICK_ROOM = 14, 120  # characters of a name below the lanes, and pixels for it
_LONGEST_NAME = 36  # characters of a culprit's name in the picture
_SHORTEST_NAME = 14  # to which it may be cut
_BOLD = 8.5  # pixels of a character of it, of a wide font


@dataclass(frozen=True)
class _Curve:
    color: str
    values: Sequence[float | None]


def draw_depth(item: Depth, width: float) -> str:
    """Return the picture as markup, `width` pixels wide; every text in it is escaped."""
    count = len(item.names)
    inner = width - _LEFT - _RIGHT
    top = _TOP + (_POINTER if item.culprits else 0)
    height = top + len(item.lanes) * (_LANE + _GAP) + _FOOT - _GAP
    parts = [_bands(item, inner, top, height - top - _FOOT), *_pointer(item, inner)]
    for place, lane in enumerate(item.lanes):
        if any(len(values) != count for _, _, values in lane.series):
            raise InputError(f"depth {item.title!r}: {lane.label!r} needs {count} values, one for each name.")
        parts.append(_lane(lane, top + place * (_LANE + _GAP), inner, count))
    parts.append(_ticks(item.names, inner, height - _FOOT))
    parts.append(_text(_LEFT + inner / 2, height - 6, f"{item.x_label}, {count:,} in all", "middle"))
    spoken = escape(visible(_spoken(item)))
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'


def read_out(item: Depth) -> dict[str, Any]:
    """Return what the page shows at the pointer: names, and the values of every lane as text."""
    lanes = []
    for lane in item.lanes:
        for (_, _, values), (label, color) in zip(lane.series, lane_legend(lane), strict=True):
            told = " · ".join(part for part in (visible(lane.label), label) if part)
            lanes.append([told, color, [number(value) for value in values]])
    return {"names": [visible(name) for name in item.names], "lanes": lanes}


def lane_legend(lane: Lane) -> list[tuple[str, str]]:
    """Return label and CSS color of each curve of a lane."""
    return [(visible(label), variable(c)) for (label, _, _), c in zip(lane.series, _colors(lane), strict=True)]


def _colors(lane: Lane) -> list[str]:
    before: list[Role] = ["auto"] * lane.hues
    roles = before + [role for _, role, _ in lane.series]
    return colors_of([Series("", (), (), role) for role in roles])[lane.hues :]


def _bands(item: Depth, width: float, top: float, height: float) -> str:
    """Bars behind all lanes at the marked places; lines at their ends keep them visible among hundreds of places."""
    later = [place for place in item.consequences if place not in item.culprits]
    drawn = ""
    for kind, marks in (("consequence", later), ("culprit", item.culprits)):
        for run in _runs(marks):
            ends = "".join(f"M{place} 0V1" for place in sorted({run.start, run.stop - 1}))
            drawn += (
                f'<g class="{kind}"><rect x="{run.start - 0.5:g}" y="0" width="{len(run)}" height="1"/>'
                f'<path d="{ends}" vector-effect="non-scaling-stroke"/></g>'
            )
    return _inner(top, width, height, len(item.names), drawn)


def _runs(places: Sequence[int]) -> list[range]:
    """The places as ranges.

    >>> _runs([1, 2, 3, 7])
    [range(1, 4), range(7, 8)]
    """
    runs: list[range] = []
    for place in sorted(places):
        if runs and place == runs[-1].stop:
            runs[-1] = range(runs[-1].start, place + 1)
        else:
            runs.append(range(place, place + 1))
    return runs


def _pointer(item: Depth, width: float) -> list[str]:
    """The name of the first marked place above it, on the side where there is room; the page moves it with the zoom."""
    if not item.culprits:
        return []
    place, count = item.culprits[0], len(item.names)
    x = _LEFT + (place + 0.5) / count * width
    more = f" and {len(item.culprits) - 1} more" if len(item.culprits) > 1 else ""
    beyond = _LEFT + width + _RIGHT - x
    room = int(max(x, beyond) / _BOLD) - 2
    if room - len(more) < _SHORTEST_NAME:  # in the middle of a phone; the places are marked, and the findings name them
        more = ""
    name = elide(visible(item.names[place]), min(_LONGEST_NAME, room - len(more)))
    anchor, text = ("start", f"▼ {name}{more}") if x < beyond else ("end", f"{name}{more} ▼")
    shift = -5 if anchor == "start" else 5
    drawn = _text(x + shift, 15, text, anchor, 12.5)
    return [f'<g class="pointer" data-place="{place}" data-shift="{shift}">{drawn}</g>']


def _inner(top: float, width: float, height: float, count: int, content: str) -> str:
    """An inner view in which x is the place and y goes from 0 above to 1 below."""
    return (
        f'<svg class="lane" x="{_LEFT}" y="{top:g}" width="{width:g}" height="{height:g}" '
        f'viewBox="-0.5 0 {max(count, 1)} 1" preserveAspectRatio="none">{content}</svg>'
    )


def _lane(lane: Lane, top: float, width: float, count: int) -> str:
    curves = [_Curve(color, values) for color, (_, _, values) in zip(_colors(lane), lane.series, strict=True)]
    known = [value for curve in curves for value in curve.values if value is not None and shows(value, log=True)]
    axis = make_axis(
        known + ([lane.reference] if lane.reference is not None and known else []), log=True, num_ticks=3, margin=0.12
    ).thinned(_LINE / _LANE)
    parts = [_text(_LEFT, top - 7, lane.label, "start", 12.5, "lane-title")]
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        y = top + (1 - (tick - axis.low) / (axis.high - axis.low)) * _LANE
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}h{width:g}"/>')
        parts.append(_text(_LEFT - 7, y + 4, label, "end"))
    parts.append(f'<rect class="frame" x="{_LEFT}" y="{top:g}" width="{width:g}" height="{_LANE}"/>')
    inside = ""
    if lane.reference is not None and known:
        inside += (
            f'<path class="reference" vector-effect="non-scaling-stroke" '
            f'd="M-0.5 {1 - axis.fraction(lane.reference):.4f}H{count}"/>'
        )
    inside += "".join(_curve(curve, axis) for curve in curves)
    return "".join(parts) + _inner(top, width, _LANE, count, inside)


def _curve(curve: _Curve, axis: Axis) -> str:
    """A line through what is known, discs where it is little, and marks at the edges: 0, and what is not finite."""
    line, discs, edges = [], [], []
    for place, value in enumerate(curve.values):
        if value is None:
            continue
        if shows(value, log=True):
            line.append(f"{place} {1 - axis.fraction(value):.4f}")
        else:
            edges.append(f"M{place} {0.94 if value == 0 else 0.06}h0")
    if len(line) <= _MOST_DISCS:
        discs = [f"M{point}h0" for point in line]
    drawn = f'<path class="curve" vector-effect="non-scaling-stroke" d="M{"L".join(line)}"/>' if line else ""
    for kind, marks in (("discs", discs), ("edges", edges)):
        if marks:
            drawn += f'<path class="{kind}" vector-effect="non-scaling-stroke" d="{"".join(marks)}"/>'
    return f'<g style="color:{variable(curve.color)}">{drawn}</g>'


def _ticks(names: Sequence[str], width: float, top: float) -> str:
    """Names of some places, as far as there is room; the number of one would be another in other pictures."""
    count = len(names)
    axis = make_axis([0, max(count - 1, 1)], num_ticks=max(2, int(width / _TICK_ROOM)), integer=True)
    marks = []
    for place in (int(tick) for tick in axis.ticks if 0 <= tick <= count - 1):
        x = (place + 0.5) / max(count, 1) * width
        anchor = "end" if x > width - _TICK_ROOM / 2 else "start" if x < _TICK_ROOM / 2 else "middle"
        marks.append(_text(_LEFT + x, top + 16, elide(visible(names[place]), _TICK_NAME), anchor))
    return f'<g class="ticks" data-left="{_LEFT}" data-width="{width:g}" data-y="{top + 16:g}">{"".join(marks)}</g>'


def _text(x: float, y: float, text: str, anchor: str, size: float = _TICK_SIZE, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
    return f"<text{named} {at}>{escape(visible(text))}</text>"


def _spoken(item: Depth) -> str:
    parts = [f"{item.title}, {len(item.names):,} places."]
    for lane in item.lanes:
        for label, _, values in lane.series:
            known = [value for value in values if value is not None and math.isfinite(value)]
            if known:
                told = f"{lane.label} {label}".strip()
                parts.append(
                    f"{told}: from {number(known[0])} to {number(known[-1])}, least {number(min(known))}, "
                    f"greatest {number(max(known))}."
                )
    if item.culprits:
        parts.append(f"Marked: {', '.join(item.names[place] or MISSING for place in item.culprits[:6])}.")
    return " ".join(parts)
