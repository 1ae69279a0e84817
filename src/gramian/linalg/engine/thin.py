"""A matrix times a few columns in float64, in the order of the factors that this processor multiplies faster.

A Z is also (Zᵀ Aᵀ)ᵀ. For an A stored by rows and 16 columns MKL takes half as long for the first on a Xeon with AMX,
and two to three times as long on an EPYC (Zen 4): so the two are timed once in a process. The last bits may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg.engine.cost import is_fixed

LEAST = 1 << 14
"""Entries of a matrix from which the order is worth a measurement, which takes 3 ms."""


def times(a: Tensor, z: Tensor) -> Tensor:
    """a z (B, m, k) or (m, k), for a (…, m, n) and z (…, n, k) in float64."""
    by_columns = a.stride(-2) == 1
    return (z.mT @ a.mT).mT if by_columns or (a.numel() >= LEAST and turned(a.device.type)) else a @ z


def turned(device: str) -> bool:
    """Whether (Zᵀ Aᵀ)ᵀ is faster than A Z for an A stored by rows."""
    if device != "cpu":
        return False
    if is_fixed():
        return "amx_bf16" not in getattr(torch.cpu, "get_capabilities", dict)()
    from gramian.linalg.engine.measuring import turned  # which needs probes, which need this file

    return turned(torch.get_num_threads())
