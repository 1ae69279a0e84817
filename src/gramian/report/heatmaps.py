"""Heat maps as SVG with an embedded image; those that stand side by side share one colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .axes import Axis, LeftOut, make_axis, shows
from .canvas import Canvas, Image
from .model import HeatMap
from .pictures import Drawn

_TICK_SIZE = 11.5
_MOST_COLUMNS = 512  # more cells than pixels only weigh
_MOST_ROWS = 1024
_MOST_DECADES = 10.0  # of the colour scale: a single exact zero kept as 1e-17 would wash out all that is of interest


def shared_scale(heat_maps: Sequence[HeatMap]) -> Axis:
    """Return the colour scale over all values that can be shown."""
    log = any(heat_map.log for heat_map in heat_maps)
    values = [float(v) for heat_map in heat_maps for row in heat_map.values for v in row]
    shown = [v for v in values if shows(v, log)]
    if log and shown:
        floor = max(shown) * 10.0**-_MOST_DECADES
        shown = [max(v, floor) for v in shown]
    return make_axis(shown, log=log, num_ticks=5)


def draw_heat_map(
    heat_map: HeatMap, prefix: str, scale: Axis | None = None, width: float = 960, height: float = 340
) -> Drawn:
    """Draw at a size in pixels, within `canvas.drawing_settings`; row 0 is at the top, cells without a value blank."""
    scale = scale or shared_scale([heat_map])
    rows = [[float(v) for v in row] for row in heat_map.values]
    left_out = LeftOut()
    for row in rows:
        left_out.count(row, scale.log)
    num_columns = max((len(row) for row in rows), default=0)
    canvas = Canvas(width, height)
    top = 14.0
    if heat_map.y_label or heat_map.value_label:
        top = 34.0
        labels = [text for text in (heat_map.y_label, heat_map.value_label) if text]
        if sum(canvas.text_width(text) for text in labels) + 24 > width:
            top = 54.0
    bottom = height - (46.0 if heat_map.x_label else 26.0)
    bar_text = max([canvas.text_width(label, _TICK_SIZE) for label in scale.labels] + [0.0])
    right = width - bar_text - 46
    row_axis = _cells(len(rows), max(int((bottom - top) / 36), 2))
    left = max([canvas.text_width(label, _TICK_SIZE) for label in row_axis.labels] + [8.0]) + 10
    column_axis = _cells(num_columns, max(int((right - left) / 70), 2))
    image = _image(rows, num_columns, scale, (left, top, right - left, bottom - top))
    bar = _bar((right + 18, top, 12.0, bottom - top))
    for tick, label in zip(row_axis.ticks, row_axis.labels, strict=True):
        y = top + (tick + 0.5) / max(len(rows), 1) * (bottom - top)
        canvas.line([left - 4, left], [y, y], "axis")
        canvas.text(left - 8, y, label, anchor="right", size=_TICK_SIZE)
    for tick, label in zip(column_axis.ticks, column_axis.labels, strict=True):
        x = left + (tick + 0.5) / max(num_columns, 1) * (right - left)
        canvas.line([x, x], [bottom, bottom + 4], "axis")
        canvas.text(x, bottom + 15, label, anchor="center", size=_TICK_SIZE)
    for tick, label in zip(scale.ticks, scale.labels, strict=True):
        y = bottom - (tick - scale.low) / (scale.high - scale.low) * (bottom - top)
        canvas.line([right + 30, right + 34], [y, y], "axis")
        canvas.text(right + 38, y, label, size=_TICK_SIZE)
    if heat_map.x_label:
        canvas.text((left + right) / 2, height - 10, canvas.fitting(heat_map.x_label, right - left), anchor="center")
    canvas.text(0, 10, canvas.fitting(heat_map.y_label, width))
    canvas.text(width, top - 24, canvas.fitting(heat_map.value_label, width), anchor="right")
    if image is None:
        canvas.text((left + right) / 2, (top + bottom) / 2, "no values", anchor="center")
    spoken = f"{heat_map.title}. Heat map of {len(rows):,} rows and {num_columns:,} columns."
    drawn = Drawn(canvas.svg(prefix, spoken, [i for i in (image, bar) if i is not None]))
    drawn.notes = [str(left_out)] if str(left_out) else []
    if num_columns > _MOST_COLUMNS or len(rows) > _MOST_ROWS:
        drawn.notes.append(
            f"{min(len(rows), _MOST_ROWS):,} of {len(rows):,} rows and {min(num_columns, _MOST_COLUMNS):,} of "
            f"{num_columns:,} columns drawn, evenly spaced."
        )
    low = sum(v < 10.0**scale.low * (1 - 1e-9) for row in rows for v in row if shows(v, True)) if scale.log else 0
    if low:
        values = "value is" if low == 1 else "values are"
        drawn.notes.append(f"{low:,} {values} below {10.0**scale.low:.0e} and drawn in the lowest colour.")
    return drawn


def _cells(count: int, num_ticks: int) -> Axis:
    if count <= 1:
        return Axis(False, 0.0, 1.0, (0.0,) if count else (), ("0",) if count else ())
    axis = make_axis([0, count - 1], num_ticks=num_ticks, integer=True)
    ticks = [(t, label) for t, label in zip(axis.ticks, axis.labels, strict=True) if t <= count - 1]
    return Axis(False, 0.0, count - 1.0, tuple(t for t, _ in ticks), tuple(label for _, label in ticks))


def _colours(fractions: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    # viridis without its two ends, which would sink into a dark and into a white page.
    return colormaps["viridis"](0.06 + 0.9 * np.clip(fractions, 0, 1))


def _image(
    rows: Sequence[Sequence[float]], num_columns: int, scale: Axis, box: tuple[float, float, float, float]
) -> Image | None:
    picked_rows = _picked(len(rows), _MOST_ROWS)
    picked_columns = _picked(num_columns, _MOST_COLUMNS)
    grid = np.full((len(picked_rows), len(picked_columns)), np.nan)
    for place, index in enumerate(picked_rows):
        row = rows[index]
        cells = [row[column] if column < len(row) else math.nan for column in picked_columns]
        grid[place] = [scale.fraction(v) if shows(v, scale.log) else math.nan for v in cells]
    if not np.isfinite(grid).any():
        return None
    colours = _colours(np.nan_to_num(grid))
    colours[..., 3] = np.isfinite(grid)
    return Image(colours, *box)


def _picked(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _bar(box: tuple[float, float, float, float]) -> Image:
    return Image(_colours(np.linspace(1, 0, 128))[:, None, :], *box)
