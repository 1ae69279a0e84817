"""Causes in what is frozen: everything, or a part that looks forgotten, and not a fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from gramian.block import Block
from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.experiments.intended_zeros import is_factor
from gramian.inspection.weights.trained import signs_of
from gramian.report import Finding
from gramian.report.model import plural

__all__ = ["RULES"]

# A frozen part of more than this share of the matrices' values, between layers that are trained, is what adapters train
# around. A part counts as trained where more than this share of it is not as it was drawn.
MOST, TRAINED = 0.5, 0.3

# Rows and columns of a table from which on it tells whether it was trained.
ROWS = 8

# Entries of which most differ where they are drawn; codes, bases and kernels that were written down repeat theirs.
ENTRIES, DIFFERENT = 256, 0.75

DRAWN = "Layers are frozen whose weights do not look trained: they are as they were drawn."

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def frozen(context: Context) -> Iterator[Finding]:
    """Find what is frozen, and whether it looks as if it were meant."""
    all_of = {n: p for n, p in context.parameters.items() if p.is_floating_point()}
    names = [n for n, p in all_of.items() if not p.requires_grad]
    if names and not any(n in context.observed.used for n in all_of if n not in names):
        yield Finding(
            "parameter-frozen",
            "error",
            "All parameters that are used are frozen",
            where="all layers",
            evidence=f"requires_grad is False in {len(names)} of {len(all_of)} parameters, and in all that the forward "
            "pass uses (exact)",
            cause="Nothing can be trained.",
            advice="Call requires_grad_(True) on what should be trained.",
        )
        return
    if len(names) == len(all_of) or not any(not block.parameter.requires_grad for block in context.matrices):
        return
    share = sum(all_of[n].numel() for n in names) / sum(p.numel() for p in all_of.values())
    idle = [n for n in names if _is_idle(context, n)]
    if idle and not _all_held(context, names):
        yield Finding(
            "parameter-frozen",
            "warning",
            f"{'A matrix is' if len(idle) == 1 else f'{len(idle)} matrices are'} zero and frozen, and can never act",
            where=some(list(dict.fromkeys(context.module_of(n) or n for n in idle)), SHOWN),
            evidence=f"{some(idle, SHOWN)}: zero, used in the forward pass, and requires_grad is False (exact)",
            cause="What begins at zero, as B of LoRA, was frozen with the rest: its adapter is never trained.",
            advice="Call requires_grad_(True) on the adapters after the base is frozen, or remove them.",
        )
        return
    why = "" if any(map(is_factor, all_of)) or _all_held(context, names) else _mistake(context)
    yield Finding(
        "parameter-frozen",
        "warning" if why else "info",
        f"{plural(len(names), 'parameter')} {'is' if len(names) == 1 else 'are'} frozen: requires_grad is False",
        where=some(list(dict.fromkeys(context.module_of(n) or n for n in names)), SHOWN),
        evidence=f"{share:.1%} of the values, in {some(names, SHOWN)}; the other {1 - share:.1%} are trained (exact)",
        cause=why or "It looks meant: what is trained stands beside it, before or behind it as in a fine-tune.",
        advice="Unless it is meant, call model.requires_grad_(True)." if why else "",
    )


def _is_idle(context: Context, name: str) -> bool:
    """Whether a matrix that is used is all zero, and stays so."""
    p = context.parameters[name].detach()
    return name in context.observed.used and p.ndim > 1 and min(p.shape) > 1 and not bool(p.any())


def _mistake(context: Context) -> str:
    """Why what is frozen looks forgotten; empty where it looks meant.

    Meant are parts beside whose every matrix something is trained (adapters, biases), all matrices while prompts,
    tables or norms are trained, or, if the matrices are not as they were drawn, some biases; and, of weights that are
    not as they were drawn, the layers before those that are trained on, the head and others or most of a network around
    new parts, and a network in another.
    """
    tables = [b for b in context.matrices if b.role == "embedding" and b.name in context.observed.used]
    used = [b for b in context.matrices if b.role != "embedding" and b.name in context.observed.used]
    large = [b for b in tables if not b.parameter.requires_grad and min(b.shape[-2:]) >= ROWS]
    if large and all(b.parameter.requires_grad for b in used) and len(_as_drawn(context, large)) == len(large):
        return "Tables are frozen whose rows do not look trained: they are as they were drawn."
    moving = [b for b in used if b.parameter.requires_grad]
    held = [b for b in used if not b.parameter.requires_grad]
    still = [b for b in held if not _has_beside(context, b, moving)]
    if not still:
        return ""
    if not moving:
        return "" if _is_tuned(context, used) or len(_as_drawn(context, still)) < len(still) else DRAWN
    has_head = any(b.role == "head" for b in still)
    if has_head and len(held) == 1:
        return "The head is frozen, and what is before it is trained."
    size, drawn = sum(b.parameter.numel() for b in held), _as_drawn(context, held)
    is_trained = sum(b.parameter.numel() for b in held if b.name not in drawn) > TRAINED * size
    if has_head or used[: len(still)] == still:  # new parts within a network, or behind its first layers
        return "" if is_trained else DRAWN
    if size > MOST * sum(b.parameter.numel() for b in used):
        return "" if is_trained else DRAWN
    if is_trained and _is_part(context, still):
        return ""
    return "Layers before and behind are trained: frozen for an earlier fine-tune, or by mistake."


def _is_tuned(context: Context, used: Sequence[Block]) -> bool:
    """Whether something is trained beside biases of matrices: prompts, tables, norms."""
    owners = {context.module_of(b.name) for b in used}
    return not all(context.module_of(n) in owners for n, p in context.parameters.items() if p.requires_grad)


def _as_drawn(context: Context, weights: Sequence[Block]) -> set[str]:
    """Those of the matrices whose entries are like independent draws."""
    known = {layer.name: layer.singular_values for layer in context.layers}
    trained = {sign.name for sign in signs_of(context.model, weights, known)} | context.trained
    return {b.name for b in weights if b.name not in trained and _differ(b.parameter.detach())}


def _differ(w: Tensor) -> bool:
    """Whether hardly any of the entries repeat, zeros aside, as those of a padding row."""
    w = w[w != 0]
    some_of = w[:: max(1, len(w) // ENTRIES)][:ENTRIES]
    return len(some_of.unique()) > DIFFERENT * len(some_of)


def _has_beside(context: Context, block: Block, moving: Sequence[Block]) -> bool:
    """Whether the module of a frozen matrix has parameters that are trained, or factors of a change of it are."""
    is_whole = block.module is context.model  # a table of positions that the model itself has is beside nothing
    if any(p.requires_grad for p in block.module.parameters(recurse=not is_whole)):
        return True
    inner, outer = min(block.shape[-2:]), set(block.shape[-2:])
    parent = context.module_of(block.name)
    while parent:
        parent = parent.rpartition(".")[0]
        if isinstance(context.model.get_submodule(parent), _CONTAINERS):
            continue
        prefix = f"{parent}." if parent else ""
        ends = [set(b.shape[-2:]) for b in moving if b.name.startswith(prefix) and min(b.shape[-2:]) < inner]
        for rank in {min(shape) for shape in ends}:
            factors = [shape - {rank} for shape in ends if rank in shape]
            if len(factors) > 1 and outer <= set().union(*factors):
                return True
    return False


def _is_part(context: Context, still: Sequence[Block]) -> bool:
    """Whether the frozen matrices are a part of the model, with several layers, of which nothing is trained."""
    words = [b.name.split(".")[:-2] for b in still]
    shared = 0
    while all(len(w) > shared and w[shared] == words[0][shared] for w in words):
        shared += 1
    part = context.model.get_submodule(".".join(words[0][:shared]))
    return len(still) > 1 and shared > 0 and not any(p.requires_grad for p in part.parameters())


def _all_held(context: Context, names: Sequence[str]) -> bool:
    """Whether all modules are fixed in more ways than one: run under `no_grad`, or in evaluation mode in training."""
    modules = dict(context.model.named_modules())
    for name in {context.module_of(n) for n in names}:
        words = name.split(".")
        around = {".".join(words[:i]) for i in range(1, len(words) + 1)}
        module = modules.get(name, context.model)
        if not around & context.observed.ungraded and not (context.model.training and not module.training):
            return False
    return True


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (frozen,)
