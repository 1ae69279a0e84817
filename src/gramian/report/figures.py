"""The pictures of a page as matplotlib's figures, with ordinary axes, for a person to change and to save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .document import Depth, Document, Drawing, HeatMap, Picture, Role, Section, Series
from .formatting import elide, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS: dict[Role, str] = {"before": "C1", "after": "C0", "baseline": "0.4", "accent": "C4", "muted": "0.6"}
_MOST_NAMES = 16  # of places below a picture by depth
_LONGEST_NAME = 28


def figures_of(document: Document) -> dict[str, Figure]:
    """Return a figure for each picture of the page, by its title; of equal titles the later ones are numbered."""
    found: dict[str, Figure] = {}
    for drawing in _drawings(document):
        name, number = drawing.title, 2
        while name in found:
            name, number = f"{drawing.title} ({number})", number + 1
        found[name] = _figure(drawing)
    return found


def figures_by_layer(title: str, verdict: str, names: Sequence[str], **drawn: Sequence[float]) -> dict[str, Figure]:
    """Return a figure with a bar for each layer for each keyword, whose underscores are spaces in its title."""
    places = range(len(names))
    pictures = [
        Picture(name.replace("_", " "), [Series("", places, values, style="bars")], "layer", x_names=names)
        for name, values in drawn.items()
    ]
    return figures_of(Document(title, verdict, sections=[Section("By layer", items=pictures)]))


def _drawings(document: Document) -> Iterator[Drawing]:
    for section in document.sections:
        for item in section.items:
            for part in item if isinstance(item, tuple) else (item,):
                if isinstance(part, Drawing):
                    yield part


def _figure(drawing: Drawing) -> Figure:
    from matplotlib.figure import Figure

    rows = len(drawing.lanes) if isinstance(drawing, Depth) else 1
    figure = Figure(figsize=(9, 2.2 + 1.5 * rows), layout="constrained")
    figure.suptitle(drawing.title)
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    if isinstance(drawing, Depth):
        _draw_depth(list(axes), drawing)
    elif isinstance(drawing, HeatMap):
        _draw_heat_map(figure, axes[0], drawing)
    else:
        _draw_picture(axes[0], drawing)
    return figure


def _draw_picture(ax: Any, picture: Picture) -> None:
    for series in picture.series:
        options: dict[str, Any] = {"label": series.label, "color": _COLORS.get(series.role)}
        if series.style == "bars":
            ax.bar(series.x, series.y, **options)
        elif series.style == "area":
            ax.fill_between(series.x, series.y, alpha=0.3, **options)
        else:
            ax.plot(series.x, series.y, {"points": "o", "dashed": "--"}.get(series.style, "-"), **options)
    if picture.reference is not None:
        ax.axhline(picture.reference[0], color="0.4", linestyle="--", label=picture.reference[1])
    if picture.x_names:
        ax.set_xticks(range(len(picture.x_names)), picture.x_names, rotation=35, ha="right")
    ax.set(xlabel=picture.x_label, ylabel=picture.y_label)
    ax.set(xscale="log" if picture.log_x else "linear", yscale="log" if picture.log_y else "linear")
    _legend(ax)


def _draw_heat_map(figure: Figure, ax: Any, heat_map: HeatMap) -> None:
    values = np.full((len(heat_map.values), max(map(len, heat_map.values), default=0)), math.nan)
    for place, row in enumerate(heat_map.values):
        values[place, : len(row)] = row
    if heat_map.log:
        values[values <= 0] = math.nan
    image = ax.imshow(values, aspect="auto", interpolation="nearest", norm="log" if heat_map.log else None)
    figure.colorbar(image, ax=ax, label=heat_map.value_label)
    ax.set(xlabel=heat_map.x_label, ylabel=heat_map.y_label)


def _draw_depth(axes: Sequence[Any], depth: Depth) -> None:
    for ax, lane in zip(axes, depth.lanes, strict=True):
        for label, role, values in lane.series:
            places = [place for place, value in enumerate(values) if value is not None]
            known = [value for value in values if value is not None]
            ax.plot(places, known, ".-", label=label, color=_COLORS.get(role))
        if lane.reference is not None:
            ax.axhline(lane.reference, color="0.4", linestyle="--")
        for place in depth.culprits:
            ax.axvspan(place - 0.5, place + 0.5, color="0.9", zorder=0)
        ax.set(yscale="log")
        ax.set_title(lane.label, loc="left", fontsize="medium")
        _legend(ax)
    _name_places(axes[-1], depth.names)
    axes[-1].set_xlabel(depth.x_label)


def _name_places(ax: Any, names: Sequence[str]) -> None:
    """Ticks with the names of their places: of all, where there is room, and of those in view after a zoom."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def named(x: float, _: int | None) -> str:
        place = round(x)
        return elide(visible(names[place]), _LONGEST_NAME) if x == place and 0 <= place < len(names) else ""

    ax.xaxis.set_major_locator(MaxNLocator(_MOST_NAMES, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(named))
    ax.tick_params("x", rotation=35)
    for label in ax.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")


def _legend(ax: Any) -> None:
    if any(ax.get_legend_handles_labels()[1]):
        ax.legend(fontsize="small")
