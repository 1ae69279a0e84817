"""Causes in the inputs: all tensors that the model is called with, and what its first layers make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gramian.batch import main_input
from gramian.errors import GramianError
from gramian.inspection.causes.context import Context
from gramian.inspection.passes.batch_roles import Given, given_of, key
from gramian.inspection.passes.moments import all_finite
from gramian.inspection.passes.records import Raw
from gramian.report import Finding, Severity
from gramian.samples import has_rows

__all__ = ["RULES"]

# Heuristics, with what standardized, unit-interval and grayscale data have in brackets: the mean over the deviation (up
# to 2), the root mean square (0.3 to 8), and the largest share of variance in one of many features (below 0.3).
OFFSET, SMALL, LARGE, DOMINANT = 5.0, 0.02, 30.0, 0.9
# A scale beyond these is an error: int16 samples, or a division by 255 done twice.
TINY, HUGE = 0.005, 1000.0
# A channel that dominates is so many times as large as the median of the others.
TIMES = 10.0

# Dimensions from which on floats are pictures: samples, channels, and places.
PICTURE = 4

# Samples from which on copies are told.
FEW = 30
# Share of different rows that come once, from which on they repeat as words do.
ONCE = 0.5
# Samples from which on one code for all is no chance of a small batch.
MANY = 100


def inputs(context: Context) -> Iterator[Finding]:
    """Judge the inputs' values: finite, centered, of order one, with more than one feature that varies."""
    x = _inputs(context)
    if x is None:
        return
    if not context.has_float_inputs:
        yield from _repeated(context, x)
        return
    if not all_finite(x):
        finite = x.isfinite()
        rows = int((~finite).flatten(1).any(1).sum())
        yield _finding(
            "input-non-finite",
            "error",
            f"{rows} of {len(x)} inputs have values that are NaN or infinite",
            f"{int((~finite).sum()):,} of {x.numel():,} values (exact)",
            "The data have missing or overflown values; everything computed from them is lost.",
            "Find where they come from, and replace or drop those samples.",
        )
        return
    flat = x.flatten(1)
    scale = float(flat.abs().amax())
    if len(flat) < 2:
        return
    variance, mean = _spread(flat / (scale or 1.0))
    total = float(variance.sum())
    if total <= 1e-14 * float(mean.square().sum() + 1e-30):
        joined = torch.cat(_joined(context, x), 1)
        if len(torch.unique(joined, dim=0)) > 1 or not _are_samples(context):  # another input varies, as edges do
            return
        yield _finding(
            "input-constant",
            "error",
            f"All {len(flat)} inputs are the same",
            "no feature varies between samples (exact, up to rounding)",
            "A loader that returns one sample again and again, or a preprocessing step that erases the data.",
            "Look at what the loader returns.",
        )
        return
    deviation, rms = math.sqrt(total / len(mean)) * scale, math.sqrt(float((variance + mean.square()).mean())) * scale
    offset = float(mean.mean().abs()) * scale / deviation
    if context.changes_inputs_first:
        yield from _repeated(context, flat)
        return  # a norm, or arithmetic before the first layer, which sees other numbers
    share, top = (float(v) for v in (variance / total).max(0))
    if len(mean) >= 4 and share > DOMINANT:
        yield _finding(
            "input-dominated",
            "warning",
            f"One of {len(mean)} input features has {share:.0%} of the variance",
            f"feature {int(top)}: standard deviation {math.sqrt(float(variance[int(top)])) * scale:.3g}, "
            f"median of all {float(variance.median().sqrt()) * scale:.3g}",
            "Features have different units, so that the first layer sees one of them only.",
            STANDARDIZE,
        )
    elif (found := _dominating_channel(context)) is not None:
        channel, num, most, deviations = found
        yield _finding(
            "input-dominated",
            "warning",
            f"One of {num} input channels has {most:.0%} of the variance",
            f"channel {channel}: standard deviation {deviations[0]:.3g}, median of the others {deviations[1]:.3g}",
            "Channels have different units, so that the first layer sees one of them only.",
            STANDARDIZE.replace("feature", "channel"),
        )
    elif offset > OFFSET:
        yield _finding(
            "input-offset",
            "warning",
            f"The inputs' mean is {offset:.3g} times their standard deviation",
            f"mean {float(mean.mean()) * scale:.3g}, standard deviation between samples {deviation:.3g}",
            "The first layer answers to the offset that all samples share, and hardly to their differences.",
            STANDARDIZE,
        )
    elif not SMALL < rms < LARGE:
        yield _finding(
            "input-scale",
            "warning" if TINY < rms < HUGE else "error",
            f"The inputs' root mean square is {rms:.3g}",
            f"root mean square {rms:.3g}, standard deviation between samples {deviation:.3g}; initializations and "
            "learning rates assume about 1",
            "The data are in units that the first layer was not initialized for.",
            STANDARDIZE,
        )
    yield from _repeated(context, flat)


