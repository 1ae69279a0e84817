"""Curves as SVG: one picture at one size, its legend, and a note on values left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from gramian.errors import InputError

from .axes import Axis, LeftOut, make_axis, shows, spread
from .canvas import TEXT_SIZE, Canvas
from .document import Picture, Series
from .formatting import distinct_parts, elide, number, visible
from .palette import colors_of, variable

_TICK_SIZE, _LINE = 11.5, 14.0
_LONGEST_NAME = 20  # characters of a name along the axis
_WIDEST_BAR = 90.0
_SLANT = math.radians(35)
_LABEL_GAP = 15.0  # least distance of two direct labels
_FARTHEST_LABEL = 40.0  # largest distance of a label from its curve's end, beyond which a legend is clearer
_MOST_LABELS = 8
_MOST_HOVER_POINTS = 400  # per curve; more would enlarge the page, and a pointer cannot separate them


@dataclass
class Drawn:
    """A drawn picture for a page: `svg` is markup; all else is text, which the page escapes."""

    svg: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # label, CSS color, style
    notes: list[str] = field(default_factory=list)
    hover: dict[str, Any] | None = None
    box: tuple[float, ...] | None = None  # of a heat map: the drawing's width; left, top, width and height of the cells


@dataclass(frozen=True)
class Frame:
    """The rectangle of the data in pixels, and its two axes."""

    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis

    def at_x(self, value: float) -> float:
        """Return the pixel of a value along x."""
        return self.left + self.x.fraction(value) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        """Return the pixel of a value along y."""
        return self.bottom - self.y.fraction(value) * (self.bottom - self.top)


@dataclass(frozen=True)
class _Curve:
    """A series as plain floats; `None` for points that the axes cannot show."""

    series: Series
    color: str
    points: list[tuple[float, float] | None]

    @property
    def shown(self) -> list[tuple[float, float]]:
        return [point for point in self.points if point is not None]


def draw_picture(picture: Picture, prefix: str, width: float = 960, height: float = 320) -> Drawn:
    """Draw a picture in pixels, within `canvas.drawing_settings`; ids begin with `prefix`."""
    curves, left_out = _clean(picture)
    canvas = Canvas(width, height)
    reference = picture.reference
    if reference is not None and not shows(reference[0], picture.log_y):
        left_out.count([reference[0]], picture.log_y)
        reference = None
    full_names = [visible(name) for name in picture.x_names]
    names, pattern = distinct_parts(full_names)
    if pattern:
        picture = replace(picture, x_label=" · ".join(part for part in (picture.x_label, elide(pattern, 48)) if part))
    frame, labels = _layout(canvas, picture, curves, reference, names)
    _draw_axes(canvas, frame, picture, names)
    if reference is not None:
        y = frame.at_y(reference[0])
        canvas.line([frame.left, frame.right], [y, y], "baseline", 1.4, dashed=True)
    _draw_bars(canvas, frame, [c for c in curves if c.series.style == "bars"])
    for curve in curves:
        if curve.series.style != "bars":
            _draw_curve(canvas, frame, curve)
    for text, color, wanted, y in labels or []:
        if abs(wanted - y) > 4:
            canvas.line([frame.right + 3, frame.right + 9], [wanted, y], color, 0.8)
        canvas.text(frame.right + 12, y, text, color="ink" if color == "muted" else color, size=TEXT_SIZE)
    if not any(curve.shown for curve in curves):
        canvas.text((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2, "no values", anchor="center")
    drawn = Drawn(canvas.svg(prefix, _spoken(picture, curves)), hover=_hover(frame, curves, width, height, full_names))
    if labels is None:
        drawn.legend = [(visible(c.series.label), variable(c.color), c.series.style) for c in curves if c.series.label]
        if reference is not None and reference[1]:
            drawn.legend.append((visible(reference[1]), variable("baseline"), "dashed"))
    drawn.notes = [str(left_out)] if str(left_out) else []
    return drawn


def _clean(picture: Picture) -> tuple[list[_Curve], LeftOut]:
    curves: list[_Curve] = []
    left_out = LeftOut()
    for series, color in zip(picture.series, colors_of(picture.series), strict=True):
        if len(series.x) != len(series.y):
            raise InputError(
                f"picture {picture.title!r}: series {series.label!r} has {len(series.x)} x and {len(series.y)} y. "
                "Give one y for each x."
            )
        points: list[tuple[float, float] | None] = []
        for x, y in zip(map(float, series.x), map(float, series.y), strict=True):
            if not shows(y, picture.log_y):
                left_out.count([y], picture.log_y)
            elif not shows(x, picture.log_x):
                left_out.count([x], picture.log_x)
            else:
                points.append((x, y))
                continue
            points.append(None)
        curves.append(_Curve(series, color, points))
    return curves, left_out


def _layout(
    canvas: Canvas,
    picture: Picture,
    curves: Sequence[_Curve],
    reference: tuple[float, str] | None,
    names: Sequence[str],
) -> tuple[Frame, list[tuple[str, str, float, float]] | None]:
    """Return the frame and the labels at the curves' ends, or None in their place where a legend is needed."""
    xs = [x for curve in curves for x, _ in curve.shown]
    ys = [y for curve in curves for _, y in curve.shown] + ([reference[0]] if reference is not None else [])
    bars = [curve for curve in curves if curve.series.style == "bars"]
    from_zero = any(curve.series.style in ("bars", "area") for curve in curves)
    if bars and xs and not picture.log_x:
        half = _bar_pitch(bars) / 2
        xs += [min(xs) - half, max(xs) + half]
    y = make_axis(ys, log=picture.log_y, num_ticks=6, margin=0.05, from_zero=from_zero)
    top = 34.0 if picture.y_label else 12.0
    left = max([canvas.text_width(label, _TICK_SIZE) for label in y.labels] + [12.0]) + 10
    bottom = canvas.height - (46.0 if picture.x_label else 26.0)
    if names and not _level(canvas, names, canvas.width - left - 20):
        length = max(canvas.text_width(elide(name, _LONGEST_NAME), _TICK_SIZE) for name in names)
        bottom -= math.sin(_SLANT) * length
        left = max(left, math.cos(_SLANT) * length - 12)
    integer = bool(bars) or all(x.is_integer() for x in xs)

    y = y.thinned(_LINE / (bottom - top))

    def frame_of(right: float) -> Frame:
        num_ticks = max(int((right - left) / 58), 3)
        x = make_axis(xs, log=picture.log_x, num_ticks=num_ticks, integer=integer)
        widest = max((canvas.text_width(label, _TICK_SIZE) for label in x.labels), default=0.0)
        return Frame(left, top, right, bottom, x.thinned((widest + 8) / (right - left)), y)

    labels = _direct_labels(canvas, picture, curves, reference, frame_of)
    if labels is None:
        return frame_of(canvas.width - 20), None
    widest = max((canvas.text_width(text) for text, *_ in labels), default=0.0)
    return frame_of(canvas.width - (widest + 18 if labels else 20)), labels


