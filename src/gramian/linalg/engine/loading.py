"""From the caller's tensor to finite, scaled matrices.

LAPACK raises for the whole batch, or spoils it, when one matrix holds NaN, and it overflows on products of large
entries. So `load` marks matrices that are not finite and puts the identity in their place, and scales every matrix by a
power of two, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError
from gramian.linalg.engine.rounding import norm
from gramian.linalg.engine.scaling import exponent_above, exponent_of, largest_entry, scale

T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

COMPLEX = (torch.complex128, torch.complex64)
REAL_FORM = "torch.cat([torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)], -2)"

NEGLIGIBLE = 10
"""Asymmetry and negative eigenvalues up to 10·n·ε(dtype)·‖M‖ count as rounding; the design's constant."""

Damping = float | int | Tensor


@dataclass(frozen=True)
class Loaded:
    """Matrices flattened to (B, m, n) as they came, with the powers of two that scale them, and which are finite.

    `at(dtype)` gives raw · 2^-down, finite and with entries below 1. It stands for the original · 2^-exponent.
    """

    raw: Tensor
    down: Tensor
    exponent: Tensor
    finite: Tensor
    shape: torch.Size
    dtype: torch.dtype
    asymmetric: Tensor | None = None

    def at(self, work: torch.dtype | None) -> Tensor:
        """The scaled matrices in `work`; in their own dtype, widened to at least float32, if None.

        In float32, entries 2^-126 times smaller than the largest lose bits; in float64 none do.
        """
        x = self.raw
        work = work or torch.promote_types(self.dtype, torch.float32)
        if not self.ordinary:
            eye = torch.eye(*x.shape[1:], dtype=x.dtype, device=x.device)
            x = torch.where(self.finite[:, None, None], x, eye)
        # float64 is scaled before it is narrowed, since float32 may not hold it; narrower types are widened first.
        if x.dtype == torch.float64:
            return scale(x, -self.down).to(work)
        return scale(x.to(work), -self.down, inplace=x.dtype != work)

    @cached_property
    def ordinary(self) -> bool:
        """Whether all are finite, as far as a CPU tells: another device is not waited for."""
        return self.raw.device.type == "cpu" and bool(self.finite.all())

    @cached_property
    def x(self) -> Tensor:
        """The scaled matrices in float64, exact."""
        return self.at(torch.float64)

    def rows(self, keep: Tensor | None) -> Loaded:
        """The matrices with the indices `keep`; all if None."""
        if keep is None:
            return self
        return replace(
            self,
            raw=self.raw[keep],
            down=self.down[keep],
            exponent=self.exponent[keep],
            finite=self.finite[keep],
            asymmetric=None if self.asymmetric is None else self.asymmetric[keep],
        )


_A_GRAM = "Pass a Gram matrix, such as gm.linalg.syrk(a)."
OF_RECTANGLES = {
    "inv": "Of other matrices gm.linalg.pinv gives the pseudoinverse.",
    "solve": "With more or fewer equations than unknowns gm.linalg.lstsq gives the least-squares solution.",
    "sign": "Of other matrices gm.linalg.polar gives the orthogonal factor.",
    "spectral_radius": "Other matrices have no eigenvalues; gm.linalg.spectral_norm gives the largest singular value.",
    "cond": "Of other matrices there is the condition number with p=2 and p=-2.",
    "sqrtm": _A_GRAM,
    "inv_root": _A_GRAM,
}
"""By function, what there is for a matrix that is not square."""


