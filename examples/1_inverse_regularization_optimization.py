"""Inverse, regularization, optimization: one line fitted in every way, all checked against the regularized inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gramian as gm
from _check import Lesson, plt

torch.set_default_dtype(torch.float64)
lesson = Lesson("1_inverse_regularization_optimization", __doc__)
generator = torch.Generator().manual_seed(0)

# --- the data: y = 3x + 2 + U(0, 1), 100 points of U(0, 1) ------------------------------------------------------------

m, strength = 100, 1.0
x = gm.random.uniform(m, generator=generator)
y = 3 * x + 2 + gm.random.uniform(m, generator=generator)
X = torch.stack([torch.ones(m), x], 1)  # an intercept is a column of ones

lesson.section("The regularized inverse: θ = (XᵀX + λI)⁻¹ Xᵀy minimizes 1/(2m) Σ(ŷ − y)² + λ/(2m) Σθ²")
theta = gm.linalg.inv(gm.linalg.syrk(X), damping=strength) @ X.mT @ y
solved, certificate = gm.linalg.solve_ex(gm.linalg.syrk(X), (X.mT @ y)[:, None], damping=strength)
lesson.close("inverse and solve", theta, solved[:, 0], 1e-12)
lesson.close("gradient of J is zero there", X.mT @ (X @ theta - y) / m + strength / m * theta, torch.zeros(2), 1e-14)
lesson.less("certified relative error of the solve", certificate.error_bound, 1e-14)
plain = gm.linalg.solve(gm.linalg.syrk(X), (X.mT @ y)[:, None])[:, 0]
# The noise has mean 1/2: least squares estimates 2.5, not 2, however many points there are.
spread = math.sqrt(1 / 12) * gm.linalg.inv(gm.linalg.syrk(X)).diagonal().sqrt()
lesson.less("λ = 0: (θ − (2.5, 3)) in standard errors", ((plain - torch.tensor([2.5, 3.0])) / spread).abs().max(), 3.0)
lesson.less("λ = 0: (θ − (2, 3)) in standard errors is no fit", 3.0, abs((plain[0] - 2) / spread[0]))
free = gm.linalg.solve(gm.linalg.syrk(X) + torch.diag(torch.tensor([0.0, strength])), (X.mT @ y)[:, None])[:, 0]
lesson.close("intercept left free: residuals sum to zero", (y - X @ free).mean(), 0.0, 1e-14)
lesson.less("intercept penalized: they do not", 1e-3, (y - X @ theta).mean().abs())

# --- gradient descent, SGD, Adam --------------------------------------------------------------------------------------


def gradient(w: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """∇J on the rows given: XᵀX and Xᵀy by their means, so that it is unbiased for ∇J."""
    return X[rows].mT @ (X[rows] @ w - y[rows]) / len(X[rows]) + strength / m * w


def train(make, num_steps: int, rows=lambda: slice(None), decay=lambda t: 1.0) -> tuple[Tensor, Tensor]:
    """θ, and its distance from the closed form at every step."""
    w = nn.Parameter(torch.zeros(2))
    optimizer = make([w])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    distances = []
    for _ in range(num_steps):
        distances.append((w.detach() - theta).norm().item())
        w.grad = gradient(w.detach(), rows())
        optimizer.step()
        schedule.step()
    return w.detach(), torch.tensor(distances)


def by_hand_adam(num_steps: int, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Tensor:
    """Adam as written in the paper, bias correction included: m and v start at zero, and are divided by 1 − βᵗ."""
    w, first, second = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for t in range(1, num_steps + 1):
        g = gradient(w)
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        w = w - lr * (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + eps)
    return w


lesson.section("The same minimizer by descent")
largest = torch.linalg.eigvalsh(gm.linalg.second_moment(X))[-1].item() + strength / m
num_steps = 1500
gd, gd_path = train(lambda p: torch.optim.SGD(p, lr=1 / largest), num_steps)
lesson.close("gradient descent and the closed form", gd, theta, 1e-10)
sgd, sgd_path = train(
    lambda p: torch.optim.SGD(p, lr=0.5),
    10 * num_steps,
    rows=lambda: torch.randint(m, (4,), generator=generator),
    decay=lambda t: 1 / (1 + t / 100),
)
_, constant_path = train(
    lambda p: torch.optim.SGD(p, lr=0.5), num_steps, rows=lambda: torch.randint(m, (4,), generator=generator)
)
lesson.close("SGD, batches of 4, rate ∝ 1/t, and the closed form", sgd, theta, 3e-2)
lesson.less(
    "with a constant rate SGD stays away: last 500 distances", sgd_path[-500:].mean(), constant_path[-500:].mean()
)
adam, adam_path = train(
    lambda p: torch.optim.Adam(p, lr=0.1), num_steps, decay=lambda t: 0.5 * (1 + math.cos(math.pi * t / num_steps))
)
lesson.close("Adam, rate decayed to zero, and the closed form", adam, theta, 1e-4)
for steps in (1, 10, 300):
    theirs, _ = train(lambda p: torch.optim.Adam(p, lr=0.1), steps)
    lesson.close(f"Adam's formula and torch's after {steps} steps", by_hand_adam(steps, 0.1), theirs, 1e-12)
lesson.close("bias correction: the first step is the rate itself", by_hand_adam(1, 0.1).abs(), [0.1, 0.1], 1e-8)
at = torch.tensor([0.5, 0.8, 0.9])
lesson.close("predictions at 0.5, 0.8, 0.9", gd[0] + gd[1] * at, theta[0] + theta[1] * at, 1e-9)

lesson.section("L1: 1/(2m) Σ(ŷ − y)² + λ/(2m) Σ|θ|, by proximal gradient descent")


def lasso(design: Tensor, target: Tensor, w: Tensor, penalty: gm.prox.Penalty, num_steps: int) -> Tensor:
    """Proximal gradient descent at rate 1/L from w; the first column, an intercept, is named so."""
    parameter = nn.Parameter(w.clone())
    lr = len(design) / torch.linalg.eigvalsh(gm.linalg.syrk(design))[-1].item()
    optimizer = gm.optim.Proximal(torch.optim.SGD([("w", parameter)], lr=lr), {"w": penalty})
    for _ in range(num_steps):
        parameter.grad = design.mT @ (design @ parameter.detach() - target) / len(design)
        optimizer.step()
    return parameter.detach()


for lam in (1.0, 300.0):
    w = lasso(X, y, torch.zeros(2), gm.prox.L1(lam / (2 * m)), 3000)
    g, bound = X.mT @ (X @ w - y) / m, lam / (2 * m)
    on, off = w != 0, w == 0
    lesson.close(f"λ = {lam:g}: gradient = −λ/(2m) sign θ where θ ≠ 0", g[on], -bound * w[on].sign(), 1e-10)
    if off.any():
        lesson.less(f"λ = {lam:g}: |gradient| < λ/(2m) where θ = 0 exactly", g[off].abs().max(), bound)
rate, w_sub = 0.1, torch.zeros(2)
for _ in range(3000):
    w_sub = w_sub - rate * (X.mT @ (X @ w_sub - y) / m + bound * w_sub.sign())
lesson.less("adding λ sign(θ) to the gradient never reaches zero: smallest |θ|", 1e-8, w_sub.abs().min())

# --- when there is no inverse -----------------------------------------------------------------------------------------

lesson.section("Singular and near-singular: a column twice, exactly and up to 1e-9")
twice = torch.cat([X, X[:, 1:]], 1)
# Multiples of 1/1024: XᵀX has no rounding at all, and is singular exactly.
exact = torch.round(twice * 1024) / 1024
_, certificate = gm.linalg.inv_ex(gm.linalg.syrk(exact))
lesson.same("exactly singular: the certificate says so", certificate.converged.item(), False)
print(f"      because: {certificate.reasons[0]}")
smallest = torch.linalg.pinv(exact) @ y
lesson.close("pseudo-inverse shares the slope equally", smallest[1], smallest[2], 1e-10)
for damping in (1e-1, 1e-4, 1e-7):
    answer, certificate = gm.linalg.solve_ex(gm.linalg.syrk(exact), (exact.mT @ y)[:, None], damping=damping)
    move = (answer[:, 0] - smallest).norm().item()
    bound = certificate.error_bound.item()
    print(f"      damping {damping:.0e}: moves the answer by {move:.1e}, certified to {bound:.0e}")
lesson.less("damping → 0 tends to the pseudo-inverse, moved by", move, 1e-6)
apart = gm.random.normal(m, generator=generator)
near = twice.clone()
near[:, 2] += 1e-6 * apart
answer, certificate = gm.linalg.solve_ex(gm.linalg.syrk(near), (near.mT @ y)[:, None])
by_svd = torch.linalg.lstsq(near, y[:, None], driver="gelsd").solution
lesson.same("1e-6 apart: the solve is certified", certificate.converged.item(), True)
lost = (answer - by_svd).norm() / by_svd.norm()
lesson.less("for XᵀX as given; forming it squared κ, and against the SVD of X it is off by", 1e-8, lost)
near[:, 2] = twice[:, 2] + 1e-9 * apart
gram = gm.linalg.syrk(near)
_, certificate = gm.linalg.solve_ex(gram, (near.mT @ y)[:, None])
# κ(XᵀX) is beyond 1/ε: rounding alone decides which matrix is solved, certified or not.
print(f"      1e-9 apart: certified for XᵀX as it was rounded: {certificate.converged.item()}")
wild = torch.linalg.solve(gram, near.mT @ y).norm()
lesson.less("1e-9 apart: what torch returns without a word; ‖θ‖ of pinv, a thousandfold, and of torch's",
            1000 * smallest.norm(), wild)  # fmt: skip
tame, certificate = gm.linalg.solve_ex(gram, (near.mT @ y)[:, None], damping=1e-6)
lesson.same("1e-9 apart, damped by 1e-6: certified", certificate.converged.item(), True)
lesson.close("and close to the pseudo-inverse's predictions", near @ tame[:, 0], exact @ smallest, 1e-2)

# --- where the inverse belongs ----------------------------------------------------------------------------------------

lesson.section("Newton and Gauss–Newton: the inverse of a curvature")
start = torch.tensor([10.0, -10.0])
hessian = gm.linalg.second_moment(X) + strength / m * torch.eye(2)
newton = start - gm.linalg.solve(hessian, gradient(start)[:, None])[:, 0]
lesson.close("one Newton step on a quadratic is the closed form", newton, theta, 1e-12)

curve_y = 2 * torch.exp(-1.5 * x) + 0.05 * gm.random.normal(m, generator=generator)


def residual(w: Tensor) -> Tensor:
    """Of the model a·exp(bx), which is not linear in b."""
    return w[0] * torch.exp(w[1] * x) - curve_y


def loss_of(w: Tensor) -> Tensor:
    return 0.5 * residual(w).square().mean()


w, gn_steps = torch.tensor([1.0, 0.0]), 0
while (slope := torch.func.grad(loss_of)(w)).norm() > 1e-12 and gn_steps < 50:
    jacobian = torch.func.jacrev(residual)(w)
    w = w - gm.linalg.solve(gm.linalg.second_moment(jacobian), slope[:, None])[:, 0]
    gn_steps += 1
v, descent_steps = torch.tensor([1.0, 0.0]), 0
rate = 1 / torch.linalg.eigvalsh(torch.func.hessian(loss_of)(w))[-1]
while torch.func.grad(loss_of)(v).norm() > 1e-9 and descent_steps < 5000:
    v = v - rate * torch.func.grad(loss_of)(v)
    descent_steps += 1
lesson.close("Gauss–Newton and gradient descent meet", w, v, 1e-6)
lesson.less("in steps", gn_steps, descent_steps)
full = w - gm.linalg.solve(torch.func.hessian(loss_of)(w + 0.01), torch.func.grad(loss_of)(w + 0.01)[:, None])[:, 0]
lesson.less("Newton from 0.01 away: error is its square's size", (full + 0.01 - w).norm(), 0.01 * math.sqrt(2) / 10)

# --- over-fitting -----------------------------------------------------------------------------------------------------

lesson.section("Over-fitting: degree 12 on 16 noisy points of sin(πt), penalized in the Legendre basis")


def legendre(t: Tensor, degree: int) -> Tensor:
    columns = [torch.ones_like(t), t]
    for k in range(1, degree):
        columns.append(((2 * k + 1) * t * columns[k] - k * columns[k - 1]) / (k + 1))
    return torch.stack(columns, 1)


def draw(count: int) -> tuple[Tensor, Tensor]:
    """One point in each of `count` equal parts of [−1, 1], with noise of standard deviation 0.3."""
    t = -1 + 2 * (torch.arange(count) + gm.random.uniform(count, generator=generator)) / count
    return legendre(t, 12), torch.sin(math.pi * t) + 0.3 * gm.random.normal(count, generator=generator)


(P, target), (P_held, target_held) = draw(16), draw(1000)
monomials = torch.stack([P[:, 1] ** k for k in range(13)], 1)
conditions = [(s := gm.linalg.svdvals(design))[0] / s[-1] for design in (P, monomials)]
lesson.less("condition number of the Legendre design and of 1, t, t², …", *conditions)
lambdas = torch.logspace(-3, 0.5, 15)
ridge = gm.linalg.solve(
    gm.linalg.second_moment(P).expand(15, 13, 13), (P.mT @ target / 16).expand(15, 13)[..., None], damping=lambdas
)[..., 0]
sparse, w = [], torch.zeros(13)
for lam in lambdas.flip(0):  # from the strongest, each from the last: few steps are needed
    w = lasso(P, target, w, gm.prox.L1(lam.item()), 2000)
    sparse.append(w)
sparse = torch.stack(sparse[::-1])


def errors(weights: Tensor) -> tuple[Tensor, Tensor]:
    return (weights @ P.mT - target).square().mean(1), (weights @ P_held.mT - target_held).square().mean(1)


(ridge_train, ridge_held), (sparse_train, sparse_held) = errors(ridge), errors(sparse)
rise = (ridge_train[1:] - ridge_train[:-1]).min()
lesson.less("training error only ever grows with λ: smallest change", -1e-12, rise)
lesson.less("held-out: best λ of L2 against the weakest", ridge_held.min(), 0.9 * ridge_held[0])
lesson.less("held-out: best λ of L1 against the weakest", sparse_held.min(), 0.9 * sparse_held[0])
best = sparse[sparse_held.argmin()]
lesson.less("L1 at its best λ keeps fewer of 13 coefficients", (best != 0).sum(), 13)
slopes = (sparse @ P.mT - target) @ P / 16
unmet = torch.where(sparse != 0, slopes + lambdas[:, None] * sparse.sign(), (slopes.abs() - lambdas[:, None]).relu())
lesson.close("and meets its optimality conditions at every λ", unmet.abs().max(), 0.0, 1e-4)

# --- the picture ------------------------------------------------------------------------------------------------------

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
left.scatter(x, y, s=10, color="#9aa4ad", label="data")
line = torch.tensor([0.0, 1.0])
left.plot(line, plain[0] + plain[1] * line, label="least squares, λ = 0")
left.plot(line, theta[0] + theta[1] * line, label="λ = 1, intercept penalized")
left.plot(line, 3 * line + 2.5, "k:", lw=1, label="3x + 2.5, the mean of the data")
left.scatter(at, theta[0] + theta[1] * at, marker="x", color="k", zorder=3, label="predictions at 0.5, 0.8, 0.9")
left.set(xlabel="x", ylabel="y", title="The line: its intercept is 2.5, not 2")
left.legend(fontsize=7.5)
for path, label in (
    (gd_path, "gradient descent"),
    (adam_path, "Adam, cosine decay"),
    (constant_path, "SGD, constant rate"),
    (sgd_path[:num_steps], "SGD, rate ∝ 1/t"),
):
    middle.semilogy(path.clamp_min(1e-13), label=label, lw=1.2)
middle.set(xlabel="step", ylabel="‖θ − closed form‖", title="All go to the regularized inverse")
middle.legend(fontsize=7.5)
for train_error, held, color, label in (
    (ridge_train, ridge_held, "#2a6fbb", "L2"),
    (sparse_train, sparse_held, "#d1602a", "L1"),
):
    right.loglog(lambdas, held, color=color, label=f"{label}, held out")
    right.loglog(lambdas, train_error, "--", color=color, label=f"{label}, training")
right.axhline(0.09, color="k", ls=":", lw=1, label="noise variance, 0.09")
right.set(xlabel="λ", ylabel="mean squared error", title="Degree 12 on 16 points: training error misleads")
right.set_yticks([0.03, 0.1, 0.3, 1.0], ["0.03", "0.1", "0.3", "1"])
right.minorticks_off()
right.legend(fontsize=7.5)
lesson.finish(figure)