def later_inputs(context: Context) -> Iterator[Finding]:
    """Find values that are not finite in batches beyond the first few, where these are in memory. Exact."""
    seen = context.observed
    num = len(seen.batches)
    for given in given_of([*seen.batches, *context.further], seen.fed, set()) if context.further else ():
        known = [not t.is_floating_point() or all_finite(t) for t in given.values]
        lost = [0 if known[i] else int((~t.isfinite()).sum()) for i, t in enumerate(given.values)]
        bad = [i for i, many in enumerate(lost) if many]
        if given.is_input and bad and bad[0] >= num:
            yield _finding(
                "input-non-finite",
                "error",
                f"{sum(lost)} values of {given.name} are NaN or infinite, in {len(bad)} of the {len(lost)} batches "
                "looked at",
                f"none in the first {num}, the first in batch {bad[0]}, counted from 0 (exact)",
                "The data have missing or overflown values; everything computed from them is lost.",
                "Find where they come from, and replace or drop those samples.",
            )


def _dominating_channel(context: Context) -> tuple[int, int, float, tuple[float, float]] | None:
    """Which of the first layer's features holds nearly all of the variance, over samples and positions alike.

    Returns: its number, how many vary, its share, and its standard deviation with the median of the others.
    """
    raw = next((raw for raw in context.observed.raw if _is_main(context, raw.key)), None)
    if raw is None or raw.values.shape[1] < 2:
        return None
    deviations = raw.values.double().std(0, correction=0)
    top = int(deviations.argmax())
    others = torch.cat((deviations[:top], deviations[top + 1 :]))
    others = others[others > 0]
    if not len(others):
        return None
    largest, usual = float(deviations[top]), float(others.median())
    share = largest**2 / float(deviations.square().sum())
    if share <= DOMINANT or largest <= TIMES * usual:
        return None
    return top, len(others) + 1, share, (largest, usual)


def _repeated(context: Context, x: Tensor) -> Iterator[Finding]:
    """Find inputs that are all the same, or mostly copies. Exact."""
    if not _are_samples(context):
        return
    parts, new = _joined(context, x), _of_other_batches(context)
    parts = [part[new] if len(new) == len(part) else part for part in parts]
    flat = torch.cat(parts, 1)
    copies = len(flat) - len(torch.unique(flat, dim=0))
    if copies and copies == len(flat) - 1:
        yield _finding(
            "input-constant",
            "error",
            f"All {len(flat)} inputs are the same",
            "equal bit for bit (exact)",
            "A loader that returns one sample again and again, or a preprocessing step that erases the data.",
            "Look at what the loader returns.",
        )
    elif (
        len(flat) >= FEW
        and copies > 0.5 * len(flat)
        and math.prod(map(_num_codes, parts)) > len(flat) / 2
        and not _are_contexts(flat)
    ):
        yield _finding(
            "input-duplicates",
            "warning",
            f"{copies} of {len(flat)} inputs repeat an earlier one",
            "equal bit for bit (exact)",
            "The loader samples from few examples, or indexes wrongly.",
            "Look at what the loader returns.",
        )


