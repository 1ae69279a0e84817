"""Causes in parameters: values that cannot learn, a scale unlike the others, and what the loss does not reach."""

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
SMALLEST, LARGEST, RATIO = 0.05, 8.0, 8.0

# Where all layers leave this range and no norm restores the scale, all are told; behind norms too from `UNIT` on,
# which are weights that were drawn with unit variance.
ALL_SMALL, ALL_LARGE, UNIT = 0.3, 2.0, 2.6

# Root mean square of an embedding's rows: torch draws 1, transformers 0.02.
SMALL_EMBEDDING, EMBEDDING = 1e-3, 8.0

# ‖W‖_F² / σ₁² of a matrix that counts as one direction; smaller matrices than this side are not judged.
ONE, SIDE = 1.02, 4

# Share of the values that are not used from which on that is a warning.
UNUSED = 0.1

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
    blocked = context.has_constant_output
    zero, constant, single = [], [], []
    for block, w in context.values():
        if not bool(w.isfinite().all()) or w.numel() < 2 or "lora_" in block.name:
            continue
        if not bool(w.any()):
            if block.role != "head" and blocked:
                zero.append(block.name)
        elif bool((w == w.flatten()[0]).all()) and len(w) > 1:
            constant.append(block.name)
        elif _is_rank_one(block.split(w)):
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
        if (
            block.role in ("embedding", "elementwise")
            or not bool(w.isfinite().all())
            or not bool(w.any())
            or "lora_" in block.name
        ):
            continue
        sized.append((block, float(w.float().square().mean().sqrt()) * math.sqrt(block.shape[-1])))
    for block, w in context.values():
        rms = float(w.float().square().mean().sqrt())
        if block.role != "embedding" or context.is_normed(block) or not 0 < rms < math.inf:
            continue
        if not SMALL_EMBEDDING < rms < EMBEDDING:
            yield Finding(
                "embedding-scale",
                "error",
                f"The embedding {block.name} has rows of size {rms:.3g} a component",
                where=block.name,
                evidence=f"root mean square {rms:.3g}; usual are 0.02 to 1",
                cause="What is added to it, positions and branches, is lost beside it, and its gradient is small."
                if rms > 1
                else "It is lost beside what is added to it, positions and biases, so that all tokens look the same.",
                advice="torch.nn.init.normal_(weight, std=0.02)",
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
    odd = [(b, s) for b, s in odd if context.has_gain(b, s)]
    told = [(b, s) for b, s in odd if not context.is_normed(b) or (s < 1 and context.is_lost_in_norm(b))]
    for block, s in told[:1] if len(told) < max(3, len(sized) // 3) else []:
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
    normed = any("Norm" in call.kind for call in context.observed.calls)
    drawn = sum(s > UNIT for s in hidden) > 0.7 * len(hidden) and middle > UNIT
    if len(told) != 1 and len(hidden) >= 2 and (drawn or not normed):
        small = all(s < ALL_SMALL for s in hidden) and not normed and not context.observed.additions
        if small or drawn or all(s > ALL_LARGE for s in hidden):
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
    last = max((seen.used.get(n, 0) for n in cut), default=0)
    ends = [c for c in seen.cuts if c.behind & set(cut)]
    where = next((c for c in ends if c.order >= last), ends[-1] if ends else None)
    if where is None and seen.needs_gradient:  # computed, and the loss does not use the result
        cut, unused = [], missing
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
            evidence=f"{listed(cut)}: used in the forward pass, and not reached from the loss (exact)"
            + (
                f"; {where.function} in {where.name or 'the model'} returns a result without a gradient"
                if where
                else ""
            ),
            cause="A .detach(), .item(), .data, argmax or torch.no_grad() stands between these layers and the loss.",
            advice="Remove it, or freeze these parameters with requires_grad_(False) if it is meant.",
        )
    if unused:
        modules = list(dict.fromkeys(context.module_of(n) or n for n in unused))
        share = sum(context.parameters[n].numel() for n in unused) / sum(p.numel() for p in context.parameters.values())
        yield Finding(
            "parameter-unused",
            "warning" if share > UNUSED or any(context.has_used_twin(m) for m in modules) else "info",
            f"The loss does not depend on {len(unused)} of {len(seen.gradients)} parameters",
            where=listed(modules),
            evidence=f"{listed(unused)}: no result of theirs reaches the loss in {len(seen.batches)} batches "
            f"(exact); {share:.1%} of all values",
            cause="The layer was built and is not called, its result is dropped, or it serves other inputs.",
            advice="Use it in forward, or remove it.",
        )


def frozen(context: Context) -> Iterator[Finding]:
    """Find frozen parameters: a smaller part, or a larger one whose weights do not look trained."""
    all_of = {n: p for n, p in context.parameters.items() if p.is_floating_point()}
    names = [n for n, p in all_of.items() if not p.requires_grad]
    share = sum(all_of[n].numel() for n in names) / max(1, sum(p.numel() for p in all_of.values()))
    trained = sum(all_of[n].numel() for n in names if n in context.trained)
    of = sum(all_of[n].numel() for n in names if all_of[n].ndim >= 2)
    fine_tune = share > FROZEN and (trained > 0.3 * of or any("lora_" in n for n in all_of))
    # Tables of positions are often fixed.
    held = {b.name for b in context.matrices if b.role != "embedding"}
    if held.intersection(names) and len(names) < len(all_of) and not fine_tune:
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


def numbers(context: Context) -> Iterator[Finding]:
    """Find gradients that are lost between a finite loss and the parameters, by their dtype's range. Exact."""
    seen = context.observed
    sizes = [g for g in seen.gradients.values() if g is not None]
    if not sizes or not math.isfinite(seen.loss) or any(not c.output.is_finite for c in seen.calls):
        return
    bad = [n for n, g in seen.gradients.items() if g is not None and not math.isfinite(g)]
    if bad:
        yield Finding(
            "gradient-overflow",
            "error",
            f"The gradients of {len(bad)} parameters are not finite, and the loss is",
            where="all layers" if len(bad) > len(sizes) / 3 else listed(bad),
            evidence=f"{len(bad)} of {len(sizes)} gradients are NaN or infinite (exact); the loss is {seen.loss:.3g}",
            cause="A gradient left the range of its dtype (65,504 for float16), or a derivative is infinite where its "
            "function is finite (√0, 0⁰, |0|).",
            advice="Lower the loss scale, or use bfloat16; torch.autograd.detect_anomaly names the operation.",
        )
    elif seen.loss > 0 and _is_zero_behind_head(context):
        yield Finding(
            "gradient-underflow",
            "error",
            "The gradient of nearly every parameter is exactly zero",
            where="all layers",
            evidence=f"{sum(g == 0 for g in sizes)} of {len(sizes)} are zero (exact); the loss is {seen.loss:.3g}",
            cause="The loss is flat, or its gradient is below the smallest number of a dtype on its way, 6e-8 for "
            "float16.",
            advice="Scale the loss (torch.amp.GradScaler), or use bfloat16.",
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


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    non_finite,
    degenerate,
    numbers,
    unreached,
    frozen,
    shared,
    scale,
)
