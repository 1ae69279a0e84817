"""WhitenedMuon is its formula: against a naive float64 reference, exact moments, and Muon where there is no metric."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from gramian import random
from gramian.errors import InputError
from gramian.optim import Muon, WhitenedMuon
from steps import LR, gradients, run

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")


def polar(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


class Side:
    """A second moment as a full matrix of low rank, followed by orthogonal iteration."""

    def __init__(self, size: int, rank: int) -> None:
        self.size = size
        rank = min(rank, size)
        self.q = random.orthogonal(size, rank, generator=seeded(size), dtype=torch.float64)
        self.values = torch.zeros(rank).double()
        self.trace = 0.0

    def follow(self, square: Tensor, beta: float, damping: float = 0.1) -> None:
        self.trace = beta * self.trace + (1 - beta) * float(square.trace())
        mean = beta * self.q @ torch.diag(self.values) @ self.q.T + (1 - beta) * square
        shift = max(0.1 * damping / self.size, 1e-7) * self.trace
        self.q, r = torch.linalg.qr((mean + shift * torch.eye(self.size)) @ self.q)
        self.values = (r.diagonal().abs() - shift).clamp_min(0)

    def power(self, damping: float) -> Tensor:
        """(M + λ)^(-1/2), M's small eigenvalues all alike."""
        num = self.size - len(self.values)
        rest = max(self.trace - float(self.values.sum()), 0.0) / max(num, 1)
        extra = damping * self.trace / self.size
        inside = self.q @ torch.diag((self.values + extra) ** -0.5) @ self.q.T
        outside = torch.eye(self.size).double() - self.q @ self.q.T
        return inside + outside * (rest + extra) ** -0.5


