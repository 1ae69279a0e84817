"""Penalties on weights, each with its proximal map: prox(w, t) = argmin_x  t·penalty(x) + ½‖x − w‖².

A proximal step after a gradient step minimizes loss + penalty where the penalty has corners: zeros and ranks come out
exact, which adding the penalty to the loss never gives. See `gm.optim.Proximal`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError
from gramian.linalg.certificate import Certificate, uncertified
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.precision import without_autocast
from gramian.linalg.singular_derivatives import of_spectrum

__all__ = ["L1", "L2", "PROX", "ElasticNet", "Nuclear", "Orthogonal", "Penalty", "SpectralNorm"]

# Newton's steps for Orthogonal's cubic, from above: quadratic, but linear at its triple root (σ = 0, tλ = 1), where
# (2/3)^100 = 2e-18.
NUM_NEWTON = 100


class Penalty(ABC):
    """A penalty with a proximal map; its settings are numbers ≥ 0.

    Penalties and maps are differentiable in the weights, maps of a spectrum also where singular values are equal; at a
    corner a derivative is one of those on either side of it, or their mean. Where a map jumps, as that of `Orthogonal`
    at σ = 0 with tλ > 1, asking for it raises `UnsupportedError`. The step and the settings are constants.

    A subclass is a frozen dataclass with `penalty` and `prox`. `of_matrix` says whether it is a penalty of matrices
    (..., m, n), into which a layout must bring other tensors, or of single entries, for which shapes do not matter.

    Raises:
        InputError: for a setting that is negative or not finite.
    Cost: that of the subclass.
    Source: Parikh and Boyd, Proximal Algorithms (2014), eq. 1.1.

    >>> isinstance(L1(0.1), Penalty), L1(0.1).of_matrix, Nuclear(0.1).of_matrix
    (True, False, True)
    """

    of_matrix = True

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):  # type: ignore[arg-type]
            if not isinstance(value, str) and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{type(self).__name__}: expected {name} ≥ 0 and finite, got {value}.")

    @abstractmethod
    def penalty(self, w: Tensor) -> Tensor:
        """The value of the penalty."""

    @abstractmethod
    def prox(self, w: Tensor, step: float) -> Tensor:
        """The proximal map: argmin over x of step·penalty(x) + ½‖x − w‖².

        Args:
            w: the weights, `(..., m, n)` for a penalty of matrices.
            step: t ≥ 0, the learning rate.
        """


@dataclass(frozen=True)
class L1(Penalty):
    """The sum of magnitudes, `λ Σ|w|`; its proximal map moves every entry toward zero by tλ, and stops there.

    `prox(w, t) = sign(w) · max(|w| − tλ, 0)`.

    `penalty` sums over all entries of `w`, of any shape.

    Args:
        strength: λ ≥ 0.
    Raises:
        InputError: for a negative setting or step.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: one pass. Accuracy: one rounding; zeros are exact.
    Source: Donoho and Johnstone, Biometrika 81 (1994), §2.1.

    >>> L1(1.0).prox(torch.tensor([-3.0, 0.5, 2.0]), 0.5)
    tensor([-2.5000,  0.0000,  1.5000])
    """

    strength: float
    of_matrix = False

    def penalty(self, w: Float[Tensor, "*d"]) -> Float[Tensor, ""]:
        """The value of the penalty."""
        return self.strength * w.abs().sum()

    def prox(self, w: Float[Tensor, "*d"], step: float) -> Float[Tensor, "*d"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        _check(self, w, step)
        # Not softshrink, which gives zero for NaN: a diverged weight must not look like a pruned one.
        return w - w.clamp(-step * self.strength, step * self.strength)


@dataclass(frozen=True)
class L2(Penalty):
    """Half the sum of squares, `(λ/2) Σw²`; its proximal map shrinks all entries by the same factor.

    `prox(w, t) = w / (1 + tλ)`. `penalty` sums over all entries of `w`, of any shape. Under plain gradient descent both
    forms have the same fixed point; under Adam only the coupled form minimizes loss + penalty.

    Args:
        strength: λ ≥ 0.
        form: read by `gm.optim.Proximal` only. `"decoupled"` applies the proximal map after the step (to first order in
            t that is AdamW's decay `(1 − tλ)w`, but stable for every t); `"coupled"` adds λw to the gradient before the
            step, as Adam's `weight_decay` does, so that an adaptive step scales it too.
    Raises:
        InputError: for a negative setting or step, or another form.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: one pass. Accuracy: one rounding.
    Source: Loshchilov and Hutter (1711.05101), §2; Parikh and Boyd, Proximal Algorithms (2014), §6.1.1.

    >>> L2(2.0).prox(torch.tensor([4.0]), 0.5)
    tensor([2.])
    """

    strength: float
    form: Literal["decoupled", "coupled"] = "decoupled"
    of_matrix = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("decoupled", "coupled"):
            raise InputError(f"L2: expected form 'decoupled' or 'coupled', got {self.form!r}.")

    def penalty(self, w: Float[Tensor, "*d"]) -> Float[Tensor, ""]:
        """The value of the penalty."""
        return self.strength / 2 * w.square().sum()

    def prox(self, w: Float[Tensor, "*d"], step: float) -> Float[Tensor, "*d"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        _check(self, w, step)
        return w / (1 + step * self.strength)


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """The sum of L1 and L2, `λ₁ Σ|w| + (λ₂/2) Σw²`: zeros as under L1, and correlated weights share as under L2.

    `prox(w, t) = sign(w) · max(|w| − tλ₁, 0) / (1 + tλ₂)`.

    `penalty` sums over all entries of `w`, of any shape.

    Args:
        l1: λ₁ ≥ 0.
        l2: λ₂ ≥ 0.
    Raises:
        InputError: for a negative setting or step.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: two passes. Accuracy: two roundings; zeros are exact.
    Source: Zou and Hastie, J. R. Stat. Soc. B 67 (2005), §2; Parikh and Boyd (2014), §6.5.3.

    >>> ElasticNet(1.0, 2.0).prox(torch.tensor([3.0, 0.5]), 0.5)
    tensor([1.2500, 0.0000])
    """

    l1: float
    l2: float
    of_matrix = False

    def penalty(self, w: Float[Tensor, "*d"]) -> Float[Tensor, ""]:
        """The value of the penalty."""
        return L1(self.l1).penalty(w) + L2(self.l2).penalty(w)

    def prox(self, w: Float[Tensor, "*d"], step: float) -> Float[Tensor, "*d"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        return L2(self.l2).prox(L1(self.l1).prox(w, step), step)


@dataclass(frozen=True)
class Nuclear(Penalty):
    """The sum of singular values, `λ Σσᵢ`: L1 of the spectrum, which gives low rank.

    `prox(W, t) = U diag(max(σ − tλ, 0)) Vᵀ`. `penalty` is one value for each matrix of `w` (..., m, n). The proximal
    map of a matrix that is not finite is NaN; the other matrices of the batch are not affected.

    Args:
        strength: λ ≥ 0.
    Raises:
        InputError: for a negative setting or step.
        ShapeError: for a vector.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: one float64 SVD. Accuracy: one rounding of the dtype; singular values below the threshold are zero to that
    rounding.
    Source: Cai, Candès and Shen, SIAM J. Optim. 20 (2010), theorem 2.1.

    >>> Nuclear(1.0).prox(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
    tensor([[2., 0.],
            [0., 0.]])
    """

    strength: float

    def penalty(self, w: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b"]:
        """The value of the penalty."""
        _check(self, w, 0.0)
        return self.strength * torch.linalg.svdvals(_wide(w)).sum(-1)

    def prox(self, w: Float[Tensor, "*b m n"], step: float) -> Float[Tensor, "*b m n"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        return _on_spectrum(self, w, step, "less", step * self.strength)


@dataclass(frozen=True)
class SpectralNorm(Penalty):
    """The constraint `‖W‖₂ ≤ bound`: zero inside, infinite outside; its proximal map is the nearest matrix inside.

    `prox(W, t) = U diag(min(σ, bound)) Vᵀ` for every t. `penalty` is 0 or ∞ for each matrix of `w` (..., m, n); a norm
    up to max(m, n)·ε above the bound counts as inside. The proximal map of a matrix that is not finite is NaN.

    Args:
        bound: the largest singular value, ≥ 0.
    Raises:
        InputError: for a negative setting or step.
        ShapeError: for a vector.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: one float64 SVD. Accuracy: one rounding of the dtype.
    Source: Parikh and Boyd, Proximal Algorithms (2014), §6.7.3.

    >>> SpectralNorm(1.0).prox(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    bound: float

    def penalty(self, w: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b"]:
        """The value of the penalty."""
        _check(self, w, 0.0)
        slack = 1 + max(w.shape[-2:]) * torch.finfo(w.dtype).eps
        inside = torch.linalg.matrix_norm(_wide(w), 2) <= self.bound * slack
        return torch.where(inside, 0.0, math.inf)

    def prox(self, w: Float[Tensor, "*b m n"], step: float) -> Float[Tensor, "*b m n"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        return _on_spectrum(self, w, step, "at_most", self.bound)


@dataclass(frozen=True)
class Orthogonal(Penalty):
    """The distance of the smaller Gram matrix from the identity, `(λ/4) ‖WᵀW − I‖²_F` (`WWᵀ` where W is wide).

    `prox(W, t) = U diag(s) Vᵀ` with s ≥ 0 the root of `tλ s³ + (1 − tλ) s = σ`. As t → ∞ it is the polar factor.
    `penalty` is one value for each matrix of `w` (..., m, n). It is not convex: where σ = 0 and tλ > 1 there are many
    minimizers, and one is returned. The proximal map of a matrix that is not finite is NaN.

    Args:
        strength: λ ≥ 0.
    Raises:
        InputError: for a negative setting or step.
        ShapeError: for a vector.
        DtypeError: for a tensor that is not of a real floating dtype.
    Cost: one float64 SVD. Accuracy: one rounding of the dtype.
    Source: the stationarity condition of each singular value; the penalty of Brock et al. (1609.07093), §3.

    >>> w = Orthogonal(1.0).prox(torch.diag(torch.tensor([3.0, 1.0])), 1.0)  # 3^(1/3), and 1 stays
    >>> w.diagonal()
    tensor([1.4422, 1.0000])
    """

    strength: float

    def penalty(self, w: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b"]:
        """The value of the penalty."""
        _check(self, w, 0.0)
        tall = _wide(w if w.shape[-2] >= w.shape[-1] else w.mT)
        eye = torch.eye(tall.shape[-1], dtype=tall.dtype, device=w.device)
        # Near an orthogonal matrix the rounding of a product in bfloat16 is larger than the distance.
        with without_autocast(w.device.type):
            return self.strength / 4 * (tall.mT @ tall - eye).square().sum((-2, -1))

    def prox(self, w: Float[Tensor, "*b m n"], step: float) -> Float[Tensor, "*b m n"]:
        """The proximal map of `w` with step t.

        Args:
            w: the weights.
            step: t ≥ 0, the learning rate.
        """
        return _on_spectrum(self, w, step, "cubic", step * self.strength)


PROX: dict[str, Callable[..., Penalty]] = {
    "l1": L1,
    "l2": L2,
    "elastic_net": ElasticNet,
    "nuclear": Nuclear,
    "spectral_norm": SpectralNorm,
    "orthogonal": Orthogonal,
}


def _check(penalty: Penalty, w: Tensor, step: float) -> None:
    name = type(penalty).__name__
    if not w.is_floating_point():
        raise DtypeError(f"{name}: expected a real floating dtype, got {w.dtype}. Convert with .to(torch.float32).")
    if penalty.of_matrix and w.ndim < 2:
        raise ShapeError(
            f"{name}: expected matrices (..., m, n), got {tuple(w.shape)}. For vectors there are L1 and L2."
        )
    if not (step >= 0 and math.isfinite(step)):
        raise InputError(f"{name}.prox: expected a step ≥ 0 and finite, got {step}.")


def _wide(w: Tensor) -> Tensor:
    """LAPACK has no half types."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _on_spectrum(penalty: Penalty, w: Tensor, step: float, change: str, by: float) -> Tensor:
    """U η(σ) Vᵀ of every matrix: the minimizer for a penalty of the singular values alone (Lewis 1995)."""
    _check(penalty, w, step)
    return _prox_ex(w, change, by)[0] if w.numel() else w.clone()


def _cubic(sigma: Tensor, c: float) -> Tensor:
    """The largest root s of c·s³ + (1 − c)·s = σ ≥ 0, from max(1, σ), where the left side is convex and above σ."""
    s = sigma.clamp_min(1.0)
    for _ in range(NUM_NEWTON):
        slope = 3 * c * s.square() + (1 - c)
        s = s - torch.where(slope > 0, (c * s**3 + (1 - c) * s - sigma) / slope, 0.0)
    return s.clamp_min(0)


CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "less": lambda s, by: (s - by).clamp_min(0),
    "at_most": lambda s, by: s.clamp_max(by),
    "cubic": _cubic,
}
"""What becomes of the singular values."""


@differentiable(
    of_spectrum(lambda s, change, by: CHANGES[change](s, by)),
    shapes=lambda a, **_: torch.empty_like(a),
    methods=("svd",),
    a=2,
)
def _prox_ex(a: Tensor, change: str, by: float) -> tuple[Tensor, Certificate]:
    x = a.to(torch.float64).reshape(-1, *a.shape[-2:])
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, v, ok = lapack.svd(torch.where(finite, x, 0.0))
    value = (u * CHANGES[change](s, by)[:, None, :]) @ v.mT
    value = torch.where(finite & ok[:, None, None], value, math.nan).reshape(a.shape).to(a.dtype)
    return value, uncertified(a.shape[:-2], a.device, methods=("svd",), code=0)
