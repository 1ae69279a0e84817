"""From reports to pages: the document of one report, and sections that compare two reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real

from .formatting import number
from .model import (
    Detail,
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
    """Return the page of one report; what was not measured is left out."""
    # The first two tiles show these two already.
    facts = [(label, value) for label, value in report.facts.items() if label not in ("parameters", "matrices")]
    tiles = [
        Tile("Layers", number(len(report.layers))),
        Tile("Parameters", number(report.facts.get("parameters", parameters(report.layers)))),
    ]
    tiles += [Tile(label, number(value)) for label, value in facts[:_MOST_TILES]]
    sections = [_findings_section("Findings", report)]
    signal = _signal_section([report], [""], ["accent"])
    weights = _weights_section(report)
    spectra = _spectra_section([report], [""])
    sections += [section for section in (signal, weights, spectra) if section is not None]
    if report.jacobian:
        sections.append(_jacobian_section([report], [""], ["accent"]))
    if report.directions:
        sections.append(_directions_section(report))
    if report.layers:
        sections.append(Section("Layers", items=[layer_table(report.layers, report.findings)]))
    if len(facts) > _MOST_TILES:
        rows = [(label, value) for label, value in facts[_MOST_TILES:]]
        sections.append(Section("Further facts", items=[Table("", ("fact", "value"), rows)]))
    if report.notes:
        sections.append(Section("Notes", "\n".join("- " + " ".join(note.split()) for note in report.notes)))
    return Document(report.title, report.verdict, report.status, tiles, sections)


def compare(before: Report, after: Report, labels: tuple[str, str] = ("before", "after")) -> list[Section]:
    """Return sections that show two reports of one network side by side, with common axes and color scales.

    Args:
        before, after: the two reports.
        labels: what to call them.
    Returns: findings of each, then signal by depth, spectra and end-to-end Jacobian of both, where measured.
    Raises: nothing of its own.
    Cost: none to speak of; the pictures are drawn when the page is rendered.
    Source: this library's own.

    >>> [section.heading for section in compare(Report("a"), Report("b"))]
    ['Findings before', 'Findings after']
    """
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
    """Return indices of the most informative layers: named by findings, extreme in a measure, else evenly spaced."""
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


def interval(ends: Sequence[float] | None) -> int | float | str | None:
    """Return an interval as text, or a single number where its ends agree.

    >>> interval((3, 3)), interval((3, 5)), interval(None)
    (3, '3–5', None)
    """
    if not ends:
        return None
    low, high = ends[0], ends[-1]
    return low if low == high else f"{number(low)}–{number(high)}"


def _tail(layer: Layer) -> str | None:
    if layer.tail_alpha is None or layer.tail_interval is None:
        return "abstains" if layer.tail_note else None
    low, high = layer.tail_interval
    return f"{layer.tail_alpha:.1f} ({low:.1f}–{high:.1f}; n = {layer.tail_size})"


NOTE = "note"  # the column of texts of any length

# The columns of a layer table: heading, and what it shows of a layer. A column without a single value is left out.
COLUMNS: dict[str, Callable[[Layer], str | float | int | None]] = {
    "layer": lambda layer: layer.name,
    "kind": lambda layer: layer.kind,
    "shape": lambda layer: "×".join(str(length) for length in layer.shape),
    "gain χ": lambda layer: layer.gain,
    "activation": lambda layer: layer.activation_rms,
    "gradient": lambda layer: layer.gradient_rms,
    "‖ΔW‖ / ‖W‖": lambda layer: layer.relative_change,
    "angle °": lambda layer: None if layer.subspace_angle is None else round(layer.subspace_angle, 1),
    "‖W‖_F": lambda layer: layer.frobenius_norm,
    "σ max": lambda layer: layer.spectral_norm,
    "conv norm": lambda layer: layer.operator_norm,
    "condition": lambda layer: layer.condition,
    "stable rank": lambda layer: layer.stable_rank,
    "effective rank": lambda layer: layer.effective_rank,
    "rank": lambda layer: layer.numerical_rank,
    "rank 90 %": lambda layer: interval(layer.rank_90),
    "rank 99 %": lambda layer: interval(layer.rank_99),
    "above noise": lambda layer: layer.above_noise,
    "p": lambda layer: layer.noise_p_value,
    "tail α": _tail,
    "zeros": lambda layer: layer.zeros or None,
    "same as": lambda layer: layer.duplicate_of or None,
    "parameters": lambda layer: layer.parameters or None,
    "dtype": lambda layer: layer.dtype or None,
    NOTE: lambda layer: layer.note or None,
}


def layer_table(layers: Sequence[Layer], findings: Sequence[Finding] = ()) -> Table:
    """Return the table of all layers; the rows that an error or a warning names are marked."""
    named = named_in([f for f in findings if f.severity != "info"], layers)
    caption: list[str] = []
    columns = [column for column, value in COLUMNS.items() if any(value(layer) is not None for layer in layers)]
    dtypes = {layer.dtype for layer in layers}
    if len(dtypes) == 1 and len(layers) > 1 and "dtype" in columns:
        columns.remove("dtype")
        caption.append(f"All are {dtypes.pop()}.")
    rows = [[COLUMNS[column](layer) for column in columns] for layer in layers]
    words = [i for i, column in enumerate(columns) if column in ("dtype", NOTE, "same as", "tail α")]
    rows = [["" if i in words and cell is None else cell for i, cell in enumerate(row)] for row in rows]
    emphasis = [index for index, layer in enumerate(layers) if layer.name in named]
    if emphasis:
        caption.append("Layers that a finding names are marked.")
    if any(cell is None for row in rows for cell in row):
        caption.append("– means not measured.")
    details = [detail_of(layer) for layer in layers]
    return Table("Every matrix, in forward order", columns, rows, " ".join(caption), emphasis, details)


_MOST_POINTS = 160  # of a spectrum in a row's details: more are not distinguishable, and 500 such rows must stay small


def detail_of(layer: Layer) -> Detail:
    """Return all numbers of one layer with their labels, and at most 160 points of its spectrum."""
    values = layer.singular_values
    last = len(values) - 1
    places = sorted({round(i * last / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)}) if last >= 0 else []
    facts: dict[str, object] = {
        "shape": " × ".join(str(length) for length in layer.shape),
        "kind": " ".join(part for part in (layer.kind, layer.role, layer.dtype) if part),
        "Frobenius norm": layer.frobenius_norm,
        "spectral norm σ₁": _with_error(layer.spectral_norm, layer.spectral_norm_error),
        "operator norm of the convolution": _with_error(layer.operator_norm, layer.operator_norm_error),
        "relative change": layer.relative_change,
        "angle of the leading subspaces": None
        if layer.subspace_angle is None
        else f"{layer.subspace_angle:.1f}° (dimension {layer.subspace_dim})",
        "condition": layer.condition,
        "stable rank": layer.stable_rank,
        "effective rank": layer.effective_rank,
        "numerical rank": layer.numerical_rank,
        "rank for 90 % of the energy": interval(layer.rank_90),
        "rank for 99 % of the energy": interval(layer.rank_99),
        "parameters saved by factors of that rank": f"{layer.saving_99:.0%}" if layer.saving_99 else None,
        "noise edge (independent entries)": layer.noise_edge,
        "singular values beyond it": layer.above_noise,
        "p of the largest (Tracy–Widom)": layer.noise_p_value,
        "power-law tail α (95 %; size)": _tail(layer) if layer.tail_alpha is not None else None,
        "tail": layer.tail_note or None,
        "exact zeros": layer.zeros or None,
        "lost to infinity in float16": layer.overflow_float16 or None,
        "lost to zero in float16": layer.underflow_float16 or None,
        "equal to": layer.duplicate_of or None,
        "gain χ": layer.gain,
        "note": layer.note or None,
    }
    known = tuple((label, number(value)) for label, value in facts.items() if value is not None)
    points = tuple((place + 1, values[place]) for place in places)
    reference = (layer.noise_edge, "noise edge") if layer.noise_edge and values else None
    return Detail(layer.name, known, points, "index of the singular value", "singular value", reference)


def _with_error(value: float | None, error: float | None) -> str | float | None:
    return value if value is None or not error else f"{number(value)} ± {number(error)}"


# ---- sections over one report, or over several -----------------------------------------------------------------------


def _findings_section(heading: str, report: Report) -> Section:
    if not report.findings:
        return Section(heading, report.verdict)
    return Section(heading, items=[list(report.findings)])


def _depths(layers: Sequence[Layer]) -> list[float]:
    """Return each layer's depth, or its index where depths repeat, as in parallel branches."""
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
    """Return the picture with one curve per report; None where fewer than two layers were measured."""
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


