"""Singular values and vectors inside a derivative, which refuse to be differentiated where they have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.linalg.engine.derivative import guarded
from gramian.linalg.engine.transforms import pullback

DISTINCT = 1e-6
"""Singular values closer than this times the largest have vectors that no derivative can follow in float64."""


def singular_vectors(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, V of A (..., m, n) in float64 or complex128, thin; σ is NaN where a matrix is not finite.

    Differentiating them is a second derivative of what the caller computes. It needs distinct singular values: where
    two are equal, U and V turn at any rate.
    """
    u, s, v = _Svd.apply(a.to(torch.promote_types(a.dtype, torch.float64)))  # pyright: ignore[reportGeneralTypeIssues]
    return u, s, v


def _plain(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u, s, vh.mH


class _Svd(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        finite = a.isfinite().flatten(-2).all(-1)[..., None, None]
        u, s, v = _plain(torch.where(finite, a, torch.eye(*a.shape[-2:], dtype=a.dtype, device=a.device)))
        # Forward mode wants values and tangents of one layout.
        return u.contiguous(), torch.where(finite[..., 0], s, torch.nan), v.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, u, s, v = ctx.saved_tensors
        return _pull(a, u, s, v, grads)

    @staticmethod
    def jvp(ctx: Any, da: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, u, s, v = ctx.saved_tensors
        zero = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (u, s, v))
        # The transpose of the backward pass, which is linear: forward mode does not nest.
        tangents = pullback(lambda *grads: _pull(a, u, s, v, grads), *zero)[1](da)
        return tuple(x.contiguous() for x in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, a: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Svd.apply(a.movedim(in_dims[0], 0)), (0, 0, 0)


def _pull(a: Tensor, u: Tensor, s: Tensor, v: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    far = -s.detach().diff(dim=-1) > DISTINCT * s.detach()[..., :1]
    guarded(
        (far | ~s.detach()[..., :1].isfinite()).all(-1),
        "singular values: no second derivative where two of them are equal or nearly so: their vectors turn freely.",
    )
    return pullback(_plain, a)[1](grads)[0]
