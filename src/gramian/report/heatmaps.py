"""Heat maps as SVG with an embedded image; heat maps side by side share one color scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .axes import Axis, LeftOut, make_axis, shows
from .canvas import Canvas, Image
from .document import HeatMap
from .formatting import visible
from .pictures import Drawn

_TICK_SIZE = 11.5
_MOST_COLUMNS = 512  # more cells than pixels only make the file larger
_MOST_ROWS = 1024
_MOST_CELLS = 20_000  # whose values the page shows at the pointer: at six bytes each
_MOST_DECADES = 10.0  # of the color scale: one zero stored as 1e-17 would leave all other values one color


def shared_scale(heat_maps: Sequence[HeatMap]) -> Axis:
    """Return the color scale that spans all values that can be shown."""
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
    """Draw a heat map in pixels, within `canvas.drawing_settings`; row 0 is on top, missing values stay blank."""
    scale = scale or shared_scale([heat_map])
    rows = [[float(v) for v in row] for row in heat_map.values]
    num_columns = max((len(row) for row in rows), default=0)
    canvas = Canvas(width, height)
    top = 34.0 if heat_map.y_label or heat_map.value_label else 14.0
    if canvas.text_width(heat_map.y_label) + canvas.text_width(heat_map.value_label) + 24 > width:
        top += 20.0  # the two labels take a line each
    bottom = height - (46.0 if heat_map.x_label else 26.0)
    right = width - max([canvas.text_width(label, _TICK_SIZE) for label in scale.labels] + [0.0]) - 46
    row_axis = _cells(len(rows), max(int((bottom - top) / 36), 2))
    left = max([canvas.text_width(label, _TICK_SIZE) for label in row_axis.labels] + [8.0]) + 10
    column_axis = _cells(num_columns, max(int((right - left) / 70), 2))
    box = (left, top, right - left, bottom - top)
    image = _image(rows, num_columns, scale, box)
    _label_cells(canvas, box, row_axis, column_axis)
    _label_scale(canvas, box, scale)
    if heat_map.x_label:
        canvas.text((left + right) / 2, height - 10, canvas.fitting(heat_map.x_label, right - left), anchor="center")
    canvas.text(0, 10, canvas.fitting(heat_map.y_label, width))
    canvas.text(width, top - 24, canvas.fitting(heat_map.value_label, width), anchor="right")
    if image is None:
        canvas.text((left + right) / 2, (top + bottom) / 2, "no values", anchor="center")
    spoken = f"{heat_map.title}. Heat map of {len(rows):,} rows and {num_columns:,} columns."
    images = [_bar((right + 18, top, 12.0, bottom - top))] + ([image] if image is not None else [])
    return Drawn(canvas.svg(prefix, spoken, images), notes=_notes(rows, num_columns, scale), box=(width, *box))


def read_out(heat_map: HeatMap) -> dict[str, Any] | None:
    """Return what the page shows at the pointer: names of rows, and the values; None where there are too many."""
    if not heat_map.row_names or sum(len(row) for row in heat_map.values) > _MOST_CELLS:
        return None
    return {
        "names": [visible(name) for name in heat_map.row_names],
        "rows": [[float(f"{v:.3g}") if math.isfinite(v) else None for v in row] for row in heat_map.values],
    }


def _label_cells(canvas: Canvas, box: tuple[float, float, float, float], rows: Axis, columns: Axis) -> None:
    """Write the indices of rows and columns at the middles of their cells."""
    left, top, width, height = box
    for tick, label in zip(rows.ticks, rows.labels, strict=True):
        y = top + (tick + 0.5) / (rows.high + 1) * height
        canvas.line([left - 4, left], [y, y], "axis")
        canvas.text(left - 8, y, label, anchor="right", size=_TICK_SIZE)
    for tick, label in zip(columns.ticks, columns.labels, strict=True):
        x = left + (tick + 0.5) / (columns.high + 1) * width
        canvas.line([x, x], [top + height, top + height + 4], "axis")
        canvas.text(x, top + height + 15, label, anchor="center", size=_TICK_SIZE)


def _label_scale(canvas: Canvas, box: tuple[float, float, float, float], scale: Axis) -> None:
    left, top, width, height = box
    for tick, label in zip(scale.ticks, scale.labels, strict=True):
        y = top + height * (scale.high - tick) / (scale.high - scale.low)
        canvas.line([left + width + 30, left + width + 34], [y, y], "axis")
        canvas.text(left + width + 38, y, label, size=_TICK_SIZE)


def _notes(rows: Sequence[Sequence[float]], num_columns: int, scale: Axis) -> list[str]:
    """Return notes on what the drawing does not show: missing values, values off the scale, skipped cells."""
    left_out = LeftOut()
    for row in rows:
        left_out.count(row, scale.log)
    notes = [str(left_out)] if str(left_out) else []
    if num_columns > _MOST_COLUMNS or len(rows) > _MOST_ROWS:
        notes.append(
            f"{min(len(rows), _MOST_ROWS):,} of {len(rows):,} rows and {min(num_columns, _MOST_COLUMNS):,} of "
            f"{num_columns:,} columns drawn, evenly spaced."
        )
    floor = 10.0**scale.low if scale.log else 0.0
    low = sum(0 < value < floor * (1 - 1e-9) for row in rows for value in row)
    if low:
        values = "value is" if low == 1 else "values are"
        notes.append(f"{low:,} {values} below {floor:.0e} and drawn in the lowest color.")
    return notes


def _cells(count: int, num_ticks: int) -> Axis:
    if count <= 1:
        return Axis(False, 0.0, 0.0, (0.0,) if count else (), ("0",) if count else ())
    axis = make_axis([0, count - 1], num_ticks=num_ticks, integer=True)
    ticks = [(t, label) for t, label in zip(axis.ticks, axis.labels, strict=True) if t <= count - 1]
    return Axis(False, 0.0, count - 1.0, tuple(t for t, _ in ticks), tuple(label for _, label in ticks))


def _colors(fractions: np.ndarray) -> np.ndarray:
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
    colors = _colors(np.nan_to_num(grid))
    colors[..., 3] = np.isfinite(grid)
    return Image(colors, *box)


def _picked(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _bar(box: tuple[float, float, float, float]) -> Image:
    return Image(_colors(np.linspace(1, 0, 128))[:, None, :], *box)
