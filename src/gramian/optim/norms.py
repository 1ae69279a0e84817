"""Norms of gradients on a CPU, of the same parameters in every step: in few calls where they are small."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Norms"]

ROWS = 1 << 15
"""Entries up to which gradients are copied to the rows of one tensor: a norm of each by itself takes longer."""


class Norms:
    """The norms of the gradients of some parameters.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self._rows: Tensor | None = None
        longest = max((p.numel() for p in params), default=0)
        is_plain = all(not hasattr(p, "placements") and p.is_cpu and p.dtype == torch.float32 for p in params)
        if is_plain and 0 < longest * len(params) <= ROWS:
            self._rows = torch.zeros(len(params), longest)
            self._parts = [row[: p.numel()].view(p.shape) for p, row in zip(params, self._rows, strict=True)]

    def finite(self, grads: list[Tensor]) -> Tensor | None:
        """The norm of each gradient, (P,), if these show that all of them and their squares are finite.

        Where it is `None`, `gramian.optim.sharding.not_finite` tells which are not, if any: it asks the other ranks
        too, and a GPU without waiting.
        """
        if not grads or not all(type(g) is Tensor and g.is_cpu for g in grads):
            return None
        dtypes = {torch.float32}
        if self._rows is not None and all(g.dtype == torch.float32 for g in grads):
            torch._foreach_copy_(self._parts, grads)
            found = torch.linalg.vector_norm(self._rows, dim=1)
        else:
            norms = torch._foreach_norm(grads)
            dtypes = {norm.dtype for norm in norms}
            if dtypes != {torch.float32}:
                wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
                norms = [norm.to(wide) for norm in norms]
            found = torch.stack(norms)
        # A norm in bfloat16 or float16 is rounded by far less than the factor of two. NaN is not less than anything.
        most = min(torch.finfo(dtype).max for dtype in dtypes) ** 0.5 / 2
        return found if all(norm < most for norm in found.tolist()) else None
