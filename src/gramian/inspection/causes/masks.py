"""Causes in what attention may see: masks that show padding, or nothing, or the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gramian.batch import main_input
from gramian.errors import GramianError, some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.passes.attention import NUM_SAMPLES
from gramian.inspection.passes.padding import padding_of, zero_ends
from gramian.inspection.passes.records import Visible
from gramian.report import Finding, Severity
from gramian.report.model import plural

__all__ = ["RULES"]

# Share of the queries at tokens that see nothing but padding from which on the mask counts as inverted.
INVERTED = 0.9
# Positions from which on a triangle is told from other masks.
LEAST = 3

_MEANING = (
    "torch's key_padding_mask is true where a key is hidden, and a bool attn_mask of scaled_dot_product_attention is "
    "true where it is seen."
)


def masks(context: Context) -> Iterator[Finding]:
    """Find masks that show only padding, that hide each position from itself, or all of a sample. Exact."""
    try:
        x = main_input(context.observed.batches[0])
    except (GramianError, IndexError):
        return
    padding = padding_of(context.model, context.observed.batches[0], x)
    padding = zero_ends(x) if padding is None else padding
    inverted, strict, blind = [], [], {}
    for one in context.observed.visible:
        seen = _by_sample(one, len(x))
        if seen is None:
            continue
        queries, keys = seen.shape[1:]
        if padding is not None and keys == padding.shape[1] and _shows_padding(seen, padding[: len(seen)]):
            inverted.append(one.name)
        elif queries == keys >= LEAST and torch.equal(seen.any(0), torch.ones_like(seen[0]).tril(-1)):
            strict.append(one.name)
        elif x.ndim > 1 and queries == x.shape[1] and (share := float((~seen.any(-1)).all(-1).float().mean())):
            blind[one.name] = share
    lost = [one.name for one in context.observed.visible if one.is_lost]
    if lost and not inverted and context.is_not_finite:
        yield _masked(
            context,
            lost,
            "error",
            "hides every key of some queries",
            "some rows of scores are −∞ everywhere, and the loss or a gradient is not finite (exact)",
            "A softmax over a row of −∞ is NaN, and so is every gradient that it has a part in, also where the loss "
            "leaves these queries out: a mask of padding over the queries in place of the keys, or a sample that is "
            "all padding.",
        )
    elif inverted:
        yield _masked(
            context,
            inverted,
            "error",
            "shows the padding and hides the tokens",
            "at tokens, no query sees a token, and some see padding (exact)",
            f"The mask is inverted: {_MEANING}",
        )
    elif strict:
        yield _masked(
            context,
            strict,
            "warning",
            "hides each position from itself",
            "a query sees the keys before its own position and not that; the first sees none (exact)",
            "A causal mask that is off by one: the diagonal is to be seen. A softmax over no key is NaN, or, where a "
            "large number stands for −∞, equal weights for all keys, also those behind.",
        )
    elif blind:
        yield _masked(
            context,
            list(blind),
            "warning",
            "hides all keys of some samples",
            f"{max(blind.values()):.1%} of the samples have no key that is seen (exact)",
            "Samples that are empty or all padding, or a mask of another batch. A softmax over no key is NaN or equal "
            "weights for all.",
        )


def _masked(context: Context, names: list[str], severity: Severity, does: str, evidence: str, cause: str) -> Finding:
    places = list(dict.fromkeys(n for n in names if n))
    return Finding(
        "attention-masked",
        severity,
        f"The mask of {context.told(places[0] if places else '')} {does}",
        where=some(places, SHOWN) or "all layers",
        evidence=evidence,
        cause=cause,
        advice="Correct the mask.",
    )


def over_queries(context: Context) -> Iterator[Finding]:
    """Find attention with a softmax over the queries in place of the keys. Exact."""
    found = context.observed.over_queries
    if not found:
        return
    name, shape = next(iter(found.items()))
    if shape[-2] == 1:
        yield Finding(
            "softmax-single-value",
            "error",
            f"The softmax of the attention in {context.told(name)} is over its one query, so that all weights are 1",
            where=", ".join(found) if name else "all layers",
            evidence=f"the weights {shape} have one entry along the dimension of the softmax, {len(shape) - 2}, and "
            f"{shape[-1]} along the one that is multiplied by the values (exact)",
            cause="The values are added up whatever the query is, and no gradient passes to queries and keys.",
            advice="Use softmax(dim=-1) of scores (…, queries, keys).",
        )
        return
    more = f"; so in {plural(len(found) - 1, 'other module')}" if len(found) > 1 else ""
    yield Finding(
        "attention-over-queries",
        "error",
        f"The softmax of the attention in {context.told(name)} is over the queries, and not over the keys",
        where=", ".join(found) if name else "all layers",
        evidence=f"of the weights {shape}, dimension {len(shape) - 2} sums to one, and the last is multiplied by the "
        f"values{more} (exact)",
        cause="What a query gets is no mean of the values: queries compete for keys, and in a decoder each depends on "
        "those behind it.",
        advice="Use softmax(dim=-1) of scores (…, queries, keys).",
    )


def leak(context: Context) -> Iterator[Finding]:
    """Find outputs that see the target that they are to predict."""
    found = context.leak
    if found is not None and not found.is_hidden:
        yield Finding(
            "target-leak",
            "error",
            f"The tokens that are to be restored stand in {found.source}",
            where="data",
            evidence="at the positions that count in the loss, the targets are the inputs (exact); the outputs depend "
            "on them",
            cause="Of a masked language model, the tokens that are its targets are hidden: here they are not, and it "
            "learns to copy.",
            advice="Put the mask's token, or a random one, in place of the tokens that are the targets.",
        )
    elif found is not None and found.source:
        yield Finding(
            "target-leak",
            "error",
            f"The model is given its targets: {found.source}"
            + (", not shifted" if found.is_copy else " at the positions that it predicts"),
            where="data" if found.is_copy else "all layers",
            evidence="the targets of the loss are inputs at the same positions (exact); with "
            f"others from position {found.position + 2} on, the outputs up to it change by {found.share:.2g} of the "
            "change behind it",
            cause="The output for a position sees the token that it is to predict, and learns to copy it."
            if found.is_copy
            else "Attention without a causal mask, or a recurrence in both directions: the output for a position sees "
            "the token that it is to predict.",
            advice="Shift by one: give the tokens before, and compare with those behind: tokens[:, :-1] and "
            "tokens[:, 1:]. For a decoder, put a start token in front and drop the last one."
            if found.is_copy
            else "Let position t of the decoder see the positions up to t: is_causal=True.",
        )
    elif found is not None:
        yield Finding(
            "target-leak",
            "error",
            "The output for a position sees the input behind it, which is its target",
            where=", ".join(n for n in (found.before, found.name) if n) or "all layers",
            evidence=f"with other inputs behind position {found.position + 1}, the outputs up to it change by "
            f"{found.share:.2g} of the change behind it; the first that does is that of "
            f"{context.told(found.name)}",
            cause="Attention without a causal mask, with an inverted one, or one that is off by one; a norm, a mean, a "
            "convolution or a recurrence that runs over the positions in both directions. The loss falls fast, and "
            "nothing is learned.",
            advice="Let position t see the positions up to t: is_causal=True, or torch.ones(T, T).tril() where true "
            "means seen.",
        )


def _by_sample(one: Visible, num: int) -> Tensor | None:
    """What some head sees (samples, T, S); `None` where rows are neither samples nor samples times heads."""
    heads = 1 if one.rows in (num, min(num, NUM_SAMPLES)) else one.rows // num
    if not heads or one.rows % heads or (heads > 1 and one.rows != heads * num):
        return None
    samples = len(one.seen) // heads
    return one.seen[: samples * heads].unflatten(0, (samples, heads)).any(1) if samples else None


def _shows_padding(seen: Tensor, padding: Tensor) -> bool:
    """Whether queries see padding only, in samples that have tokens and padding."""
    padding = padding.to(seen.device)
    queries = ~padding if seen.shape[1] == seen.shape[2] else torch.ones_like(seen[..., 0])
    queries = queries & (padding.any(-1) & ~padding.all(-1))[:, None]
    only = (seen & padding[:, None]).any(-1) & ~(seen & ~padding[:, None]).any(-1)
    return bool(queries.any()) and float(only[queries].float().mean()) > INVERTED


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (over_queries, masks, leak)
