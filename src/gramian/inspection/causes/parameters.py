"""Causes in parameters: values that cannot learn, a scale unlike the others, and parameters that the loss does not reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from gramian.block import Block
from gramian.inspection.causes.context import Context, listed
from gramian.report import Action, Finding

__all__ = ["RULES"]

ISOMETRIC = Action("isometric_")

# σ = rms(W) √fan_in is 0.58 for torch's layers and up to 1.7 for other initializations. A layer is told when it leaves
# this range and differs from the median of the others by more than this ratio. Heuristics.
SMALLEST, LARGEST, RATIO = 0.1, 5.0, 6.0

# Where all layers leave this range and no norm restores the scale, all are told.
ALL_SMALL, ALL_LARGE = 0.25, 3.0

# Root mean square of an embedding's rows: torch draws 1, transformers 0.02.
EMBEDDING = 8.0

# ‖W‖_F² / σ₁² of a matrix that counts as one direction; smaller matrices than this side are not judged.
ONE, SIDE = 1.02, 4

# A frozen part of up to this share is told; a larger one is a fine-tune of a few layers.
FROZEN = 0.5


def non_finite(context: Context) -> Iterator[Finding]:
    """Find parameters that are not finite. Exact."""
    bad = [n for n, p in context.parameters.items() if p.is_floating_point() and not bool(p.detach().isfinite().all())]
    if bad:
        yield Finding(
            "non-finite-weights",
            "error",
            f"{_parameters(len(bad))} NaN or infinite values",
            where=listed(bad),
            evidence=f"{len(bad)} of {len(context.parameters)} parameters hold values that are not finite (exact)",
            cause="Training diverged, or the file was damaged, before these weights were saved.",
            advice="Go back to an earlier checkpoint, and continue with a lower learning rate or clipped gradients.",
        )


def degenerate(context: Context) -> Iterator[Finding]:
    """Find matrices that are zero, constant or of rank one, and through which the output loses the input. Exact."""
    blocked = _is_constant_output(context)
    zero, constant, single = [], [], []
    for block, w in context.values():
        if not bool(w.isfinite().all()) or w.numel() < 2 or "lora_" in block.name:
            continue
        if not bool(w.any()):
            if block.role != "head" and blocked:
                zero.append(block.name)
        elif block.role != "embedding" and bool((w == w.flatten()[0]).all()):
            constant.append(block.name)
        elif block.role != "embedding" and _is_rank_one(block.matrices(w)):
            single.append(block.name)
    if zero:
        yield Finding(
            "zero-weights",
            "error",
            f"{listed(zero)} {'is' if len(zero) == 1 else 'are'} zero, and the output does not depend on the input",
            where=listed(zero),
            evidence="every entry is zero, and all samples get the same output (exact)",
            cause="The layer was never initialized or never loaded. Layers behind it see a constant; those before it "
            "get no gradient.",
            action=ISOMETRIC,
        )
    for code, names, what, evidence in (
        ("parameter-constant", constant, "the same number in all entries", "all entries are equal (exact)"),
        ("parameter-rank-one", single, "rank one", f"‖W‖_F² < {ONE} σ₁²"),
    ):
        if names:
            yield Finding(
                code,
                "error",
                f"{listed(names)} {'has' if len(names) == 1 else 'have'} {what}",
                where=listed(names),
                evidence=evidence,
                cause="All units of the layer compute the same function, get the same gradient, and stay equal."
                if code == "parameter-constant"
                else "All that passes the layer is one number for each sample.",
                action=ISOMETRIC,
            )


def scale(context: Context) -> Iterator[Finding]:
    """Find layers whose weights are far from the size that keeps a signal, and from that of the other layers."""
    sized: list[tuple[Block, float]] = []
    for block, w in context.values():
        if block.role == "embedding" or not bool(w.isfinite().all()) or not bool(w.any()) or "lora_" in block.name:
            continue
        sized.append((block, float(w.float().square().mean().sqrt()) * math.sqrt(block.shape[-1])))
    for block, w in context.values():
        rms = float(w.float().square().mean().sqrt())
        if block.role == "embedding" and not context.is_normed(block) and math.isfinite(rms) and rms > EMBEDDING:
            yield Finding(
                "embedding-scale",
                "error",
                f"The embedding {block.name} has rows of size {rms:.3g} a component",
                where=block.name,
                evidence=f"root mean square {rms:.3g}; usual are 0.02 to 1",
                cause="What is added to it (positions, branches) is lost beside it, and its gradient is small for its size.",
                advice=f"Initialize it smaller: torch.nn.init.normal_(weight, std=0.02), not {rms:.2g}.",
            )
    if not sized:
        return
    hidden = [s for b, s in sized if b.role == "hidden"] or [s for _, s in sized]
    middle = median(hidden)
    odd = [
        (b, s)
        for b, s in sized
        if len(sized) >= 3 and not SMALLEST < s < LARGEST and abs(math.log(s / middle)) > math.log(RATIO)
        and not (s < 1 and b.role == "head")
    ]  # fmt: skip
    told = [(b, s) for b, s in odd if not context.is_normed(b)]
    for block, s in told[:1] if len(told) < 3 else []:
        small = s < 1
        head = block.role == "head"
        yield Finding(
            "head-scale" if head and not small else f"parameter-scale-{'small' if small else 'large'}",
            "error",
            f"{block.name} multiplies the signal by about {s:.2g}",
            where=listed([b.name for b, _ in told]),
            evidence=f"root mean square of the weights × √fan_in = {s:.3g}; median of the other layers {middle:.3g}",
            cause="The layer was initialized with another fan or a wrong factor"
            + ("; its outputs are lost beside biases and rounding." if small else ", and saturates what follows."),
            action=ISOMETRIC,
        )
    normed = any(context.is_normed(b) for b, _ in sized)
    if not told and len(hidden) >= 2 and not normed and not context.observed.additions:
        small = all(s < ALL_SMALL for s in hidden)
        if small or all(s > ALL_LARGE for s in hidden):
            yield Finding(
                f"gain-{'below' if small else 'above'}-one",
                "error",
                f"Every layer multiplies the signal by about {middle:.2g}",
                where="all layers",
                evidence=f"root mean square of the weights × √fan_in between {min(hidden):.2g} and {max(hidden):.2g}; "
                "about 1 keeps a signal",
                cause="The weights were drawn with another variance than 1/fan_in to 2/fan_in.",
                action=ISOMETRIC,
                source="He et al. 1502.01852, eq. 10",
            )


def unreached(context: Context) -> Iterator[Finding]:
    """Find parameters that are never used, and those that were used and get no gradient. Exact."""
    seen = context.observed
    missing = [n for n, grad in seen.gradients.items() if grad is None]
    if not missing:
        return
    unused = [n for n in missing if n not in seen.used]
    cut = [n for n in missing if n in seen.used]
    if not seen.needs_gradient and not cut:
        cut, unused = missing, []
    if cut:
        last = max(seen.used.get(n, 0) for n in cut)
        where = next((c for c in seen.cuts if c.order >= last), seen.cuts[-1] if seen.cuts else None)
        owner = context.module_of(max(cut, key=lambda n: seen.used.get(n, 0)))
        place = ", ".join(dict.fromkeys(n for n in ((where.name if where else ""), owner) if n)) or "loss"
        everything = len(cut) == len(seen.gradients)
        yield Finding(
            "graph-cut",
            "error",
            "No gradient arrives at any layer" if everything else f"{_parameters(len(cut))} no gradient: the graph is cut",
            where=place,
            evidence=f"{listed(cut)}: used in the forward pass, and not reached from the loss (exact)"
            + (f"; {where.function} in {where.name or 'the model'} returns a result without a gradient" if where else ""),
            cause="A .detach(), .item(), .data, argmax or torch.no_grad() stands between these layers and the loss.",
            advice="Remove it, or freeze these parameters with requires_grad_(False) if it is meant.",
        )
    if unused:
        modules = list(dict.fromkeys(context.module_of(n) for n in unused))
        yield Finding(
            "parameter-unused",
            "warning",
            f"{_parameters(len(unused), verb='are', single='is')} not used in the forward pass",
            where=listed([m or n for m, n in zip(modules, unused, strict=False)]),
            evidence=f"{listed(unused)}: no operation took them (exact, for {len(seen.batches)} batches)",
            cause="The layer was built and is not called, or only for other inputs.",
            advice="Call it in forward, or remove it.",
        )


def frozen(context: Context) -> Iterator[Finding]:
    """Find the smaller part of a network that is frozen."""
    all_of = {n: p for n, p in context.parameters.items() if p.is_floating_point()}
    names = [n for n, p in all_of.items() if not p.requires_grad]
    share = sum(all_of[n].numel() for n in names) / max(1, sum(p.numel() for p in all_of.values()))
    if names and len(names) <= FROZEN * len(all_of) and any("lora_" in n for n in all_of) is False:
        modules = list(dict.fromkeys(context.module_of(n) or n for n in names))
        yield Finding(
            "parameter-frozen",
            "warning",
            f"{_parameters(len(names), verb='are', single='is')} frozen: requires_grad is False",
            where=listed(modules),
            evidence=f"{share:.0%} of the values, in {listed(names)} (exact)",
            cause="Frozen for an earlier fine-tune or by mistake; the optimizer does not move them.",
            advice="model.requires_grad_(True), unless it is meant.",
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
            f"{' and '.join(names[:3])} are one module",
            where=", ".join(names[:6]),
            evidence=f"{len(names)} names of one object (exact)",
            cause="The list was built from one instance ([layer] * n), so that all places have the same weights.",
            advice="Build a new module for each place, unless sharing is meant.",
        )


def _is_tied(context: Context, names: list[str]) -> bool:
    module = context.model.get_submodule(names[0])
    return "Embedding" in type(module).__name__


def _inside(names: list[str], other: list[str]) -> bool:
    return names is not other and any(name.startswith(o + ".") for name in names for o in other)


def _parameters(count: int, *, verb: str = "get", single: str = "gets") -> str:
    return f"1 parameter {single}" if count == 1 else f"{count} parameters {verb}"


def _is_constant_output(context: Context) -> bool:
    """Whether all samples get the same output."""
    logits = context.observed.logits
    if logits is not None and len(logits) > 1:
        return float(logits.std(0).amax()) <= 1e-6 * float(logits.abs().amax())
    calls = context.observed.calls
    return bool(calls) and calls[-1].output.between <= 1e-6 * calls[-1].output.rms


def _is_rank_one(matrices: Tensor) -> bool:
    w = matrices.float().reshape(-1, *matrices.shape[-2:])
    if min(w.shape[-2:]) < SIDE:
        return False
    w = w / w.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    generator = torch.Generator(w.device).manual_seed(0)
    v = torch.randn(w.shape[0], w.shape[-1], 1, generator=generator, device=w.device)
    for _ in range(3):
        v = w.mT @ (w @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    largest = (w @ v).square().sum((1, 2))
    return bool((w.square().sum((1, 2)) < ONE * largest).all())


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (non_finite, degenerate, unreached, frozen, shared, scale)
