"""The size of weights and biases at which an activation keeps the size of signals and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["CriticalPoint", "activation_gain", "critical_point", "point_of"]

# On [-10, 10] for the mean over a standard normal; even, so that none is at zero, where many activations have a kink.
NUM_NODES = 20_000

# The mean squares of preactivations among which a fixed point is looked for. Far above the largest, a sigmoid has one
# at which nearly all of its units are saturated.
LEAST_SQUARE, MOST_SQUARE, NUM_SQUARES = 0.05, 64.0, 64

# A fixed point is stable where a deviation of q shrinks by more than this from layer to layer.
STABLE = 1e-3


@dataclass(frozen=True)
class CriticalPoint:
    """Where signals and gradients keep their size from layer to layer.

    With `W = σ Q`, Q orthogonal, and biases of standard deviation `bias`, the mean square of the preactivations is
    `q → σ² E[φ(z)²] + bias²` for z ~ N(0, q), and gradients grow by `χ = σ² E[φ'(z)²]`.

    Args:
        weight: σ.
        bias: the biases' standard deviation.
        square: q; `None` where any will do (ReLU), or where it tends to zero (tanh).
        odd: c, where φ(z) − φ(−z) = c z for all z (GELU, SiLU, ReLU: 1), else zero.
        stable: whether q returns to it, so that χ stays at one. Where it is false, there is no such point with a
            variance of the biases that is not negative: σ then gives χ = 1 at q = 1.
    """

    weight: float
    bias: float = 0.0
    square: float | None = None
    odd: float = 0.0
    stable: bool = True


def activation_gain(activation: nn.Module) -> float:
    """The standard deviation σ of the weights, times √fan_in, at which an activation φ keeps the size of gradients.

    `χ = σ² E[φ'(z)²] = 1` for `z ~ N(0, q)`. Where φ is linear at the origin (φ(0) = 0, φ''(0) = 0: tanh, sine, the
    identity) q tends to zero and `σ = 1/|φ'(0)|`; ReLU and its like have one σ for every q. For the others (GELU,
    SiLU, Mish, ELU) q is the stable fixed point of `q → σ² E[φ(z)²] + σ_b²`, which needs biases of variance σ_b²:
    `isometric_` draws them. Where there is no such point, q = 1.

    Args:
        activation: a module that works element by element.

    Returns:
        σ; 1 where the derivative is zero everywhere.

    Raises: nothing of its own.
    Cost: 20,000 evaluations of φ, for a smooth φ 64 times as many. Accuracy: 1e-3 where φ' jumps; midpoint rule.
    Source: Poole et al. (1606.05340), eq. 3–6; Roberts, Yaida & Hanin (2106.10165), §5.1–5.3, for the universality
    classes; the choice of q is this library's own: of the fixed points with χ = 1, the most stable.

    >>> round(activation_gain(nn.ReLU()) ** 2, 2), round(activation_gain(nn.Tanh()), 3)
    (2.0, 1.0)
    """
    return point_of(activation).weight


def point_of(activation: nn.Module) -> CriticalPoint:
    """The critical point of an activation module."""
    phi = copy.deepcopy(activation).double().eval()
    channels = getattr(activation, "num_parameters", 1)  # of a PReLU
    device = next((p.device for p in phi.parameters()), torch.device("cpu"))

    def value(z: Tensor) -> Tensor:
        z = z.to(device)
        return phi(z[:, None] * torch.ones(channels, dtype=z.dtype, device=device)).cpu()  # a copy: φ may be in place

    return critical_point(value)


def critical_point(phi: Callable[[Tensor], Tensor], h: float = 1e-5) -> CriticalPoint:
    """The critical point of an activation: stable if there is one, and of those the most stable.

    Along `χ = 1` there is one fixed point for each q, with `σ² = 1 / E[φ'²]` and `σ_b² = q − σ² E[φ²]`, and a deviation
    of q is multiplied by `1 + σ² E[φ φ'']` from layer to layer (`= σ² E[φ φ' z] / √q` by Stein's lemma). The q at which
    this is least, and σ_b² is not negative, is taken. GELU has a half-stable one at q = 3.56 (from above it is reached,
    from below it is left) and its most stable one at q = 13. A least value at the end of the range does not count: at a
    sigmoid's nearly all units are saturated.

    Args:
        phi: from (N,) in float64 to (N,), or (N, channels), whose statistics are averaged.
        h: the step of the differences at the origin, above the error of φ.
    """
    low, middle, high = _columns(phi(torch.tensor([-h, 0.0, h], dtype=torch.float64))).detach().mean(1).tolist()
    slope, bend = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
    if abs(middle) < 1e-6 and abs(bend) < 1e-3 and abs(slope) > 1e-3:
        return CriticalPoint(1.0 / abs(slope))
    value, derivative, _ = _moments(phi, 1.0)
    if derivative <= 0:
        return CriticalPoint(1.0, stable=False)
    at_one = CriticalPoint(1.0 / math.sqrt(derivative), stable=False)
    others = [_moments(phi, q) for q in (LEAST_SQUARE, MOST_SQUARE)]
    if all(math.isclose(d, derivative, rel_tol=1e-2) for _, d, _ in others) and math.isclose(
        value, derivative, rel_tol=1e-2
    ):
        return CriticalPoint(at_one.weight, odd=_odd_slope(phi))  # positively homogeneous
    found: list[tuple[float, CriticalPoint]] = []
    ratio = (MOST_SQUARE / LEAST_SQUARE) ** (1 / (NUM_SQUARES - 1))
    for k in range(NUM_SQUARES):
        q = LEAST_SQUARE * ratio**k
        value, derivative, cross = _moments(phi, q)
        bias = q - value / derivative if derivative > 0 else -1.0
        if bias >= 0 and cross / derivative < 1 - STABLE:
            found.append((cross / derivative, CriticalPoint(1.0 / math.sqrt(derivative), math.sqrt(bias), q)))
    best = min(found, key=lambda pair: pair[0])[1] if found else at_one
    best = at_one if best.square is None or best.square > MOST_SQUARE / ratio**0.5 else best
    return replace(best, odd=_odd_slope(phi))


def _odd_slope(phi: Callable[[Tensor], Tensor]) -> float:
    z = torch.linspace(0.1, 8.0, 64, dtype=torch.float64)
    slopes = (_columns(phi(z)) - _columns(phi(-z))).detach() / z[:, None]
    slope = float(slopes.mean())
    return slope if slope > 0 and float((slopes - slope).abs().max()) < 1e-3 * slope else 0.0


def _moments(phi: Callable[[Tensor], Tensor], q: float) -> tuple[float, float, float]:
    """E[φ²], E[φ'²] and E[φ φ' z] / √q for a normal z of mean square q."""
    unit = (torch.arange(NUM_NODES, dtype=torch.float64) + 0.5) * (20 / NUM_NODES) - 10
    weight = torch.exp(-unit.square() / 2)
    weight /= weight.sum()
    z = (math.sqrt(q) * unit).requires_grad_()
    with torch.enable_grad():
        values = _columns(phi(z))
        sums = values.sum(0)
        derivative = torch.stack([torch.autograd.grad(s, z, retain_graph=True)[0] for s in sums], 1)
    values = values.detach()
    return (
        float(weight @ values.square().mean(1)),
        float(weight @ derivative.square().mean(1)),
        float(weight @ ((values * derivative).mean(1) * unit)) / math.sqrt(q),
    )


def _columns(values: Tensor) -> Tensor:
    return values if values.ndim == 2 else values[:, None]
