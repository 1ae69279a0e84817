"""Linear algebra and descent: what gradient descent does is decided by the eigenvalues of one matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gramian as gm
from _check import Lesson, plt

torch.set_default_dtype(torch.float64)
lesson = Lesson("2_linear_algebra_and_descent", __doc__)
generator = torch.Generator().manual_seed(0)

m = 100
x = gm.random.uniform(m, generator=generator)
y = 3 * x + 2 + gm.random.uniform(m, generator=generator)
X = torch.stack([torch.ones(m), x], 1)


def loss(w: Tensor) -> Tensor:
    """Mean squared error, without the ½: its Hessian is 2 XᵀX/m."""
    return (X @ w - y).square().mean()


def gradient(w: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    return 2 / len(X[rows]) * X[rows].mT @ (X[rows] @ w - y[rows])


best = gm.linalg.solve(gm.linalg.syrk(X), (X.mT @ y)[:, None])[:, 0]
hessian = 2 * gm.linalg.second_moment(X)
smallest, largest = torch.linalg.eigvalsh(hessian)

# --- the gradient, three ways -----------------------------------------------------------------------------------------

lesson.section("The gradient 2/m Xᵀ(Xθ − y)")
at = torch.tensor([0.3, -0.7])
lesson.close("by hand and by autograd", gradient(at), torch.func.grad(loss)(at), 1e-13)
h = 6e-6  # ε^(1/3): where rounding, ε/h, and truncation, h², balance
steps = h * torch.eye(2)
central = torch.stack([(loss(at + e) - loss(at - e)) / (2 * h) for e in steps])
lesson.close("by hand and by central differences", gradient(at), central, 1e-8)
lesson.close("the Hessian is 2 XᵀX/m", torch.func.hessian(loss)(at), hessian, 1e-13)
half = gradient(at, slice(0, 50)) + gradient(at, slice(50, 100))
lesson.close("the mean of two half batches' gradients is the whole's", half / 2, gradient(at), 1e-13)

# --- 1,000 epochs at rate 0.01 ----------------------------------------------------------------------------------------

lesson.section("1,000 epochs of gradient descent at rate 0.01")


def descend(rate, num_steps: int, rows=lambda t: slice(None), start: Tensor | None = None) -> Tensor:
    """All iterates; `rate` is a number, or a function of the step."""
    w = nn.Parameter(torch.zeros(2) if start is None else start.clone())
    optimizer = torch.optim.SGD([w], lr=1.0)
    path = [w.detach().clone()]
    for t in range(num_steps):
        optimizer.param_groups[0]["lr"] = rate(t) if callable(rate) else rate
        w.grad = gradient(w.detach(), rows(t))
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def losses(path: Tensor) -> Tensor:
    return (path @ X.mT - y).square().mean(1)


path = descend(0.01, 1000)
for epoch in range(0, 1001, 100):
    print(f"      epoch {epoch:4d}  loss {losses(path)[epoch]:.6f}  θ = ({path[epoch][0]:.4f}, {path[epoch][1]:.4f})")
values, vectors = torch.linalg.eigh(hessian)
exact = best + vectors @ ((1 - 0.01 * values) ** 1000 * (vectors.mT @ -best))
lesson.close("θ after 1,000 epochs is θ* + (I − ηH)¹⁰⁰⁰(θ₀ − θ*)", path[-1], exact, 1e-11)
remaining = (1 - 0.01 * smallest) ** 1000
print(f"      eigenvalues of H: {smallest:.4f} and {largest:.4f}; the slow one has {remaining:.0%} of its error left")
lesson.less("so it has not converged: the slope is off by more than", 0.1, (path[-1] - best).abs()[1])

# --- the largest stable rate ------------------------------------------------------------------------------------------

lesson.section("The largest stable rate is 2/λmax")


def grows(rate: float) -> bool:
    """Whether the distance still grows after 600 steps, when only the fastest direction is left."""
    distance = (descend(rate, 600) - best).norm(dim=1)
    return bool(distance[-1] > distance[-2])


low, high = 0.1, 2.0
for _ in range(24):
    middle = (low + high) / 2
    low, high = (low, middle) if grows(middle) else (middle, high)
edge = 2 / largest.item()
lesson.close("measured by bisection, and 2/λmax", low, edge, 1e-6)
lesson.less("at 0.99 of it, loss after 2,000 steps", losses(descend(0.99 * edge, 2000))[-1], losses(path)[-1])
lesson.less("at 1.01 of it, loss after 2,000 steps is above", 1e6, losses(descend(1.01 * edge, 2000))[-1])

lesson.section("How to choose a rate")
ideal = 2 / (smallest + largest)
factor = ((largest - smallest) / (largest + smallest)).item()
distance = (descend(ideal.item(), 101) - best).norm(dim=1)
lesson.close("at 2/(λmin + λmax), error per step, and (κ − 1)/(κ + 1)", distance[-1] / distance[-2], factor, 1e-9)


def needed(rate: float, tolerance: float = 1e-6, limit: int = 4000) -> int:
    """Steps until ‖θ − θ*‖ is below tolerance; `limit` if never."""
    distance = (descend(rate, limit) - best).norm(dim=1)
    below = (distance < tolerance).nonzero()
    return int(below[0]) if len(below) else limit


rates = torch.cat([torch.logspace(-2, math.log10(0.98 * edge), 12), torch.tensor([ideal, 0.995 * edge, 1.02 * edge])])
rates = rates.sort().values
counts = [needed(r.item()) for r in rates]
lesson.close("the fastest rate of those tried, and 2/(λmin + λmax)", rates[counts.index(min(counts))], ideal, 1e-12)
centered = X.clone()
centered[:, 1] = (x - x.mean()) / x.std(correction=0)
H = 2 * gm.linalg.second_moment(centered)
lesson.close("standardized input has H = 2I: condition number", torch.linalg.cond(H), 1.0, 1e-12)
target = gm.linalg.solve(H, (2 / m * centered.mT @ y)[:, None])[:, 0]
lesson.close("so one step at rate 1/2 is the answer", 0.5 * 2 / m * centered.mT @ y, target, 1e-12)
v = gm.random.normal(2, generator=generator)
for _ in range(60):  # for a network: Hessian times vector, no Hessian
    v = torch.func.jvp(torch.func.grad(loss), (at,), (v,))[1]
    top, v = v.norm(), v / v.norm()
lesson.close("λmax by power iteration with Hessian-vector products", top, largest, 1e-9)

# --- batch, mini-batch, stochastic, decaying --------------------------------------------------------------------------

lesson.section("Batch, mini-batch, stochastic, decaying rate; 100 gradients of one sample are one epoch")


def drawn(size: int):
    return lambda t: torch.randint(m, (size,), generator=generator)


num_epochs = 60
runs = {
    "batch of 100, rate 0.3": descend(0.3, num_epochs),
    "mini-batch of 10, rate 0.1": descend(0.1, num_epochs * 10, drawn(10)),
    "one sample, rate 0.1": descend(0.1, num_epochs * 100, drawn(1)),
    "one sample, rate ∝ 1/t": descend(lambda t: 0.3 / (1 + t / 100), num_epochs * 100, drawn(1)),
}
excess = {name: losses(p) - loss(best) for name, p in runs.items()}
floor = {name: e[-len(e) // 4 :].mean() for name, e in excess.items()}
for name, value in floor.items():
    print(f"      {name:26s} mean excess loss over the last quarter {value:.2e}")
few, one = floor["mini-batch of 10, rate 0.1"], floor["one sample, rate 0.1"]
lesson.less("constant rate: mini-batches hover lower than single samples", few, one)
lesson.less("a decaying rate goes on", floor["one sample, rate ∝ 1/t"], one / 5)
grads = torch.stack([gradient(at, torch.tensor([i])) for i in range(m)])
lesson.close("single-sample gradients are unbiased", grads.mean(0), gradient(at), 1e-13)

lesson.section("Gradient ascent on a concave function, and the log-likelihood of a coin")
heads, tosses = 7, 10
logit = nn.Parameter(torch.zeros(()))
ascent = torch.optim.SGD([logit], lr=0.4, maximize=True)
for _ in range(200):
    logit.grad = None
    (heads * nn.functional.logsigmoid(logit) + (tosses - heads) * nn.functional.logsigmoid(-logit)).backward()
    ascent.step()
lesson.close("the likeliest probability is the share of heads", torch.sigmoid(logit).detach(), heads / tosses, 1e-12)
curvature = tosses * 0.7 * 0.3
print(f"      its edge is 2/{curvature:.1f} = {2 / curvature:.2f} at the maximum: ascent has one too")

# --- several minima ---------------------------------------------------------------------------------------------------

lesson.section("Several minima: f(u) = u⁴ − 3u² + u")


def f(u: Tensor) -> Tensor:
    return u**4 - 3 * u**2 + u


companion = torch.tensor([[0.0, 0.0, -0.25], [1.0, 0.0, 1.5], [0.0, 1.0, 0.0]])  # of u³ − 1.5u + 0.25 = f′/4
roots = torch.linalg.eigvals(companion).real.sort().values
starts = torch.linspace(-2, 2, 41)
u = starts.clone()
trail = [u]
for _ in range(2000):
    u = u - 0.02 * (4 * u**3 - 6 * u + 1)
    trail.append(u)
trail = torch.stack(trail)
expected = torch.where(starts < roots[1], roots[0], roots[2])
lesson.close("41 starts end in the minimum of their basin, roots of f′", u, expected, 1e-9)
lesson.less("the two minima are not equal: f at the left and right", f(roots[0]), f(roots[2]))
sharp, flat = 12 * roots[0] ** 2 - 6, 12 * roots[2] ** 2 - 6
rate = (1 / sharp + 1 / flat).item()  # between the edges 2/f″ of the two
small = roots[2] + 1e-3
deep = roots[0] + 1e-3
for _ in range(100):
    small = small - rate * (4 * small**3 - 6 * small + 1)
    deep = deep - rate * (4 * deep**3 - 6 * deep + 1)
lesson.close(f"rate {rate:.3f} holds in the flat minimum, below 2/f″ = {2 / flat:.3f}", small, roots[2], 1e-3)
lesson.less(f"and leaves the sharp one, above 2/f″ = {2 / sharp:.3f}: distance", 0.05, (deep - roots[0]).abs())

# --- the picture ------------------------------------------------------------------------------------------------------

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for name in runs:
    means = excess[name][1:].reshape(num_epochs, -1).mean(1)
    left.semilogy(range(1, num_epochs + 1), means, lw=1.4, label=name)
left.set(xlabel="epoch", ylabel="loss − least loss, mean over the epoch", title="A constant rate on samples hovers")
left.legend(fontsize=7.5, loc="upper right")
middle.semilogy(rates[:-1], counts[:-1], "o-", ms=4)
middle.axvline(edge, color="#d1602a", label=f"2/λmax = {edge:.3f}: beyond, it diverges")
middle.axvline(ideal, color="#3a8f5c", ls="--", label=f"2/(λmin + λmax) = {ideal:.3f}")
middle.axvline(0.01, color="#5f6b76", ls=":", label="0.01")
middle.set(xlabel="rate", ylabel="steps until ‖θ − θ*‖ < 10⁻⁶", title="Choosing a rate (4,000: not reached)")
middle.set_yticks([200, 500, 1000, 2000, 4000], ["200", "500", "1,000", "2,000", "4,000"])
middle.minorticks_off()
middle.legend(fontsize=7.5, loc="upper center")
grid = torch.linspace(-2.05, 2.05, 300)
right.plot(grid, f(grid), color="#5f6b76")
for start, color in ((0, "#2a6fbb"), (21, "#2a6fbb"), (22, "#d1602a"), (40, "#d1602a")):
    walk = trail[::2, start][:60]
    right.plot(walk, f(walk), "o-", ms=3, lw=0.8, color=color)
right.axvline(roots[1], color="k", ls=":", lw=1, label=f"u = {roots[1]:.3f} parts the basins")
right.set(xlabel="u", ylabel="f(u) = u⁴ − 3u² + u", title="The start decides the minimum")
right.legend(fontsize=7.5, loc="upper center", frameon=True, edgecolor="none", framealpha=1)
lesson.finish(figure)
