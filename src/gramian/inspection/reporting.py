"""From measurements and causes to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gramian.inspection.causes import ordered
from gramian.inspection.causes.folding import following
from gramian.inspection.measurements import Measured
from gramian.inspection.rules import find
from gramian.report import Finding, Report

__all__ = ["report_of"]

# What leaves the loss at the start as it is.
UNRELATED = frozenset((
    "input-duplicates", "input-unused", "labels-independent", "labels-sorted", "order-ignored", "parameter-shared",
    "parameter-unused",
))  # fmt: skip


def report_of(
    title: str, measured: Measured, causes: Sequence[Finding] | None = None, *, has_model: bool = True
) -> Report:
    """The report of what was measured, with each finding once, causes first.

    Args:
        title: of the report.
        measured: what rules for weights and for the signal look at.
        causes: that were found in training steps; `None` without data.
        has_model: whether there is a model, which the lines of remedies may name.

    Returns: a `Report`.
    Cost: that of the rules.
    """
    found = [following(f, measured.lost_by if f.code == "non-finite-weights" else None) for f in find(measured)]
    found = found if causes is None else ordered((*causes, *found))
    if measured.unexplained and not any(f.severity != "info" and f.code not in UNRELATED for f in found):
        found = ordered((measured.unexplained, *found))
    found = [_runnable(finding, has_model=has_model, has_data=causes is not None) for finding in found]
    return Report(
        title, found, measured.layers, measured.facts, measured.jacobian, measured.notes, measured.directions,
        measured.places, measured.looked_at, measured.skipped,
    )  # fmt: skip


def _runnable(finding: Finding, *, has_model: bool, has_data: bool) -> Finding:
    """The finding, with an action as advice where its code names a model or batches that nobody gave."""
    if finding.action is None or finding.action.is_command:
        return finding
    code = finding.action.code.replace("\n", "; ")
    if has_model and (has_data or "batches" not in code):
        return finding
    told = f"With {'data' if has_model else 'the model in memory'}: {code}"
    return replace(finding, action=None, advice=f"{told}\n{finding.advice}" if finding.advice else told)
