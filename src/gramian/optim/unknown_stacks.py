"""Stacks of matrices that nothing tells of: which layouts they may have, and a warning where many step by AdamW."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Mapping, Sequence

from gramian.errors import GramianWarning, some
from gramian.layers.lookup import is_lazy
from gramian.optim.route import Route

__all__ = ["OPEN", "how_to_tell", "possible_layouts", "warn_of_matrices_left"]

MOST_LEFT = 0.25
"""The largest share of the hidden parameters that may go to AdamW, for want of a layout, without a warning."""


def warn_of_matrices_left(routes: Sequence[Route], overridden: Sequence[Route], *, model: bool) -> None:
    """Warns if more than `MOST_LEFT` of the hidden parameters step by AdamW since nothing tells their matrices.

    Hidden are the matrices, and what has two or more dimensions and is no table, head or elementwise weight. Frozen
    parameters, and those that `routes=` names, are as the user wants them. `model`: whether the model was asked.
    """
    trained = [r for r in routes if r.parameter.requires_grad and r.role == "hidden" and not is_lazy(r.parameter)]
    left = [r for r in trained if r.layout is None and sum(length > 1 for length in r.parameter.shape) >= 2]
    matrices = sum(r.parameter.numel() for r in (*trained, *overridden) if r.layout is not None)
    num_left = sum(r.parameter.numel() for r in left)
    if num_left <= MOST_LEFT * (num_left + matrices):
        return
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", r.name) for r in left))
    shown = [next(r for r in left if fnmatch.fnmatchcase(r.name, pattern)) for pattern in patterns[:3]]
    biases = {r.name: tuple(r.parameter.shape) for r in routes}
    found = {p: possible_layouts(r, biases) for p, r in zip(patterns, shown, strict=False)}
    layouts = ", ".join(f"{p!r}: {repr(options[0]) if len(options) == 1 else OPEN}" for p, options in found.items())
    write = f"layouts={{{layouts}{', …' if len(patterns) > 3 else ''}}}"
    undecided = next((options for options in found.values() if len(options) > 1), None)
    tell = f" ({how_to_tell(undecided)})" if undecided else ""
    warnings.warn(
        f"{num_left / (num_left + matrices):.0%} of the hidden parameters step by AdamW, since nothing tells which "
        f"matrices they hold: {some([r.name for r in left])}. Pass "
        f"{write if model else f'the model, and where its classes do not tell, {write}'}, which says how they "
        f"lie{tell}, see gm.blocks; or, where AdamW is right, routes={{{patterns[0]!r}: 'adamw'}}",
        GramianWarning,
        stacklevel=5,
    )


OPEN = "LAYOUT"
"""What stands for a layout that nothing tells: code that is pasted with it does not run, rather than transpose."""


def possible_layouts(route: Route, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layouts that a stack of matrices may have: the one that its bias tells, else (in, out) and (out, in).

    A bias has the length of the output: of the two last sizes, where they differ, the one that it shares is `out`.
    """
    shape = tuple(route.parameter.shape)
    stack = "".join(f"{axis} " for axis in "abcdefgh"[: len(shape) - 3] + "e"[: len(shape) - 2])
    both = [f"{stack}i o -> {stack}o i", f"{stack}o i -> {stack}o i"]
    module, dot, own = route.name.rpartition(".")
    names = [f"{own}_bias", own.replace("weight", "bias"), re.sub("^w", "b", own)]
    lengths = {shapes[module + dot + name][-1] for name in names if name != own and shapes.get(module + dot + name)}
    if len(lengths) == 1 and shape[-1] != shape[-2]:
        length = lengths.pop()
        if length in shape[-2:]:
            return [both[0] if length == shape[-1] else both[1]]
    return both


def how_to_tell(layouts: Sequence[str]) -> str:
    """Which of two layouts is right, from what forward computes."""
    return f"{OPEN}: {layouts[0]!r} if forward computes x @ w[e], {layouts[1]!r} if it computes x @ w[e].T"