def _are_samples(context: Context) -> bool:
    """Whether rows are samples, and not the nodes of graphs, which are alike but for their edges."""
    return all(map(has_rows, context.observed.batches))


def _are_contexts(flat: Tensor) -> bool:
    """Whether rows of whole numbers repeat as words do: a few often, and many once.

    Where a loader draws from so few samples that most of its rows repeat, each comes twice or more on average, and
    m e⁻ᵐ / (1 − e⁻ᵐ) of them once, 0.31 for m = 2.
    """
    if not bool((flat == flat.round()).all()):
        return False
    times = flat.unique(dim=0, return_counts=True)[1]
    return float((times == 1).float().mean()) > ONCE


def _num_codes(flat: Tensor) -> float:
    """How many different rows there may be: of small integers, or of rows that mark one or a few of their entries.

    As many as there are pairs of values of all columns; where each row has k ones among d zeros, one in each of k
    groups, up to (d / k)^k. Where samples are more than twice as many, most repeat an earlier one, however drawn.
    """
    if not bool((flat == flat.round()).all()):
        return math.inf
    marked = flat.sum(1)
    if bool(((flat == 0) | (flat == 1)).all()) and bool((marked == marked[0]).all()) and marked[0] > 0:
        return (flat.shape[1] / float(marked[0])) ** float(marked[0])
    return math.exp(min(700.0, sum(math.log(len(column.unique())) for column in flat.T)))


def _of_other_batches(context: Context) -> Tensor:
    """Which rows of all batches are of one that was not there before: training on all data gives one batch always."""
    seen: set[tuple[int, int]] = set()
    new: list[Tensor] = []
    for batch in context.observed.batches:
        x = main_input(batch)
        place = (x.data_ptr(), len(x))
        new.append(torch.full((len(x),), place not in seen))
        seen.add(place)
    return torch.cat(new)


STANDARDIZE = "Standardize: subtract each feature's mean over the training data and divide by its standard deviation."


def _inputs(context: Context) -> Tensor | None:
    """The inputs of all batches, (N, …) float32 on the CPU; `None` where they are no floats or differ in shape."""
    found: list[Tensor] = []
    for batch in context.observed.batches:
        try:
            x = main_input(batch)
        except (GramianError, TypeError, ValueError, KeyError, IndexError):
            return None
        if x.is_complex() or (x.ndim < 2 and x.is_floating_point()):
            return None
        found.append((x if x.ndim > 1 else x[:, None]).detach().float().cpu())
    if not found or any(x.shape[1:] != found[0].shape[1:] for x in found):
        return None
    return torch.cat(found)


def _finding(
    code: str, severity: Severity, title: str, evidence: str, cause: str, advice: str, where: str = "data"
) -> Finding:
    return Finding(code, severity, title, where=where or "data", evidence=evidence, cause=cause, advice=advice)


def other_inputs(context: Context) -> Iterator[Finding]:
    """Judge what the first layers take of the data, beside the main input: its scale, and features in other units."""
    for given in context.given:
        lost = sum(int(t.isnan().sum()) for t in given.values if given.is_input and t.is_floating_point())
        if lost and not _is_main(context, key(given.values[0])):
            yield _finding(
                "input-non-finite",
                "error",
                f"{lost:,} values of {given.name} are NaN",
                f"counted in {len(given.values)} batches (exact)",
                "The data have missing values; everything computed from them is lost.",
                "Find where they come from, and replace or drop those samples.",
            )
        yield from _constant(context, given)
    if context.has_float_inputs and not context.changes_inputs_first:
        others = [raw for raw in context.observed.raw if not _is_main(context, raw.key)]
    else:
        others = context.observed.raw
    for raw in others:
        yield from _judged(context, raw)


