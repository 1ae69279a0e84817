"""The table of layers: its columns, which rows tell most, and all numbers of one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .by_depth import places_of
from .document import Detail, Table
from .findings import Finding
from .formatting import number
from .layer import Layer


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
    "input rms": lambda layer: layer.activation_rms,
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
    order = (
        "in forward order"
        if any(layer.activation_rms is not None for layer in layers)
        else "in the order of the model or its file"
    )
    return Table(f"Every matrix, {order}", columns, rows, " ".join(caption), emphasis, details)


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
