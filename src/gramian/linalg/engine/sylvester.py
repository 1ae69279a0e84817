"""The equation behind the derivatives of roots and polar factors, solved so that it can be differentiated again."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gramian.errors import UnsupportedError
from gramian.linalg.engine.spectrum import Spectrum
from gramian.linalg.engine.symmetric_products import changed_in_basis, halves, symmetric_product, with_transpose
from gramian.linalg.engine.transforms import pullback

EPS = torch.finfo(torch.float64).eps


def power_sum(x: Tensor, d: Tensor, p: int) -> Tensor:
    """Σₖ Xᵏ D Xᵖ⁻¹⁻ᵏ over k = 0 … p − 1: the derivative of Xᵖ along D."""
    total, power = d, x
    for _ in range(p - 1):
        total, power = x @ total + d @ power, power @ x
    return total


def solve_power_sum(
    x: Tensor,
    e: Tensor,
    p: int,
    name: str,
    *,
    root: bool = False,
    inverse: bool = False,
    symmetric: bool = False,
    spectrum: Spectrum | None = None,
) -> Tensor:
    """The D with Σₖ Xᵏ D Xᵖ⁻¹⁻ᵏ = E, or −XᵖEXᵖ if `inverse`, for a symmetric positive semi-definite X (..., n, n).

    In the eigenbasis of X each entry of E is divided by a sum of products of two eigenvalues, none of them negative. So
    equal eigenvalues do no harm, and only two that are zero do: there `name` has no derivative, and it raises. Zero is
    what rounding cannot tell from it: nε of the largest, or √(nε) where X is a square `root` of what was given. An
    entry of E there counts as zero up to nε of its largest.

    With the `spectrum` of X no eigendecomposition is needed, and the products are in the dtype of its vectors; where it
    is NaN, and without one, in float64. If E is `symmetric` the four products take the work of 3¼. Its own
    derivatives are solutions of the same equation, so no eigenvector is ever differentiated.

    Source: Higham, Functions of Matrices (2008), §3.2 and theorem 3.11.
    """
    w, v = (None, None) if spectrum is None else spectrum
    out = _Solve.apply(x, e, w, v, Equation(p, name, root, inverse), symmetric)
    assert isinstance(out, Tensor)
    return out


class Equation(NamedTuple):
    """The equation of `solve_power_sum`."""

    p: int
    name: str
    root: bool
    inverse: bool

    def right(self, x: Tensor, e: Tensor) -> Tensor:
        """The right-hand side."""
        if not self.inverse:
            return e
        power = torch.linalg.matrix_power(x, self.p)
        return -(power @ e @ power)

    def refuse(self) -> NoReturn:
        """Say that there is no derivative."""
        at = "where the slope of a root is infinite. Add damping, or leave" if self.root else "where it jumps. Leave"
        raise UnsupportedError(
            f"{self.name}: has no derivative at a matrix that is singular up to rounding, {at} such matrices out of "
            "the loss."
        )

    def solved(self, k: Tensor, w: Tensor) -> Tensor:
        """The solution in the eigenbasis, where E is `k` and the eigenvalues are `w`."""
        n, eps = w.shape[-1], torch.finfo(k.dtype).eps
        small = self.small(w)
        w = w.to(k.dtype)
        if not bool(small.any()):
            return self.divide(k, w, w)
        zero = small[..., :, None] & small[..., None, :]
        if bool((zero & (k.abs() > n * eps * k.abs().amax((-2, -1), keepdim=True))).any()):
            self.refuse()
        return self.divide(k.clone(), w, w).masked_fill_(zero, 0.0)

    def small(self, w: Tensor) -> Tensor:
        """Which eigenvalues w (..., n) are zero up to rounding."""
        floor = (w.shape[-1] * EPS) ** 0.5 if self.root else w.shape[-1] * EPS
        return w <= floor * w.amax(-1, keepdim=True) if w.shape[-1] and self.p > 1 else w < 0

    def divide(self, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The solution where no two eigenvalues are zero, in place; those of the rows and of the columns of `k`."""
        if self.p == 2:
            sums = rows[..., :, None] + columns[..., None, :]
        else:
            powers = [torch.stack([w**i for i in range(self.p)], -1) for w in (rows, columns)]
            sums = powers[0] @ powers[1].flip(-1).mT
        k.div_(sums)
        if self.inverse:
            k.mul_(-(rows**self.p)[..., :, None]).mul_((columns**self.p)[..., None, :])
        return k


