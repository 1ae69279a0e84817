"""Causes in the head: scores with an offset, and scores between ends that are too near."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.causes.context import Context
from gramian.report import Finding

__all__ = ["RULES"]

# An offset of the scores that all samples share: told where its spread over the classes is this large, this many times
# the samples' own, and the loss is this far above guessing.
SPREAD, SHARED, ABOVE = 8.0, 3.0, 3.0
# The lowest loss that bounded scores can reach, as a share of ln(classes): told from here on, and as an error from
# there.
FLOOR, MOSTLY = 0.2, 0.5
# Times that a learned scale has to grow, from which on it is told.
FAR = 20.0
# Scale of cosines above which softmax looks at the largest alone; CLIP bounds its own at 100.
SHARPEST = 300.0

# Why scores are large and alike though the head's bias is not, and what to do.
ALIKE = "What the head is given is large and nearly the same for all samples."
NORMALIZE = (
    "Normalize the features before the head, and look for what makes them alike: sums over many neighbors or "
    "positions, an offset of the inputs or of the layers before it."
)


def offset(context: Context) -> Iterator[Finding]:
    """Find scores that prefer a class by an amount beside which the samples do not count."""
    logits = context.observed.logits
    if logits is None or len(logits) < 2 or not bool(logits.isfinite().all()):
        return
    mean, own = logits.mean(0), float(logits.std(0).mean())
    shared, guessing = float(mean.std()), math.log(max(2, logits.shape[-1]))
    if not (_is_shared(shared, own) and context.observed.first_loss > guessing + ABOVE):
        return
    module, bias = _last_bias(context, logits.shape[-1])
    by_inputs = shared if bias is None else float((mean - bias).std())
    title = f"All samples get class {int(mean.argmax())}: the scores have a large offset"
    evidence = (
        f"over the classes the mean scores differ by {shared:.3g}, those of a class between samples by {own:.2g}; "
        f"loss {context.observed.first_loss:.3g}, and {guessing:.3g} by guessing; without the head's bias the mean "
        f"scores differ by {by_inputs:.3g}"
    )
    if _is_shared(by_inputs, own):
        yield Finding(
            "head-input-offset",
            "error",
            title,
            where=module or "loss",
            evidence=evidence,
            cause=ALIKE,
            advice=NORMALIZE,
        )
    else:
        yield Finding(
            "head-offset",
            "error",
            title,
            where=module or "loss",
            evidence=evidence,
            cause="The head's bias is large.",
            advice=f"Set the bias to zero: torch.nn.init.zeros_ of {module}.bias.",
        )


def offset_of_binary(context: Context) -> Iterator[Finding]:
    """Find scores of yes or no that say the same for all samples, by an amount beside which these do not count."""
    seen = context.observed
    found = context.criterion("binary_cross_entropy_with_logits")
    if found is None or found.given.ndim < 1 or found.given.shape != found.target.shape or len(found.given) < 2:
        return
    scores, target = found.given.double(), found.target.double()
    if not bool(scores.isfinite().all()) or not bool(((target >= 0) & (target <= 1)).all()):
        return
    channels = scores.shape[1] if scores.ndim > 1 else 1
    scores, target = (t.transpose(0, 1).flatten(1) if t.ndim > 1 else t[None] for t in (scores, target))
    mean, own = scores.mean(1), float(scores.std(1).mean())
    rates = target.mean(1)
    rates = torch.where((rates > 0) & (rates < 1), rates, target.mean())  # no positive of a rare class in this batch
    if not 0 < float(target.mean()) < 1:
        return  # a generator's, say, which is to change what all of its samples get
    guessing = float(-(rates * rates.log() + (1 - rates) * (1 - rates).log()).mean())
    loss = float(F.binary_cross_entropy_with_logits(scores, target))
    wrong = (mean - rates.logit()).abs()  # the scores of guessing are the log-odds of the rates
    if not (_is_shared(float(wrong.amax()), own) and loss > guessing + ABOVE):
        return
    worst = int(wrong.argmax())
    biases = [n for n, p in context.parameters.items() if n.endswith("bias") and p.shape == (channels,)]
    biases = [n for n in biases if float((mean - context.parameters[n].detach().double().cpu()).abs().amax()) < ABOVE]
    module = context.module_of(biases[-1]) if biases else ""
    if not module and (seen.output is None or seen.output.data_ptr() != found.given.data_ptr()):
        return  # scores of another network
    last, bias = _last_bias(context, channels)
    by_inputs = 0.0 if bias is None or module else float((mean - bias.double().cpu() - rates.logit()).abs().amax())
    is_given = _is_shared(by_inputs, own)
    yield Finding(
        "head-input-offset" if is_given else "head-offset",
        "error",
        f"All samples get {'yes' if float(mean[worst]) > 0 else 'no'}: the scores have a large offset",
        where=(last if is_given else module) or "loss",
        evidence=f"the mean score is {float(mean[worst]):.3g}, and {float(rates[worst].logit()):.3g} by the rate of "
        f"the targets; between samples scores differ by {own:.2g}; loss {loss:.3g}, and {guessing:.3g} by guessing"
        + (f"; without the head's bias it is {float(mean[worst] - _at(bias, worst)):.3g}" if is_given else ""),
        cause=ALIKE
        if is_given
        else "The head's bias is large, or has the wrong sign."
        if module
        else "What the head is given is large and nearly the same for all samples, or its bias is.",
        advice=NORMALIZE
        if is_given
        else "Set the bias to the log-odds of the targets' rate, or to zero"
        + (f": torch.nn.init.zeros_ of {module}.bias." if module else "."),
    )


def bounded_scores(context: Context) -> Iterator[Finding]:
    """Find a cross-entropy of cosines without a temperature, which cannot become small. Exact."""
    cosines = context.observed.cosines
    if cosines is None or cosines.num_classes < 2:
        return
    classes, scale = cosines.num_classes, cosines.scale
    if scale > SHARPEST:
        yield Finding(
            "loss-bounded-scores",
            "warning",
            f"The scores are cosines times {scale:g}: differences of a hundredth decide",
            where=", ".join(filter(None, ("loss", cosines.learned))),
            evidence=f"both factors of the scores have length one (exact), and a difference of 0.01 between two "
            f"cosines changes the odds by e^{scale / 100:g}",
            cause="The temperature is so small that softmax looks at the largest score alone: the loss is the "
            "difference of two scores, gradients are as many times larger, and pairs that are not the hardest teach "
            "nothing.",
            advice="Start the learned scale at 14, as exp of a parameter at ln 14, and clamp it at 100 (CLIP)."
            if cosines.learned
            else "Use a temperature of 0.05 to 0.1, or a learned one whose scale is at most 100 (CLIP).",
            source="Radford et al. 2103.00020, §2.5",
        )
        return
    balanced = math.log1p((classes - 1) * math.exp(-scale * classes / (classes - 1)))
    lowest, guessing = math.log1p((classes - 1) * math.exp(-2 * scale)), math.log(classes)
    # With this scale, a cosine of 1 against others of 0 has a hundredth of the loss of guessing.
    wanted = math.log((classes - 1) / math.expm1(guessing / 100))
    if lowest < FLOOR * guessing or (cosines.learned and scale * FAR > wanted):
        return
    yield Finding(
        "loss-bounded-scores",
        "error" if lowest > MOSTLY * guessing and not cosines.learned else "warning",
        f"The scores are cosines times {scale:g}, by a learned scale that has to grow {wanted / scale:.0f} times"
        if cosines.learned
        else f"The scores are cosines, between {-scale:g} and {scale:g}: the loss cannot fall below {lowest:.3g}",
        where=", ".join(filter(None, ("loss", cosines.learned))),
        evidence=f"both factors of the scores have length one (exact); with {classes:,} classes the lowest loss is "
        f"ln(1 + {classes - 1:,} e^(−{2 * scale:g})) = {lowest:.3g}, {lowest / guessing:.0%} of guessing's "
        f"{guessing:.3g}",
        cause="The learned scale starts so small that it has to grow many times before the loss can fall; a step of "
        "Adam moves its logarithm by the rate."
        if cosines.learned
        else "Features and class vectors are normalized, and no temperature widens the range of their products. With "
        f"as many samples of each class the loss stays above {balanced:.3g}.",
        advice=f"Multiply the scores by a scale: {max(10.0, math.ceil(wanted)):g} or more here, or a learned one that "
        "starts there, such as exp of a parameter at ln 14 (CLIP); dividing by a temperature of 0.1 is a scale of 10.",
        source="Wang et al. 1704.06369, proposition 2",
    )


def _at(bias: Tensor | None, i: int) -> float:
    return 0.0 if bias is None else float(bias[i])


def _is_shared(shared: float, own: float) -> bool:
    return shared > SPREAD and shared > SHARED * own


def _last_bias(context: Context, num_classes: int) -> tuple[str, Tensor | None]:
    """The module of the last parameter that the forward pass used, and its bias where it has one for each class."""
    used = context.observed.used
    module = context.module_of(max(used, key=lambda name: used[name])) if used else ""
    bias = context.parameters.get(f"{module}.bias" if module else "bias")
    is_one = bias is not None and bias.shape == (num_classes,)
    return module, bias.detach().float() if is_one and bias is not None else None


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (offset, offset_of_binary, bounded_scores)
