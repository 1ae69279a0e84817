"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian.linalg.engine import lapack
from gramian.optim.muon import average, look_ahead
from gramian.optim.options import FLAG, Shared, interval
from gramian.optim.preconditioned import REFRESH, SIDES, Sides, preconditioned_sides
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.scaling import rescale_
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = ["SOAP"]

DAMPING = 1e-3
"""Added to Adam's denominator, times the root mean square over the matrix: smaller entries are rounding noise."""


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """Per side: a basis Q, and QᵀMQ for the second moment M of the gradients. Adam's two moments, in these bases."""
    num = m.shape[0]
    state = {
        "momentum": m.new_zeros(m.shape),
        "variance": m.new_zeros(m.shape),
        "weight": m.new_zeros(num, 1, 1),
        "unit": m.new_zeros(num, 1, 1),
    }
    for side, size in preconditioned_sides(m.shape, options["sides"]):
        state[f"{side}_basis"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
        state[f"{side}_moment"] = m.new_zeros(num, size, size)
    return state


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """Q_L D Q_Rᵀ, with D Adam's direction of Q_Lᵀ g Q_R."""
    options = context.options
    rescale_(g, state, {"momentum": 1, "variance": 2, "left_moment": 2, "right_moment": 2})
    sides = _sides(state)
    for side in sides:
        g = _into(g, state[f"{side}_basis"], side)
    for side in sides:
        second = g @ g.mT if side == "left" else g.mT @ g
        average(state[f"{side}_moment"], second, options["moment_beta"], context)
    if context.due is None or len(context.due):
        for side in sides:
            g = _rotate(g, state, side, context.due)
    average(state["momentum"], g, options["momentum"], context)
    average(state["variance"], g.square(), options["variance_beta"], context)
    average(state["weight"], torch.ones_like(state["weight"]), options["variance_beta"], context)
    root = state["variance"].sqrt()
    floor = state["variance"].mean((-2, -1), keepdim=True).sqrt() * DAMPING
    # Not in place: without Nesterov, look_ahead returns the momentum itself.
    d = look_ahead(g, state["momentum"], options["momentum"], context) / root.add_(
        floor.clamp_min_(torch.finfo(g.dtype).tiny)
    )
    # The entries of Adam's direction are usually at most ±1, so that its norm is at most that of a polar factor.
    d *= state["weight"].sqrt() / max(d.shape[-2:]) ** 0.5
    for side in sides:
        d = _out_of(d, state[f"{side}_basis"], side)
    return d


def staleness(state: State, options: Mapping[str, Any]) -> Tensor:
    """The share of QᵀMQ that is off its diagonal, in the Frobenius norm; the larger of the sides."""
    shares = []
    for side in _sides(state):
        moment = state[f"{side}_moment"].double()
        off = moment - torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
        part, whole = (torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (off, moment))
        shares.append(part / whole.clamp_min(torch.finfo(moment.dtype).tiny))
    return torch.stack(shares).amax(0)


def _sides(state: State) -> list[str]:
    return [side for side in ("left", "right") if f"{side}_basis" in state]


def _into(x: Tensor, basis: Tensor, side: str) -> Tensor:
    return basis.mT @ x if side == "left" else x @ basis


def _out_of(x: Tensor, basis: Tensor, side: str) -> Tensor:
    return basis @ x if side == "left" else x @ basis.mT


def _rotate(g: Tensor, state: State, side: str, due: Tensor | None) -> Tensor:
    """Rotates the basis of a side to the eigenvectors of its second moment, with both moments; returns `g` rotated.

    With R the eigenvectors of QᵀMQ: Q ← QR and momentum ← Rᵀ·momentum. The variance, a mean of squares, becomes
    (R∘R)ᵀ·variance, which is exact where entries in the old basis are uncorrelated, and always keeps its sum.
    """
    at = slice(None) if due is None else due
    moment = state[f"{side}_moment"][at]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = moment / size.clamp_min(torch.finfo(g.dtype).tiny)
    values, rotation, ok = lapack.eigh(scaled)
    good = ok & rotation.isfinite().all(-1).all(-1) & (size[:, 0, 0] > 0)
    identity = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    rotation = torch.where(good[:, None, None], rotation, identity)
    diagonal = torch.diag_embed(values * size[:, :, 0])
    state[f"{side}_moment"][at] = torch.where(good[:, None, None], diagonal, moment)
    basis = state[f"{side}_basis"][at] @ rotation
    # One step of Newton–Schulz: rounding would otherwise add up over thousands of rotations.
    state[f"{side}_basis"][at] = 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)
    state["momentum"][at] = _into(state["momentum"][at], rotation, side)
    state["variance"][at] = _into(state["variance"][at], rotation.square(), side)
    if due is None:
        return _into(g, rotation, side)
    g[due] = _into(g[due], rotation, side)
    return g


class SOAP(MatrixOptimizer):
    """Steps along Adam's direction in the eigenbasis of the gradients' second moments: `W ← W − lr · s · Q_L D Q_Rᵀ`.

    `Q_L` and `Q_R` are the eigenvectors of the running means of `g gᵀ` and `gᵀ g`, and `D` is Adam's direction of
    `Q_Lᵀ g Q_R`. Adam's moments are kept in the basis and rotate with it.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum: the weight of the past in Adam's first moment.
        nesterov: whether the step looks ahead by one update of the momentum.
        variance_beta: the weight of the past in Adam's second moment.
        moment_beta: the weight of the past in the means of `g gᵀ` and `gᵀ g`.
        sides: `"both"`; `"small"`, the smaller one only; `"auto"`: both where the longer side is less than twice the
            shorter one.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`; `refresh`, the steps
            between two rotations of a basis, is 10 by default.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: per step and side of size k, `6 m n k` operations; every `refresh` steps, `6 k³` and an eigendecomposition.
    Source: Vyas et al., SOAP (2409.11321), algorithm 3; one side: §7.1 there.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = SOAP(net, lr=0.05, refresh=5)
    >>> [group["refresh"] for group in optimizer.param_groups]
    [5]
    """

    recipe = Recipe(
        init=init,
        update=update,
        options={
            "momentum": interval("[0, 1)"),
            "nesterov": FLAG,
            "variance_beta": interval("[0, 1)"),
            "moment_beta": interval("[0, 1)"),
            "sides": SIDES,
        },
        # The first basis is the identity, in which Adam's moments are as AdamW has them.
        adamw={"momentum": "exp_avg", "variance": "exp_avg_sq", "weight": "exp_avg_sq_weight"},
        momentum="momentum",
        staleness=staleness,
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        variance_beta: float = 0.95,
        moment_beta: float = 0.95,
        sides: Sides = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        shared.setdefault("refresh", REFRESH)
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "variance_beta": variance_beta,
            "moment_beta": moment_beta,
            "sides": sides,
        }
        super().__init__(params, lr, options, **shared)
