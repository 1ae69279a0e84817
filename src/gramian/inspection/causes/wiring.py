"""Causes in the wiring: parameters that no gradient reaches or that are shared, and gradients that are lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gramian.errors import some
from gramian.inspection.across_depth import ADAMW_EPS
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.causes.precision import gradient_overflow
from gramian.inspection.causes.routers import idle_experts
from gramian.report import Finding

__all__ = ["RULES"]

# Share of the values that are not used from which on that is a warning.
UNUSED = 0.1

# Share of the gradients that are not finite from which on a finding is about all layers.
MOST = 1 / 3


def unreached(context: Context) -> Iterator[Finding]:
    """Find parameters that are never used, and those that were used and get no gradient. Exact."""
    seen = context.observed
    missing = [n for n, grad in seen.gradients.items() if grad is None]
    if not missing:
        return
    unused = [n for n in missing if n not in seen.used]
    cut = [n for n in missing if n in seen.used]
    if not seen.needs_gradient and not cut and not any(n in seen.used for n in context.frozen):
        cut, unused = missing, []
    last = max((seen.used.get(n, 0) for n in cut), default=0)
    ends = [c for c in seen.cuts if c.behind & set(cut)]
    where = next((c for c in ends if c.order >= last), ends[-1] if ends else None)
    if where is None and seen.needs_gradient:  # computed, and the loss does not use the result
        linked = context.probes.unlinked  # by a list, NumPy or a new tensor, which no operation shows
        cut, unused = [n for n in missing if n in linked], [n for n in missing if n not in linked]
    if cut:
        owner = context.module_of(max(cut, key=lambda n: seen.used.get(n, 0)))
        place = ", ".join(dict.fromkeys(n for n in ((where.name if where else ""), owner) if n)) or "loss"
        everything = len(cut) == len(seen.gradients)
        yield Finding(
            "graph-cut",
            "error",
            "No gradient arrives at any layer"
            if everything
            else f"{_parameters(len(cut))} no gradient: the graph is cut",
            where=place,
            evidence=f"{some(cut, SHOWN)}: used in the forward pass, and not reached from the loss (exact)"
            + ("; with other values of theirs the loss changes" if where is None and context.probes.unlinked else "")
            + (
                f"; {where.function} in {context.told(where.name)} returns a result without a gradient" if where else ""
            ),
            cause="A .detach(), .item(), .tolist(), .data, argmax, torch.tensor(…) or torch.no_grad() stands between "
            "these layers and the loss.",
            advice="Remove it, or freeze these parameters with requires_grad_(False) if it is meant.",
        )
    idle = [f"{name}." for one in idle_experts(context) for name in one.names]
    unused = [n for n in unused if not n.startswith(tuple(idle))]  # which the router's finding is about
    if unused:
        modules = list(dict.fromkeys(context.module_of(n) or n for n in unused))
        share = sum(context.parameters[n].numel() for n in unused) / sum(p.numel() for p in context.parameters.values())
        left = context.probes.idle_targets
        is_odd = bool(left) or any(context.has_used_twin(m) or _is_stood_in_for(context, m) for m in modules)
        yield Finding(
            "parameter-unused",
            "warning" if share > UNUSED or is_odd else "info",
            f"The loss does not depend on {len(unused)} of {len(seen.gradients)} parameters",
            where=some(modules, SHOWN),
            evidence=f"{some(unused, SHOWN)}: no result of theirs reaches the loss in {len(seen.batches)} batches "
            f"(exact); {share:.1%} of all values"
            + (f"; nor does the loss depend on {some(left)} (exact)" if left else ""),
            cause="A term of the loss is missing, which would compare their result with that."
            if left
            else "The layer was built and is not called, its result is dropped, or it serves other inputs.",
            advice="Use it in forward, or remove it.",
        )


def _is_stood_in_for(context: Context, name: str) -> bool:
    """Whether a module is not called, and another of its class and shapes twice or more, as by a name that is wrong."""
    if name in context.observed.called or not name:
        return False
    own = context.modules.get(name)
    counts = Counter(call.name for call in context.observed.calls)
    return own is not None and any(
        counts[other] > 1 and type(module) is type(own) and _shapes(module) == _shapes(own)
        for other, module in context.modules.items()
        if other.rpartition(".")[0] == name.rpartition(".")[0] and other != name
    )


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [p.shape for p in module.parameters()]


def drawn(context: Context) -> Iterator[Finding]:
    """Find numbers drawn without a gradient that go on through the network, where no score function is used. Exact."""
    draw = next((d for d in context.observed.draws if d.passed_to and not d.is_scored), None)
    if draw is None:
        return
    yield Finding(
        "graph-cut",
        "error",
        f"What {context.told(draw.passed_to)} is given is drawn without a gradient",
        where=", ".join(dict.fromkeys(n for n in (draw.name, draw.passed_to) if n)),
        evidence=f"{draw.function} under torch.no_grad takes values that have a gradient, and its result, which has "
        f"none, goes into {context.told(draw.passed_to)} (exact)",
        cause="Distribution.sample() draws without a gradient: what makes its mean and deviation does not learn from "
        "what follows.",
        advice="Use rsample(), or mean + deviation * torch.randn_like(mean); or add log_prob of the sample times what "
        "it led to.",
        source="Kingma & Welling 1312.6114, §2.4",
    )


def shared(context: Context) -> Iterator[Finding]:
    """Find modules that stand in the network under several names. Exact."""
    by_module: dict[int, list[str]] = {}
    for name, module in context.model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters()):
            by_module.setdefault(id(module), []).append(name)
    repeated = [names for names in by_module.values() if len(names) > 1]
    outer = [names for names in repeated if not any(_inside(names, other) for other in repeated)]
    outer = [names for names in outer if not _is_tied(context, names)]
    if outer:
        names = outer[0]
        yield Finding(
            "parameter-shared",
            "warning",
            f"Modules {' and '.join(map(repr, names[:3]))} are one",
            where=some(names, SHOWN),
            evidence=f"{len(names)} names of one object (exact)",
            cause="The list was built from one instance ([layer] * n), so that all places have the same weights.",
            advice="Build a new module for each place, unless sharing is meant.",
        )


def numbers(context: Context) -> Iterator[Finding]:
    """Find gradients that are lost between a finite loss and the parameters, by their dtype's range. Exact."""
    seen = context.observed
    sizes = [g for g in seen.gradients.values() if g is not None]
    if not sizes or not math.isfinite(seen.loss) or any(not c.output.is_finite for c in seen.calls):
        return
    bad = [n for n, g in seen.gradients.items() if g is not None and not math.isfinite(g)]
    if bad:
        told = f"{len(bad)} of {len(sizes)} gradients are NaN or infinite (exact); the loss is {seen.loss:.3g}"
        yield gradient_overflow(bad, len(sizes), told, seen.first_infinite_derivative, is_narrow=seen.is_narrow)
    elif seen.loss > 0 and seen.first_loss != 0.0 and _is_zero_behind_head(context):
        yield Finding(
            "gradient-underflow",
            "error",
            "The gradient of nearly every parameter is exactly zero",
            where="loss",
            evidence=f"{sum(g == 0 for g in sizes)} of {len(sizes)} are zero (exact); the loss is {seen.loss:.3g}",
            cause="The loss is flat, or its gradient is below the smallest number of a dtype on its way, 6e-8 for "
            "float16."
            if seen.is_narrow
            else "The loss is flat where the network is: its outputs are at an end of their range, or do not depend on "
            "the weights.",
            advice="Scale the loss (torch.amp.GradScaler), or use bfloat16."
            if seen.is_narrow
            else "Look at the last function of the network, and at what the loss is given.",
        )


