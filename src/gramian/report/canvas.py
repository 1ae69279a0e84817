"""Drawing in the page's pixels with matplotlib, and conversion to SVG in the page's fonts and colors."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from .formatting import elide, visible
from .palette import replace_stand_ins, stand_in

if TYPE_CHECKING:
    import numpy as np

TEXT_SIZE = 12.0
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
# Height of the digits' middle above the baseline, as a share of the text size; about the same in every UI font.
_MIDDLE = 0.36


@contextmanager
def drawing_settings() -> Iterator[None]:
    """Use matplotlib's defaults and not the user's matplotlibrc, with text kept as text; restored on exit."""
    import matplotlib

    # Not the backend: setting it would change the user's.
    settings: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
    }
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "gramian", "svg.image_inline": True}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's font has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        yield


class Canvas:
    """A drawing of `width` × `height` pixels, origin at the top left, y downwards. Use within `drawing_settings`.

    Colors are names of `palette.NAMES`. Texts are drawn literally: no mathematics, no markup.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # at 72 dpi a point is a pixel
        self.axes = self.figure.add_axes((0, 0, 1, 1), autoscale_on=False)
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self._layers = count()  # z-order: later drawings cover earlier ones, whatever their kind
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def text_width(self, text: str, size: float = TEXT_SIZE) -> float:
        """Return the width of a text in matplotlib's own font, which is wider than the usual page fonts."""
        from matplotlib.font_manager import FontProperties

        width, _, _ = self._renderer.get_text_width_height_descent(visible(text), FontProperties(size=size), False)
        return float(width)

    def fitting(self, text: str, width: float, size: float = TEXT_SIZE) -> str:
        """Return the text, with its middle left out where it is wider than `width`."""
        text = visible(text)
        full = self.text_width(text, size)
        return text if full <= width else elide(text, max(int(len(text) * width / full) - 1, 1))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        color: str = "faint",
        anchor: Literal["left", "center", "right"] = "left",
        size: float = TEXT_SIZE,
        rotation: float = 0.0,
    ) -> None:
        """Write a text whose middle line lies at `y`."""
        self.axes.text(
            x,
            y + (0 if rotation else _MIDDLE * size),
            visible(text),
            color=stand_in(color),
            ha=anchor,
            va="center" if rotation else "baseline",
            size=size,
            rotation=rotation,
            rotation_mode="anchor",
            parse_math=False,
            zorder=next(self._layers),
        )

    def line(
        self, xs: Sequence[float], ys: Sequence[float], color: str, width: float = 1.0, dashed: bool = False
    ) -> None:
        """Draw a line through points; a NaN is a gap."""
        style: dict[str, Any] = {"dashes": (5, 3.5)} if dashed else {"solid_capstyle": "round"}
        self.axes.plot(xs, ys, color=stand_in(color), linewidth=width, zorder=next(self._layers), **style)

    def points(self, xs: Sequence[float], ys: Sequence[float], color: str, size: float, opacity: float = 1.0) -> None:
        """Draw discs of a diameter of `size`."""
        style: dict[str, Any] = {"marker": "o", "markersize": size, "markeredgewidth": 0, "linestyle": "none"}
        self.axes.plot(xs, ys, color=stand_in(color), alpha=opacity, zorder=next(self._layers), **style)

    def polygon(self, xs: Sequence[float], ys: Sequence[float], color: str, opacity: float = 1.0) -> None:
        """Fill the region that the points enclose."""
        style: dict[str, Any] = {"alpha": opacity, "linewidth": 0, "zorder": next(self._layers)}
        self.axes.fill(xs, ys, facecolor=stand_in(color), **style)

    def bar(self, left: float, top: float, width: float, height: float, color: str, opacity: float = 1.0) -> None:
        """Fill a rectangle."""
        from matplotlib.patches import Rectangle

        style: dict[str, Any] = {"alpha": opacity, "linewidth": 0, "zorder": next(self._layers)}
        self.axes.add_patch(Rectangle((left, top), width, height, facecolor=stand_in(color), **style))

    def svg(self, prefix: str, label: str, images: Sequence[Image] = ()) -> str:
        """Return an `<svg>` element whose ids begin with `prefix`; `label` is for screen readers.

        The XML writer has escaped all text inside: do not escape it again.
        """
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _for_page(buffer.getvalue(), prefix, visible(label), images)


class Image:
    """Colors `(rows, columns, 4)` from 0 to 1, stretched over a box; cells keep sharp edges at every zoom."""

    def __init__(self, colors: np.ndarray, left: float, top: float, width: float, height: float) -> None:
        from matplotlib.image import imsave

        buffer = io.BytesIO()
        # Metadata with matplotlib's version would make equal pictures differ.
        imsave(buffer, colors, format="png", metadata={"Software": "gramian"})
        self.source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        self.box = {"x": left, "y": top, "width": width, "height": height}

    def element(self) -> ElementTree.Element:
        """Return the `<image>` element."""
        attributes = {name: f"{value:g}" for name, value in self.box.items()}
        attributes |= {"href": self.source, "preserveAspectRatio": "none", "style": "image-rendering: pixelated"}
        return ElementTree.Element("image", attributes)


def _for_page(file: str, prefix: str, label: str, images: Sequence[Image]) -> str:
    root = ElementTree.fromstring(file.encode("utf-8"))
    for parent in list(root.iter()):
        for child in list(parent):
            # The file's style rule would apply to the whole page, and its metadata are not shown.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = ((_local(name), value) for name, value in element.attrib.items())
        element.attrib = {name: _in_page(name, value, prefix) for name, value in attributes}
        element.text = element.text if element.tag == "text" else None
        element.tail = None
    size = root.attrib["viewBox"]
    root.attrib = {"viewBox": size, "role": "img", "aria-label": label, "stroke-linejoin": "round"}
    for place, image in enumerate(images):
        root.insert(place, image.element())
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _in_page(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return "#" + prefix + value[1:]
    value = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
    if name == "style":
        return replace_stand_ins(_FONT.sub("", value))
    return " ".join(value.split())
