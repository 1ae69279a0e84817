"""One wild gradient costs few steps, a storm of them ends, and ordinary gradients pass to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from gramian.optim import Muon
from gramian.optim.guard import FASTEST, FOLLOW, MOST, SLOWEST, init, limit_
from gramian.optim.registry import MATRIX_OPTIMIZERS

SHAPE = (12, 16)
LR = 0.2


def noise(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=seeded(step), dtype=torch.float64)


class Fit:
    """A linear least-squares problem, in batches, stepped by a matrix optimizer."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.x = torch.randn(256, SHAPE[1], generator=seeded(0), dtype=torch.float64)
        self.y = self.x @ torch.randn(SHAPE, generator=seeded(1), dtype=torch.float64).T
        self.w = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
        self.optimizer = MATRIX_OPTIMIZERS[name].optimizer([("w", self.w)], lr=LR, routes={"w": "matrix"})
        self.steps = 0

    def residual(self) -> Tensor:
        return self.x @ self.w.detach().double().T - self.y

    def loss(self) -> float:
        return float(self.residual().square().mean())

    def step(self, g: Tensor) -> None:
        self.w.grad = g.to(self.w.dtype)
        self.optimizer.step()
        self.steps += 1

    def train(self, steps: int) -> float:
        """The loss after so many steps of gradients of batches."""
        for _ in range(steps):
            rows = torch.randint(len(self.x), (64,), generator=seeded(1000 + self.steps))
            self.step(self.residual()[rows].T @ self.x[rows] / len(rows))
        return self.loss()