def flat(context: Context) -> Iterator[Finding]:
    """Find losses whose slope is below AdamW's ε, with outputs as they are and with others. Measured."""
    slope = context.probes.slope
    if slope is None or not 0 < slope < ADAMW_EPS or context.observed.first_loss == 0.0:
        return
    yield Finding(
        "gradient-underflow",
        "error",
        f"The slope of the loss is {slope:.1g} in all, wherever the outputs are",
        where="loss",
        evidence=f"the sum of its gradients by all outputs of 16 samples, as they are and drawn at random, is at most "
        f"{slope:.2g}; AdamW divides by √v + 1e-8 (measured)",
        cause="A product of many probabilities, or the exponential of a large negative number, is small beyond what "
        "steps or a dtype can show.",
        advice="Add up logarithms in place of multiplying: log_softmax, logsumexp, or "
        "binary_cross_entropy_with_logits.",
    )


def stopped(context: Context) -> Iterator[Finding]:
    """Find operations that let nothing of a gradient pass, where parameters have one of exact zeros. Exact."""
    found = context.observed.stopped
    zero = [n for n, g in context.observed.gradients.items() if g == 0.0]
    if found is None or not zero or context.has_learned:
        return
    place, operation = found
    yield Finding(
        "gradient-stopped",
        "error",
        f"No gradient passes {operation} in {'the loss' if place == 'loss' else context.told(place)}",
        where=place or "all layers",
        evidence=f"it gets a gradient and gives one of exact zeros; that of {some(zero, SHOWN)} is zero (exact)",
        cause="The function is flat: a rounding or a sign has steps, and a clamp ends, at which all values are."
        if operation not in ("normal", "bernoulli")
        else "What is drawn has no derivative by the numbers it is drawn with.",
        advice="Let the gradient pass a rounding straight through, x + (round(x) - x).detach(); remove a clamp, or "
        "widen it; draw with mean + deviation * torch.randn_like(mean).",
    )


