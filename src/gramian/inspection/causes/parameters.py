"""Causes in parameters: values that cannot learn, and a scale that does not keep the signal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from gramian.block import Block
from gramian.errors import some
from gramian.inspection.causes.context import ONE, SHOWN, Context
from gramian.inspection.causes.sizes import (
    LARGEST,
    RATIO,
    SMALLEST,
    by_layer,
    cell_of,
    hidden_sizes,
    sized_matrices,
    usual_size,
)
from gramian.inspection.causes.zero_started import grows_from_zero
from gramian.inspection.experiments.intended_zeros import is_factor
from gramian.report import Action, Finding

__all__ = ["RULES"]

ISOMETRIC = Action("isometric_")

# Root mean square of what is added to a signal, such as positions.
USUAL_ADDED = 0.1

# Layers from which on one of them is told by the others.
FEW_LAYERS = 3

# Share of a recurrent cell's gates and states at their ends, in some step, from which on its weights are told: torch's
# follow the number of states, and not that of the inputs, of which many may be zero.
SATURATED = 0.5

# A loss at the start that is this far above guessing is due to the size of the scores.
ABOVE = 3.0

# Where all layers leave this range and no norm restores the scale, all are told. Behind norms too where most are beyond
# `UNIT`, which are weights that were drawn with unit variance, or below `SMALLEST`, beside which biases and the usual
# rate's steps are large.
ALL_SMALL, ALL_LARGE, UNIT, MOST = 0.3, 2.0, 2.6, 0.7

# Root mean square of an embedding's rows: torch draws 1, transformers 0.02.
SMALL_EMBEDDING, EMBEDDING = 1e-3, 8.0


def degenerate(context: Context) -> Iterator[Finding]:
    """Find matrices that are zero, constant or of rank one, and through which the output loses the input. Exact.

    A parameter that meets other values entry by entry is no matrix, whatever its shape: that of a state space model
    starts with equal rows, and a gain at one. Nor does one do harm on which the loss does not depend.
    """
    values = list(context.values())
    blocking = context.probes.blocking
    zero, constant, single = [], [], []
    for block, w in values:
        if not bool(w.isfinite().all()) or w.numel() < 2 or is_factor(block.name):
            continue
        is_matrix = block.name not in context.observed.entries
        if not bool(w.any()):
            if block.name not in context.last and (block.name in blocking if blocking else context.is_blocked):
                zero.append(block.name)
        elif context.parameters[block.name].requires_grad and context.observed.gradients.get(block.name, 0.0) is None:
            continue
        elif is_matrix and bool((w == w.flatten()[0]).all()) and len(w) > 1:
            constant.append(block.name)
        elif (
            is_matrix
            and block.name in context.rank_one
            and not _is_far(block, w)
            and not grows_from_zero(context, block.name, w)
        ):
            single.append(block.name)
    if zero:
        yield Finding(
            "zero-weights",
            "error",
            f"{some(zero, SHOWN)} {'is' if len(zero) == 1 else 'are'} zero, and the output ignores the input",
            where=some(zero, SHOWN),
            evidence="every entry is zero, and all samples get the same output (exact)",
            cause="The layer was never initialized or never loaded. Layers behind it see a constant; those before it "
            "get no gradient.",
            action=Action("reset", {"names": tuple(zero)}),
        )
    elif shut := _shut(context):
        yield Finding(
            "zero-weights",
            "error",
            f"{some(shut, SHOWN)} {'is' if len(shut) == 1 else 'are'} zero, and no step changes that",
            where=some(shut, SHOWN),
            evidence="every entry and its gradient are zero in all batches, and the gradient is not once these values "
            "are others (tried)",
            cause="Each is multiplied by another that is zero, or feeds ReLUs that are at zero with it. One factor of "
            "a product may start at zero, not all.",
            advice="Draw the values of all but the last factor anew.",
        )
    for code, names, what, evidence in (
        ("parameter-constant", constant, "the same number in all entries", "all entries are equal (exact)"),
        ("parameter-rank-one", single, "rank one", f"‖W‖_F² < {ONE} σ₁²"),
    ):
        if names:
            yield Finding(
                code,
                "error",
                f"{some(names, SHOWN)} {'has' if len(names) == 1 else 'have'} {what}",
                where=some(names, SHOWN),
                evidence=evidence,
                cause="All units of the layer compute the same function, get the same gradient, and stay equal."
                if code == "parameter-constant"
                else "All that passes the layer is one number for each sample.",
                action=ISOMETRIC,
            )


def _is_far(block: Block, w: Tensor) -> bool:
    """Whether a table of rows has an offset beside which its rows are alike, which `embedding_scale` tells."""
    return block.role == "embedding" and float(w.float().square().mean()) > EMBEDDING**2


def _shut(context: Context) -> list[str]:
    """The zeros that keep each other shut, without norms that shut the whole network, which `norm_gain` tells."""
    names = context.opening.shut if context.opening is not None else ()
    modules = context.modules
    told = [n for n in names if not (context.is_blocked and "Norm" in type(modules[context.module_of(n)]).__name__)]
    return sorted(told, key=lambda name: (context.observed.used.get(name.partition("[")[0], math.inf), name))


def embedding_scale(context: Context) -> Iterator[Finding]:
    """Find embeddings beside which nothing else counts, or that are lost beside what is added to them."""
    odd: list[tuple[str, float]] = []
    for block, w in context.values():
        if block.role == "embedding":
            rms = float(w.float().square().mean().sqrt())
            lost = 0 < rms < SMALL_EMBEDDING and not context.is_normed(block) and _leads_on(context, block)
            if lost or EMBEDDING < rms < math.inf:
                odd.append((block.name, rms))
    tied = _tied(context)
    if tied and not odd:
        name, rms = tied
        yield Finding(
            "embedding-scale",
            "error",
            f"The embedding {name}, which is the head too, makes scores of size {_spread(context):.3g}",
            where=name,
            evidence=f"root mean square {rms:.3g} of its components; loss {context.observed.first_loss:.3g}, "
            f"and {_guessing(context):.3g} by guessing",
            cause="Its rows are drawn for an embedding, and as a head they add up over the features.",
            advice=f"Draw it with a standard deviation of 1/√features or 0.02: torch.nn.init.normal_ of {name}.",
        )
    if odd:
        name, rms = odd[0]
        yield Finding(
            "embedding-scale",
            "error",
            f"The embedding {name} has rows of size {rms:.3g} a component",
            where=some([n for n, _ in odd], SHOWN),
            evidence=f"root mean square {rms:.3g}; usual are 0.02 to 1",
            cause="What is added to it, positions and branches, is lost beside it, and its gradient is small."
            if rms > 1
            else "It is lost beside what is added to it, positions and biases, so that all tokens look the same.",
            advice=f"Draw it anew with a standard deviation of 0.02: torch.nn.init.normal_ of {name}.",
        )


def _leads_on(context: Context, block: Block) -> bool:
    """Whether layers take the rows of a table, which has no values compared with it: a codebook follows its inputs."""
    used, call = context.observed.used, context.first_calls.get(context.module_of(block.name))
    order = used.get(block.name, math.inf)
    is_code = call is not None and order < call.order - 1  # taken before it is looked up
    return not is_code and any(b.role == "hidden" and used.get(b.name, 0) > order for b in context.matrices)


def _tied(context: Context) -> tuple[str, float] | None:
    """An embedding that is the head too, where the loss says that it makes scores too large."""
    seen, logits = context.observed, context.observed.logits
    if logits is None or not seen.first_loss > _guessing(context) + ABOVE or not _spread(context) > LARGEST:
        return None
    names = [n for n, _ in context.model.named_parameters(remove_duplicate=False)]
    uses = {n: sum(context.model.get_parameter(m) is context.parameters[n] for m in names) for n in context.parameters}
    for block, w in context.values():
        rms = float(w.float().square().mean().sqrt())
        is_head = uses.get(block.name, 0) > 1 and w.shape[0] == logits.shape[-1]
        if is_head and block.role in ("embedding", "head") and rms * math.sqrt(w.shape[-1]) > LARGEST:
            return block.name, rms
    return None


def _spread(context: Context) -> float:
    logits = context.observed.logits
    return 0.0 if logits is None else float(logits.float().std(-1).mean())


def _guessing(context: Context) -> float:
    logits = context.observed.logits
    return math.log(max(2, logits.shape[-1])) if logits is not None else math.inf


def scale(context: Context) -> Iterator[Finding]:
    """Find layers, or all of them, whose weights are far from the size that keeps a signal."""
    sized = sized_matrices(context)
    if not sized:
        return
    hidden, every, middle = hidden_sizes(sized), by_layer(sized), usual_size(sized)
    told = [
        (b, s) for b, s in sized if len(every) >= FEW_LAYERS or s > LARGEST > middle if _is_odd(context, b, s, middle)
    ]
    if told and len(by_layer(told)) < max(FEW_LAYERS, len(every) // 3):
        yield _one_layer(told, middle, context.observed.added)
    if len(told) != 1 and (len(hidden) >= 2 or any(map(cell_of, (b for b, _ in sized)))):
        yield from _all_layers(context, hidden, middle)


def _is_odd(context: Context, block: Block, size: float, middle: float) -> bool:
    """Whether a matrix is unlike the others by its entries and by what it did to the signal, and no norm repairs it."""
    if SMALLEST < size < LARGEST or abs(math.log(size / middle)) <= math.log(RATIO):
        return False
    is_last = block.role == "head" or block.name in context.last
    if size < 1 and grows_from_zero(context, block.name, context.parameters[block.name].detach()):
        return False
    if (
        size > 1 and cell_of(block) and (ends := _ends(context, block))
    ):  # its states have no gain, whatever is behind it
        return max(ends) > SATURATED
    if (size < 1 and is_last) or not context.has_gain(block, size):
        return False
    if size > 1 and context.module_of(block.name) in context.observed.branch_ends:
        return True  # the norm behind it is the next branch's, and divides the sum
    return not context.is_normed(block) or (size < 1 and context.is_lost_in_norm(block))


def _ends(context: Context, block: Block) -> list[float]:
    """Of a recurrent cell's gates and states with two ends, in each step, the share that is at one."""
    name, bounded = context.module_of(block.name), ("tanh", "sigmoid")
    return [a.saturated for a in context.observed.activations if a.name == name and a.function in bounded]


