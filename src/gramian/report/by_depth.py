"""The sections that show a network by depth: the signal's and the weights' lanes, with the findings' places marked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from .axes import shows
from .document import Depth, Lane, Role, Section
from .findings import Finding, causes_first
from .layer import Layer, Place
from .model import Report


def places_of(finding: Finding, names: Sequence[str]) -> list[int]:
    """Return the places that the `where` of a finding names: modules, their parameters, or what is inside them.

    >>> places_of(Finding("c", "error", "t", where="1.weight, 3"), ["0", "1", "3.a", "3.b"])
    [1, 2, 3]
    """
    ends = re.fullmatch(r"(\S+) … (\S+)", finding.where)
    if ends:  # from one to the other
        hits = [places_of(replace(finding, where=end), names) for end in ends.groups()]
        return list(range(hits[0][0], hits[1][-1] + 1)) if all(hits) else sorted(hits[0] + hits[1])
    words = {word for word in re.split(r"[\s,;…()]+", finding.where.replace(" and ", ", ")) if word}
    words = {word.partition("[")[0] for word in words}
    found = []
    for place, name in enumerate(names):
        plain = name.partition("[")[0]
        if plain and any(_meets(plain, word) for word in words):
            found.append(place)
    return found


def _meets(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}.") or word.rpartition(".")[0] == name


def _marked(report: Report, names: Sequence[str]) -> tuple[list[int], list[int], str]:
    """Return the places that the first trouble names, those of what follows from it, and a sentence on the marks."""
    first = next(((cause, after) for cause, after in causes_first(report.findings) if cause.severity != "info"), None)
    if first is None:
        return [], [], ""
    cause, after = first
    title = cause.title.rstrip(".")
    if cause.where == "data":
        return [], [], f"The first finding is about the data, before the first place: {title}."
    culprits = places_of(cause, names)
    later = sorted({place for finding in after for place in places_of(finding, names)} - set(culprits))
    if not culprits and "" in names and _is_own(report, cause.where):
        return [names.index("")], later, f"Marked: {title}. It is the model's own, at whose end the mark is."
    if not culprits:
        where = "about all of it" if cause.where == "all layers" else _elsewhere(cause.where)
        faint = " Shaded: what follows from it." if later else ""
        return [], later, f"The first finding is {where}: {title}.{faint}"
    faint = " Fainter: what follows from it." if later else ""
    return culprits, later, f"Marked: {title}.{faint}"


def _is_own(report: Report, where: str) -> bool:
    """Whether a finding names a parameter that the model itself has, and none of its modules."""
    own = {layer.name.partition("[")[0] for layer in report.layers}
    return where in own and "." not in where


def _elsewhere(where: str) -> str:
    """What is said of a finding whose place is none of the picture's, such as the loss or a parameter of the model."""
    if where in ("labels", "loss", "optimizer", "training step"):
        return f"about the {where}"
    return f"about {where}, for which the picture has no place" if where else "about no single place"


# The lanes of the picture by depth: label, what of a place, and the height of a reference line.
_LANES: tuple[tuple[str, Callable[[Place], float | None], float | None], ...] = (
    ("signal, root mean square (RMS)", lambda place: place.rms, None),
    ("variation between samples / signal", lambda place: place.variation, None),
    ("gradient at the output, RMS per unit", lambda place: place.gradient, None),
    ("gain χ; gradients shrink below 1", lambda place: place.gain, 1.0),
    ("first step ‖ΔW‖ / ‖W‖", lambda place: place.update, None),
)

_WHOLE = "the model"

_EDGES = "A red mark at the lower edge is a zero, one at the upper edge is not finite."


def depth_section(reports: Sequence[Report], labels: Sequence[str], roles: Sequence[Role]) -> Section | None:
    """Return the network by depth, one curve for each report in each lane; None where no signal was measured."""
    tracks = [report.depth or _places_of_layers(report) for report in reports]
    names = [place.name for place in max(tracks, key=len)]
    lanes = []
    for label, measure, reference in _LANES:
        values = [[measure(place) for place in track] for track in tracks]
        curves: list[tuple[str, Role, Sequence[float | None]]] = [
            (curve, role, row + [None] * (len(names) - len(row)))
            for curve, role, row in zip(labels, roles, values, strict=True)
            if sum(value is not None for value in row) > 1
        ]
        if curves:
            lanes.append(Lane(label, curves, reference))
    if not lanes:
        return None
    culprits, later, caption = _marked(reports[0], names) if len(reports) == 1 else ([], [], "")
    caption = " ".join(part for part in (caption, _EDGES if _has_edges(lanes) else "") if part)
    shown = [name or _WHOLE for name in names]
    return Section("The network by depth", items=[Depth("Signal by depth", shown, lanes, culprits, later, caption)])


def _places_of_layers(report: Report) -> list[Place]:
    """Places from the table of layers, for a report that has no others."""
    return [
        Place(layer.name, layer.kind, layer.activation_rms, None, layer.gradient_rms, layer.gain)
        for layer in report.layers
    ]


def _has_edges(lanes: Sequence[Lane]) -> bool:
    values = [value for lane in lanes for _, _, row in lane.series for value in row if value is not None]
    return any(not shows(value, log=True) for value in values)


def weights_section(report: Report) -> Section | None:
    """Sizes and ranks of the matrices over the depth of the network."""
    layers = report.layers
    if sum(bool(layer.spectral_norm) for layer in layers) < 2:
        return None
    sizes: dict[str, Callable[[Layer], float | None]] = {
        "largest σ": lambda layer: layer.operator_norm or layer.spectral_norm,
        "root mean square σ": lambda layer: (
            None if layer.frobenius_norm is None else layer.frobenius_norm / math.sqrt(min(layer.shape))
        ),
        "noise edge": lambda layer: layer.noise_edge,
    }
    ranks: dict[str, Callable[[Layer], float | None]] = {
        "99 % of the energy": lambda layer: layer.rank_99[-1] / min(layer.shape) if layer.rank_99 else None,
        "90 % of the energy": lambda layer: layer.rank_90[-1] / min(layer.shape) if layer.rank_90 else None,
        "stable rank": lambda layer: layer.stable_rank / min(layer.shape) if layer.stable_rank else None,
    }
    changes: dict[str, Callable[[Layer], float | None]] = {"": lambda layer: layer.relative_change}
    lanes = []
    for label, measures in (
        ("singular values", sizes),
        ("rank / full rank", ranks),
        ("change ‖ΔW‖ / ‖W‖", changes),
    ):
        curves: list[tuple[str, Role, list[float | None]]] = [
            (curve, "auto", [measure(layer) for layer in layers]) for curve, measure in measures.items()
        ]
        known = [curve for curve in curves if sum(value is not None for value in curve[2]) > 1]
        if known:
            lanes.append(Lane(label, known, hues=sum(len(lane.series) for lane in lanes)))
    names = [layer.name for layer in layers]
    culprits, later, caption = _marked(report, names)
    caption = " ".join(
        part for part in (
            caption if culprits or later else "",
            "Random entries of the same size have no singular value above the noise edge; a largest one far above it "
            "is structure that was learned.",
            _EDGES if _has_edges(lanes) else "",
        ) if part
    )  # fmt: skip
    return Section(
        "Weights by depth", items=[Depth("Weights by depth", names, lanes, culprits, later, caption, "matrix")]
    )