def canceled(context: Context) -> Iterator[Finding]:
    """Find differences and quotients in the loss whose two sides are one function of the parameters. Measured."""
    seen = context.observed
    if not seen.canceled:
        return
    zero = [n for n, g in seen.gradients.items() if g == 0.0]
    constant = "1" if seen.canceled == "quotient" else "0"
    yield Finding(
        "gradient-stopped",
        "error" if zero else "warning",
        f"Nothing is learned from a {seen.canceled} in the loss: its sides are the same, and their gradients cancel",
        where=", ".join(("loss", *dict.fromkeys(map(context.module_of, zero[:SHOWN])))),
        evidence=f"it is {constant} for all samples, both sides have a gradient, and by all parameters together no "
        "gradient is left of them" + (f"; that of {some(zero, SHOWN)} is zero (exact)" if zero else " (exact)"),
        cause="One side is to stay as it was, and was made by the same weights with a gradient: the log-probabilities "
        "of the policy that acted, a teacher's output, another view of the same samples.",
        advice="Detach that side: keep it from when the actions were drawn, or compute it under torch.no_grad(). A "
        "ratio exp(logp − logp.detach()) is 1 too, and has a gradient.",
        source="Schulman et al. 1707.06347, equation 6",
    )


def _is_zero_behind_head(context: Context) -> bool:
    """Whether all matrices but the head get a gradient of exact zeros, and no zero matrix explains that."""
    zero = context.observed.zero_gradients
    hidden = [b.name for b, w in context.values() if b.role != "head" and b.name in zero]
    return (
        bool(hidden)
        and not context.has_zero_gates
        and all(zero[n] == 1.0 for n in hidden)
        and all(bool(w.any()) for _, w in context.values())
    )


def unregistered(context: Context) -> Iterator[Finding]:
    """Find parameters that are used in the model and are not among its own. Exact."""
    strangers = list(context.observed.strangers.values())
    if strangers:
        places = list(dict.fromkeys(name for name, _ in strangers))
        yield Finding(
            "parameter-unregistered",
            "error",
            f"{len(strangers)} parameters that the forward pass uses are not the model's",
            where=some([n for n in places if n], SHOWN) or "all layers",
            evidence=f"not in model.parameters(): shapes {', '.join(str(s) for _, s in strangers[:SHOWN])} (exact)",
            cause="Layers in a Python list or dict, or built in forward, or tensors with requires_grad that are no "
            "nn.Parameter: no optimizer gets them, nor a state dict.",
            advice="Use nn.ModuleList, nn.ModuleDict or nn.ParameterList, make layers in __init__, and wrap a tensor "
            "in nn.Parameter.",
        )


def _is_tied(context: Context, names: list[str]) -> bool:
    module = context.model.get_submodule(names[0])
    return "Embedding" in type(module).__name__


def _inside(names: list[str], other: list[str]) -> bool:
    return names is not other and any(name.startswith(o + ".") for name in names for o in other)


def _parameters(count: int, *, verb: str = "get", single: str = "gets") -> str:
    return f"1 parameter {single}" if count == 1 else f"{count} parameters {verb}"


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    numbers, flat, canceled, stopped, unreached, drawn, unregistered, shared,
)  # fmt: skip
