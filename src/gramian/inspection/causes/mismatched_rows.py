"""Rows of a batch that do not belong together: labels, inputs, actions or pairs of other samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.causes.dependence import DEPENDENCE, POWER
from gramian.inspection.causes.row_agreement import LEAST, NOISE, Join, follows, power, relations, sees_views
from gramian.inspection.causes.sample_similarity import is_sequence
from gramian.inspection.passes.batch_roles import Given, given_of, key
from gramian.inspection.passes.moments import all_finite
from gramian.report import Finding
from gramian.report.model import plural

__all__ = ["RULES"]

# The share of the inputs' numbers from which on one of them is a main input.
MAIN = 0.5
# Codes from which on how many there are of each says what a sequence is.
CODES, FEW_COLUMNS = 8, 8
# Samples from which on two inputs are not the same by chance.
FEW = 30
# What a report says was not looked at.
PAIRS = "whether the two of each pair belong together"


def joined(context: Context) -> Iterator[Finding]:
    """Find tensors whose rows are of other samples than those beside them."""
    seen, probes = context.observed, context.probes
    if context.has_learned or seen.changed or probes.rows is not None:
        return
    if probes.supervision is not None and probes.supervision.kind == "shifted":
        return
    given = given_of([*seen.batches, *context.further], seen.fed, set())
    tensors = _tensors(given)
    if tensors is None or len(tensors) < 2:
        return
    joins = relations(tensors)
    if not joins:
        if probes.together_rows is not None and probes.together_rows.are_pairs:
            context.skipped[PAIRS] = f"fewer than {LEAST} were read"
        return
    found = _shifted(context, tensors, joins) or _unrelated(context, tensors, joins)
    if found is not None:
        context.skipped.pop(DEPENDENCE, None)
        yield found


def same(context: Context) -> Iterator[Finding]:
    """Find two of three or more inputs that are the same, where the loss takes nothing else. Exact."""
    given = [g for g in context.given if g.is_input]
    if len(given) < 3 or len(given) < len(context.given):
        return
    values = [torch.cat([t.detach().cpu().flatten(1 if t.ndim > 1 else 0) for t in g.values]) for g in given]
    pairs = [
        (i, k)
        for i, k in combinations(range(len(given)), 2)
        if values[i].shape == values[k].shape and torch.equal(values[i], values[k])
    ]
    if len(pairs) != 1 or len(values[0]) < FEW or bool((values[pairs[0][0]] == values[pairs[0][0]][:1]).all()):
        return
    one, other = (given[i] for i in pairs[0])
    if key(one.values[0]) == key(other.values[0]):  # one tensor, under two names
        return
    yield Finding(
        "pairs-mismatched",
        "warning",
        f"{one.name} and {other.name} are the same for all samples",
        where="data",
        evidence=f"equal bit for bit in {len(values[0])} samples, and stored twice; of {len(given)} inputs no others "
        "are (exact)",
        cause="What is to be different, as a negative beside its positive, was copied, or drawn in the same way with "
        "the same seed.",
        advice="Look at how the two are drawn.",
    )


def copied(context: Context) -> Iterator[Finding]:
    """Find pairs whose two sides are the same, which no loss has to bring together. Measured."""
    rows = context.probes.together_rows
    if rows is None or not rows.are_copies:
        return
    one, other = rows.inputs
    values = [[t for g in context.given if g.name == name for t in g.values] for name in rows.inputs]
    if not all(torch.equal(a, b) for a, b in zip(*values, strict=True)):
        return
    yield Finding(
        "pairs-mismatched",
        "warning",
        f"{one} and {other} are the same for all samples, and the loss takes them as pairs",
        where="data",
        evidence="equal bit for bit in all batches that were read, and so are their outputs in training mode; the loss "
        "is lower where the two of a row are equal than where they are those of other rows (measured)",
        cause="The augmentation is missing, was drawn with one seed, or one of the two is a copy: what is to be alike "
        "is alike from the start, so that nothing has to be learned of what two views of a sample have in common.",
        advice="Draw the two views of each sample apart.",
        source="Chen et al. 2002.05709, §3",
    )


def _tensors(given: list[Given]) -> dict[str, Tensor] | None:
    """The rows of all batches, by name; `None` where some tensor has no row for each sample."""
    made: dict[str, Tensor] = {}
    for one in given:
        values = [t.detach().cpu() for t in one.values]
        if any(t.is_complex() or t.shape[1:] != values[0].shape[1:] for t in values):
            return None
        t = torch.cat(values)
        t = t.long() if t.dtype == torch.bool else t
        if t.is_floating_point() and not all_finite(t):
            return None
        if bool((t != t[:1]).any()):  # what all rows share says nothing
            made[one.name] = t
    return made if len({len(t) for t in made.values()}) == 1 else None


def _shifted(context: Context, tensors: dict[str, Tensor], joins: dict[str, Join]) -> Finding | None:
    """A tensor whose rows belong to the others a few rows on."""
    moved = {name: join for name, join in joins.items() if join.shift}
    if not moved:
        return None
    least = min(join.shifted for join in moved.values())
    best = [name for name, join in moved.items() if join.shifted <= max(least, 1e-300) ** 0.8]
    inputs = {g.name for g in context.given if g.is_input}
    labels = _labels(context)
    own = [name for name in moved if name in labels]  # all inputs may be off by the reverse
    name = own[0] if own else min(best, key=lambda n: (n in inputs, moved[n].shifted))
    join = moved[name]
    if any(follows(t, join.shift) for n, t in tensors.items()):
        return None  # in the order of time, where one row holds what the next is to be
    rest = [n for n in tensors if n != name]
    where = f"{plural(abs(join.shift), 'row')} {'earlier' if join.shift < 0 else 'later'}"
    return Finding(
        "labels-independent" if name in labels else "pairs-mismatched",
        "warning",
        f"The rows of {name} belong to other samples: to those {where}",
        where="labels" if name in labels else "data",
        evidence=f"of {join.num} samples, those that are alike in {name} are {'no' if join.is_unseen else 'hardly'} "
        f"more alike in {some(rest, SHOWN)} than by chance (p = {join.p_value:.2g}); taken {where} they are "
        f"(p = {join.shifted:.1g})",
        cause="An index is off, or one tensor was rolled, or lost rows at an end, before they were joined.",
        advice="Look at a few samples with all that belongs to them, and join by a key and not by position.",
    )


def _labels(context: Context) -> tuple[str, ...]:
    """What the loss compares outputs with, where it takes nothing else."""
    outside = [g for g in context.given if not g.is_input] if context.given_is_known else []
    named = [g.name for g in context.given if g.is_label and not g.is_input]
    return tuple(named or [g.name for g in outside if len(outside) == 1])


def _unrelated(context: Context, tensors: dict[str, Tensor], joins: dict[str, Join]) -> Finding | None:
    """A tensor that has nothing in common with the others, where it would be seen."""
    rows = context.probes.together_rows
    if rows is None or not {*rows.inputs, *rows.taken} <= tensors.keys() or context.probes.ignores_order:
        return None
    labels = [g.name for g in context.given if g.is_label]
    taken = list(dict.fromkeys((*rows.taken, *labels)))
    names = [n for n in rows.inputs if n not in taken and not _is_mask(tensors[n])]
    inputs = [tensors[n] for n in names]
    if not names or not all(map(_is_described, inputs)):
        return None
    if rows.are_pairs and len(names) == 2:
        one, two = names
        if not (joins[one].is_unseen and joins[two].is_unseen):
            return None
        would_see = _would_see(inputs[1], inputs[:1]) and _would_see(inputs[0], inputs[1:])
        are_views = not would_see and sees_views(*inputs)
        if not would_see and not are_views:
            context.skipped[PAIRS] = "simple tests see nothing that they share, and might not"
            return None
        return _finding(
            "pairs-mismatched",
            f"The rows of {one} and {two} have nothing in common, and the loss takes them as pairs",
            joins[one], one, [two], where="data", are_views=are_views,
        )  # fmt: skip
    if not taken:
        return None
    own = [n for n in taken if n in context.probes.labels]  # each is all that its output is compared with
    if len(taken) > 1 and any(not tensors[n].is_floating_point() for n in taken if n not in (*labels, *own)):
        return None  # choices, of which something came that may be chance as yet
    unseen = taken if all(joins[n].is_unseen for n in taken) else [n for n in own if joins[n].is_unseen]
    if unseen:
        if not all(_would_see(tensors[name], inputs) for name in unseen):
            return None
        what = f"The labels {some(unseen, SHOWN)} do not depend on the inputs, as far as simple tests see"
        return _finding("labels-independent", what, joins[unseen[0]], unseen[0], names, where="labels")
    total = sum(t[0].numel() for t in inputs)
    for name in names:
        t = tensors[name]
        if len(inputs) < 2 or not joins[name].is_unseen or t[0].numel() < MAIN * total:
            continue
        if not _would_see(tensors[taken[0]], inputs, beside=t):
            continue
        rest = [n for n in tensors if n != name]
        what = f"The rows of {name} have nothing in common with the labels, whatever the other inputs are"
        return _finding("labels-independent", what, joins[name], name, rest, where="data")
    return None


def _finding(
    code: str, title: str, join: Join, name: str, rest: list[str], *, where: str, are_views: bool = False
) -> Finding:
    return Finding(
        code,
        "warning",
        title,
        where=where,
        evidence=f"of {join.num} samples, those that are alike in {name} are no more alike in {some(rest, SHOWN)} than "
        f"by chance (p = {join.p_value:.2g} for dependence); "
        + (
            f"with views made up of each, {NOISE:.0%} of their variance noise, they would be"
            if are_views
            else "of labels made up of these inputs, a quarter to three quarters of them noise, at least "
            f"{POWER:.0%} would be seen"
        ),
        cause="They were shuffled apart, or joined by the wrong index.",
        advice="Look at a few samples with all that belongs to them, and join by a key and not by position. Relations "
        "of three or more inputs at once (parity), and very weak ones, also look like this.",
    )


def _would_see(label: Tensor, inputs: list[Tensor], *, beside: Tensor | None = None) -> bool:
    """Whether nearly all labels that are made up of these inputs are seen; for sequences of labels, linear ones."""
    found = power(label, inputs, beside=beside)
    return found is not None and (found[0] if is_sequence(label) else min(found)) >= POWER


def _is_mask(t: Tensor) -> bool:
    """Whether a tensor marks places, and says nothing of what is there."""
    return t.ndim > 1 and not t.is_floating_point() and bool(((t == 0) | (t == 1)).all())


def _is_described(t: Tensor) -> bool:
    """Whether simple features say what an input is: not of long sequences of few codes."""
    return t.is_floating_point() or t[0].numel() <= FEW_COLUMNS or len(t.unique()) >= CODES


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (same, copied, joined)