def _constant(context: Context, given: Given) -> Iterator[Finding]:
    """Find one number for all samples, as a time that was set to a default, beside another input. Exact.

    Numbers that are no codes are asked only where the model is called once: the second call of a loss may be at the
    start, or at a boundary.
    """
    values = given.values[0]
    is_float = values.is_floating_point()
    if not given.is_input or values.numel() != len(values) or values.ndim > 1 + is_float:
        return
    if len(context.given_inputs[0]) < 2 or (is_float and context.observed.passes != 1):
        return
    numbers = torch.cat([t.detach().cpu().flatten() for t in given.values])
    if len(numbers) >= MANY and bool((numbers == numbers[0]).all()):
        yield _finding(
            "input-constant",
            "warning",
            f"All {len(numbers)} values of {given.name} are the same",
            f"{given.name} is {numbers[0].item():g} for all samples (exact)",
            "What tells samples apart was lost on the way: a clamp, a default value, or a column of one kind.",
            "Look at what the loader returns.",
        )


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """The variance of each feature over the samples, and its mean; `x` is overwritten."""
    first = x[0].clone()  # from which on equal samples differ by nothing
    mean = x.sub_(first).mean(0)
    return x.sub_(mean).square_().mean(0), mean + first  # var_mean takes five times as long on a processor


def _judged(context: Context, raw: Raw) -> Iterator[Finding]:
    """Judge the data that a layer takes. Small ones, which flags and sparse counts are, are not told."""
    x = raw.values
    if len(x) < 2 or not all_finite(x):
        return
    scale = float(x.abs().amax()) or 1.0
    variance, mean = _spread(x / scale)
    total = float(variance.sum())
    rms = math.sqrt(float((variance + mean.square()).mean())) * scale
    taken = [given for given in context.given if given.is_input and key(given.values[0]) == raw.key]
    names = [given.name for given in taken]
    is_picture = any(given.values[0].ndim >= PICTURE for given in taken)
    what = names[0] if names else f"what {context.told(raw.name)} takes of the data"
    told = f"{context.told(raw.name)} takes it as it is; " if names else ""
    if total <= 0 or rms <= LARGE:
        return
    share, top = (float(v) for v in (variance / total).max(0))
    if len(mean) > 1 and share > DOMINANT:
        yield _finding(
            "input-dominated",
            "warning" if rms < HUGE else "error",
            f"One of {len(mean)} features of {what} has {share:.0%} of the variance",
            f"{told}feature {int(top)}: standard deviation {math.sqrt(float(variance[int(top)])) * scale:.3g}, "
            f"median of all {float(variance.median().sqrt()) * scale:.3g}",
            "Features have different units, so that the first layer sees one of them only.",
            STANDARDIZE,
            raw.name,
        )
        return
    yield _finding(
        "input-scale",
        "warning" if rms < HUGE else "error",
        f"The root mean square of {what} is {rms:.3g}",
        f"{told}values from {float(x.min()):.3g} to {float(x.max()):.3g}; initializations and learning rates assume "
        "about 1",
        "Data in their own units, as counts or steps of time are, outweigh what else the layer is given, and its "
        "biases.",
        "Divide them by their range"
        + (". " if is_picture else ", or give sines and cosines of them, as for a diffusion's time. ")
        + STANDARDIZE.replace("feature", "channel" if is_picture else "feature"),
        raw.name,
    )


def _is_main(context: Context, of: tuple[int, int]) -> bool:
    try:
        return key(main_input(context.observed.batches[0])) == of
    except (GramianError, IndexError):
        return False


def _joined(context: Context, x: Tensor) -> list[Tensor]:
    """The rows of each of the inputs that have one for each of the main input's."""
    others = []
    for given in context.given:
        if given.is_input and not _is_main(context, key(given.values[0])):
            found = [t.detach().cpu().flatten(1) if t.ndim > 1 else t.detach().cpu()[:, None] for t in given.values]
            if sum(map(len, found)) == len(x) and all(t.shape[1:] == found[0].shape[1:] for t in found):
                others.append(torch.cat(found).double())
    return [x.flatten(1).double(), *others] if others else [x.flatten(1)]


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (inputs, other_inputs, later_inputs)
