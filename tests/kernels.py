"""What lies below torch's operations: their number, and the order in which they sum.

As a pytest plugin (`pytest -p kernels`, in `make test-kernels`) it runs every test with the sums in the order that
GRAMIAN_ORDER, an integer, chooses: so a test that passes only with one processor's rounding fails.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Counts torch's operations and the entries of what they return: a cost that no other process changes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.entries += out.numel() if isinstance(out, Tensor) else 0
        return out


class OtherOrder(TorchDispatchMode):
    """Every inner product is summed in another order, which `seed` chooses; what is exact in any order stays exact.

    LAPACK gets rows and columns in another order where that permutes its answer and changes nothing else.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def order(self, n: int, device: torch.device) -> Tensor:
        """The same for the same n, so that equal calls give equal answers."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + n)
        return torch.randperm(n, generator=generator).to(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        change = CHANGES.get(func)
        dense = all(a.layout == torch.strided for a in args if isinstance(a, Tensor))
        return change(self, func, *args) if change and dense and not kwargs else func(*args, **kwargs)


def _product(mode, func, a, b):
    p = mode.order(a.shape[-1], a.device)
    return func(a.index_select(-1, p), b.index_select(-2 if b.ndim > 1 else 0, p))


def _added(mode, func, c, a, b, *rest):
    p = mode.order(a.shape[-1], a.device)
    return func(c, a.index_select(-1, p), b.index_select(-2 if b.ndim > 1 else 0, p), *rest)


def _eigh(mode, func, m, *rest):
    if not bool(m.isfinite().all()):
        return func(m, *rest)
    p = mode.order(m.shape[-1], m.device)
    lower = m.tril() + m.tril(-1).mT if not rest or rest[0] == "L" else m.triu() + m.triu(1).mT
    values, vectors = func(lower.index_select(-1, p).index_select(-2, p), *rest)
    return values, vectors.index_select(-2, p.argsort()) if vectors.numel() else vectors


def _svd(mode, func, a, *rest):
    p, q = mode.order(a.shape[-2], a.device), mode.order(a.shape[-1], a.device)
    u, s, vh = func(a.index_select(-2, p).index_select(-1, q), *rest)
    u = u.index_select(-2, p.argsort()) if u.numel() else u
    return u, s, vh.index_select(-1, q.argsort()) if vh.numel() else vh


def _qr(mode, func, a, *rest):
    # Row signs, and so R's, may differ: that is another kernel's right as well.
    p = mode.order(a.shape[-2], a.device)
    q, r = func(a.index_select(-2, p), *rest)
    return q.index_select(-2, p.argsort()) if q.numel() else q, r


CHANGES = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: _product,
    aten.dot.default: _product,
    aten.addmm.default: _added,
    aten.addmm_.default: _added,
    aten.addmv.default: _added,
    aten.baddbmm.default: _added,
    aten._linalg_eigh.default: _eigh,
    aten._linalg_svd.default: _svd,
    aten.linalg_qr.default: _qr,
}


@pytest.fixture(autouse=True)
def other_order():
    """Run the test under the order that GRAMIAN_ORDER chooses."""
    seed = int(os.environ.get("GRAMIAN_ORDER", "0"))
    if not seed:
        yield
        return
    with OtherOrder(seed):
        yield
