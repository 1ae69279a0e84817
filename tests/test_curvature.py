"""Curvature maps equal the dense matrices of torch.autograd, and their outermost eigenvalues those of eigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gramian as gm
from gramian.errors import ConvergenceError, InputError, ShapeError


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class OneLayerTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def cnn() -> nn.Module:
    conv = nn.Conv2d(1, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


CASES = {
    "mlp": (mlp, (5,)),
    "cnn": (cnn, (1, 4, 4)),
    "lstm": (LastOfLSTM, (4, 3)),
    "transformer": (OneLayerTransformer, (3, 4)),
    "tied": (Tied, (4,)),
}


def made(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model in float64 and two batches of different size."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double()
    return model, [(torch.randn(b, *shape).double(), torch.randint(3, (b,))) for b in (5, 2)]


def dense(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian, Gauss–Newton and empirical Fisher matrix by torch.func, from the mean over all samples."""
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    model.eval()

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        return functional_call(model, {k: t.view_as(p) for (k, p), t in zip(named.items(), parts, strict=True)}, (x,))

    def loss(theta: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(theta), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian: Any = torch.autograd.functional.hessian(loss, flat)
        j: Any = torch.autograd.functional.jacobian(outputs, flat)
    p = outputs(flat).softmax(-1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    g = torch.einsum("bc,bcn->bn", p - nn.functional.one_hot(y, 3), j)
    return hessian, torch.einsum("bcn,bcd,bdm->nm", j, middle, j) / len(y), g.T @ g / len(y)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_dense_matrices_and_their_top_eigenvalues(name):
    model, batches = made(name)
    model.train()
    objective = gm.Objective.classification()
    makers = (gm.operators.hessian, gm.operators.gauss_newton, gm.operators.fisher)
    maps = [make(model, batches, objective) for make in makers]
    n = maps[0].shape[0]
    products = [m.matmat(torch.eye(n, dtype=torch.float64)) for m in maps]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for curvature, found, wanted in zip(maps, products, dense(model, batches), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, found.T, rtol=0, atol=1e-13)
        values = torch.linalg.eigvalsh(wanted)
        top = values[values.abs().argsort(descending=True)[:5]]
        assert ((gm.linalg.eigvalsh_top(curvature, 5) - top).abs() <= 1e-6 * top.abs()).all()
    assert sum(s.stop - s.start for s in maps[0].slices.values()) == n == sum(p.numel() for p in model.parameters())


def test_linalg_takes_the_maps():
    model, batches = made("mlp")
    h = gm.operators.hessian(model, batches, gm.Objective.classification())
    matrix = dense(model, batches)[0]
    s = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(gm.linalg.spectral_norm(h), s[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(gm.linalg.svd_lowrank(h, 3)[1], s[:3], rtol=1e-3, atol=0)
    density = gm.linalg.spectral_density(h, rtol=1.0)
    for power in (1, 2):
        moment = (density.weights * density.nodes**power).sum()
        assert abs(moment - torch.linalg.matrix_power(matrix, power).trace() / len(matrix)) < 0.05 * s[0] ** power
    assert density.nodes[-1] <= s[0] * (1 + 1e-9)
    wide = gm.operators.hessian(nn.Linear(3, 1).double(), [(torch.randn(9, 3).double(), torch.zeros(9, 1).double())],
                                gm.Objective.regression())  # fmt: skip
    wanted = torch.linalg.cond(wide.matmat(torch.eye(4, dtype=torch.float64)))
    torch.testing.assert_close(gm.linalg.cond(wide), wanted, rtol=1e-4, atol=0)


def test_a_plain_loss_and_what_is_refused():
    model, batches = made("mlp")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    x = torch.randn(gm.operators.hessian(model, batches, loss).shape[0], dtype=torch.float64)
    plain = gm.operators.hessian(model, batches, loss)
    torch.testing.assert_close(plain.matvec(x), dense(model, batches)[0] @ x)
    with pytest.raises(ShapeError, match="trainable parameters"):
        plain.matmat(torch.ones(2, 2))
    with pytest.raises(InputError, match=r"gm\.Objective"):
        gm.operators.gauss_newton(model, batches, loss)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no trainable"):
        gm.operators.hessian(model.requires_grad_(False), batches, loss)


class Diagonal:
    def __init__(self, d: Tensor) -> None:
        self.d, self.shape, self.dtype = d, (len(d), len(d)), d.dtype

    def matvec(self, x: Tensor) -> Tensor:
        return self.d * x

    def matmat(self, x: Tensor) -> Tensor:
        return self.d[:, None] * x

    def adjoint(self) -> Diagonal:
        return self


def test_top_eigenvalues_of_hard_maps():
    top = gm.linalg.eigvalsh_top
    d = torch.cat([torch.tensor([-5.0, 4.0, 4.0, 4.0, -2.0]), torch.linspace(-1, 1, 395)]).double()
    assert top(Diagonal(d), 5).tolist() == pytest.approx([-5, 4, 4, 4, -2], rel=1e-9)
    assert top(Diagonal(d), 3, which="largest").tolist() == pytest.approx([4, 4, 4], rel=1e-9)
    assert top(Diagonal(d), 2, which="smallest").tolist() == pytest.approx([-5, -2], rel=1e-9)
    assert top(Diagonal(1e300 * d), 1).tolist() == pytest.approx([-5e300])
    assert top(Diagonal(torch.full((50,), 7.0).double()), 4).tolist() == pytest.approx([7] * 4)
    assert top(Diagonal(torch.zeros(50).double()), 4).tolist() == [0] * 4
    assert top(Diagonal(torch.eye(50)[0].double()), 3).tolist() == pytest.approx([1, 0, 0], abs=1e-12)
    assert top(Diagonal(d.float()), 4).tolist() == pytest.approx([-5, 4, 4, 4], rel=1e-5)
    with pytest.raises(ConvergenceError, match="NaN"):
        top(Diagonal(d.where(d != -2, torch.nan)), 2)
    with pytest.raises(ConvergenceError, match="not symmetric"):
        top(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)).double().to_sparse_csr(), 2)
    with pytest.raises(InputError, match="from 1 to n"):
        top(Diagonal(d), 0)
    matrices = torch.stack([torch.diag(d[:6]), -torch.diag(d[:6])])
    assert top(matrices, 2).tolist() == [[-5, 4], [5, -4]]


def test_inspect_tells_the_eigenvalues_and_the_rate_of_sgd():
    model, batches = made("mlp")
    values = torch.linalg.eigvalsh(dense(model, batches)[0])
    values = values[values.abs().argsort(descending=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=4 / float(values.max()))
    stages = set()
    report = gm.inspect(
        model, batches, gm.Objective.classification(), optimizer=optimizer, curvature=True,
        progress=lambda what, done, total: stages.add(what),
    )  # fmt: skip
    found = [report.facts[f"Hessian λ{i}"] for i in "₁₂₃₄₅"]
    assert found == pytest.approx(values[:5].tolist(), rel=1e-3)
    wanted = torch.linalg.eigvalsh(dense(model, batches)[1])[-1]
    assert report.facts["Gauss–Newton λ₁"] == pytest.approx(float(wanted), rel=1e-3)
    assert "curvature" in stages
    assert "curvature" in report.looked_at
    assert any("is above 2 / λ" in note for note in report.notes)
    with pytest.raises(InputError, match="curvature"):
        gm.inspect(model, curvature=True)
