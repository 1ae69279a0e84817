"""The rules that need weights only. None of them uses a tail exponent.

Heuristic thresholds were chosen on one set of healthy matrices and tested on another by
benchmarks/inspect_calibration.py; the rates of false alarms are in benchmarks/results/inspect_calibration.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gramian.inspection.experiments.intended_zeros import (
    is_change,
    is_product,
    name_pattern,
    starts_at_zero,
    untrained_adapter,
)
from gramian.inspection.weights.ranks import rank_beyond_chance
from gramian.report import Action, Finding, Layer
from gramian.report.model import plural

if TYPE_CHECKING:
    from gramian.inspection.measurements import Measured

__all__ = ["RULES", "names_of", "non_finite_weights"]

# A hidden matrix has a dominant direction if that holds this share of the energy; smaller matrices than this side are
# not tested.
DOMINANT, DOMINANT_SIDE = 0.5, 32
# A warning from this share on: a small matrix that is trained by few samples reaches half.
NEARLY_ALL = 0.8

# σ₁ is unusual if it differs from the median of matrices of the same kind by more than this ratio and this many robust
# standard deviations of log σ₁, in groups of at least this many.
SIZE_RATIO, SIZE_DEVIATIONS, SIZE_GROUP = 10.0, 8.0, 8

# Shares of a matrix's entries above which zeros and underflows are reported.
ZERO_SHARE, UNDERFLOW_SHARE = 0.1, 0.01

# Share of the parameters that two factors with 99 % of the energy must save to be reported.
SAVING = 0.3

# Singular values of a mirrored isometry differ by less than this share.
EQUAL = 1e-4

# A network counts as trained if this share of its matrices has structure above noise.
TRAINED = 0.5


def non_finite_weights(measured: Measured) -> Iterator[Finding]:
    """Find NaN and infinity in parameters. Exact."""
    bad = [(layer, s) for layer, s in zip(measured.layers, measured.spectra, strict=True) if s.num_nonfinite]
    if bad:
        layer, spectrum = bad[0]
        verb = "is" if spectrum.num_nonfinite == 1 else "are"
        is_buffer = all(one.name in measured.buffers for one, _ in bad)
        yield Finding(
            "non-finite-weights",
            "error",
            f"{plural(spectrum.num_nonfinite, 'value')} of {layer.name} {verb} NaN or infinite",
            where=names_of([layer for layer, _ in bad]),
            evidence=f"{len(bad)} of {plural(len(measured.layers), 'tensor')} with such values (exact count)",
            cause="It is a buffer, which no step changes: what it is computed from gave no finite value, as "
            "the root of a negative one or a division by zero does."
            if is_buffer
            else "Training diverged, or the file was damaged, before these weights were saved.",
            advice=f"Look at the line that makes {layer.name}, and at the settings it takes."
            if is_buffer
            else "Go back to an earlier checkpoint, and continue with a lower learning rate or clipped gradients.",
        )


def zero_weights(measured: Measured) -> Iterator[Finding]:
    """Find matrices that are zero, and matrices with many zeros. Exact."""
    zero = [layer for layer in measured.layers if layer.spectral_norm == 0.0]
    by_design = starts_at_zero(measured.layers)
    waiting = measured.waiting or frozenset()
    learns = {
        n for n, size in ((layer.name, layer.gradient_rms) for layer in zero) if size or n.partition("[")[0] in waiting
    }
    learns -= measured.frozen
    wrong = [layer for layer in zero if layer.name not in by_design | learns and not is_change(layer)]
    if wrong:
        yield Finding(
            "zero-weights",
            "warning",
            f"{_matrices(wrong)} {'is' if len(wrong) == 1 else 'are'} all zero",
            where=names_of(wrong),
            evidence="every entry is zero (exact)",
            cause="Never loaded, or initialized to zero.",
            advice="Compare with the checkpoint that these weights come from (gramian inspect MODEL --against OTHER): "
            "are they zero there too?",
        )
    untrained = untrained_adapter(measured.layers)
    started = [layer for layer in zero if layer not in wrong and not (untrained and is_change(layer))]
    if started:
        yield Finding(
            "zero-weights",
            "info",
            f"{_matrices(started)} {'is' if len(started) == 1 else 'are'} all zero",
            where=names_of(started),
            evidence="every entry is zero (exact)"
            + (
                "; a gradient arrives in the first steps of training"
                if learns.issuperset(layer.name for layer in started)
                else "; other matrices are not, and no block differs from another in this"
            ),
            cause="By design if this is a head, a table, a gate or the end of a branch that is not trained yet; else "
            "never loaded.",
            advice="Compare with the checkpoint that these weights come from (gramian inspect MODEL --against OTHER): "
            "are they zero there too?",
        )
    some = [layer for layer in measured.layers if layer.spectral_norm and _share(layer, layer.zeros) > ZERO_SHARE]
    if some:
        worst = max(some, key=lambda layer: _share(layer, layer.zeros))
        yield Finding(
            "many-zeros",
            "info",
            f"{len(some)} of {len(measured.layers)} matrices have many exact zeros",
            where=names_of(some),
            evidence=f"most in {worst.name}: {_share(worst, worst.zeros):.0%} (exact count)",
            cause="The weights were pruned, or rows were padded or never updated.",
        )


def repeated_weights(measured: Measured) -> Iterator[Finding]:
    """Find matrices that are stored twice under different names. Exact."""
    alike = [layer for layer in measured.layers if layer.duplicate_of and layer.role == "hidden"]
    copied = [layer for layer in alike if _is_copied(layer, measured.copied)]
    held = [layer for layer in alike if _is_frozen(layer, measured)]
    hidden = [layer for layer in alike if layer not in copied]
    tied = [layer for layer in measured.layers if layer.duplicate_of and layer.role != "hidden"]
    if hidden:
        yield Finding(
            "repeated-weights",
            "warning" if measured.stats is None and len(held) < len(alike) else "info",
            f"{_matrices(hidden)} {'equals' if len(hidden) == 1 else 'equal'} another one bit for bit",
            where=names_of(hidden),
            evidence=f"{hidden[0].name} = {hidden[0].duplicate_of} (exact)",
            cause="One is frozen, as a copy is that follows the other."
            if hidden[0] in held
            else "Layers were copied at initialization and never trained, or shared weights were saved twice.",
            action=_tie(hidden[0]),
            advice=f"Tie {'each like this' if _tie(hidden[0]) else 'them'} if they are meant to be shared. If not, "
            "check that both receive gradients.",
        )
    if copied:
        yield Finding(
            "repeated-weights",
            "info",
            f"{_matrices(copied)} {'equals' if len(copied) == 1 else 'equal'} that of another layer: torch copies it",
            where=names_of(copied),
            evidence=f"{copied[0].name} = {copied[0].duplicate_of} (exact)",
            cause="nn.TransformerEncoder and nn.TransformerDecoder copy the layer that they are given: "
            "all layers start alike, and part in training.",
        )
    if tied:
        yield Finding(
            "tied-weights",
            "info",
            f"{tied[0].name} and {tied[0].duplicate_of} are equal, stored twice",
            where=names_of(tied),
            evidence="equal bit for bit",
            cause="A tied embedding and head were saved separately.",
        )


def out_of_range(measured: Measured) -> Iterator[Finding]:
    """Find entries that a cast to a narrower dtype would lose. Exact, for a cast that rounds to nearest."""
    for name, counts in (("float16", "overflow_float16"), ("bfloat16", "overflow_bfloat16")):
        over = [layer for layer in measured.layers if getattr(layer, counts)]
        if over:
            worst = max(over, key=lambda layer: getattr(layer, counts))
            yield Finding(
                f"overflows-{name}",
                "warning",
                f"{_matrices(over)} would be infinite in {name}",
                where=names_of(over),
                evidence=f"most in {worst.name}: {getattr(worst, counts):,} of its entries (exact count)",
                cause=f"These entries exceed the largest number of {name}.",
                action=Action("cast_to_bfloat16") if name == "float16" else None,
                advice="" if name == "float16" else "Keep these layers in float32.",
            )
    under = [layer for layer in measured.layers if _share(layer, layer.underflow_float16) > UNDERFLOW_SHARE]
    if under:
        worst = max(under, key=lambda layer: _share(layer, layer.underflow_float16))
        yield Finding(
            "underflows-float16",
            "info",
            f"{_matrices(under)} would lose entries to zero in float16",
            where=names_of(under),
            evidence=f"most in {worst.name}: {_share(worst, worst.underflow_float16):.1%} of its entries (exact count)",
            cause="Entries are below 3e-8, half of float16's smallest number.",
            action=Action("cast_to_bfloat16"),
        )


def unusual_size(measured: Measured) -> Iterator[Finding]:
    """Find spectral norms far from those of matrices of the same kind."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Layer]] = {}
    for layer in measured.layers:
        if layer.spectral_norm and layer.role == "hidden" and not layer.duplicate_of:
            groups.setdefault((name_pattern(layer.name), layer.kind, layer.shape), []).append(layer)
    for layers in groups.values():
        if len(layers) < SIZE_GROUP:
            continue
        logs = [math.log(layer.spectral_norm or 1.0) for layer in layers]
        middle = statistics.median(logs)
        spread = 1.4826 * statistics.median([abs(x - middle) for x in logs])
        for layer, x in zip(layers, logs, strict=True):
            if abs(x - middle) > max(math.log(SIZE_RATIO), SIZE_DEVIATIONS * spread):
                larger = x > middle
                yield Finding(
                    "unusual-size",
                    "warning",
                    f"σ₁ of {layer.name} is {math.exp(abs(x - middle)):,.0f} times "
                    f"{'larger' if larger else 'smaller'} than in similar layers",
                    where=layer.name,
                    evidence=f"{layer.spectral_norm:.3g}, and a median of {math.exp(middle):.3g} over {len(layers)} "
                    f"matrices, half of which are within a factor of {math.exp(spread / 1.4826):.2f} of it",
                    cause="This layer's weights grew without bound." if larger else "This layer's weights decayed.",
                    advice="Add weight decay, put a normalization before the layer, or train with gm.optim.Muon."
                    if larger
                    else "Check that a gradient arrives at the layer: with data, gm.inspect shows it by depth.",
                    source="a heuristic; false alarms are counted in benchmarks/results/inspect_calibration.json",
                )


