"""The rules for what a signal and its gradient lose or gain across the depth of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, TypeGuard

import torch

from gramian.errors import some
from gramian.gram import DiagonalGram, Gram
from gramian.report import Action, Finding, Layer

if TYPE_CHECKING:
    from gramian.inspection.measurements import Measured

__all__ = [
    "ADAMW_EPS",
    "ISOMETRIC",
    "end_to_end",
    "gain",
    "gradient_by_depth",
    "is_single",
    "with_gradients",
]

ISOMETRIC = Action("isometric_")

# A network of depth L trains where L ≲ 6ξ, ξ = 1/|ln χ| (Schoenholz et al. 1611.01232, figure 5).
TRAINABLE_DEPTHS = 6.0

# AdamW divides by √v + ε: a gradient far below its ε = 1e-8 moves nothing.
ADAMW_EPS = 1e-8

# Ratio of the gradient's size at the first and last layer that gives a warning. A heuristic: healthy plain networks of
# 1,000 layers stay below 30, and an encoder with its decoder (Whisper) reaches 2e3 as it is initialized.
GRADIENT_RATIO = 1e4

# Share of the layers up to which those that have most of the ratio are named, and not all.
LOCAL = 1 / 3

# Largest σ₁ of the end-to-end Jacobian, and largest 1/σ₁, without a warning. A heuristic, as for the gradients.
END_TO_END = 1e3


def gain(measured: Measured) -> Iterator[Finding]:
    """Find networks deeper than a gradient can cross at the layers' mean gain χ, at the favorable end of its interval.

    χ averages over all directions, of which a trained network uses few. So the finding also needs an end-to-end
    measurement that agrees: the gradient by depth, or the Jacobian.
    """
    gains = {name: g for name, g in measured.gains.items() if g is not None and g.chi > 0 and math.isfinite(g.chi)}
    depth = len(gains)
    if depth < 3 or depth < 0.5 * len(measured.gains):
        return
    logs = {name: math.log(g.chi) for name, g in gains.items()}
    mean = fmean(logs.values())
    errors = [g.standard_error / g.chi for g in gains.values() if math.isfinite(g.standard_error)]
    half = 2 * math.sqrt(sum(e * e for e in errors)) / depth
    chi, low, high = math.exp(mean), math.exp(mean - half), math.exp(mean + half)
    measured.facts["gain χ (geometric mean)"] = chi
    below = mean < 0
    if _crosses(mean, half, depth) or not _confirmed(measured, below=below):
        return
    few = _culprits(logs, half)
    if len(few) <= LOCAL * depth:
        rest = math.exp(fmean(v for name, v in logs.items() if name not in few))
        yield Finding(
            "gain-below-one" if below else "gain-above-one",
            "error",
            f"The gain of {some(few)} {'stops' if below else 'blows up'} the gradient; the others' is {rest:.2g}",
            where=some(few),
            evidence=", ".join(f"χ = {gains[name].chi:.2g} at {name}" for name in few[:3])
            + f"; the geometric mean of the other {depth - len(few)} layers is {rest:.3g}",
            cause="These layers have most of the ratio of the gradients: their weights, biases or activations do not "
            "keep the signal.",
            action=ISOMETRIC,
            source="Schoenholz et al. 1611.01232, §5",
        )
        return
    xi = 1 / abs(mean)
    side = [value for value in logs.values() if (value < 0) == below]
    yield Finding(
        "gain-below-one" if below else "gain-above-one",
        "error",
        f"Gain {chi:.2g} per layer lets a gradient cross about {TRAINABLE_DEPTHS * xi:.0f} layers; there are {depth}",
        where="all layers",
        evidence=f"{len(side)} of {depth} layers have a gain {'below' if below else 'above'} one; "
        f"χ = {chi:.3g} ({low:.3g} to {high:.3g}, 95 %), so ξ = 1/|ln χ| = {xi:.2g} layers; "
        f"{depth} layers need ξ ≥ {depth / TRAINABLE_DEPTHS:.1f}",
        cause=f"Each layer's Jacobian multiplies a gradient by {math.sqrt(chi):.2g} on average; over {depth} layers "
        f"that is {math.sqrt(chi):.2g}^{depth} = {_decade(mean / 2 * depth)}.",
        action=ISOMETRIC,
        source="Schoenholz et al. 1611.01232, §5",
    )


def _crosses(mean: float, half: float, depth: int) -> bool:
    """Whether a gradient crosses this many layers at the favorable end of the interval of their mean ln χ."""
    return max(0.0, abs(mean) - half) * depth <= TRAINABLE_DEPTHS


def _culprits(logs: dict[str, float], half: float) -> list[str]:
    """The fewest layers without which a gradient would cross the others."""
    sign = math.copysign(1.0, fmean(logs.values()))
    order = sorted(logs, key=lambda name: -sign * logs[name])
    few = 0
    while few < len(order) and not _crosses(fmean(logs[name] for name in order[few:]), half, len(order) - few):
        few += 1
    return order[:few]


def gradient_by_depth(measured: Measured) -> Iterator[Finding]:
    """Compare the gradient at the first layer with that at the last.

    A large gradient at an embedding alone is none that grew with depth: the size of its vectors is free where a norm
    follows (RWKV starts them at 1e-4), and their gradient is inverse to it.
    """
    sized = _without_adapters(measured, with_gradients(measured))
    if not measured.is_chain or len(sized) < 3 or not all(math.isfinite(layer.gradient_rms or 0.0) for layer in sized):
        return
    start, end = sized[0], max(_ends(measured, sized), key=lambda layer: _per_unit(measured, layer))
    last = _per_unit(measured, end)
    if last == 0.0:
        return
    first = _per_unit(measured, start)
    measured.facts["gradient, first layer against last"] = ratio = first / last
    if ratio > GRADIENT_RATIO and start.role == "embedding":
        start = next((layer for layer in sized if layer.role != "embedding"), start)
        first = _per_unit(measured, start)
        ratio = max(1.0, first / last)
    if 1 / GRADIENT_RATIO <= ratio <= GRADIENT_RATIO:
        return
    vanishes = ratio < 1
    opens = vanishes and bool(measured.opening)
    unmoved = [layer for layer in sized if (layer.gradient_rms or 0.0) < ADAMW_EPS]
    evidence = f"root mean square{_positions(measured, sized)} {first:.1e} at {start.name}, {last:.1e} at {end.name}"
    if unmoved:
        evidence += f"; below AdamW's ε = 1e-8 in {len(unmoved)} of {len(sized)} layers, which AdamW hardly moves"
    yield Finding(
        "gradient-vanishes" if vanishes else "gradient-explodes",
        "info" if opens else "error" if unmoved or not vanishes else "warning",
        f"The gradient at the first layer is {ratio:.0e} times the last layer's"
        if ratio
        else "The gradient at the first layer is zero",
        where="all layers",
        evidence=evidence,
        cause="A matrix before the end started at zero, and has opened by a few steps so far."
        if opens
        else f"The product of the layers' Jacobians {'shrinks' if vanishes else 'grows'} with every layer.",
        action=None if opens else ISOMETRIC,
        advice="" if opens else "Then train with gm.optim.Muon, whose steps do not shrink with the gradient.",
        source="Hochreiter 1991; Pascanu et al. 1211.5063",
    )


def end_to_end(measured: Measured) -> Iterator[Finding]:
    """Check the end-to-end Jacobian's largest singular value."""
    if not measured.jacobian or _is_blocked(measured):
        return
    largest, middle = measured.jacobian[0], measured.jacobian[len(measured.jacobian) // 2]
    measured.facts["end-to-end Jacobian σ₁"] = largest
    if largest == 0.0 and measured.varies:
        return  # the last layer does not depend on the first, and the output on the input by another way
    eps = torch.finfo(measured.dtype).eps
    small = largest < 1
    forgets = small and largest >= eps and measured.is_recurrent  # a cell need not keep its first input to learn
    if (largest < 1 / END_TO_END and not forgets) or largest > END_TO_END:
        yield Finding(
            "jacobian-vanishes" if small else "jacobian-explodes",
            "error" if largest < eps or largest > 1 / eps else "warning",
            f"A change of the input changes the last hidden layer by at most {largest:.1e} times as much",
            evidence=f"singular values of the Jacobian from the first layer's input to the last layer's: "
            f"σ₁ = {largest:.1e}, median {middle:.1e} (median over samples, exact)",
            cause=f"Below {eps:.1e} the change is lost in {str(measured.dtype)[6:]} rounding: the output does not "
            "depend on the input."
            if largest < eps
            else f"The product of the layers' Jacobians {'shrinks' if small else 'amplifies'} changes of the input.",
            action=ISOMETRIC,
            source="Pennington et al. 1711.04735",
        )


def is_single(a: Gram | DiagonalGram | None) -> TypeGuard[Gram | DiagonalGram]:
    """Whether there is a single second moment for the whole layer, not one per head or group."""
    return a is not None and not a.batch


def _ends(measured: Measured, sized: list[Layer]) -> list[Layer]:
    """The last layer, and others that take the same input: several heads, of which a loss may weigh some more."""
    shared = _input_rms(measured, sized[-1]) if sized else None
    return [layer for layer in sized if layer is sized[-1] or (shared and _input_rms(measured, layer) == shared)]


def _input_rms(measured: Measured, layer: Layer) -> float | None:
    sites = measured.stats.get(layer.name.partition("[")[0]) if measured.stats is not None else None
    a = sites[0].A if sites else None
    return float(a.rms) if is_single(a) else None


def _confirmed(measured: Measured, *, below: bool) -> bool:
    """Whether the gradient or the Jacobian, measured across the whole depth, leaves its healthy range on that side."""
    sized = [_per_unit(measured, layer) for layer in with_gradients(measured)]
    layers = with_gradients(measured)
    end = max((_per_unit(measured, layer) for layer in _ends(measured, layers)), default=0.0)
    ratio = sized[0] / end if measured.is_chain and sized and end > 0 else 1.0
    largest = measured.jacobian[0] if measured.jacobian and not _is_blocked(measured) else 1.0
    if below:
        return ratio < 1 / GRADIENT_RATIO or largest < 1 / END_TO_END
    return not (ratio <= GRADIENT_RATIO and largest <= END_TO_END)


def with_gradients(measured: Measured) -> list[Layer]:
    """The layers with a gradient, without those whose gradient is exactly zero as long as a factor of it is.

    LoRA's B, a gate, and the last matrix of a residual branch start at zero on purpose: what they multiply gets its
    gradient after the first step. Where that was not tried, any zero matrix is taken for the reason.
    """
    sized = [layer for layer in measured.layers if layer.gradient_rms is not None]
    if measured.waiting is None:
        return [layer for layer in sized if layer.gradient_rms != 0.0 or not _zero_matrices(measured)]
    owners = {name.rpartition(".")[0] for name in measured.waiting | measured.frozen}
    return [layer for layer in sized if layer.gradient_rms != 0.0 or layer.name.rpartition(".")[0] not in owners]


def _without_adapters(measured: Measured, layers: list[Layer]) -> list[Layer]:
    """These layers without trained ones that stand in one module with a frozen one.

    An adapter's factor sets the size of its own gradients, which says nothing about depth.
    """
    held = [layer.name for layer in layers if layer.name in measured.frozen]
    around = {".".join(parts[:end]) for parts in (name.split(".") for name in held) for end in range(1, len(parts))}
    return [
        layer
        for layer in layers
        if layer.name in measured.frozen or not any(layer.name.startswith(f"{prefix}.") for prefix in around)
    ]


def _per_unit(measured: Measured, layer: Layer) -> float:
    """The gradient's root mean square times the root of the number of rows (positions of an image) for each unit.

    Where a mean over positions follows, each position's gradient is small because there are many.
    """
    return (layer.gradient_rms or 0.0) * math.sqrt(_rows_per_unit(measured, layer))


def _rows_per_unit(measured: Measured, layer: Layer) -> float:
    sites = measured.stats.get(layer.name.partition("[")[0]) if measured.stats is not None else None
    a = sites[0].A if sites else None
    return max(1.0, float(a.count / measured.stats.units)) if measured.stats is not None and is_single(a) else 1.0


def _positions(measured: Measured, layers: list[Layer]) -> str:
    """What is said of the positions where there are several."""
    several = any(_rows_per_unit(measured, layer) > 1 for layer in layers)
    return " over units, all positions of a unit together:" if several else ""


def _zero_matrices(measured: Measured) -> list[Layer]:
    return [layer for layer in measured.layers if layer.frobenius_norm == 0.0 and layer.role != "embedding"]


def _is_blocked(measured: Measured) -> bool:
    """Whether the Jacobian is exactly zero, and a zero matrix is why."""
    return measured.jacobian[0] == 0.0 and bool(_zero_matrices(measured))


def _decade(log: float) -> str:
    """Return `exp(log)` as a power of ten, also beyond float64's range: `"1e-400"`."""
    return f"1e{log / math.log(10):+.0f}"
