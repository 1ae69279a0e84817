"""Gram matrices of data: xᵀx and xᵀx / n, exactly symmetric, accumulated in float32 or wider."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import ShapeError
from gramian.linalg.batch import check


def syrk(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d d"]:
    """The Gram matrix of the columns of X.

    syrk(X) = XᵀX, exactly symmetric.

    Arguments: `x` (..., n, d), n samples of d features. Half types are accumulated and returned in float32, also under
    autocast, since the sum over samples neither fits float16 nor survives bfloat16's 8 bits.
    Raises: `ShapeError`, `DtypeError`. Cost: one product. Accuracy: nε ‖X‖²_F.
    Source: Higham, Accuracy and Stability (2002), §3.5.

    >>> syrk(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[10., 14.],
            [14., 20.]])
    """
    check("syrk", x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        gram = wide.mT @ wide
    # A general product may round (i, j) and (j, i) differently.
    return gram.tril() + gram.tril(-1).mT


def second_moment(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d d"]:
    """The second moment of the rows of X.

    second_moment(X) = XᵀX / n = (1/n) Σ xᵢxᵢᵀ, exactly symmetric.

    Arguments: `x` (..., n, d), n ≥ 1 samples of d features; half types as in `syrk`.
    Raises: `ShapeError`, also for n = 0; `DtypeError`. Cost: one product. Accuracy: nε times the mean ‖xᵢ‖².
    Source: Higham, Accuracy and Stability (2002), §3.5.

    >>> second_moment(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """
    check("second_moment", x)
    if not x.shape[-2]:
        raise ShapeError(f"second_moment: expected at least one sample (..., n ≥ 1, d), got {tuple(x.shape)}.")
    return syrk(x) / x.shape[-2]
