"""The equation behind the derivatives of roots and polar factors, solved so that it can be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.errors import UnsupportedError
from gramian.linalg.engine.transforms import pullback

EPS = torch.finfo(torch.float64).eps


def power_sum(x: Tensor, d: Tensor, p: int) -> Tensor:
    """Σₖ Xᵏ D Xᵖ⁻¹⁻ᵏ over k = 0 … p − 1: the derivative of Xᵖ along D."""
    total, power = d, x
    for _ in range(p - 1):
        total, power = x @ total + d @ power, power @ x
    return total


def _power_sum_along(x: Tensor, dx: Tensor, d: Tensor, p: int) -> Tensor:
    """The derivative of `power_sum(X, D, p)` as X moves along dX."""
    total, power, d_total, d_power = d, x, torch.zeros_like(d), dx
    for _ in range(p - 1):
        d_total, d_power = dx @ total + x @ d_total + d @ d_power, d_power @ x + power @ dx
        total, power = x @ total + d @ power, power @ x
    return d_total


def solve_power_sum(x: Tensor, e: Tensor, p: int, name: str, *, root: bool = False) -> Tensor:
    """The D with Σₖ Xᵏ D Xᵖ⁻¹⁻ᵏ = E, for a symmetric positive semi-definite X (..., n, n).

    In the eigenbasis of X each entry of E is divided by a sum of products of two eigenvalues, none of them negative. So
    equal eigenvalues do no harm, and only two that are zero do: there `name` has no derivative, and it raises. Zero is
    what rounding cannot tell from it: nε of the largest, or √(nε) where X is a square `root` of what was given. An
    entry of E there counts as zero up to nε of its largest.

    Its own derivatives are solutions of the same equation, so no eigenvector is ever differentiated.

    Source: Higham, Functions of Matrices (2008), §3.2 and theorem 3.11.
    """
    out = _Solve.apply(x, e, p, name, root)
    assert isinstance(out, Tensor)
    return out


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, e: Tensor, p: int, name: str, root: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = x.shape[-1]
        finite = x.isfinite().flatten(-2).all(-1)[..., None, None]
        w, v = torch.linalg.eigh(torch.where(finite, (x + x.mT) / 2, torch.eye(n, dtype=x.dtype, device=x.device)))
        w = w.clamp_min(0)
        k = v.mT @ e @ v
        row, column = w[..., :, None], w[..., None, :]
        sums = column ** (p - 1)
        for i in range(1, p):
            sums = sums + row**i * column ** (p - 1 - i)
        floor = (n * EPS) ** 0.5 if root else n * EPS
        zero = torch.maximum(row, column) <= floor * w.amax(-1)[..., None, None] if n and p > 1 else sums < 0
        lost = zero & finite & (k.abs() > n * EPS * k.abs().amax((-2, -1), keepdim=True)) if n else zero
        if bool(lost.any()):
            advice = "where the slope of a root is infinite. Add damping, or leave" if root else "where it jumps. Leave"
            raise UnsupportedError(
                f"{name}: has no derivative at a matrix that is singular up to rounding, {advice} such matrices out of "
                "the loss."
            )
        d = v @ torch.where(zero, 0.0, k / torch.where(zero, 1.0, sums)) @ v.mT
        return torch.where(finite, d, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, ctx.p, ctx.name, ctx.root = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, d = ctx.saved_tensors
        to_e = solve_power_sum(x, grad, ctx.p, ctx.name, root=ctx.root)
        _, pull = pullback(lambda y: power_sum(y, d, ctx.p), x)
        (to_x,) = pull(-to_e)
        return (to_x + to_x.mT) / 2, to_e, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, de: Tensor | None, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, d = ctx.saved_tensors
        right = torch.zeros_like(d) if de is None else de
        if dx is not None:
            right = right - _power_sum_along(x, dx, d, ctx.p)
        return solve_power_sum(x, right, ctx.p, ctx.name, root=ctx.root)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, e: Tensor, p: int, name: str, root: bool) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, e = (
            y.expand(info.batch_size, *y.shape) if d is None else y.movedim(d, 0)
            for y, d in zip((x, e), in_dims[:2], strict=True)
        )
        return solve_power_sum(x, e, p, name, root=root), 0