def naive(
    grads: list[Tensor], rank: int, refresh: int = 1, damping: float = 0.1, momentum: float = 0.9, nesterov: bool = True
) -> Tensor:
    m, n = grads[0].shape
    left, right = Side(m, rank), Side(n, rank)
    b = w = torch.zeros(m, n, dtype=torch.float64)
    for step, g in enumerate(grads):
        if step % refresh == 0:
            left.follow(g @ g.T, 0.9, damping)
            right.follow(g.T @ g, 0.9, damping)
        b = momentum * b + (1 - momentum) * g
        p, q = left.power(damping), right.power(damping)
        d = p @ polar(p @ (momentum * b + (1 - momentum) * g if nesterov else b) @ q) @ q
        w = w - LR * math.sqrt(m / n) * math.sqrt(min(m, n)) * d / torch.linalg.matrix_norm(d)
    return w


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_nesterov": {"nesterov": False},
    "no_momentum": {"momentum": 0.0},
    "refresh": {"refresh": 3},
    "damping": {"damping": 3.0},
}


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_agrees_with_the_formula(name: str, shape: tuple[int, int], rank: int) -> None:
    grads = gradients(shape)
    found = run(WhitenedMuon, grads, rank=rank, rtol=1e-9, **OPTIONS[name])
    torch.testing.assert_close(found, naive(grads, rank, **OPTIONS[name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_it_does_not_see_the_scale(scale: float) -> None:
    grads = gradients((6, 6))
    found = run(WhitenedMuon, [g * scale for g in grads], rank=3, rtol=1e-9)
    torch.testing.assert_close(found, naive(grads, 3), rtol=0, atol=2e-6)


def test_strong_damping_is_muon() -> None:
    grads = gradients((6, 9))
    found = run(WhitenedMuon, grads, damping=1e12, rtol=1e-9)
    torch.testing.assert_close(found, run(Muon, grads, momentum=0.9, rtol=1e-9), rtol=1e-6, atol=1e-8)


def test_it_finds_the_leading_eigenvectors() -> None:
    """Of gradients from one distribution: the step is that of the exact second moments of rank 2 and a flat rest."""
    scale = torch.tensor([30.0, 10.0, *[1.0] * 18], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(20, 20, generator=seeded(7), dtype=torch.float64)).Q
    w = nn.Parameter(torch.zeros(400, 20, dtype=torch.float64))
    optimizer = WhitenedMuon([w], part_size=None, rank=2)
    for step in range(30):
        w.grad = torch.randn(400, 20, generator=seeded(step), dtype=torch.float64) * scale @ q.T
        optimizer.step()
    basis, values = optimizer.state[w]["right_basis"], optimizer.state[w]["right_values"][0]
    assert (basis.T @ q[:, :2]).abs().diagonal().min() > 0.999
    unit = 4.0 ** float(optimizer.state[w]["unit"])
    weight = 1 - 0.9**30  # the mean is not corrected for its start at zero
    torch.testing.assert_close(values * unit / weight, 400 * scale[:2].square(), rtol=0.05, atol=0)


def test_no_step_of_that_length_descends_faster() -> None:
    """Against random steps of the same norm ‖P⁻¹ D Q⁻¹‖₂, by the inner product with the gradient."""
    g = gradients((6, 5))[0]
    step = -run(WhitenedMuon, [g], rank=3, rtol=1e-9)
    left, right = Side(6, 3), Side(5, 3)
    left.follow(g @ g.T, 0.9)
    right.follow(g.T @ g, 0.9)
    p, q = left.power(0.1), right.power(0.1)

    def gain(d: Tensor) -> float:
        length = torch.linalg.matrix_norm(torch.linalg.solve(p, d) @ torch.linalg.inv(q), 2)
        return float((g * d).sum() / length)

    rivals = [g, polar(g), p @ polar(g) @ q, *(step + 0.1 * step.norm() * polar(x) for x in gradients((6, 5), seed=3))]
    assert all(gain(step) > gain(d) * (1 + 1e-6) for d in rivals)


def test_bases_stay_orthonormal() -> None:
    """In float32 over many steps, also where gradients never fill them."""
    params = [nn.Parameter(torch.zeros(40, 30)) for _ in range(4)]
    optimizer = WhitenedMuon(params, damping=1e-12)
    q = torch.linalg.qr(torch.randn(40, 2, generator=seeded(1))).Q
    for step in range(300):
        g = torch.randn(40, 30, generator=seeded(step))
        params[0].grad, params[1].grad = g, q @ (q.T @ g)
        params[2].grad, params[3].grad = q @ q.T @ torch.ones_like(g), torch.ones_like(g)
        optimizer.step()
    for p in params:
        for basis in (optimizer.state[p]["left_basis"], optimizer.state[p]["right_basis"]):
            torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=0, atol=2e-3)
    # Of the exact rank: all but two values are nothing.
    values = optimizer.state[params[1]]["left_values"][0]
    assert values[2:].max() < 1e-5 * values[0]


def test_zeros_change_no_metric() -> None:
    """They shorten the means of both sides alike, and before the first gradient there is nothing to shorten."""
    w, other = (nn.Parameter(torch.zeros(6, 6, dtype=torch.float64)) for _ in range(2))
    optimizer, plain = (WhitenedMuon([p], lr=LR, rank=2) for p in (w, other))
    for g in gradients((6, 6)):
        other.grad = g.clone()
        plain.step()
    for g in [*[torch.zeros(6, 6)] * 3, *gradients((6, 6)), *[torch.zeros(6, 6)] * 3]:
        w.grad = g.double()
        optimizer.step()
    found, wanted = optimizer.state[w], plain.state[other]
    torch.testing.assert_close(found["trace"], 0.9**3 * wanted["trace"])
    for side in ("left", "right"):
        torch.testing.assert_close(found[f"{side}_values"], 0.9**3 * wanted[f"{side}_values"], rtol=1e-3, atol=0)
        torch.testing.assert_close(found[f"{side}_basis"], wanted[f"{side}_basis"], rtol=0, atol=1e-2)


def test_a_rank_cannot_be_changed_on_the_way() -> None:
    w = nn.Parameter(torch.zeros(6, 6))
    optimizer = WhitenedMuon([("w", w)], rank=4)
    w.grad = torch.ones(6, 6)
    optimizer.step()
    later = WhitenedMuon([("w", w)], rank=2)
    with pytest.raises(InputError, match=r"'left_basis' of 'w' has shape \(6, 4\), and \(6, 2\) is wanted"):
        later.load_state_dict(optimizer.state_dict() | {"param_groups": later.state_dict()["param_groups"]})


def test_the_direction_that_dominates_still_descends() -> None:
    """Along a part of the gradients a thousand times as large as the rest, the step is small, but never uphill."""
    u, v = torch.ones(128) / 128**0.5, torch.linspace(-1, 1, 128)
    v = v / v.norm()
    for rtol in (0.1, 1e-4):
        w = nn.Parameter(torch.zeros(128, 128))
        optimizer = WhitenedMuon([w], lr=1.0, rtol=rtol)
        along = []
        for step in range(40):
            w.grad = 1000 * torch.outer(u, v) + torch.randn(128, 128, generator=seeded(step))
            before = w.detach().clone()
            optimizer.step()
            along.append(float(u @ (before - w.detach()) @ v))
        assert min(along[10:]) > 0
        assert max(along[10:]) < 0.01  # Muon's is one


def test_an_unseen_matrix_takes_muons_step() -> None:
    """A momentum from elsewhere and zero gradients: there is no metric yet, and no direction is left out."""
    w = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    adamw = torch.optim.AdamW([w])
    w.grad = gradients((6, 6))[0]
    adamw.step()
    optimizer = WhitenedMuon([w], lr=LR, rank=2, rtol=1e-9)
    optimizer.load_adamw(adamw)
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(before - w.detach(), LR * polar(gradients((6, 6))[0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number, at least 1, got 0"),
        ({"rank": 2.5}, r"rank must be .*, got 2\.5"),
        ({"damping": 0.0}, r"damping must be in \(0, ∞\), got 0\.0"),
        ({"moment_beta": 1.0}, "moment_beta must be in"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WhitenedMuon([{"params": [nn.Parameter(torch.zeros(3, 3))], **options}])
