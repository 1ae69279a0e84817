"""The order of findings: by origin, with what follows from a cause told as such."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gramian.report import SEVERITIES, Finding

__all__ = ["DRIVEN", "SYMPTOMS", "following", "ordered"]

_GAIN = ("gain-below-one", "gain-above-one")
# Codes by origin, causes first. What is in no group comes after these, before depth.
_ORIGINS: tuple[tuple[str, ...], ...] = (
    ("non-finite-weights", "input-non-finite", "input-changed"),
    ("labels-constant", "labels-out-of-range", "labels-sorted", "input-constant"),
    ("labels-non-finite", "training-fails", "parameter-unregistered", "softmax-single-value"),
    (
        "loss-broadcast",
        "loss-unbounded",
        "loss-reversed",
        "loss-not-log-probabilities",
        "loss-term-missing",
        "loss-flat",
        "loss-term-dominates",
        "loss-collapses",
        "labels-ignored",
        "derivative-zero",
        "target-drawn",
        "pairs-mismatched",
        "target-not-detached",
        "output-range",
        "loss-maximized",
    ),
    (
        "graph-cut",
        "gradient-stopped",
        "gradient-overflow",
        "loss-double-softmax",
        "loss-double-sigmoid",
        "loss-rectified",
        "loss-bounded-scores",
        "zero-weights",
        "zero-factor",
        "parameter-constant",
        "norm-zero-gain",
        "norm-single-value",
        "attention-masked",
        "attention-over-queries",
        "axes-swapped",
        "reduction-cancels",
        "samples-mixed",
        "target-leak",
    ),
    ("gradient-kept", "gradient-dropped", "gradient-clipped", "state-lost", "rate-grows", "rate-vanished"),
    ("input-dominated", "input-offset", "input-scale", "labels-scale"),
    ("loss-summed",),
    ("parameter-not-stepped", "parameter-float16", "weight-decay-too-large", "momentum-too-high"),
    (
        "embedding-scale",
        "head-scale",
        "head-offset",
        "parameter-scale-small",
        "parameter-scale-large",
        "parameter-rank-one",
    ),
    ("adapter-scale",),
    ("norm-evaluation-mode", "dropout-rate", "dropout-evaluation", "gate-shut"),
    ("norm-statistics", "norm-few-values"),
    ("loss-non-finite",),
    _GAIN,
    ("attention-saturated", "residual-growth"),
    ("head-input-offset",),
    ("padding-read",),
    ("no-nonlinearity", "order-ignored"),
    ("dead-units", "saturated-units"),
    ("input-unused", "parameter-frozen", "parameter-unused", "parameter-shared", "input-duplicates"),
    ("modes-disagree",),
    ("rate-too-high", "rate-too-low"),
    ("labels-independent",),
    ("labels-imbalanced",),
)

# The rank behind the causes in data and in losses.
_BEHIND_LOSSES = next(i for i, codes in enumerate(_ORIGINS) if "graph-cut" in codes) - 0.5

# What a finding makes true elsewhere: these are told as following from the first of the causes that is there.
SYMPTOMS = frozenset(
    [
        "samples-indistinguishable",
        "gradient-underflow",
        "gradient-vanishes",
        "gradient-explodes",
        "jacobian-vanishes",
        "jacobian-explodes",
        "non-finite-input",
        "non-finite-gradient",
        "loss-non-finite",
        "modes-disagree",
    ]
)
_UNITS = frozenset((
    "norm-statistics", "dead-units", "saturated-units", "attention-saturated", "residual-growth", "head-input-offset",
))  # fmt: skip
# What units that do not act, and weights that are alike or small, cannot make.
_NOT_FINITE = frozenset(("loss-non-finite", "non-finite-input", "non-finite-gradient"))
_ALIKE = frozenset(("parameter-constant", "parameter-rank-one", "parameter-scale-small"))
_GAINS = frozenset(_GAIN)
# What reading the state behind long padding makes.
_FORGOTTEN = frozenset(("gradient-underflow", "samples-indistinguishable", "gradient-vanishes", "jacobian-vanishes"))
# What data, a loss or a decay of a wrong size make of weights in training, wherever it began.
DRIVEN = frozenset((
    "head-scale", "parameter-rank-one", "parameter-scale-small", "parameter-scale-large", "embedding-scale",
    "head-offset", "dominant-direction", "overflows-float16", "unusual-size",
)) | _UNITS | _GAINS  # fmt: skip
_DRIVERS = frozenset((
    "input-scale", "input-dominated", "labels-scale", "loss-unbounded", "loss-not-log-probabilities", "loss-summed",
    "weight-decay-too-large",
))  # fmt: skip
_SIZES = frozenset(("unusual-size", "dominant-direction"))
# Functions with a point where they are infinite: their arguments, and not the size of data, bring them there.
_POLES = frozenset(
    ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "div", "__truediv__", "pow", "acos")
)
_SIZES_OF_DATA = frozenset(("input-scale", "input-offset", "input-dominated"))
# What grows cannot follow from what shrinks; units are driven to their ends by what grows.
_GROWING = frozenset(("gradient-explodes", "jacobian-explodes", "residual-growth"))
_SHRINKING = frozenset(("saturated-units", "dead-units", "attention-saturated", "gain-below-one", "gate-shut"))
_RATES = frozenset(("rate-too-high", "rate-too-low", "labels-independent"))
_SIGNAL = frozenset((
    "non-finite-weights", "input-non-finite", "input-constant", "input-dominated", "input-offset", "input-scale",
    "graph-cut", "gradient-stopped", "gradient-overflow", "zero-weights", "zero-factor", "parameter-constant",
    "norm-zero-gain", "embedding-scale", "norm-single-value", "attention-masked", "reduction-cancels", "samples-mixed",
    "output-range",
    "labels-non-finite", "parameter-unregistered", "softmax-single-value",
    "head-scale", "head-offset", "parameter-scale-small", "parameter-scale-large", "parameter-rank-one", "gate-shut",
    "gradient-kept", "rate-grows", "loss-flat", "loss-collapses", "loss-reversed", "loss-unbounded",
))  # fmt: skip

# Data in units that drive what they enter to its ends.
_UNITS_OF_DATA = frozenset(("input-dominated", "input-scale"))

# What a network is like whose branches are multiplied by zero.
_EMPTIED = frozenset(("no-nonlinearity", "input-unused", "order-ignored"))

# What samples that change each other's outputs explain: where all become the same, no gradient comes back; but they
# make no gain wrong and no unit dead.
_MIXED = SYMPTOMS | _RATES
# What values do that a reshape put in the wrong places.
_MISPLACED = frozenset(("samples-mixed", "target-leak"))
# What lies behind all other layers, and does not change their gains.
_BEHIND = frozenset(("head-scale", "head-offset", "output-range"))

# What lies behind a residual stream or beside it, and does not make it grow.
_BESIDE = frozenset(
    ("samples-mixed", "graph-cut", "attention-masked", "gate-shut", "head-scale", "head-offset", "output-range")
)


def _rank(finding: Finding) -> float:
    if _is_deaf(finding):
        return 1.5  # before all losses: none can learn from an output that is one number
    if _is_shut(finding):  # whatever the gains of the others are, nothing passes
        return _ORIGINS.index(_GAIN) - 0.5
    for i, codes in enumerate(_ORIGINS):
        if finding.code in codes:
            return float(i)
    return float(len(_ORIGINS))


def _place(finding: Finding) -> float:
    """The rank among what is told: a loss that is not finite, and follows from nothing, hides all but a wrong loss."""
    is_first = finding.code == "loss-non-finite" and not finding.follows
    return min(_rank(finding), _BEHIND_LOSSES) if is_first else _rank(finding)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Findings by severity and origin, one for each code, the first; what follows from a cause becomes information.

    Args:
        found: all findings.

    Returns: the list; a finding that follows from another is information, says from which, and has no remedy; the
        warning from which an error follows is an error.
    Cost: linear.
    """
    unique: dict[str, Finding] = {}
    for finding in found:
        unique.setdefault(finding.code, finding)
    all_of = list(unique.values())
    serious = sorted((f for f in all_of if f.severity != "info"), key=_rank)
    causes = [f for f in serious if f.code in _SIGNAL | _GAINS | _UNITS or _is_deaf(f)]
    roots = {f.code: root for f in all_of if (root := _root(f, causes, serious)) is not None}
    grave = {root.code for code, root in roots.items() if unique[code].severity == "error"}
    result = [following(f, roots.get(f.code)) for f in all_of]
    result = [replace(f, severity="error") if f.code in grave and f.severity == "warning" else f for f in result]
    return sorted(result, key=lambda f: (SEVERITIES.index(f.severity), _place(f)))


