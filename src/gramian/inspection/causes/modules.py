"""Causes in modules: units that do not act, dropout, attention, streams that grow, and sums that cancel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.passes.records import Activation
from gramian.report import Action, Finding

__all__ = ["RULES"]

ISOMETRIC = Action("isometric_")

# Share of the units of a layer: told from here on, and as an error from there.
DEAD, MOSTLY_DEAD = 0.5, 0.9
# Share from which on dead units are a warning: of a small layer as torch initializes it, half are not rare.
MANY_DEAD = 0.75
# Dropout's p: told from here on, and as an error from there.
DROPOUT, NEARLY_ALL = 0.8, 0.9
# Entropy of attention as a share of that of equal weights: told below.
ENTROPY = 0.1
# Share of queries without a key from which on the mask is told; queries at padding may have none.
BLIND = 0.9
# Growth of a residual stream from its first to its last addition, and per addition.
GROWTH, STEP = 6.0, 1.25
# A stream that falls below this share of itself is divided by a norm.
KEPT = 0.9
# Rows from which on a unit that never acts is told: with N rows it is active on less than 3/N at 95 %.
FEW = 30
# Units of a layer that are all negative at first by chance in more than one of a hundred cases, 2⁻⁶.
FEW_UNITS = 6
# Probability of so many dead units in a layer by chance below which fewer rows are enough.
CHANCE = 1e-6


def dead_units(context: Context) -> Iterator[Finding]:
    """Find layers most of whose units are zero on all rows."""
    rectified = [
        a
        for a in context.activations
        if a.function in ("relu", "relu6", "hardtanh") and a.dead and not _is_given_zeros(context, a)
    ]
    waking = {id(a) for a in rectified if _may_wake(context, a)}
    shut = [a for a in rectified if _is_shut(a) and id(a) not in waking]
    dead = shut or [a for a in rectified if a.rows >= FEW and a.dead >= DEAD * a.channels]
    asleep = {context.source_of(a) for a in rectified if id(a) in waking and (_is_shut(a) or a in dead)}
    context.asleep |= {n for n in context.parameters if context.module_of(n) in asleep}
    if dead:
        worst = max(dead, key=lambda a: a.dead / a.channels)
        sources = tuple(dict.fromkeys(context.source_of(a) for a in dead))
        share = worst.dead / worst.channels
        can_wake = waking.issuperset(map(id, dead))
        yield Finding(
            "dead-units",
            "error" if shut else "info" if context.has_learned or share < MANY_DEAD or can_wake else "warning",
            f"{worst.dead} of {worst.channels} units after {context.told(sources[0])} are never active"
            if len(dead) == 1
            else f"In {len(dead)} layers most units are never active, up to {worst.dead} of {worst.channels}",
            where=some([s for s in sources if s], SHOWN) or "all layers",
            evidence=f"first after {context.told(sources[0])}, in {len(dead)} in all; zero on all {worst.rows:,} rows"
            + (f": active on at most {3 / worst.rows:.2%} (95 %)" if worst.rows >= FEW else ", with the whole layer"),
            cause="Their pre-activations are negative for all samples: a bias or an offset of the inputs, or a rate "
            "that was too large.",
            action=_renewed(context, sources),
            advice="This is for a fresh model. Otherwise lower the learning rate, or replace ReLU by LeakyReLU.",
        )


def _may_wake(context: Context, a: Activation) -> bool:
    """Whether a layer has so few units that chance makes them so, and layers before it are trained by others.

    A count, a size or a rate may be a rectified unit of its own, which wakes when what it is given changes.
    """
    if a.channels > FEW_UNITS:
        return False
    before = context.observed.used.get(f"{context.source_of(a)}.weight", 0)
    trained = (n for n, size in context.observed.gradients.items() if size)
    return any(context.observed.used.get(n, before) < before for n in trained)


def _renewed(context: Context, sources: tuple[str, ...]) -> Action:
    """What makes the layers anew: all weights, or these layers where one is a norm, whose bias shuts its units."""
    has_matrix = all(any(p.ndim > 1 for p in context.modules[name].parameters(recurse=False)) for name in sources)
    return ISOMETRIC if has_matrix else Action("reset", {"names": sources})


def _is_given_zeros(context: Context, a: Activation) -> bool:
    """Whether pre-activations are exactly zero, as behind a branch that starts at zero, and not negative."""
    call = context.first_calls.get(context.source_of(a))
    return call is not None and call.output.rms == 0.0


def _is_shut(a: Activation) -> bool:
    """Whether a layer passes nearly nothing on.

    Of few rows, or of rows that are all alike, a unit is off with a probability of one half: so many are not by chance.
    """
    if a.dead <= MOSTLY_DEAD * a.channels or a.rows < 2:
        return False
    chance = sum(math.comb(a.channels, k) for k in range(a.dead, a.channels + 1)) / 2**a.channels
    return a.rows >= FEW or chance < CHANCE


def dropout(context: Context) -> Iterator[Finding]:
    """Find dropout that drops nearly all."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    high = [(n, m.p) for n, m in context.modules.items() if isinstance(m, kinds) and m.p >= DROPOUT]
    for name, module in context.modules.items():
        p = getattr(module, "dropout", None)
        if isinstance(p, float) and p >= DROPOUT and isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            high.append((name, p))
    high += [(n, p) for n, p in context.observed.dropouts.items() if p >= DROPOUT and n not in dict(high)]
    if high:
        worst = max(p for _, p in high)
        yield Finding(
            "dropout-rate",
            "error" if worst >= NEARLY_ALL else "warning",
            f"Dropout removes {worst:.0%} of the units",
            where=some([n for n, _ in high if n], SHOWN) or "all layers",
            evidence=f"p = {worst:g}; usual are 0 to 0.5",
            cause="torch's p is the share that is dropped; 1 − p was perhaps meant.",
            advice="Lower p.",
        )