def check(name: str, a: object, *, square: bool = False, real: bool = True) -> Tensor:
    """`a` if it is a matrix or a batch of them, a complex one only if not `real`; otherwise an error that says what
    came and what was wanted."""
    if not isinstance(a, Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor, got {type(a).__name__}. Use torch.as_tensor first.")
    if a.is_nested:
        raise InputError(f"{name}: expected a dense tensor, got a nested one. Call it for each part in a.unbind().")
    if a.layout != torch.strided:
        kind = str(a.layout).removeprefix("torch.")
        raise InputError(f"{name}: expected a dense tensor, got one of layout {kind}. Use a.to_dense().")
    check_dtype(name, a, real=real)
    if a.ndim < 2:
        raise ShapeError(
            f"{name}: expected (..., m, n), got {tuple(a.shape)}. "
            "A vector becomes a matrix of one column by a[:, None], of one row by a[None, :]."
        )
    if square and a.shape[-1] != a.shape[-2]:
        raise ShapeError(
            f"{name}: expected square matrices (..., n, n), got {tuple(a.shape)}. "
            + OF_RECTANGLES.get(name, "It is defined for these alone.")
        )
    return a


def over(
    name: str, a: Any, dim: tuple[int, int], keepdim: bool, of: Callable[[Any], tuple[Tensor, T]]
) -> tuple[Tensor, T]:
    """`of` the matrices that the dimensions `dim` of `a` are; these stay with size 1 in the value if `keepdim`."""
    if dim == (-2, -1) and not keepdim:
        return of(a)
    if not isinstance(a, Tensor) or a.layout != torch.strided:
        raise InputError(f"{name}: dim and keepdim are for dense tensors. Leave them out.")
    check(name, a, real=False)
    first, second = (d + a.ndim if d < 0 else d for d in dim)
    if first == second or not 0 <= min(first, second) <= max(first, second) < a.ndim:
        raise InputError(f"{name}: expected two dimensions of {a.ndim}, got dim={dim}.")
    value, proof = of(a.movedim((first, second), (-2, -1)))
    if keepdim:
        for d in sorted((first, second)):
            value = value.unsqueeze(d)
    return value, proof


def check_dtype(name: str, a: Tensor, *, real: bool = True) -> None:
    """Raise where the dtype of `a` is not floating point, or is complex and the function takes only `real` ones."""
    if a.dtype in DTYPES or (a.dtype in COMPLEX and not real):
        return
    wanted = f"{name}: expected float64, float32, float16 or bfloat16, got {a.dtype}. "
    if not a.is_complex():
        raise DtypeError(f"{wanted}Convert with .to(torch.float32).")
    if not real:
        raise DtypeError(f"{name}: expected complex128 or complex64, got {a.dtype}. Convert with .to(torch.complex64).")
    raise DtypeError(
        f"{wanted}A cast would drop the imaginary part. Pass the real matrix {REAL_FORM}, which has every singular "
        "value of a twice, and every eigenvalue where a is Hermitian."
    )


def choose(name: str, method: str, methods: Collection[str]) -> None:
    """Raise for a method that the function does not have, and list those it has."""
    if method != "auto" and method not in methods:
        raise InputError(f"{name}: unknown method {method!r}. Use one of: auto, {', '.join(methods)}.")


def damping_of(name: str, damping: Damping, m: Tensor) -> Tensor:
    """`damping` as a flat (B,) float64 tensor; the caller gives one number, or one per matrix."""
    if not isinstance(damping, Tensor) and not (damping >= 0 and math.isfinite(damping)):
        raise InputError(f"{name}: expected damping ≥ 0 and finite, got {damping}.")
    value = torch.as_tensor(damping, dtype=torch.float64, device=m.device)
    try:
        return value.expand(m.shape[:-2]).reshape(-1)
    except RuntimeError as e:
        raise ShapeError(
            f"{name}: expected damping to be one number or of shape {tuple(m.shape[:-2])}, got {tuple(value.shape)}."
        ) from e


def load(a: Tensor, *, multiple: int = 1, at_least: Tensor | None = None) -> Loaded:
    """Flatten the batch, and find which matrices are finite and which power of two scales each.

    `multiple` makes the exponent divisible by p, so that p-th roots scale exactly. `at_least` (B,) is a magnitude, such
    as the damping, that must not overflow once it is scaled alike.
    """
    m, n = a.shape[-2:]
    x = a.detach().reshape(math.prod(a.shape[:-2]), m, n)
    peak = largest_entry(x)
    finite = peak.isfinite()
    peak = torch.where(finite, peak, 1.0)
    exponent = exponent_above(peak, multiple)
    if at_least is not None:
        nonzero = peak > 0 if x[0:1].numel() else finite
        other = exponent_of(at_least[:, None], multiple=multiple)
        exponent = torch.where(
            nonzero & (at_least <= 0), exponent, torch.where(nonzero, exponent.maximum(other), other)
        )
    return Loaded(x, exponent, exponent, finite, a.shape[:-2], a.dtype)


STRIP = 128
"""Rows that are compared at once."""


def unscaled(loaded: Loaded, *, within: float = 24) -> Loaded:
    """The matrices at their own scale where every |exponent| is at most `within`, which saves a copy."""
    if loaded.exponent.numel() and int(loaded.exponent.abs().amax()) > within:
        return loaded
    return replace(loaded, down=torch.zeros_like(loaded.down), exponent=torch.zeros_like(loaded.exponent))


def equals_transpose(m: Tensor) -> bool:
    """Whether m (..., n, n) is symmetric to the last bit: in strips, which takes half of the time of comparing all."""
    return all(
        torch.equal(m[..., i : i + STRIP, i:], m[..., i:, i : i + STRIP].mT) for i in range(0, m.shape[-1], STRIP)
    )


def symmetric_part(m: Tensor, loaded: Loaded) -> Loaded:
    """(M + Mᵀ)/2 of the matrices loaded from m, with a mark on those whose asymmetry is more than rounding."""
    if m.device.type == "cpu" and equals_transpose(m):
        return loaded
    x = loaded.x
    allowed = NEGLIGIBLE * m.shape[-1] * torch.finfo(m.dtype).eps * norm(x)
    asymmetric = norm(x - x.mT) > allowed
    # Halved before the sum, which is then exact except for its last bit.
    return replace(loaded, raw=x / 2 + x.mT / 2, down=torch.zeros_like(loaded.down), asymmetric=asymmetric)