def _one_layer(told: list[tuple[Block, float]], middle: float, added: set[str]) -> Finding:
    block, size = told[0]
    small = size < 1
    if block.name in added:  # positions: they are no factor of the signal
        rms = size / math.sqrt(block.shape[-1])
        return Finding(
            f"parameter-scale-{'small' if small else 'large'}",
            "error",
            f"{block.name} is added to the signal, and its entries have a size of {rms:.2g}",
            where=some([b.name for b, _ in told], SHOWN),
            evidence=f"root mean square {rms:.3g}; usual for what is added, such as positions, are 0.02 to 1",
            cause="It is lost beside what it is added to." if small else "What it is added to is lost beside it.",
            action=Action("rescale", {"name": block.name, "factor": float(f"{USUAL_ADDED / rms:.3g}")}),
        )
    return Finding(
        "head-scale" if block.role == "head" else f"parameter-scale-{'small' if small else 'large'}",
        "error",
        f"{block.name} multiplies the signal by about {size:.2g}",
        where=some([b.name for b, _ in told], SHOWN),
        evidence=f"root mean square of the weights × √fan_in = {size:.3g}; median of the other layers {middle:.3g}",
        cause="The layer was initialized with another fan or a wrong factor"
        + ("; its outputs are lost beside biases and rounding." if small else ", and saturates what follows."),
        action=ISOMETRIC,
    )


