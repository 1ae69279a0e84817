"""A cause in products: what is multiplied by exactly zero, and learns nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding
from gramian.report.model import plural

__all__ = ["RULES"]


def zero_factor(context: Context) -> Iterator[Finding]:
    """Find values that are multiplied by zeros, which nothing trains. Tried: with ones, a gradient arrives."""
    found = context.zeroed
    if found is None:
        return
    what = f"a tensor of zeros {found.shape}" if found.shape is not None else "the number 0"
    what = f"{found.name}, which is zero and not trained" if found.name else what
    place = "the loss" if found.place == "loss" else context.told("" if found.place == "all layers" else found.place)
    owners = list(dict.fromkeys(context.module_of(n) or n for n in found.starved))
    is_all = len(found.starved) == found.num_trained
    names = [found.name] if found.name else [found.place] if found.place != "all layers" else []
    yield Finding(
        "zero-weights" if found.is_parameter else "zero-factor",
        "error" if is_all or found.shape is not None or found.name else "warning",
        f"In {place} something is multiplied by {what}, so that "
        + (
            "nothing learns" if is_all else f"{some(owners, SHOWN)} {'learns' if len(owners) == 1 else 'learn'} nothing"
        ),
        where=", ".join(dict.fromkeys((*names, *owners[:SHOWN]))),
        evidence=f"the gradient of {plural(len(found.starved), 'parameter')} of {found.num_trained} is exactly zero in "
        "all batches, and is not with ones in the place of the zeros (tried)",
        cause="A mask, a weight of samples, classes or a term, or the factor of a branch is zero: by its own value, or "
        "because a mask is inverted or empty."
        if not found.is_parameter
        else "The parameter starts at zero and is frozen, so that no step opens it.",
        advice="Print the zeros where they are made; leave a term out if it is not meant to count. An input of zeros, "
        "as a decoder's, is to be what it begins from: the targets one place later."
        if not found.is_parameter
        else f"Train it: {found.name} needs requires_grad_(True); or start it at one.",
    )


def zero_classes(context: Context) -> Iterator[Finding]:
    """Find weights of classes that are zero for all classes but one. Exact."""
    for found in context.observed.criteria:
        if found.weight is None or found.target.is_floating_point():
            continue
        weight = found.weight.detach()
        present = found.target[(found.target >= 0) & (found.target < len(weight))].unique()
        counting = int((weight[present] != 0).sum())
        if counting < 2 <= len(present):
            yield Finding(
                "zero-factor",
                "error",
                f"Of {len(present)} classes {counting or 'none'} has a weight other than zero",
                where="loss",
                evidence=f"the weights of {found.function} are zero for {len(present) - counting} of the classes that "
                "the labels of the first batch hold (exact)",
                cause="The same output for all samples is best where one class counts alone.",
                advice="Give each class a weight: one over its share of the labels, or none at all.",
            )
            return


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (zero_factor, zero_classes)
