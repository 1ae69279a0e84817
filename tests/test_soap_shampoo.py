"""SOAP and Shampoo are their formulas: against naive float64 references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.optim import SOAP, Shampoo
from gramian.optim.soap import DAMPING
from steps import LR, gradients, run


def both(shape: tuple[int, int], sides: str) -> tuple[bool, bool]:
    """Whether the rows and the columns have a second moment."""
    m, n = shape
    if sides == "both" or (sides == "auto" and max(m, n) < 2 * min(m, n)):
        return True, True
    return m <= n, m > n


def naive_soap(grads: list[Tensor], refresh: int, sides: str, momentum=0.95, nesterov=True) -> Tensor:
    """The docstring's formula for one matrix that starts at zero; all is kept in the parameter's own coordinates."""
    m, n = grads[0].shape
    has_left, has_right = both((m, n), sides)
    left, right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    q, r = torch.eye(m).double(), torch.eye(n).double()
    b, v, w = (torch.zeros(m, n, dtype=torch.float64) for _ in range(3))
    for step, g in enumerate(grads):
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        if step % refresh == 0:
            new_q = torch.linalg.eigh(left)[1] if has_left else q
            new_r = torch.linalg.eigh(right)[1] if has_right else r
            # The variance of an entry in the new basis, as if the entries in the old one were uncorrelated.
            v = (new_q.T @ q).square() @ v @ (r.T @ new_r).square()
            q, r = new_q, new_r
        b = momentum * b + (1 - momentum) * g
        v = 0.95 * v + 0.05 * (q.T @ g @ r).square()
        ahead = q.T @ (momentum * b + (1 - momentum) * g if nesterov else b) @ r
        d = ahead / (v.sqrt() + DAMPING * v.mean().sqrt())
        d = d * math.sqrt(1 - 0.95 ** (step + 1)) / math.sqrt(max(m, n))
        w = w - LR * math.sqrt(m / n) * q @ d @ r.T
    return w


def naive_shampoo(
    grads: list[Tensor], refresh: int, sides: str, damping: float, momentum=0.95, nesterov=True
) -> Tensor:
    m, n = grads[0].shape
    has_left, has_right = both((m, n), sides)
    power = -1 / (2 * (has_left + has_right))
    left, right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    p, r = torch.eye(m).double(), torch.eye(n).double()
    b, w = (torch.zeros(m, n, dtype=torch.float64) for _ in range(2))
    for step, g in enumerate(grads):
        left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
        if step % refresh == 0:
            p = matrix_power(left, power, damping) if has_left else p
            r = matrix_power(right, power, damping) if has_right else r
        b = momentum * b + (1 - momentum) * g
        d = p @ (momentum * b + (1 - momentum) * g if nesterov else b) @ r
        w = w - LR * math.sqrt(m / n) * math.sqrt(min(m, n)) * d / torch.linalg.matrix_norm(d)
    return w


def matrix_power(m: Tensor, power: float, damping: float) -> Tensor:
    values, q = torch.linalg.eigh(m)
    return q * (values + damping * values.mean()) ** power @ q.T


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_nesterov": {"nesterov": False},
    "no_momentum": {"momentum": 0.0},
}
SHAPES = [((6, 6), "auto"), ((9, 4), "auto"), ((4, 9), "small"), ((6, 6), "small"), ((5, 4), "small")]


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize(("shape", "sides"), SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_soap_agrees_with_the_formula(name: str, shape: tuple[int, int], sides: str, refresh: int) -> None:
    grads = gradients(shape)
    found = run(SOAP, grads, sides=sides, refresh=refresh, **OPTIONS[name])
    torch.testing.assert_close(found, naive_soap(grads, refresh, sides, **OPTIONS[name]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_soap_does_not_see_the_scale(scale: float) -> None:
    grads = gradients((6, 6))
    found = run(SOAP, [g * scale for g in grads], refresh=3)
    torch.testing.assert_close(found, naive_soap(grads, 3, "auto"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize(("shape", "sides"), [*SHAPES, ((5, 4), "both")], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_shampoo_agrees_with_the_formula(name: str, shape: tuple[int, int], sides: str, refresh: int) -> None:
    grads = gradients(shape)
    found = run(Shampoo, grads, sides=sides, refresh=refresh, damping=1e-3, rtol=1e-9, **OPTIONS[name])
    wanted = naive_shampoo(grads, refresh, sides, 1e-3, **OPTIONS[name])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def test_shampoo_without_averages_is_muon() -> None:
    """With the moments of this step alone, (ggᵀ)^(-1/4) g (gᵀg)^(-1/4) = UVᵀ."""
    grads = gradients((6, 6))[:3]
    found = run(Shampoo, grads, momentum=0.0, moment_beta=0.0, refresh=1, damping=1e-12, rtol=1e-6)
    wanted = torch.zeros(6, 6, dtype=torch.float64)
    for g in grads:
        u, _, vt = torch.linalg.svd(g)
        wanted -= LR * u @ vt
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_turning_the_basis_keeps_the_momentum_and_the_sum_of_the_variance() -> None:
    """Between two steps only the basis differs: in the parameter's own coordinates the momentum is a plain average."""
    grads = gradients((6, 6))
    w = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = SOAP([w], lr=LR, refresh=2)
    momentum, energy = torch.zeros(6, 6).double(), 0.0
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * g
        energy = 0.95 * energy + 0.05 * float(g.square().sum())
        state = optimizer.state[w]
        unit = torch.exp2(state["unit"])
        left, right = state["left_basis"], state["right_basis"]
        torch.testing.assert_close(left @ state["momentum"] @ right.T * unit, momentum, rtol=1e-10, atol=1e-12)
        assert float((state["variance"] * unit**2).sum()) == pytest.approx(energy, rel=1e-10)
        torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_an_uncertified_root_is_not_used_and_counted() -> None:
    """Float64 cannot certify a root to 1e-17: the identity, which the roots start from, stays."""
    w = nn.Parameter(torch.zeros(6, 6))
    optimizer = Shampoo([w], lr=LR, refresh=1, rtol=1e-17, damping=1e-9, momentum=0.0)
    for g in gradients((6, 6))[:2]:
        w.grad = g.float()
        before = w.detach().clone()
        optimizer.step()
        step = before - w.detach()
        torch.testing.assert_close(step, LR * math.sqrt(6) * w.grad / torch.linalg.matrix_norm(w.grad))
    assert optimizer.health()["0"] == {"skipped": 0, "fallbacks": 4}