def _all_layers(context: Context, hidden: list[float], middle: float) -> Iterator[Finding]:
    normed = any("Norm" in call.kind for call in context.observed.calls)
    small = all(s < ALL_SMALL for s in hidden) and not normed and not context.observed.additions
    large = all(s > ALL_LARGE for s in hidden) and not normed
    drawn = middle > UNIT and sum(s > UNIT for s in hidden) > MOST * len(hidden)
    lost = middle < SMALLEST and sum(s < SMALLEST for s in hidden) > MOST * len(hidden)
    if (small or large or drawn or lost) and not context.has_learned:
        is_trained = any(b.name in context.trained for b in context.matrices)
        yield Finding(
            f"gain-{'below' if small or lost else 'above'}-one",
            "error",
            f"Every layer multiplies the signal by about {middle:.2g}",
            where="all layers",
            evidence=f"root mean square of the weights × √fan_in between {min(hidden):.2g} and {max(hidden):.2g}; "
            "about 1 keeps a signal",
            cause="The weights have grown or shrunk in training: by a rate, a decay, or what drives the loss."
            if is_trained
            else "The weights were drawn with another variance than 1/fan_in to 2/fan_in.",
            action=None if is_trained else ISOMETRIC,
            advice="Look at what is told beside this; gm.init.isometric_ draws all weights anew, and what they have "
            "learned is lost."
            if is_trained
            else "",
            source="He et al. 1502.01852, eq. 10",
        )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (degenerate, embedding_scale, scale)
