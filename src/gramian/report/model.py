"""What `gramian.inspect` returns: a `Report` of findings, and one `Layer` for each matrix.

`Report.to_document` turns it into a page (`document.py`); terminal, HTML and JSON render both.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .document import Document, Status
from .findings import Finding, ranked
from .formatting import first_clauses, plural
from .layer import Direction, Layer, Place

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

_LONGEST_REASON = 96  # characters of a reason in the verdict; the report has it in full

# The fact that says how much of the model the second moments cover; below a half, the verdict says it.
COVERAGE = "share of parameters whose signal was measured"

HALF = 0.5


@dataclass(repr=False)
class Report:
    """What `gramian.inspect` found: findings, one row per layer, and facts about the whole model.

    Args:
        title: name of the model or file.
        findings: problems and remarks, errors first.
        layers: one row per matrix, in forward order.
        facts: numbers and words about the whole model, by label.
        jacobian: singular values of the end-to-end Jacobian, largest first; empty where it was not measured.
        notes: how things were measured, and what was skipped.
        directions: leading singular vectors of the first layer.
        depth: the modules in the order of the forward pass; empty where no data were given.
        looked_at: what was examined, in a few words each.
        not_looked_at: why something was not examined, by what it is.

    >>> report = Report("net", [Finding("dead-units", "warning", "12 of 64 units are dead", where="layers.3")])
    >>> report.status, report.verdict
    ('warning', '1 warning: 12 of 64 units are dead.')
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    notes: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    depth: list[Place] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    not_looked_at: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """`"bad"` if there is an error, else `"warning"` if there is a warning, else `"good"`."""
        severities = {finding.severity for finding in self.findings}
        return "bad" if "error" in severities else "warning" if "warning" in severities else "good"

    @property
    def verdict(self) -> str:
        """The number of errors and warnings and the first of them, or where no trouble was found; what was left out."""
        return f"{self.outcome} {self.left_out}".strip()

    @property
    def left_out(self) -> str:
        """What was not looked at and why, in one sentence; empty where nothing was left out."""
        told = "; ".join(f"{what} ({first_clauses(why, _LONGEST_REASON)})" for what, why in self.not_looked_at.items())
        return f"Not looked at: {told}." if told else ""

    @property
    def outcome(self) -> str:
        """The verdict without what was left out."""
        counts = [(sum(f.severity == severity for f in self.findings), severity) for severity in ("error", "warning")]
        parts = [plural(count, severity) for count, severity in counts if count]
        if parts:
            return f"{', '.join(parts)}: {ranked(self.findings)[0].title.rstrip('.')}."
        remarks = f" ({plural(len(self.findings), 'remark')})" if self.findings else ""
        if len(self.findings) == 1:
            title = self.findings[0].title.rstrip(".")
            remarks = f"; 1 remark: {title[0].lower()}{title[1:]}"
        if not self.layers:
            return f"No trouble found{remarks}, but there were no layers to inspect."
        among = f" Looked at: {', '.join(self.looked_at)}." if self.looked_at else ""
        share = self.facts.get(COVERAGE, 1.0)
        if isinstance(share, float) and share < HALF:
            told = "none" if share <= 0 else "under 1 %" if share < 0.005 else f"{100 * share:.0f} %"
            among += f" The signal was measured of {told} of the parameters."
        return f"No trouble found in {plural(len(self.layers), 'layer')}{remarks}.{among}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts and lists that strict JSON can hold; NaN and infinity become `None`."""
        from .serial import report_to_dict

        return report_to_dict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Return strict JSON (no NaN, no Infinity); the key `"gramian"` holds the schema's version."""
        from .serial import report_to_json

        return report_to_json(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report that `to_json` wrote.

        A list item or a fact that was not finite comes back as NaN. Raises `InputError` where the text is not JSON, not
        a report, or of a newer schema.
        """
        from .serial import report_from_json

        return report_from_json(text)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a table of pandas with one row per layer, indexed by name.

        Raises `UnsupportedError` where pandas is not installed.
        """
        from .serial import layers_to_dataframe

        return layers_to_dataframe(self.layers)

    def figures(self) -> dict[str, Figure]:
        """Return the pictures as matplotlib's figures, by title, to change or to save (`figure.savefig`)."""
        return self.to_document().figures()

    def to_document(self) -> Document:
        """Return the report as a page: the network by depth, findings, spectra, Jacobian, layers, notes."""
        from .compose import document_of

        return document_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.html` page or a `.json` file, by the suffix; the file is written completely or not at all.

        Raises `InputError` for another suffix, or where the folder is missing or cannot be written.
        """
        from .serial import save_report

        save_report(self, path)

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {self.verdict}>"

    def __str__(self) -> str:
        state = random.getstate()
        try:
            from .terminal import to_text

            return to_text(self, width=shutil.get_terminal_size((100, 24)).columns)  # COLUMNS, the terminal, or 100
        finally:
            random.setstate(state)  # rich draws from it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import ReportView

        yield ReportView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self.to_document())