def dominant_direction(measured: Measured) -> Iterator[Finding]:
    """Find hidden matrices with most of their energy in one direction."""
    found = [
        layer
        for layer in measured.layers
        if layer.role == "hidden"
        and not is_product(layer)
        and layer.name.partition("[")[0] not in measured.entries | measured.opening
        and layer.stable_rank
        and min(layer.shape) >= DOMINANT_SIDE
        and layer.stable_rank < 1 / DOMINANT
    ]
    if found:
        worst = min(found, key=lambda layer: layer.stable_rank or 0.0)
        error = 2 * (worst.spectral_norm_error or 0.0) / (worst.spectral_norm or 1.0)
        share = 1 / (worst.stable_rank or 1.0)
        is_asked = measured.layers[-1].role == "head" and min(measured.layers[-1].shape) == 1  # one score needs one
        yield Finding(
            "dominant-direction",
            "warning" if share > NEARLY_ALL and not is_asked and not measured.has_learned else "info",
            f"One direction holds most of the energy of {_matrices(found)}",
            where=names_of(found),
            evidence=f"most in {worst.name}: σ₁² is {share:.0%} of ‖W‖_F² "
            f"({share:.3%} to {min(1.0, share * (1 + error)):.3%}), stable rank {worst.stable_rank:.2f}",
            cause="The inputs have a large mean, or the rank has collapsed: most outputs are multiples of one vector.",
            advice="Center the layer's inputs (LayerNorm), or train with gm.optim.Muon, whose updates have full rank.",
            source="stable rank: Rudelson & Vershynin, J. ACM 54 (2007)",
        )


