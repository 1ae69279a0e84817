"""Matrices that are used only through their products with vectors: dense, sparse, or any object that multiplies."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gramian.errors import DtypeError, ShapeError
from gramian.linalg.engine.loading import check, check_dtype
from gramian.linalg.engine.scaling import exponent_of, scale


@runtime_checkable
class LinearMap(Protocol):
    """A linear map from n to m numbers, such as a Jacobian or a Hessian.

    Values are real. An object may also have a `dtype` and a `device`, those of the vectors it takes: float32 on the CPU
    where it has none.

    Attributes:
        shape: (m, n).

    >>> class Twice:
    ...     shape = (3, 3)
    ...     def matvec(self, x): return 2 * x
    ...     def matmat(self, x): return 2 * x
    ...     def adjoint(self): return self
    >>> isinstance(Twice(), LinearMap)
    True
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""
        ...

    def matvec(self, x: Tensor, /) -> Tensor:
        """A x of x (n,)."""
        ...

    def matmat(self, x: Tensor, /) -> Tensor:
        """A X of X (n, b)."""
        ...

    def adjoint(self) -> LinearMap:
        """The map of Aᵀ."""
        ...


class TensorMap:
    """A dense tensor or a sparse matrix as a `LinearMap`.

    Args:
        a: `(..., m, n)` dense, or `(m, n)` sparse.
        adjoint: the map of Aᵀ, where it is known already.

    >>> TensorMap(torch.eye(2).to_sparse_csr()).matvec(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, a: Tensor, *, adjoint: TensorMap | None = None) -> None:
        self.a = a
        self.shape = tuple(a.shape)
        self.dtype = a.dtype
        self.device = a.device
        self._adjoint = adjoint

    def matvec(self, x: Tensor) -> Tensor:
        """A x of x (..., n)."""
        return self.matmat(x[..., None])[..., 0]

    def matmat(self, x: Tensor) -> Tensor:
        """A X of X (..., n, b)."""
        return self.a @ x

    def adjoint(self) -> TensorMap:
        """The map of Aᵀ; a sparse one is transposed once and kept."""
        if self._adjoint is None:
            flipped = self.a.mT if self.a.layout == torch.strided else self.a.t().to_sparse_csr()
            self._adjoint = TensorMap(flipped, adjoint=self)
        return self._adjoint


class ScaledMap:
    """Any `LinearMap` times a power of two, with results in float64: the operand of the Krylov methods."""

    def __init__(self, inner: Any, factor: float = 1.0) -> None:
        self.inner, self.factor = inner, factor
        self.shape = tuple(inner.shape)
        self.dtype = getattr(inner, "dtype", torch.float32)
        self.device = torch.device(getattr(inner, "device", "cpu"))

    def matmat(self, x: Tensor) -> Tensor:
        """factor · A X, in the inner map's dtype, returned in float64."""
        return self.inner.matmat(x.to(self.dtype)).to(torch.float64) * self.factor

    def matvec(self, x: Tensor) -> Tensor:
        """factor · A x."""
        return self.inner.matvec(x.to(self.dtype)).to(torch.float64) * self.factor

    def adjoint(self) -> ScaledMap:
        """factor · Aᵀ."""
        return ScaledMap(self.inner.adjoint(), self.factor)


def scaled_map(a: Any, start: Tensor) -> tuple[ScaledMap, Tensor, bool]:
    """A map scaled by the size of its products with the rows of `start` (1, r, n), a power of two; the exponent e (1,)
    with A = scaled · 2^e, on the CPU; and whether those products are finite.
    """
    image = ScaledMap(a).matmat(start[0].mT)[None]
    exponent = exponent_of(image.nan_to_num(posinf=0.0)).cpu()
    factor = float(scale(torch.ones(1, dtype=torch.float64, device="cpu"), -exponent))
    return ScaledMap(a, factor), exponent, bool(image.isfinite().all())


def is_dense(a: object) -> bool:
    """Whether `a` is a tensor that is not sparse."""
    return isinstance(a, Tensor) and a.layout == torch.strided


def as_linear_map(name: str, a: object) -> LinearMap:
    """A dense tensor, a sparse matrix (CSR or COO) or an object with the protocol as a `LinearMap`.

    >>> as_linear_map("f", torch.eye(3)).shape
    (3, 3)
    """
    if is_dense(a):
        return TensorMap(check(name, a))
    if isinstance(a, Tensor):
        if a.ndim != 2:
            raise ShapeError(
                f"{name}: expected a sparse matrix (m, n), got {tuple(a.shape)}. Sparse ones do not batch."
            )
        check_dtype(name, a)
        return TensorMap(a if a.layout == torch.sparse_csr else a.to_sparse_csr())
    if not isinstance(a, LinearMap):
        raise DtypeError(
            f"{name}: expected a tensor or an object with shape, matvec, matmat and adjoint(), got {type(a).__name__}. "
            "See gm.linalg.LinearMap."
        )
    if len(a.shape) != 2:
        raise ShapeError(f"{name}: expected a linear map of shape (m, n), got {tuple(a.shape)}.")
    return a


def made_dense(name: str, a: object, *, real: bool = True) -> Tensor:
    """A dense tensor as it is, complex only if not `real`; a sparse matrix or a map by its product with the identity.

    >>> made_dense("f", torch.eye(2).to_sparse_csr()).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if isinstance(a, Tensor) and is_dense(a):
        return check(name, a, real=real)
    own = ScaledMap(as_linear_map(name, a))
    eye = torch.eye(own.shape[-1], dtype=torch.float64, device=own.device)
    return own.matmat(eye).to(own.dtype)
