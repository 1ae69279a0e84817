"""Wide matrices, decomposed in float32: what a cut loses stays the least there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gramian.compression.budget.weighted import WeightedSVD, decompose
from gramian.compression.calibration import wide
from gramian.compression.calibration.shrinkage import roots
from gramian.compression.calibration.targets import targets
from gramian.compression.calibration.weighting import Weighting
from gramian.compression.calibration.wide import eigen
from gramian.gram import Gram


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 from 64 on, with as many directions apart as three large ones ask for."""
    monkeypatch.setattr(wide, "WIDE", 64)
    monkeypatch.setattr(wide, "SHARE", 8)


def moment(dim: int, values: Tensor) -> Tensor:
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    return q * values @ q.mT


def outlying(dim: int) -> Tensor:
    """Eigenvalues of which three are thousands of times the others, as in language models."""
    values = torch.arange(1, dim + 1, dtype=torch.float64).pow(-0.7)
    values[:3] = torch.tensor([3e3, 1e3, 5e2])
    return values


def test_small_eigenvalues_survive_beside_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    wanted = outlying(256)
    m = moment(256, wanted)
    values, vectors = eigen(m)
    assert (values.dtype, vectors.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(values.flip(0), wanted, rtol=2e-5, atol=0)
    plain = torch.linalg.eigvalsh(m.float()).double().flip(0)
    assert ((plain - wanted) / wanted).abs().max() > 5e-4  # which float32 by itself does not give
    v = vectors.double()
    assert (v.mT @ v - torch.eye(256)).abs().max() < 1e-5
    assert (v.mT @ m @ v - values.diag())[:-3, :-3].abs().max() < 1e-5


@pytest.mark.parametrize("rank", [0, 1, 3, 100, 256])
def test_directions_that_are_not_there_have_no_eigenvalue(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    narrow(monkeypatch)
    values = torch.cat([torch.linspace(1.0, 2.0, rank, dtype=torch.float64), torch.zeros(256 - rank)])
    found, vectors = eigen(moment(256, values))
    assert int((found > 0).sum()) == rank
    torch.testing.assert_close(found.flip(0)[:rank], values[:rank].flip(0), rtol=1e-5, atol=0)
    v = vectors.double()
    assert (v.mT @ v - torch.eye(256)).abs().max() < 1e-5


@pytest.mark.parametrize(("m", "n"), [(128, 128), (192, 96), (96, 192)])
def test_a_cut_of_a_wide_matrix_loses_no_more(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    layer = nn.Linear(n, m, bias=False)
    ((target,), _) = targets(nn.Sequential(layer), None, ())
    grams = [
        Gram.of(1e6 * moment(dim, outlying(dim)), torch.zeros(dim, dtype=torch.float64), torch.tensor(1e6).double())
        for dim in (n, m)
    ]
    w = layer.weight.detach().double()

    def lost(s: WeightedSVD, rank: int) -> float:
        e = w - s.left[:, :rank].double() @ s.right[:rank].double()
        return float((grams[1].matrix @ e @ grams[0].matrix * e).sum())

    exact = decompose(target, Weighting(roots(grams[0], 1e6), roots(grams[1], 1e6), None, True))
    narrow(monkeypatch)
    found = decompose(target, Weighting(roots(grams[0], 1e6), roots(grams[1], 1e6), None, True))
    assert (exact.left.dtype, found.left.dtype, found.values.dtype) == (torch.float64, torch.float32, torch.float64)
    for rank in (1, 8, 24, 48):
        assert lost(found, rank) == pytest.approx(lost(exact, rank), rel=5e-4)
        told = [float(s.values[rank:].square().sum()) for s in (exact, found)]
        assert told[1] == pytest.approx(told[0], rel=5e-4)
    torch.testing.assert_close(found.left @ found.right, w.float(), rtol=0, atol=1e-3 * float(w.abs().max()))
    rows = exact.right @ grams[0].matrix @ exact.right.mT
    torch.testing.assert_close(exact.moments, rows.diagonal(), rtol=1e-2, atol=0)