def solve_skew(k: Tensor, w: Tensor, name: str, *, outside: Tensor | None) -> Tensor:
    """The D with WD + DW = K − Kᵀ for a diagonal W = diag(w), without derivatives of its own.

    It raises where two of the w are zero and K does not vanish, or one is and its column of `outside` does not.
    """
    equation = Equation(2, name, False, False)
    if outside is not None and w.shape[-1]:
        small = w <= w.shape[-1] * EPS * w.amax(-1, keepdim=True)
        if bool(small.any()) and bool((small & (outside != 0).any(-2)).any()):
            equation.refuse()
    return equation.solved(with_transpose(k, -1), w)


def _eigenpairs(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = x.isfinite().flatten(-2).all(-1)[..., None, None]
    eye = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    w, v = torch.linalg.eigh(torch.where(finite, (x + x.mT).double() / 2, eye))
    return torch.where(finite[..., 0], w, torch.nan), v


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, e: Tensor, w: Tensor | None, v: Tensor | None, equation: Equation, symmetric: bool
    ) -> Tensor:
        if w is None or v is None or bool(w.isnan().any()):
            w, v = _eigenpairs(x)
        # A matrix that is not finite has no derivative, and the others theirs.
        finite = w.isfinite().all(-1)
        w = torch.where(finite[..., None], w, 1.0).clamp_min(0)
        given, e = e.dtype, e.to(v.dtype)
        if symmetric and v.shape == e.shape and halves(v, e) and not bool(equation.small(w).any()):
            values = w.to(v.dtype).reshape(-1, w.shape[-1])

            def change(strip: Tensor, i: int, rows: slice) -> None:
                equation.divide(strip, values[i, rows], values[i, rows.start :])

            d = changed_in_basis(v, e, change)
        else:
            times = symmetric_product if symmetric else torch.matmul
            d = times(v @ equation.solved(times(v.mT, e @ v), w), v.mT)
        return d.to(given) if bool(finite.all()) else torch.where(finite[..., None, None], d.to(given), torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, e, w, v, ctx.equation, _ = inputs
        saved = (x, e, output, *(() if w is None else (w, v)))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, e, d, *pairs = ctx.saved_tensors
        equation, spectrum = ctx.equation, Spectrum(*pairs) if pairs else None
        to_e = solve_power_sum(x, grad, spectrum=spectrum, **equation._asdict())
        # ⟨grad, dD⟩ = ⟨Y, d(right) − d(sum)⟩, where Y solves the equation with grad on its right.
        plain = equation._replace(inverse=False)
        y = solve_power_sum(x, grad, spectrum=spectrum, **plain._asdict()) if equation.inverse else to_e
        _, pull = pullback(lambda x: _defect(equation, x, e, d), x)
        (to_x,) = pull(y)
        return (to_x + to_x.mT) / 2, to_e, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, de: Tensor | None, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, e, d, *pairs = ctx.saved_tensors
        equation, spectrum = ctx.equation, Spectrum(*pairs) if pairs else None
        out = torch.zeros_like(d)
        if de is not None:
            out = out + solve_power_sum(x, de, spectrum=spectrum, **equation._asdict())
        if dx is not None:
            # The transpose of a pullback, which is linear: forward mode does not nest.
            _, pull = pullback(lambda x: _defect(equation, x, e, d), x)
            _, push = pullback(lambda y: pull(y)[0], torch.zeros_like(d))
            plain = equation._replace(inverse=False)
            out = out + solve_power_sum(x, push(dx)[0], spectrum=spectrum, **plain._asdict())
        return out

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple, x: Tensor, e: Tensor, w: Any, v: Any, equation: Equation, symmetric: bool
    ) -> Any:
        full: Any = (
            y if y is None else y.expand(info.batch_size, *y.shape) if d is None else y.movedim(d, 0)
            for y, d in zip((x, e, w, v), in_dims[:4], strict=True)
        )
        return _Solve.apply(*full, equation, symmetric), 0


def _defect(equation: Equation, x: Tensor, e: Tensor, d: Tensor) -> Tensor:
    """The right-hand side less the sum: zero where D solves the equation."""
    return equation.right(x, e) - power_sum(x, d, equation.p)
