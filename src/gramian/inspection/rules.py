"""The rules that turn measurements into findings: one function for each kind of problem.

A rule takes what was measured and yields its findings; `RULES` lists all of them. Rules that need no data are in
`weights.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from gramian.gram import DiagonalGram, Gram
from gramian.inspection.across_depth import (
    ISOMETRIC,
    end_to_end,
    gain,
    gradient_by_depth,
    is_single,
    with_gradients,
)
from gramian.inspection.weights import rules as weight_rules
from gramian.inspection.weights.rules import names_of
from gramian.report import SEVERITIES, Finding
from gramian.site import Site

if TYPE_CHECKING:
    from gramian.inspection.measurements import Measured

__all__ = ["RULES", "find"]

# Share of variance in the second moment below which float32 sums cannot distinguish it from rounding.
VARIATION_FLOOR = 1e-6

# The share in the layer before from which on the differences end at once, and not little by little.
ORDINARY = 1e-2


def find(measured: Measured) -> list[Finding]:
    """Return all findings, errors first; within a severity in the order of `RULES`, exact rules before heuristics."""
    found = [finding for rule in RULES for finding in rule(measured)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _sites(measured: Measured) -> list[Site]:
    """Where weights meet vectors; lookups take indices, which have no size."""
    if measured.stats is None:
        return []
    lookups = {layer.name for layer in measured.layers if layer.role == "embedding"}
    return [site for site in measured.stats.sites() if site.name not in lookups]


def non_finite_signal(measured: Measured) -> Iterator[Finding]:
    """Find the first layer whose input is not finite, and, backward, the first whose gradient is not. Exact."""
    sites = _sites(measured)
    forward = [s.name for s in sites if s.A is not None and not math.isfinite(s.A.rms)]
    backward = [s.name for s in sites if s.G is not None and not math.isfinite(s.G.rms)]
    for names, what, first in ((forward, "input", forward[:1]), (backward, "gradient", backward[-1:])):
        if names:
            yield Finding(
                f"non-finite-{what}",
                "error",
                f"The {what} of {first[0]} is NaN or infinite",
                where=first[0],
                evidence=f"the {what} is not finite at {len(names)} of {len(sites)} layers (exact)",
                cause=f"The layer {'before' if what == 'input' else 'after'} it computed the first such value.",
                advice="Look at this layer's weights and at the operation after it."
                if what == "input"
                else "Measure again with model.float() and inputs in float32: finite there, it is the dtype's range.",
            )


def collapsed_inputs(measured: Measured) -> Iterator[Finding]:
    """Find the depth from which on all samples look the same: little by little, or from one layer to the next."""
    varying = [(s.name, _variation(s.A)) for s in _sites(measured) if is_single(s.A) and s.A.count > 1]
    # Zeros that leave outputs different, or that a few steps end, are none of the same for all samples.
    nothing = math.inf if measured.varies or measured.waiting or measured.opening else 0.0
    is_same = [(nothing if share is None else share) < VARIATION_FLOOR for _, share in varying]
    if True not in is_same[1:]:
        return
    start = is_same.index(True, 1)
    same = [name for (name, _), it_is in zip(varying, is_same, strict=True) if it_is]
    lost = same[is_same[0] :]
    given = [n for n in same if n == varying[0][0] or n.rpartition(".")[0] in measured.takes_data]
    reaches_head = lost[-1] == varying[-1][0]
    is_given = bool(given) and not reaches_head
    before, share = varying[start - 1][0], varying[start - 1][1] or 0.0
    place = None if is_given or share < ORDINARY else _first_same(measured, before, lost[0])
    zero = varying[start][1] is None
    if place is None and zero:
        return
    evidence = (
        f"the input of {lost[0]} is zero for all samples (exact)"
        if zero
        else f"the input of {lost[0]} varies between samples by less than {math.sqrt(VARIATION_FLOOR):.1%} of its "
        "size, the resolution of float32 sums"
    )
    if is_given:
        evidence += f"; so does what {given[0]} takes of the data"
    elif place is not None:
        evidence += f"; that of {before}, the layer before, by {math.sqrt(share):.0%}"
    yield Finding(
        "samples-indistinguishable",
        "error" if reaches_head else "warning" if place is None else "info",  # learned queries are the same for all
        f"From layer {lost[0]} on, all samples look the same"
        if reaches_head
        else f"{len(lost)} layers get inputs that are the same for all samples",
        where=place[0] if place else (f"{lost[0]} … {lost[-1]}" if len(lost) > 1 else lost[0]),
        evidence=evidence,
        cause=f"They depend on what {given[0]} takes of the data, which is the same for all samples."
        if is_given
        else "Each layer shrinks the differences between samples, until only the biases are left."
        if place is None
        else "The differences end at once: a rounding to one value, a mask that shows nothing but padding, a mean or "
        "an index that takes the same for all samples, or a parameter that is given to all.",
        action=None if is_given or place else ISOMETRIC,
        advice=f"Look at what enters {given[0]}."
        if is_given
        else f"Look at what is computed {place[1]}."
        if place
        else "",
        source="" if is_given or place else "Schoenholz et al. 1611.01232, §3",
    )


def _first_same(measured: Measured, before: str, behind: str) -> tuple[str, str] | None:
    """Where the differences between samples end between two layers, as a name and in words.

    `None` where the first layer's matrix ends them.
    """
    first, last = (name.partition("[")[0].rpartition(".")[0] for name in (before, behind))
    called = [place.name for place in measured.places]
    if first in called and last not in called and last.startswith(f"{first}."):
        return first, f"in module '{first}'"  # attention, which calls no module for its last matrix
    if first not in called or last not in called[called.index(first) :]:
        between = f"between {before} and {behind}"
        return between, between
    start = called.index(first)
    crossed = measured.places[start : called.index(last, start)]
    ending = next((p for p in crossed if (p.variation or 0.0) < math.sqrt(VARIATION_FLOOR)), None)
    if ending is None:
        between = f"between {crossed[-1].name} and {last}"
        return between, between
    return None if ending.name == first else (ending.name, f"in module '{ending.name}' ({ending.kind})")


def underflowing_gradients(measured: Measured) -> Iterator[Finding]:
    """Find gradients below the smallest normal number of the dtype, and zeros that no zero matrix explains. Exact."""
    sized = with_gradients(measured)
    tiny = torch.finfo(measured.dtype).tiny
    lost = [layer for layer in sized if (layer.gradient_rms or 0.0) < tiny]
    if lost and not measured.is_satisfied:
        everywhere = len(lost) == len(sized)
        yield Finding(
            "gradient-underflow",
            "info" if measured.has_learned and not everywhere else "error",
            "No gradient arrives at any layer"
            if everywhere
            else f"The gradient underflows to zero in {len(lost)} of {len(sized)} layers",
            where=names_of(lost),
            evidence=f"root mean square below {tiny:.1e}, the smallest normal {str(measured.dtype)[6:]}",
            cause="The loss does not depend on these layers."
            if everywhere
            else "The product of the layers' Jacobians is too small for the dtype.",
            action=None if everywhere else ISOMETRIC,
            advice="Look for .detach(), torch.no_grad() or an unused output between these layers and the loss."
            if everywhere
            else "",
        )


Rule = Callable[["Measured"], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    weight_rules.non_finite_weights,
    non_finite_signal,
    underflowing_gradients,
    gain,
    collapsed_inputs,
    gradient_by_depth,
    end_to_end,
    *weight_rules.RULES,
)


def _variation(a: Gram | DiagonalGram) -> float | None:
    """Return the share of variance in the second moment; `None` where it is undefined."""
    total = float(a.diagonal.sum())
    return 1.0 - float(a.mean.square().sum()) / total if total > 0 and math.isfinite(total) else None