def dropout_in_evaluation(context: Context) -> Iterator[Finding]:
    """Find dropout that acts in evaluation mode too. Exact."""
    drops = context.evaluated.drops if context.evaluated is not None else None
    if drops is not None:
        name, function = drops
        is_attention = function == "scaled_dot_product_attention"
        yield Finding(
            "dropout-evaluation",
            "warning",
            f"Dropout in {context.told(name)} acts in evaluation mode too",
            where=name or "all layers",
            evidence=f"F.{function} was called in evaluation mode, and dropped (exact)",
            cause="Its dropout_p does not follow the mode of the module."
            if is_attention
            else "It does not follow the mode of the module: training=True is its default.",
            advice=("Pass dropout_p=p if self.training else 0.0" if is_attention else "Pass training=self.training")
            + ", unless samples of the output are wanted.",
        )


def attention(context: Context) -> Iterator[Finding]:
    """Find attention that sees no key, or one only."""
    blind = [a for a in context.observed.attentions if a.masked > BLIND]
    if blind:
        names = list(dict.fromkeys(a.name for a in blind if a.name))
        yield Finding(
            "attention-masked",
            "error",
            f"The mask of {context.told(names[0] if names else '')} hides every key",
            where=some(names, SHOWN) or "all layers",
            evidence=f"{max(a.masked for a in blind):.0%} of its queries have no key that is not masked (exact)",
            cause="The mask is inverted: torch's key_padding_mask is true where a key is hidden, and a bool attn_mask "
            "of scaled_dot_product_attention is true where it is seen.",
            advice="Invert the mask.",
        )
    low = [a for a in context.observed.attentions if a.entropy < ENTROPY]
    if low:
        worst = min(low, key=lambda a: a.entropy)
        names = list(dict.fromkeys(a.name for a in low))
        yield Finding(
            "attention-saturated",
            "info" if context.has_learned else "warning",
            f"The attention of {context.told(worst.name)} looks at one key only",
            where=some([n for n in names if n], SHOWN) or "all layers",
            evidence=f"the entropy of its weights is {worst.entropy:.1%} of that of equal weights, on average",
            cause="The network has learned with it: what it does may be to choose."
            if context.has_learned
            else "The scores q·k are large, so that softmax passes nearly no gradient: a missing 1/√d, or "
            "large weights of q and k.",
            action=None if context.has_learned else ISOMETRIC,
            advice=""
            if context.has_learned
            else "This is for a fresh model. Otherwise scale the scores by 1/√d, normalize q and k, or initialize "
            "their weights smaller.",
        )


def streams(context: Context) -> Iterator[Finding]:
    """Find a residual stream that grows from addition to addition."""
    additions = [a for a in context.observed.additions if a.rms > 0]
    shapes = [a.shape for a in additions]
    stream = max(set(shapes), key=shapes.count, default=None)
    sizes = [a.rms for a in additions if a.shape == stream]
    if len(sizes) < 3 or any(after < KEPT * before for before, after in pairwise(sizes)):
        return  # too few, or a norm divides the stream
    ratios = sorted(after / before for before, after in pairwise(sizes))
    growth = sizes[-1] / sizes[0]
    # Without the largest ratio: the first branch may be much larger than a small embedding, and is not growth.
    if growth / max(ratios[-1], 1.0) > GROWTH and ratios[len(ratios) // 2] > STEP:
        first = context.observed.additions[0].name
        yield Finding(
            "residual-growth",
            "info" if context.has_learned else "error",
            f"The residual stream grows {growth:.2g} times over {len(sizes)} additions",
            where="all layers",
            evidence=f"root mean square {sizes[0]:.3g} after the first, in {context.told(first)}, {sizes[-1]:.3g} "
            f"after the last: {growth ** (1 / len(ratios)):.2f} times for each",
            cause="Each branch adds as much as the stream holds or more, and no norm divides it.",
            advice="Normalize the input of each branch, and begin with branches whose last layer is zero or scaled by "
            "1 over the root of their number.",
            source="Zhang et al. 1901.09321; De & Smith 2002.10444",
        )


def reductions(context: Context) -> Iterator[Finding]:
    """Find means and sums that cancel, where the output then depends on nothing."""
    lost = context.observed.reductions
    if lost and context.is_blocked:
        first = lost[0]
        yield Finding(
            "reduction-cancels",
            "error",
            f"A {first.function} in {context.told(first.name)} cancels",
            where=first.name or "all layers",
            evidence=f"its result is {first.share:.0e} of what independent values would give, and all samples get the "
            "same output",
            cause="The values sum to zero over this dimension, as a norm makes them over the features.",
            advice="Average over another dimension: positions, not features.",
        )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    dead_units,
    dropout,
    dropout_in_evaluation,
    attention,
    streams,
    reductions,
)
