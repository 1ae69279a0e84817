"""From reports to pages: the document of one report, and the sections that set two reports side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real

from .formatting import number
from .model import (
    Document,
    Drawing,
    Finding,
    HeatMap,
    Layer,
    Picture,
    Report,
    Role,
    Section,
    Series,
    Table,
    Tile,
)

_MOST_TILES = 6

_ACTIVATION_CAPTION = "Root mean square of each layer's input. A straight slope means a constant factor per layer."
_GRADIENT_CAPTION = "Root mean square of the loss's gradient at each layer's output, per unit."
_GAIN_CAPTION = (
    "χ, the mean squared singular value of the layer's Jacobian. Below 1, gradients shrink; above 1, they grow."
)
_SPECTRA_CAPTION = "One row per layer, its singular values from the largest to the smallest."
_JACOBIAN_CAPTION = (
    "Singular values of the Jacobian from the first layer's input to the last layer's input. "
    "Signals and gradients pass undistorted where all are near 1."
)


def document_of(report: Report) -> Document:
    """Compose the page of one report; what was not measured is left out."""
    facts = list(report.facts.items())
    tiles = [Tile("Layers", number(len(report.layers))), Tile("Parameters", number(parameters(report.layers)))]
    tiles += [Tile(label, number(value)) for label, value in facts[:_MOST_TILES]]
    sections = [_findings_section("Findings", report)]
    signal = _signal_section([report], [""], ["accent"])
    sections += [section for section in (signal, _spectra_section([report], [""])) if section is not None]
    if report.jacobian:
        sections.append(_jacobian_section([report], [""], ["accent"]))
    if report.layers:
        sections.append(Section("Layers", items=[layer_table(report.layers, report.findings)]))
    if len(facts) > _MOST_TILES:
        rows = [(label, value) for label, value in facts[_MOST_TILES:]]
        sections.append(Section("Further facts", items=[Table("", ("fact", "value"), rows)]))
    if report.notes:
        sections.append(Section("Notes", "\n".join("- " + " ".join(note.split()) for note in report.notes)))
    return Document(report.title, report.verdict, report.status, tiles, sections)


def compare(before: Report, after: Report, labels: tuple[str, str] = ("before", "after")) -> list[Section]:
    """Return sections that set two reports of one network side by side, each drawing on common axes or scales."""
    reports = [before, after]
    roles: tuple[Role, Role] = ("before", "after")
    sections = [_findings_section(f"Findings {label}", report) for label, report in zip(labels, reports, strict=True)]
    optional = (_signal_section(reports, labels, roles), _spectra_section(reports, labels))
    sections += [section for section in optional if section is not None]
    if before.jacobian or after.jacobian:
        sections.append(_jacobian_section(reports, labels, roles))
    return sections


def parameters(layers: Sequence[Layer]) -> int:
    """Return the number of parameters in all layers."""
    return sum(int(layer.parameters) for layer in layers)


def named_in(findings: Sequence[Finding], layers: Sequence[Layer]) -> dict[str, int]:
    """Return, for each layer that the `where` of a finding names, the rank of the first such finding."""
    names = {layer.name for layer in layers}
    ranks: dict[str, int] = {}
    for rank, finding in enumerate(findings):
        for word in re.split(r"[\s,;…()\[\]]+", finding.where):
            if word in names:
                ranks.setdefault(word, rank)
    return ranks


def telling_rows(layers: Sequence[Layer], findings: Sequence[Finding], most: int) -> list[int]:
    """Return the places of the layers that tell most: named by findings, extreme in a measure, else evenly spread."""
    places = {layer.name: place for place, layer in enumerate(layers)}
    named = sorted(named_in(findings, layers).items(), key=lambda item: item[1])
    # A finding may name all layers: the named take half the rows.
    picked = [places[name] for name, _ in named][: most // 2]
    for measure in _MEASURES:
        known = [(value, place) for place, layer in enumerate(layers) if (value := measure(layer)) is not None]
        finite = sorted((value, place) for value, place in known if math.isfinite(value))
        broken = [place for value, place in known if not math.isfinite(value)][:1]
        picked += broken + [place for _, place in (finite[:1] + finite[-1:])]
    picked += [0, len(layers) - 1]
    spaced = [round(i * (len(layers) - 1) / max(most - 1, 1)) for i in range(most)]
    return sorted(list(dict.fromkeys([*picked, *spaced]))[:most])


# Where a layer is extreme in one of these, it is shown.
_MEASURES: tuple[Callable[[Layer], float | None], ...] = (
    lambda layer: layer.gain,
    lambda layer: layer.gradient_rms,
    lambda layer: layer.activation_rms,
    lambda layer: layer.condition,
    lambda layer: layer.stable_rank,
    lambda layer: layer.spectral_norm,
)


# The columns of a layer table: heading, and what it shows of a layer. A column without a single value is left out.
COLUMNS: dict[str, Callable[[Layer], str | float | int | None]] = {
    "layer": lambda layer: layer.name,
    "kind": lambda layer: layer.kind,
    "shape": lambda layer: "×".join(str(length) for length in layer.shape),
    "gain χ": lambda layer: layer.gain,
    "activation": lambda layer: layer.activation_rms,
    "gradient": lambda layer: layer.gradient_rms,
    "σ max": lambda layer: layer.spectral_norm,
    "condition": lambda layer: layer.condition,
    "stable rank": lambda layer: layer.stable_rank,
    "effective rank": lambda layer: layer.effective_rank,
    "rank": lambda layer: layer.numerical_rank,
    "parameters": lambda layer: layer.parameters or None,
    "dtype": lambda layer: layer.dtype or None,
    "note": lambda layer: layer.note or None,
}


def layer_table(layers: Sequence[Layer], findings: Sequence[Finding] = ()) -> Table:
    """Return the table of all layers; the rows that an error or a warning names are marked."""
    named = named_in([f for f in findings if f.severity != "info"], layers)
    said: list[str] = []
    columns = [column for column, value in COLUMNS.items() if any(value(layer) is not None for layer in layers)]
    dtypes = {layer.dtype for layer in layers}
    if len(dtypes) == 1 and len(layers) > 1 and "dtype" in columns:
        columns.remove("dtype")
        said.append(f"All are {dtypes.pop()}.")
    rows = [[COLUMNS[column](layer) for column in columns] for layer in layers]
    words = [i for i, column in enumerate(columns) if column in ("dtype", "note")]
    rows = [["" if i in words and cell is None else cell for i, cell in enumerate(row)] for row in rows]
    emphasis = [index for index, layer in enumerate(layers) if layer.name in named]
    if emphasis:
        said.append("Layers that a finding names are marked.")
    if any(cell is None for row in rows for cell in row):
        said.append("– means not measured.")
    return Table("Every matrix, in forward order", columns, rows, " ".join(said), emphasis)


# ---- sections over one report, or over several -----------------------------------------------------------------------


def _findings_section(heading: str, report: Report) -> Section:
    if not report.findings:
        return Section(heading, report.verdict)
    return Section(heading, items=[list(report.findings)])


def _depths(layers: Sequence[Layer]) -> list[float]:
    """Return the depth of each layer, or its place where depths repeat, as for parallel branches."""
    depths = [float(layer.depth) for layer in layers]
    increasing = all(a < b for a, b in pairwise(depths))
    return depths if increasing else [float(place) for place in range(len(layers))]


def _by_depth(
    reports: Sequence[Report],
    labels: Sequence[str],
    roles: Sequence[Role],
    value: Callable[[Layer], float | None],
    picture: Picture,
) -> Picture | None:
    """Return the picture with one curve per report, or None where nothing was measured at two layers."""
    series: list[Series] = []
    for report, label, role in zip(reports, labels, roles, strict=True):
        known = [(x, value(layer)) for x, layer in zip(_depths(report.layers), report.layers, strict=True)]
        points = [(x, float(y)) for x, y in known if isinstance(y, Real)]
        if len(points) >= 2:
            series.append(Series(label, [x for x, _ in points], [y for _, y in points], role))
    if not series:
        return None
    return Picture(
        picture.title, series, "depth (layer number)", picture.y_label, log_y=True, caption=picture.caption,
        reference=picture.reference,
    )  # fmt: skip


def _signal_section(reports: Sequence[Report], labels: Sequence[str], roles: Sequence[Role]) -> Section | None:
    activation = _by_depth(
        reports, labels, roles, lambda layer: layer.activation_rms,
        Picture("Activation size by depth", (), y_label="RMS of the input", caption=_ACTIVATION_CAPTION),
    )  # fmt: skip
    gradient = _by_depth(
        reports, labels, roles, lambda layer: layer.gradient_rms,
        Picture("Gradient size by depth", (), y_label="RMS of the gradient", caption=_GRADIENT_CAPTION),
    )  # fmt: skip
    gain = _by_depth(
        reports, labels, roles, lambda layer: layer.gain,
        Picture("Gain per layer", (), y_label="gain χ", caption=_GAIN_CAPTION, reference=(1.0, "critical: 1")),
    )  # fmt: skip
    pair: tuple[Drawing, ...] = tuple(picture for picture in (activation, gradient) if picture is not None)
    items = [pair, gain] if pair and gain is not None else [pair] if pair else [gain] if gain is not None else []
    return Section("Signal by depth", items=items) if items else None


def _spectra_section(reports: Sequence[Report], labels: Sequence[str]) -> Section | None:
    drawings: list[Drawing] = []
    for report, label in zip(reports, labels, strict=True):
        layers = [layer for layer in report.layers if layer.singular_values]
        title = f"Singular values by depth{', ' + label if label else ''}"
        if len(layers) == 1:
            values = layers[0].singular_values
            spectrum = Series(layers[0].name, range(len(values)), values, "accent")
            drawings.append(Picture(title, [spectrum], "index", "singular value", log_y=True))
        elif layers:
            rows = [layer.singular_values for layer in layers]
            drawings.append(
                HeatMap(title, rows, "index of the singular value", "layer", True, _SPECTRA_CAPTION, "singular value")
            )
    if not drawings:
        return None
    return Section("Weight spectra", items=[tuple(drawings) if len(drawings) > 1 else drawings[0]])


def _jacobian_section(reports: Sequence[Report], labels: Sequence[str], roles: Sequence[Role]) -> Section:
    series = [
        Series(label, range(len(report.jacobian)), report.jacobian, role)
        for report, label, role in zip(reports, labels, roles, strict=True)
        if report.jacobian
    ]
    picture = Picture(
        "Singular values of the end-to-end Jacobian", series, "index", "singular value", log_y=True,
        caption=_JACOBIAN_CAPTION, reference=(1.0, "isometry: 1"),
    )  # fmt: skip
    return Section("End-to-end Jacobian", items=[picture])