@pytest.mark.parametrize("spike", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_spike_costs_few_steps(name: str, spike: float) -> None:
    """Without a guard, the momentum points along it for 130 to 540 steps, and the loss is thousands of times larger."""
    hit, calm = Fit(name), Fit(name)
    for fit, wild in ((hit, spike), (calm, 0.3)):
        fit.train(40)
        fit.step(wild * noise(5))
    assert hit.train(40) < 2 * calm.train(20)


WILD: list[Callable[[Tensor, float], Tensor]] = [
    lambda g, big: g * math.nan,
    lambda g, big: torch.full_like(g, math.inf),
    lambda g, big: g * big,
    lambda g, big: g / big,
    lambda g, big: g * 0,
    lambda g, big: g * 1e4,
    lambda g, big: g,
]
"""A gradient of a storm, from noise and about the largest number of a dtype."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_it_learns_after_a_storm(name: str, dtype: torch.dtype) -> None:
    """Without a guard, the loss is larger after these eighty steps than before them."""
    fit = Fit(name, dtype)
    fit.train(5)
    for step in range(60):
        fit.step(
            WILD[int(torch.randint(len(WILD), (), generator=seeded(step)))](noise(step), torch.finfo(dtype).max ** 0.9)
        )
    storm = fit.loss()
    assert fit.train(80) < 0.1 * storm
    assert all(value.isfinite().all() for value in fit.optimizer.state[fit.w].values())


def test_ordinary_gradients_pass_to_the_bit() -> None:
    g = torch.randn(4, *SHAPE, generator=seeded(0))
    state = init(g)
    for factor in (1.0, 9.0, 0.01, 0.0, 0.05):
        given = factor * g
        kept = given.clone()
        limit_(given, state)
        assert torch.equal(given, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_larger_counts_for_ten_times_the_usual(dtype: torch.dtype) -> None:
    """Beside a neighbor in the stack that stays as it is; also where the ratio overflows, it stays finite."""
    state = init(torch.zeros(2, 3, 3, dtype=dtype))
    limit_(torch.ones(2, 3, 3, dtype=dtype), state)
    for step, spike in enumerate((1e6, 1e30, torch.finfo(dtype).max)):
        g = torch.ones(2, 3, 3, dtype=dtype)
        g[0] = spike
        limit_(g, state)
        torch.testing.assert_close(g[0], torch.full_like(g[0], 10 * 2 ** (0.2 * step)))
        assert torch.equal(g[1], torch.ones_like(g[1]))
        torch.testing.assert_close(state["usual"].flatten(), torch.tensor([2 ** (0.2 * (step + 1)), 1.0], dtype=dtype))
    tiny = torch.full((2, 3, 3), torch.finfo(dtype).smallest_normal, dtype=dtype)
    state["usual"].copy_(tiny[:, :1, :1])
    wild = torch.full_like(tiny, torch.finfo(dtype).max)
    limit_(wild, state)
    assert wild.isfinite().all()


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_a_lasting_change_of_size_is_followed(factor: float) -> None:
    """As when a loss is scaled for good: new gradients soon prevail in a mean, and in the end nothing is cut."""
    state, mean = init(torch.zeros(1, *SHAPE)), torch.zeros(1, *SHAPE)
    old, new = noise(0).float()[None], noise(1).float()[None]
    for step in range(160):
        g = old.clone() if step < 20 else factor * new
        given = g.clone()
        limit_(g, state)
        mean.lerp_(g, 0.05)
        if step == 28 and factor > 1:
            assert torch.cosine_similarity(mean.flatten(), new.flatten(), 0) > 0.95
        if step < 20 or step > 140 or factor < 1:
            assert torch.equal(g, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_rest_counts_for_ten_times_the_usual_too(dtype: torch.dtype) -> None:
    """As torch's AdamW on gradients that were cut by hand; those of the user stay as they are."""
    p = nn.Parameter(torch.zeros(SHAPE[1], dtype=dtype))
    optimizer = Muon([("norm.weight", p)], rest_lr=1e-2)
    oracle = nn.Parameter(p.detach().clone())
    adamw = torch.optim.AdamW([oracle], lr=1e-2, betas=optimizer.param_groups[0]["rest_betas"], weight_decay=0.0)
    adamw.param_groups[0]["lr"] = optimizer.rates()["norm.weight"]
    usual = 0.0
    for step, spike in enumerate((1.0, 1.5, 0.0, 1e6, 0.9, 1e12, 1.2, 1e-3)):
        g = (spike * noise(step)[0]).to(dtype)
        size = float(g.double().norm())
        count = min(1.0, MOST * usual / size) if usual and size else 1.0
        if size:
            move = min(max((size / usual) ** FOLLOW, SLOWEST), FASTEST) if usual else 1.0
            usual = (usual or size) * move
        p.grad, oracle.grad = g.clone(), (count * g.double()).to(dtype)
        optimizer.step()
        adamw.step()
        assert torch.equal(p.grad, g)
        close = {} if dtype != torch.bfloat16 else {"rtol": 0.05, "atol": 1e-4}
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], adamw.state[oracle]["exp_avg_sq"], **close)
        torch.testing.assert_close(p, oracle, **close)
    assert optimizer.state[p]["usual"].dtype == torch.promote_types(dtype, torch.float32)
    again = Muon([("norm.weight", p)])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["usual"], optimizer.state[p]["usual"])
    assert again.state[p]["usual"].dtype == optimizer.state[p]["usual"].dtype


def test_a_step_is_shorter_where_gradients_have_vanished_and_is_whole_again_where_they_stay_small() -> None:
    layer = torch.nn.Linear(6, 6, bias=False)
    optimizer = Muon([("weight", layer.weight)], lr=0.1, routes={"weight": "matrix"})
    generator, moved = torch.Generator().manual_seed(0), []
    for step in range(800):
        layer.weight.grad = torch.randn(6, 6, generator=generator) * (1 if step < 20 else 1e-6)
        before = layer.weight.detach().clone()
        optimizer.step()
        moved.append(float((layer.weight.detach() - before).norm()))
    assert min(moved[:20]) > 0.8 * moved[0]
    assert max(moved[100:200]) < 0.05 * moved[0]
    assert moved[-1] > 0.8 * moved[0]
