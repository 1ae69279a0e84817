"""What was found: findings with their remedies, and what a remedy was seen to do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .actions import Action

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Rehearsal:
    """What a remedy was seen to do: a few training steps on copies, with and without it.

    Args:
        steps: before the losses are compared.
        seeds: number of rehearsals, of different random states and orders of the batches.
        before, after: loss after the steps in evaluation mode, without and with the remedy, measured alike, the mean
            over the seeds; NaN or infinite where the training fails.
        before_spread, after_spread: standard deviation over the seeds.
        is_gone: whether the finding is gone when the copy with the remedy is diagnosed.
        note: what else the remedy does, such as the loss of trained weights.

    >>> print(Rehearsal(50, 2, 2.3, 0.412, 0.01, 0.02, is_gone=True).told)
    loss after 50 steps 2.3 ± 0.01 → 0.412 ± 0.02 (mean of 2 seeds ± their deviation); the finding is gone
    """

    steps: int
    seeds: int
    before: float
    after: float
    before_spread: float = 0.0
    after_spread: float = 0.0
    is_gone: bool = False
    note: str = ""

    @property
    def told(self) -> str:
        """The rehearsal in one line."""
        many = self.seeds > 1
        losses = [
            f"{mean:.3g}" + (f" ± {spread:.1g}" if many and spread > 0 else "")
            for mean, spread in ((self.before, self.before_spread), (self.after, self.after_spread))
        ]
        spread = " ± their deviation" if many and self.before_spread + self.after_spread > 0 else ""
        seeds = f" (mean of {self.seeds} seeds{spread})" if many else ""
        gone = "the finding is gone" if self.is_gone else "the finding remains"
        when = f"after {self.steps} steps" if self.steps else "before any step"
        line = f"loss {when} {' → '.join(losses)}{seeds}; {gone}"
        return f"{line}. {self.note}" if self.note else line


@dataclass(frozen=True)
class Finding:
    """One problem, or one fact worth knowing: where it is, how large, why it happens, and what to do.

    Args:
        code: stable, so that programs may match it: `"gain-below-one"`.
        severity: `"error"`, `"warning"` or `"info"`.
        title: one sentence without a full stop.
        where: the layers concerned.
        evidence: the measured numbers, with their intervals.
        cause: why it happens, in a sentence.
        action: what to do, where code can do it.
        advice: what to do that no code performs, or what to consider beside the action.
        source: the paper behind the rule.
        follows: the code of the finding that this one follows from; empty for a cause.
        rehearsal: what the action was seen to do, where it was verified.

    >>> Finding("gain-below-one", "error", "Gradients vanish", action=Action("isometric_")).remedy
    'gm.init.isometric_(model, next(iter(batches)))'
    """

    code: str
    severity: Severity
    title: str
    where: str = ""
    evidence: str = ""
    cause: str = ""
    action: Action | None = None
    advice: str = ""
    source: str = ""
    follows: str = ""
    rehearsal: Rehearsal | None = None

    @property
    def remedy(self) -> str:
        """The action's code, then the advice, each on its own lines; empty if there is neither."""
        return "\n".join(part for part in (self.action.code if self.action else "", self.advice) if part)

    def _repr_html_(self) -> str:
        told = [("where", self.where), ("evidence", self.evidence), ("cause", self.cause)]
        code = f"<pre>{html.escape(self.action.code)}</pre>" if self.action else ""
        rows = [f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in told if text]
        if self.remedy:
            rows.append(f"<tr><th>remedy</th><td>{code}{html.escape(self.advice)}</td></tr>")
        if self.rehearsal is not None:
            rows.append(f"<tr><th>verified</th><td>{html.escape(self.rehearsal.told)}</td></tr>")
        return f"<p><b>{self.severity}</b> {html.escape(self.title)}</p><table>{''.join(rows)}</table>"


def causes_first(findings: Sequence[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Return the findings by rank, each with those that follow from it, which have no entry of their own.

    >>> causes_first([Finding("b", "info", "B", follows="a"), Finding("a", "error", "A")])[0][0].code
    'a'
    """
    causes = {f.code for f in findings if not f.follows}
    return [
        (cause, [f for f in findings if f.follows == cause.code])
        for cause in ranked(findings)
        if not cause.follows or cause.follows not in causes
    ]


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return errors, then warnings, then remarks; findings of one severity keep their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
