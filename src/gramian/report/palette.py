"""Colors by meaning: pictures are drawn in placeholder colors, which the page replaces by its light or dark ones."""

from __future__ import annotations

from collections.abc import Sequence

from .document import Role, Series

# matplotlib has fixed colors only. Each name below is drawn in a color that nothing else uses, which becomes
# `var(--c-name)` in the SVG; page.css defines the variable's light and dark values.
NAMES = (
    *("ink", "faint", "grid", "axis", "surface", "before", "after", "baseline", "accent", "muted"),
    *(f"series-{index}" for index in range(1, 9)),
)
_STAND_INS = {name: f"#{index:02x}1ea5" for index, name in enumerate(NAMES)}
_VARIABLES = {color: f"var(--c-{name})" for name, color in _STAND_INS.items()}

# The series whose hue a role uses; an automatic series in the same picture gets another.
_TAKEN_BY_ROLE: dict[Role, int] = {"after": 1, "before": 2, "accent": 5}


def variable(name: str) -> str:
    """Return the CSS color of a name in `NAMES`."""
    return f"var(--c-{name})"


def stand_in(name: str) -> str:
    """Return the color in which matplotlib draws a name in `NAMES`."""
    return _STAND_INS[name]


def replace_stand_ins(style: str) -> str:
    """Replace every stand-in color in a style by its CSS variable."""
    if "#" in style:
        for color, css in _VARIABLES.items():
            style = style.replace(color, css)
    return style


def colors_of(series: Sequence[Series]) -> list[str]:
    """Return one name per series: that of its role, or the next of eight hues that no role in the picture uses."""
    taken = {_TAKEN_BY_ROLE[s.role] for s in series if s.role in _TAKEN_BY_ROLE}
    free = [index for index in range(1, 9) if index not in taken]
    names: list[str] = []
    automatic = 0
    for curve in series:
        if curve.role == "auto":
            names.append(f"series-{free[automatic % len(free)]}")
            automatic += 1
        else:
            names.append(curve.role)
    return names
