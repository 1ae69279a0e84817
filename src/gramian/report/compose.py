"""From reports to pages: the document of one report, and sections that compare two reports."""

from __future__ import annotations

from collections.abc import Sequence

from .by_depth import depth_section, weights_section
from .document import Document, Drawing, HeatMap, Picture, Role, Section, Series, Table, Tile
from .formatting import number
from .layer import Layer
from .layer_table import layer_table
from .model import Report

_MOST_TILES = 6

# Facts that have a tile wherever they were measured.
_FIRST = ("end-to-end Jacobian σ₁", "gain χ (geometric mean)", "gradient, first layer against last")

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
        Tile("Matrices", number(len(report.layers))),
        Tile("Parameters", number(report.facts.get("parameters", parameters(report.layers)))),
    ]
    facts.sort(key=lambda fact: fact[0] not in _FIRST)
    tiles += [Tile(label, number(value)) for label, value in facts[:_MOST_TILES]]
    main = main_section(report)
    weights = weights_section(report)
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
    return depth_section([report], [""], ["accent"]) or weights_section(report)


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


def _findings_section(heading: str, report: Report) -> Section:
    if not report.findings:
        return Section(heading, report.outcome)
    return Section(heading, items=[list(report.findings)])


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
            names = [layer.name for layer in layers]
            labels_of_axes = ("index of the singular value", "layer")
            drawings.append(
                HeatMap(title, rows, *labels_of_axes, True, _SPECTRA_CAPTION, "singular value", row_names=names)
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
        if any(value > 0 for value in report.jacobian)
    ]
    if not series:
        return Section(
            "End-to-end Jacobian", "All its singular values are zero: the output does not depend on the input."
        )
    picture = Picture(
        "Singular values of the end-to-end Jacobian", series, "index", "singular value", log_y=True,
        caption=_JACOBIAN_CAPTION, reference=(1.0, "isometry: 1"),
    )  # fmt: skip
    return Section("End-to-end Jacobian", items=[picture])