def _direct_labels(
    canvas: Canvas,
    picture: Picture,
    curves: Sequence[_Curve],
    reference: tuple[float, str] | None,
    frame_of: Callable[[float], Frame],
) -> list[tuple[str, str, float, float]] | None:
    """Return (text, color, wanted y, y) of labels at the curves' right ends; None where they do not fit."""
    frame = frame_of(canvas.width * 0.75)
    alone = len(curves) == 1 and reference is None
    if alone:  # the title and the axis label are enough
        return []
    wanted: list[tuple[str, str, float]] = []
    for curve in curves:
        if not curve.series.label or not curve.shown:
            continue
        x, y = curve.shown[-1]
        if curve.series.style not in ("line", "dashed", "area") or frame.x.fraction(x) < 0.9:
            return None
        wanted.append((curve.series.label, curve.color, frame.at_y(y)))
    if reference is not None and reference[1]:
        wanted.append((reference[1], "baseline", frame.at_y(reference[0])))
    if len(wanted) > _MOST_LABELS or any(canvas.text_width(text) > 0.3 * canvas.width for text, *_ in wanted):
        return None
    places = spread([y for *_, y in wanted], _LABEL_GAP, frame.top - 4, frame.bottom + 4)
    if any(abs(place - y) > _FARTHEST_LABEL for place, (*_, y) in zip(places, wanted, strict=True)):
        return None
    return [(visible(text), color, y, place) for (text, color, y), place in zip(wanted, places, strict=True)]


def _draw_axes(canvas: Canvas, frame: Frame, picture: Picture, names: Sequence[str]) -> None:
    for tick, label in zip(frame.y.ticks, frame.y.labels, strict=True):
        y = frame.bottom - (tick - frame.y.low) / (frame.y.high - frame.y.low) * (frame.bottom - frame.top)
        canvas.line([frame.left, frame.right], [y, y], "grid", 1.0)
        canvas.text(frame.left - 8, y, label, anchor="right", size=_TICK_SIZE)
    canvas.line([frame.left, frame.right], [frame.bottom, frame.bottom], "axis", 1.0)
    if names:
        _draw_names(canvas, frame, names)
    else:
        for tick, label in zip(frame.x.ticks, frame.x.labels, strict=True):
            x = frame.left + (tick - frame.x.low) / (frame.x.high - frame.x.low) * (frame.right - frame.left)
            canvas.line([x, x], [frame.bottom, frame.bottom + 4], "axis", 1.0)
            canvas.text(x, frame.bottom + 15, label, anchor="center", size=_TICK_SIZE)
    if picture.x_label:
        label = canvas.fitting(picture.x_label, frame.right - frame.left)
        canvas.text((frame.left + frame.right) / 2, canvas.height - 10, label, anchor="center")
    if picture.y_label:
        canvas.text(0, 10, canvas.fitting(picture.y_label, canvas.width))


def _level(canvas: Canvas, names: Sequence[str], width: float) -> bool:
    """Whether the names fit side by side."""
    widest = max(canvas.text_width(elide(name, _LONGEST_NAME), _TICK_SIZE) for name in names)
    return widest <= width / len(names) - 6


