"""From reports to pages: the document of one report, and sections that compare two reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from .axes import shows
from .formatting import number
from .model import (
    Depth,
    Detail,
    Document,
    Drawing,
    Finding,
    HeatMap,
    Lane,
    Layer,
    Picture,
    Place,
    Report,
    Role,
    Section,
    Series,
    Table,
    Tile,
    causes_first,
)

_MOST_TILES = 6

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
    main = main_section(report)
    weights = _weights_section(report)
    # The picture of the whole network comes first, then what is wrong with it.
    findings = _findings_section("Findings", report) if report.findings else None
    parts = (main, findings, weights if weights != main else None)
    sections = [section for section in (*parts, _spectra_section([report], [""])) if section is not None]
    if report.jacobian:
        sections.append(_jacobian_section([report], [""], ["accent"]))
    if report.directions:
        sections.append(_directions_section(report))
    if report.layers:
        sections.append(Section("Layers", items=[layer_table(report.layers, report.findings)]))
    if len(facts) > _MOST_TILES:
        rows = [(label, value) for label, value in facts[_MOST_TILES:]]
        sections.append(Section("Further facts", items=[Table("", ("fact", "value"), rows)]))
    if report.not_looked_at:
        lines = [f"- {what}: {why}" for what, why in report.not_looked_at.items()]
        sections.append(Section("Not looked at", "\n".join(lines)))
    if report.notes:
        sections.append(Section("Notes", "\n".join("- " + " ".join(note.split()) for note in report.notes)))
    return Document(report.title, report.outcome, report.status, tiles, sections, left_out=report.left_out)


def main_section(report: Report) -> Section | None:
    """Return the picture of the whole network: the signal by depth, or the weights where no signal was measured."""
    return depth_section([report], [""], ["accent"]) or _weights_section(report)


def compare(before: Report, after: Report, labels: tuple[str, str] = ("before", "after")) -> list[Section]:
    """Return sections that show two reports of one network side by side, with common axes and color scales.

    Args:
        before, after: the two reports.
        labels: what to call them.
    Returns: both by depth, findings of each, then spectra and end-to-end Jacobian of both, where measured.
    Raises: nothing of its own.
    Cost: none to speak of; the pictures are drawn when the page is rendered.
    Source: this library's own.

    >>> [section.heading for section in compare(Report("a"), Report("b"))]
    ['Findings before', 'Findings after']
    """
    reports = [before, after]
    roles: tuple[Role, Role] = ("before", "after")
    findings = [_findings_section(f"Findings {label}", report) for label, report in zip(labels, reports, strict=True)]
    parts = (depth_section(reports, labels, roles), *findings, _spectra_section(reports, labels))
    sections = [section for section in parts if section is not None]
    if before.jacobian or after.jacobian:
        sections.append(_jacobian_section(reports, labels, roles))
    return sections


def parameters(layers: Sequence[Layer]) -> int:
    """Return the number of parameters in all layers."""
    return sum(int(layer.parameters) for layer in layers)


def named_in(findings: Sequence[Finding], layers: Sequence[Layer]) -> dict[str, int]:
    """Return, for each layer that the `where` of a finding names, the rank of the first such finding."""
    names = [layer.name for layer in layers]
    ranks: dict[str, int] = {}
    for rank, finding in enumerate(findings):
        for place in places_of(finding, names):
            ranks.setdefault(names[place], rank)
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
        return Section(heading, report.outcome)
    return Section(heading, items=[list(report.findings)])


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
    if not culprits:
        where = "about all of it" if cause.where == "all layers" else "about no single place"
        faint = " Shaded: what follows from it." if later else ""
        return [], later, f"The first finding is {where}: {title}.{faint}"
    faint = " Fainter: what follows from it." if later else ""
    return culprits, later, f"Marked: {title}.{faint}"


# The lanes of the picture by depth: label, what of a place, and the height of a reference line.
_LANES: tuple[tuple[str, Callable[[Place], float | None], float | None], ...] = (
    ("signal, root mean square (RMS)", lambda place: place.rms, None),
    ("variation between samples, share of the signal", lambda place: place.variation, None),
    ("gradient at the output, RMS per unit", lambda place: place.gradient, None),
    ("gain χ; gradients shrink below 1", lambda place: place.gain, 1.0),
    ("first step ‖ΔW‖ / ‖W‖", lambda place: place.update, None),
)
_EDGES = "A cross at the lower edge is a zero, one at the upper edge is not finite."


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
    return Section("The network by depth", items=[Depth("Signal by depth", names, lanes, culprits, later, caption)])


def _places_of_layers(report: Report) -> list[Place]:
    """Places from the table of layers, for a report that has no others."""
    return [
        Place(layer.name, layer.kind, layer.activation_rms, None, layer.gradient_rms, layer.gain)
        for layer in report.layers
    ]


def _has_edges(lanes: Sequence[Lane]) -> bool:
    values = [value for lane in lanes for _, _, row in lane.series for value in row if value is not None]
    return any(not shows(value, log=True) for value in values)


def _weights_section(report: Report) -> Section | None:
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
        ("rank, share of the full one", ranks),
        ("change ‖ΔW‖ / ‖W‖", changes),
    ):
        curves: list[tuple[str, Role, list[float | None]]] = [
            (curve, "auto", [measure(layer) for layer in layers]) for curve, measure in measures.items()
        ]
        known = [curve for curve in curves if sum(value is not None for value in curve[2]) > 1]
        if known:
            lanes.append(Lane(label, known))
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