def _root(finding: Finding, causes: list[Finding], serious: list[Finding]) -> Finding | None:
    """The first cause, by origin, that a finding follows from."""
    if finding.severity == "info":  # units whose inputs are constant are never active, or always
        return next((f for f in serious if f.code == "zero-weights" and finding.code in _UNITS), None)
    driver = next((f for f in serious if f.code in _DRIVERS and f.severity == "error"), None)
    if driver is not None and finding.code in DRIVEN:
        return driver
    zeroed = next((f for f in serious if f.code == "zero-factor"), None)
    if zeroed is not None and finding.code in _EMPTIED:
        return zeroed
    if finding.code == "input-unused" and finding.severity != "error":  # what saturates forgets what came before
        return next((f for f in serious if f.code in _UNITS_OF_DATA), None)
    if finding.code == "samples-indistinguishable" and finding.severity == "warning":  # the layers that it would enter
        unused = next((f for f in serious if f.code == "input-unused"), None)
        if unused is not None:
            return unused
    if finding.code == "gate-shut":  # what saturates chooses the same for all
        driving = next((f for f in serious if f.code in _UNITS_OF_DATA and f.severity == "error"), None)
        if driving is not None:
            return driving
    padded = next((f for f in serious if f.code == "padding-read" and f.where != "labels"), None)
    if padded is not None and finding.code in _FORGOTTEN:
        causes = [*causes, padded]
    if finding.code == "loss-non-finite" and finding.title.endswith(" ctc_loss"):  # nothing else makes it so
        return next((f for f in serious if f.code == "labels-out-of-range"), None)
    if finding.code == "gradient-overflow":  # softmax of a row of −∞
        return next((f for f in serious if f.code == "attention-masked" and f.severity == "error"), None)
    if finding.code in _MISPLACED:
        return next((f for f in serious if f.code == "axes-swapped"), None)
    if finding.code == "order-ignored":  # a recurrence that runs over the samples does not run over the tokens
        return next((f for f in serious if f.code == "samples-mixed"), None)
    if finding.code not in _MIXED:
        causes = [c for c in causes if c.code != "samples-mixed"]
    if finding.code in _GROWING:
        causes = [c for c in causes if c.code not in _SHRINKING]
    if finding.code == "saturated-units":
        grown = next((f for f in serious if f.code in _GROWING), None)
        if grown is not None and _root(grown, causes, serious) is None:
            return grown
    if _is_local(finding):  # one layer's gain is what its units, weights or norm make it
        return next((c for c in causes if c is not finding), None)
    causes = [c for c in causes if not _is_local(c)]
    if finding.code in _SIZES:  # the same matrix, seen by its weights alone
        return next((c for c in causes if c.code in _SIGNAL and c.where == finding.where), None)
    if finding.code in SYMPTOMS | _UNITS:
        among = [c for c in causes if finding.code != "residual-growth" or c.code not in _BESIDE]
        among = [c for c in among if finding.code not in _NOT_FINITE or c.code not in _UNITS | _ALIKE]
        if finding.code == "loss-non-finite" and _is_pole(finding):
            among = [c for c in among if c.code not in _SIZES_OF_DATA]
    elif finding.code in _GAINS:
        among = [c for c in causes if (c.code in _SIGNAL and c.code not in _BEHIND) or _is_shut(c)]
    elif finding.code in _RATES:
        among = [c for c in serious if c.code not in _RATES]
    else:
        return None
    if finding.code in _NOT_FINITE:  # gains make such numbers, and such a loss all others
        others = [c for c in serious if c.code == "loss-non-finite" and c is not finding]
        among = others + among if any(map(_is_pole, others)) else among
        return next(
            (c for c in (*among, *others) if c in others or c.code in _GAINS or _rank(c) < _rank(finding)), None
        )
    return next((c for c in among if c is not finding and _rank(c) < _rank(finding)), None)


def _is_pole(finding: Finding) -> bool:
    """Whether the first value that is not finite is made by a function with a point where it is infinite."""
    return finding.title.rpartition(" ")[2] in _POLES


def _is_shut(finding: Finding) -> bool:
    """Whether layers pass nothing on: units that are never active, or at an end of their range."""
    return finding.code in ("dead-units", "saturated-units") and finding.severity == "error"


def _is_deaf(finding: Finding) -> bool:
    """Whether an input that is not used leaves the same output for all samples."""
    return finding.code == "input-unused" and finding.severity == "error"


def _is_local(finding: Finding) -> bool:
    """Whether a finding about gains names a few layers."""
    return finding.code in _GAINS and finding.where != "all layers"


def following(finding: Finding, root: Finding | None) -> Finding:
    """The finding, or, where it follows from another, information without a remedy of its own.

    Args:
        finding: that is to be told.
        root: what it follows from, or `None`.

    Returns: that remark, or the finding as it is.
    """
    if root is None:
        return finding
    cause = f"Follows from {root.code}: {root.title[0].lower()}{root.title[1:]}. {finding.cause}".strip()
    return replace(finding, severity="info", cause=cause, action=None, advice="", follows=root.code)