def _draw_names(canvas: Canvas, frame: Frame, names: Sequence[str]) -> None:
    short = [elide(name, _LONGEST_NAME) for name in names]
    level = _level(canvas, names, frame.right - frame.left)
    # Slanted names stand at least a line height apart.
    every = 1 if level else max(1, math.ceil(24 * len(names) / (frame.right - frame.left)))
    for place in range(0, len(names), every):
        if not shows(place, frame.x.log):
            continue
        x = frame.at_x(place)
        if not frame.left <= x <= frame.right:
            continue
        if level:
            half = canvas.text_width(short[place], _TICK_SIZE) / 2
            x = min(max(x, half), canvas.width - half)
            canvas.text(x, frame.bottom + 15, short[place], anchor="center", size=_TICK_SIZE)
        else:
            canvas.text(
                x + 4, frame.bottom + 10, short[place], anchor="right", size=_TICK_SIZE, rotation=math.degrees(_SLANT)
            )


def _draw_curve(canvas: Canvas, frame: Frame, curve: _Curve) -> None:
    nan = (math.nan, math.nan)
    pixels = [nan if point is None else (frame.at_x(point[0]), frame.at_y(point[1])) for point in curve.points]
    if not curve.shown:
        return
    xs, ys = zip(*pixels, strict=True)
    style = curve.series.style
    if style == "points":
        many = len(pixels) > 300
        canvas.points(xs, ys, curve.color, 3.5 if many else 5.5, 0.55 if many else 0.9)
        return
    if style == "area":
        floor = frame.bottom if frame.y.log else min(max(frame.at_y(0.0), frame.top), frame.bottom)
        for part in _unbroken(pixels):
            px, py = zip(*part, strict=True)
            canvas.polygon([px[0], *px, px[-1]], [floor, *py, floor], curve.color, 0.18)
    canvas.line(xs, ys, curve.color, 1.6 if style == "dashed" else 2.0, dashed=style == "dashed")
    single = [part[0] for part in _unbroken(pixels) if len(part) == 1]
    if single:  # a line through one point is invisible
        px, py = zip(*single, strict=True)
        canvas.points(px, py, curve.color, 5.0)


def _unbroken(pixels: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for pixel in pixels:
        if math.isnan(pixel[0]):
            parts.append([])
        else:
            parts[-1].append(pixel)
    return [part for part in parts if part]


def _bar_pitch(curves: Sequence[_Curve]) -> float:
    xs = sorted({x for curve in curves for x, _ in curve.shown})
    return min((b - a for a, b in pairwise(xs)), default=1.0)


def _draw_bars(canvas: Canvas, frame: Frame, curves: Sequence[_Curve]) -> None:
    """Draw bars side by side; muted ones stand behind the others at full width, as a whole behind its parts."""
    behind = [c for c in curves if c.series.role == "muted"] if len(curves) > 1 else []
    beside = [c for c in curves if c not in behind]
    places = sorted({frame.at_x(x) for curve in curves for x, _ in curve.shown})
    pitch = min((b - a for a, b in pairwise(places)), default=(frame.right - frame.left) / 2)
    group = min(pitch * (0.72 if pitch > 4 else 1.0), _WIDEST_BAR * max(len(beside), 1))
    floor = frame.bottom if frame.y.log else min(max(frame.at_y(0.0), frame.top), frame.bottom)
    for curve in (*behind, *beside):
        width = group if curve in behind else group / max(len(beside), 1)
        shift = -group / 2 + (0 if curve in behind else beside.index(curve) * width)
        for x, y in curve.shown:
            top = frame.at_y(y)
            opacity = 0.35 if curve in behind else 1.0
            canvas.bar(frame.at_x(x) + shift, min(top, floor), width, abs(floor - top), curve.color, opacity)


def _spoken(picture: Picture, curves: Sequence[_Curve]) -> str:
    parts = [f"{picture.title}."]
    for curve in curves[:12]:
        ys = [y for _, y in curve.shown]
        if ys:
            parts.append(
                f"{curve.series.label}: {len(ys):,} values from {number(min(ys))} to {number(max(ys))}, "
                f"last {number(ys[-1])}."
            )
    return " ".join(parts)


def _hover(frame: Frame, curves: Sequence[_Curve], width: float, height: float, names: Sequence[str]) -> dict[str, Any]:
    """Return pixels and texts with which the page shows the values under the pointer."""
    shown: list[dict[str, Any]] = []
    for curve in curves[:_MOST_LABELS]:
        step = math.ceil(len(curve.shown) / _MOST_HOVER_POINTS) or 1
        points = [
            [
                round(frame.at_x(x), 1),
                round(frame.at_y(y), 1),
                names[int(x)] if names and x.is_integer() and 0 <= x < len(names) else _coordinate(x),
                number(y),
            ]
            for x, y in curve.shown[::step]
        ]
        shown.append({"label": visible(curve.series.label), "color": variable(curve.color), "points": points})
    return {"width": width, "height": height, "top": frame.top, "bottom": frame.bottom, "curves": shown}


def _coordinate(x: float) -> str:
    return f"{int(x):,}" if x.is_integer() and abs(x) < 1e9 else number(x)
