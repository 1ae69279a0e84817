"""The order of findings: by origin, with what follows from a cause told as such."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gramian.report import SEVERITIES, Finding

__all__ = ["ordered"]

# Codes by origin, causes first. What is in no group comes after these, before depth.
_ORIGINS: tuple[tuple[str, ...], ...] = (
    ("non-finite-weights", "input-non-finite"),
    ("labels-constant", "labels-out-of-range", "input-constant"),
    ("graph-cut", "loss-double-softmax", "loss-rectified", "zero-weights", "parameter-constant", "norm-zero-gain"),
    ("input-dominated", "input-offset", "input-scale"),
    ("parameter-not-stepped", "weight-decay-too-large", "momentum-too-high"),
    ("embedding-scale", "head-scale", "parameter-scale-small", "parameter-scale-large", "parameter-rank-one"),
    ("norm-statistics", "norm-evaluation-mode", "dropout-rate", "gate-shut"),
    ("attention-saturated", "residual-growth"),
    ("gain-below-one", "gain-above-one"),
    ("dead-units", "saturated-units"),
    ("parameter-frozen", "parameter-unused", "parameter-shared", "input-duplicates"),
    ("rate-too-high", "rate-too-low"),
    ("labels-independent",),
)

# What a finding makes true elsewhere: these are told as following from the first of the causes that is there.
_SYMPTOMS = frozenset(
    "samples-indistinguishable gradient-underflow no-gradient gradient-vanishes gradient-explodes jacobian-vanishes "
    "jacobian-explodes non-finite-input non-finite-gradient loss-non-finite".split()
)
_UNITS = frozenset(("dead-units", "saturated-units", "attention-saturated", "residual-growth"))
_GAINS = frozenset(("gain-below-one", "gain-above-one"))
_RATES = frozenset(("rate-too-high", "rate-too-low", "labels-independent"))
_SIGNAL = frozenset(code for group in (0, 3, 5, 7) for code in _ORIGINS[group]) | {
    "zero-weights", "norm-zero-gain", "graph-cut", "input-constant", "parameter-constant", "gate-shut",
}  # fmt: skip


def _rank(finding: Finding) -> int:
    for i, codes in enumerate(_ORIGINS):
        if finding.code in codes:
            return i
    return len(_ORIGINS)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Findings by severity and origin, one for each code and place; what follows from a cause becomes information.

    Args:
        found: all findings.

    Returns: the list; a finding that follows from another has severity "info" and says from which.
    Raises: nothing of its own.
    Cost: linear.
    Source: this library's own.
    """
    unique: dict[str, Finding] = {}
    for finding in found:
        unique.setdefault(finding.code, finding)
    all_of = list(unique.values())
    serious = [f for f in all_of if f.severity != "info"]
    causes = sorted((f for f in serious if f.code in _SIGNAL or f.code in _GAINS | _UNITS), key=_rank)
    result = [replace(f, severity="info", cause=_follows(f, root)) if (root := _root(f, causes, serious)) else f for f in all_of]
    return sorted(result, key=lambda f: (SEVERITIES.index(f.severity), _rank(f)))


def _root(finding: Finding, causes: list[Finding], serious: list[Finding]) -> Finding | None:
    """The cause that a finding follows from."""
    if finding.severity == "info":
        return None
    first = next((c for c in causes if c is not finding and _rank(c) < _rank(finding)), None)
    if finding.code in _SYMPTOMS:
        return first
    if finding.code in _UNITS | _GAINS:
        signal = next((c for c in causes if c.code in _SIGNAL and c is not finding and _rank(c) < _rank(finding)), None)
        return signal or (first if finding.code in _UNITS else None)
    if finding.code in _RATES:
        return next((c for c in sorted(serious, key=_rank) if c is not finding and c.code not in _RATES and _rank(c) < _rank(finding)), None)
    return None


def _follows(finding: Finding, root: Finding) -> str:
    return f"Follows from {root.code}: {root.title[0].lower()}{root.title[1:]}. {finding.cause}".strip()