def like_noise(measured: Measured) -> Iterator[Finding]:
    """Find matrices that look untrained in a network most of whose matrices have structure."""
    pairs = [(layer, s.noise) for layer, s in zip(measured.layers, measured.spectra, strict=True) if s.noise]
    noise = [layer for layer, test in pairs if test.is_noise]
    structured = sum(test.above > 0 for _, test in pairs)
    if noise and structured >= TRAINED * len(pairs):
        yield Finding(
            "like-noise",
            "info",
            f"{len(noise)} of {len(pairs)} matrices look like independent random entries",
            where=names_of(noise),
            evidence=f"no singular value beyond the noise edge (p = {noise[0].noise_p_value:.2g} for the largest of "
            f"{noise[0].name}), and the bulk within {noise[0].bulk_distance:.3f} of Marchenko and Pastur's law; "
            f"{structured} others have structure",
            cause="The layers are frozen, receive no gradient, or have hardly moved from their initialization.",
            advice="Look at the gradient by depth, which gm.inspect shows with data: does it reach these layers?",
            source="Marchenko & Pastur 1967; Johnstone 2001. Valid against independent entries only",
        )


def _possible(layer: Layer) -> int:
    """The rank that the shape allows; of an embedding with a row of zeros, as padding has, without that row."""
    rows, columns = layer.shape[-2:]
    is_padded = layer.role == "embedding" and (layer.zeros or 0) >= columns
    return min(rows - 1 if is_padded else rows, columns)


