"""Causes in what inputs and labels have in common: labels among the inputs, and labels that are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.passes.moments import all_finite
from gramian.inspection.passes.padding import padding_of
from gramian.report import Finding

__all__ = ["RULES"]

# Samples, and those among them with the rarer values, from which on an entry is not the label by chance.
FEW, RARE = 30, 10
# Numbers of a label, classes that are told apart, and entries of an input that are looked at.
MOST_NUMBERS, MOST_CLASSES, MOST_ENTRIES = 8, 20, 4096
# What of the label's variance a line through an entry may leave: rounding of float32.
LEFT = 1e-9
# Units of a class, and their mean loss, from which on the class is not just learned.
UNITS, UNLEARNED = 4, 0.1


def among_inputs(context: Context) -> Iterator[Finding]:
    """Find an entry of an input that is the label, up to a factor and an offset. Exact, up to rounding."""
    labels = [y for y in context.given_labels if y is not None]
    inputs = context.given_inputs
    if not labels or len(labels) != len(inputs) or not context.are_compared:
        return
    columns = _columns(labels)
    num = sum(map(len, labels))
    if columns is None or num < FEW:
        return
    for place in range(len(inputs[0])):
        values = [x[place].detach().cpu() for x in inputs]
        shape = values[0].shape[1:]
        if (
            not values[0].is_floating_point()
            or any(t.shape[1:] != shape for t in values)
            or sum(map(len, values)) != num
        ):
            continue
        x = torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in values]).double()
        if not labels[0][0].numel() < x.shape[1] <= MOST_ENTRIES or not all_finite(x):
            continue
        if len(torch.unique(x, dim=0)) < FEW:  # of few that come again, an entry is a line through the labels by chance
            continue
        shares = _standardized(x).T @ _standardized(columns) / num
        best = shares.abs().amax(1)
        entry = int(best.argmax())
        if float(best[entry]) ** 2 >= 1 - LEFT:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(entry), shape or (1,)))
            yield Finding(
                "target-leak",
                "warning",
                "The inputs hold the label: one of their entries gives it away",
                where="data",
                evidence=f"entry {index} of an input of shape {tuple(shape)} is a label, up to a factor and an offset, "
                f"in all {num} samples",
                cause="The target's column, or one made of it, was left among the features; a window reaches into what "
                "is to be predicted.",
                advice="Take it out of the inputs.",
            )
            return


def _columns(labels: list[Tensor]) -> Tensor | None:
    """The numbers of labels, and for classes whether each is the label; of those that vary enough."""
    y = torch.cat([t.detach().cpu() for t in labels]) if len({t.shape[1:] for t in labels}) == 1 else None
    if y is None or y.ndim > 2 or y[0].numel() > MOST_NUMBERS:
        return None
    numbers = y.flatten(1).double() if y.ndim > 1 else y[:, None].double()
    if not y.is_floating_point() and y.ndim == 1 and len(classes := y.unique()) <= MOST_CLASSES:
        numbers = torch.cat((numbers, (y[:, None] == classes).double()), 1)
    commonest = (numbers == numbers.mode(0).values).sum(0)
    kept = numbers[:, (len(numbers) - commonest >= RARE) & numbers.isfinite().all(0)]
    return kept if kept.shape[1] else None


def _standardized(x: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1; zeros for those that hardly vary."""
    x = x - x.mean(0)
    deviation = x.square().mean(0).sqrt()
    return torch.where(deviation > 1e-6 * x.abs().amax(0).clamp(min=1e-30), x / deviation.clamp(min=1e-30), 0)


def left_out(context: Context) -> Iterator[Finding]:
    """Find classes that are among the labels and have no gradient. Exact; an image's may be one that is no class."""
    found = {
        label: (num, ndim)
        for label, (num, ndim, loss) in context.observed.ungraded_labels.items()
        if num >= UNITS and loss > UNLEARNED and not _is_padding(context, label)
    }
    if not found:
        return
    names = [str(label) for label in found]
    num, ndim = next(iter(found.values()))
    yield Finding(
        "labels-ignored",
        "warning" if ndim < 3 else "info",
        f"The loss ignores the labels of class {some(names, SHOWN)}",
        where="loss",
        evidence=f"of {num} units with label {names[0]}, none has a gradient, and others do (exact)",
        cause="The class has a weight of zero, or is the ignore_index.",
        advice="Give it a weight; let ignore_index be a number that is no class, as -100 is, or padding's.",
    )


def _is_padding(context: Context, label: int) -> bool:
    """Whether a class is what fills up sequences, by an embedding's padding_idx or by where it stands."""
    if any(isinstance(m, nn.Embedding) and m.padding_idx == label for m in context.model.modules()):
        return True
    for found in context.observed.criteria:
        if not found.target.is_floating_point() and found.target.ndim == 2:
            padding = padding_of(nn.Identity(), None, found.target, is_main=False)
            if padding is not None and bool((found.target[padding] == label).all()):
                return True
    return False


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (among_inputs, left_out)