def _weights_section(report: Report) -> Section | None:
    """Sizes and ranks of the matrices over the depth of the network."""
    layers = [layer for layer in report.layers if layer.spectral_norm]
    if len(layers) < 2:
        return None
    sizes: dict[str, Callable[[Layer], float | None]] = {
        "largest σ": lambda layer: layer.operator_norm or layer.spectral_norm,
        "root mean square σ": lambda layer: (layer.frobenius_norm or 0.0) / math.sqrt(min(layer.shape)) or None,
        "noise edge": lambda layer: layer.noise_edge,
    }
    ranks: dict[str, Callable[[Layer], float | None]] = {
        "99 % of the energy": lambda layer: layer.rank_99[-1] / min(layer.shape) if layer.rank_99 else None,
        "90 % of the energy": lambda layer: layer.rank_90[-1] / min(layer.shape) if layer.rank_90 else None,
        "stable rank": lambda layer: layer.stable_rank / min(layer.shape) if layer.stable_rank else None,
    }
    depths = _depths(layers)

    def curves(measures: dict[str, Callable[[Layer], float | None]]) -> list[Series]:
        series = []
        for label, measure in measures.items():
            points = [(x, y) for x, y in zip(depths, map(measure, layers), strict=True) if y is not None]
            if len(points) >= 2:
                series.append(Series(label, [x for x, _ in points], [y for _, y in points]))
        return series

    size = Picture(
        "Size of the weights by depth", curves(sizes), "depth (matrix number)", "singular value", log_y=True,
        caption="Random independent entries of the same size have no singular value above the noise edge. A largest σ "
        "far above it is structure that the matrix has learned.",
    )  # fmt: skip
    rank = Picture(
        "Rank of the weights by depth", curves(ranks), "depth (matrix number)", "share of the full rank", log_y=True,
        caption="How many of a matrix's directions hold its energy ‖W‖_F². A low value means that few do.",
    )  # fmt: skip
    return Section("Weights by depth", items=[(size, rank)])


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


def _directions_section(report: Report) -> Section:
    """Leading singular vectors: pictures side by side, tokens as a table."""
    images = [d for d in report.directions if d.image]
    words = [d for d in report.directions if d.tokens]
    items: list[tuple[HeatMap, ...] | Table] = []
    if images:
        items.append(
            tuple(
                HeatMap(f"{d.layer}: direction {d.rank}, σ = {number(d.singular_value)}", d.image, "column", "row")
                for d in images
            )
        )
    if words:
        rows = [[d.layer, d.rank, d.singular_value, *("  ".join(end) for end in d.tokens)] for d in words]
        columns = ("layer", "direction", "σ", "+", "−")
        items.append(Table("Tokens at the ends of an embedding's directions", columns, rows))
    text = (
        "The inputs that the first layer amplifies most, drawn as square images. That the inputs are images is a guess "
        "from their number, which is a square."
    )
    return Section("Leading singular vectors", text if images else "", items)


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
