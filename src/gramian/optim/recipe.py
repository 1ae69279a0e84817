"""What a direction declares: how to compute it, the ranges of its options, and what its buffers mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gramian.optim.options import Range
from gramian.optim.stacks import State

__all__ = ["AdamWPart", "Recipe", "StepContext"]

AdamWPart = Literal["exp_avg", "exp_avg_sq", "exp_avg_sq_weight"]
"""What a buffer can take over from an AdamW: its running mean of the gradients (m, n); of the squares of their entries
(m, n); or the total weight 1 − β₂^step (1, 1) that the squares have in that mean, which starts at zero."""

Pads = Callable[[Sequence[tuple[int, int]], tuple[int, int], torch.device, Mapping[str, Any]], int | None]


@dataclass(frozen=True)
class StepContext:
    """What `Recipe.update` gets besides the gradients and the state.

    Args:
        alive: `(K, 1, 1)`, one; zero for a matrix without a finite gradient, whose state must not change.
        all_alive: whether `alive` is known to be all ones, without synchronizing with the device.
        due: indices of the matrices whose costly parts are to be recomputed in this step; `None` for all.
        options: the parameter group: the direction's own options and the shared ones.
        shape: (m, n) of the first matrix, which under `Recipe.pads` may be padded; `None` for that of the gradients.
        sizes: under `Recipe.pads` the numbers of rows and of columns of each matrix without its padding, `(K, 1, 1)`;
            `None` where none is padded.
    """

    alive: Tensor
    all_alive: bool
    due: Tensor | None
    options: Mapping[str, Any]
    shape: tuple[int, int] | None = None
    sizes: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to compute a direction D of `W ← W − lr · s · D`, for stacked matrices `(K, m, n)` of one shape.

    A recipe sees no model: `MatrixOptimizer` finds the matrices, stacks them, and applies D.

    Args:
        init: `init(m, options) -> state`: the buffers before the first step, tensors whose first dimension is K, for
            matrices like `m`. It is called again when options change: a buffer that it no longer names is dropped, and
            a matrix that lacks one is `due`.
        update: `update(g, state, context) -> D`: changes the state in place and returns D, of Frobenius norm
            √min(m, n) or less. The gradients `g` are finite, and may be overwritten.
        options: the range of each option of the optimizer's signature that is not shared by all.
        adamw: by buffer, the part of an AdamW's state that `load_adamw` fills it with.
        momentum: the buffer with the running mean of the gradients (in any orthogonal basis), whose singular values
            `health("spectra")` reports.
        fallbacks: the buffer `(K, 1, 1)` that counts results which were not good enough, so that older ones stayed.
        staleness: `staleness(state, options) -> (K,)`, from 0 to 1: how far the buffers that are recomputed only every
            `refresh` steps are from their present values; `None` where nothing is kept.
        choose: `choose(shapes, device, options)`: what is decided once for the matrices of a group, of these shapes
            (m, n), and kept in the group and its state. It is asked again when options change, with the group itself.
        pads: `pads(shapes, room, device, options)`: whether matrices of these shapes may be padded with zeros to the
            shape `room` to be one stack (those of more rows than it has are transposed), which must not change their
            state or direction. The multiplications in Gram matrices that cost as much as a step of one of them does
            then; `None` if they may not.
        sides: under `pads`, by buffer `(K, m, m)` of the rows, that of the columns `(K, n, n)`, whose place it takes
            where a matrix is transposed.
    """

    init: Callable[[Tensor, Mapping[str, Any]], State]
    update: Callable[[Tensor, State, StepContext], Tensor]
    options: Mapping[str, Range]
    adamw: Mapping[str, AdamWPart] = field(default_factory=dict)
    momentum: str | None = None
    fallbacks: str | None = None
    staleness: Callable[[State, Mapping[str, Any]], Tensor | None] | None = None
    choose: Callable[[Iterable[tuple[int, int]], torch.device, Mapping[str, Any]], Mapping[str, Any]] | None = None
    pads: Pads | None = None
    sides: Mapping[str, str] = field(default_factory=dict)