def _is_mirrored(layer: Layer, rank: int) -> bool:
    """Whether half of the singular values are equal, and the others zero: [[Q, -Q], [-Q, Q]] of a network of ReLUs."""
    sigma = layer.singular_values
    return 2 * rank == len(sigma) and sigma[0] <= (1 + EQUAL) * sigma[rank - 1]


def low_rank(measured: Measured) -> Iterator[Finding]:
    """Find matrices of lower rank than their shape allows, and those that two factors would store in less memory."""
    kept = [layer for layer in measured.layers if layer.name.partition("[")[0] not in measured.entries]
    layers = [layer for layer in kept if not is_product(layer)]  # their factors are stored already
    ranks = {layer.name: rank_beyond_chance(layer) for layer in layers if layer.spectral_norm}
    low = [
        layer
        for layer in layers
        if (rank := ranks.get(layer.name)) and rank < _possible(layer) and not _is_mirrored(layer, rank)
    ]
    if low:
        worst = min(low, key=lambda layer: (ranks[layer.name] or 0) / min(layer.shape))
        yield Finding(
            "rank-deficient",
            "info",
            f"{len(low)} of {len(measured.layers)} matrices {'is' if len(low) == 1 else 'are'} rank-deficient",
            where=names_of(low),
            evidence=f"lowest in {worst.name}: rank {ranks[worst.name]} of {min(worst.shape)}. The other singular "
            f"values are at the level of rounding in {worst.dtype}, and more than independent entries would put there",
            cause="Some directions of the input never reach the output.",
            action=Action("plan_compression"),
            advice="Directions without energy need not be stored: plan.at(keep=…) factors the layers.",
        )
    saving = [
        layer
        for layer in layers
        if layer.spectral_norm and (layer.saving_99 or 0.0) >= SAVING and min(layer.shape) >= 16
    ]
    if saving:
        most = max(saving, key=lambda layer: (layer.saving_99 or 0.0) * layer.parameters)
        saved = sum((layer.saving_99 or 0.0) * layer.parameters for layer in saving)
        yield Finding(
            "factorable",
            "info",
            f"Two factors hold 99 % of the energy of {_matrices(saving)} with {saved:,.0f} fewer parameters",
            where=names_of(saving),
            evidence=f"{most.name}: rank {(most.rank_99 or (0, 0))[-1]} of {min(most.shape)} "
            f"saves {most.saving_99:.0%}",
            cause="The energy of the weights is in few directions. What the loss allows depends on the data.",
            action=Action("compress", {"keep": 1 - SAVING}),
            source="Eckart & Young 1936",
        )


Rule = Callable[["Measured"], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    zero_weights,
    repeated_weights,
    out_of_range,
    unusual_size,
    dominant_direction,
    like_noise,
    low_rank,
)


def names_of(layers: list[Layer]) -> str:
    """Return the names of up to three layers, or of the first two and the last of many."""
    names = [layer.name for layer in layers]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} … {names[-1]} ({len(names)} in all)"


def _matrices(layers: list[Layer]) -> str:
    """Return how many matrices these are, in words."""
    return "1 matrix" if len(layers) == 1 else f"{len(layers):,} matrices"


def _is_copied(layer: Layer, prefixes: Sequence[str]) -> bool:
    """Whether a layer and the one that it repeats are in one stack that torch makes by copying."""
    return any(layer.name.startswith(prefix) and layer.duplicate_of.startswith(prefix) for prefix in prefixes)


def _is_frozen(layer: Layer, measured: Measured) -> bool:
    """Whether a layer, or the one that it repeats, is frozen."""
    return any(name.partition("[")[0] in measured.frozen for name in (layer.name, layer.duplicate_of))


def _tie(layer: Layer) -> Action | None:
    """Return the action that makes a layer share the parameter that it repeats; None for a part of a fused one."""
    module, _, attribute = layer.name.rpartition(".")
    if not attribute.isidentifier() or "[" in layer.duplicate_of:
        return None
    return Action("tie", {"module": module, "attribute": attribute, "source": layer.duplicate_of})


def _share(layer: Layer, count: int | None) -> float:
    return (count or 0) / layer.parameters if layer.parameters else 0.0
