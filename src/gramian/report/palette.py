"""Colors by meaning. A picture is drawn in stand-in colors that the page replaces by its own, light or dark."""

from __future__ import annotations

from collections.abc import Sequence

from .model import Role, Series

# matplotlib knows only fixed colors. Each name below is drawn as a color that nothing else uses and that becomes
# `var(--c-name)` in the SVG; page.css gives the variable its light and its dark value.
NAMES = (
    *("ink", "faint", "grid", "axis", "surface", "before", "after", "baseline", "accent", "muted"),
    *(f"series-{index}" for index in range(1, 9)),
)
_STAND_INS = {name: f"#{index:02x}1ea5" for index, name in enumerate(NAMES)}
_VARIABLES = {color: f"var(--c-{name})" for name, color in _STAND_INS.items()}

# The hues that roles have already taken; an automatic series beside them takes another.
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
    """Return one name per series: its role's, or the next of eight hues that no role in the picture has taken."""
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
