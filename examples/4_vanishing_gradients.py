"""Vanishing gradients: where they come from, and what each of the usual remedies does about them, against a control."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gramian as gm
from _check import Lesson, plt
from gramian.operators import end_to_end_jacobian, layer_gains

lesson = Lesson("4_vanishing_gradients", __doc__)
generator = torch.Generator().manual_seed(0)

# --- two layers by hand -----------------------------------------------------------------------------------------------

lesson.section("Two layers, ŷ = W₂ tanh(W₁x + b₁) + b₂, gradients by hand")
x64, y64 = (gm.random.normal(16, k, generator=generator, dtype=torch.float64) for k in (5, 3))
small = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
W1, b1, W2, b2 = (p.detach() for p in small.parameters())
a = torch.tanh(x64 @ W1.mT + b1)
delta2 = 2 * (a @ W2.mT + b2 - y64) / y64.numel()  # ∂/∂ŷ of the mean squared error
delta1 = (delta2 @ W2) * (1 - a**2)  # W₂ᵀδ₂, a matrix product, then tanh′ = 1 − tanh², element by element
by_hand = (delta1.mT @ x64, delta1.sum(0), delta2.mT @ a, delta2.sum(0))
by_autograd = torch.autograd.grad(F.mse_loss(small(x64), y64), list(small.parameters()))
for name, hand, auto in zip(("W₁", "b₁", "W₂", "b₂"), by_hand, by_autograd, strict=True):
    lesson.close(f"∂L/∂{name}, by hand and by autograd", hand, auto, 1e-14)

# --- depth ------------------------------------------------------------------------------------------------------------

WIDTH, CLASSES = 32, 10
images = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
labels = torch.as_tensor(load_digits().target)
order = torch.randperm(len(images), generator=generator)
images, labels = (images - images.mean(0))[order], labels[order]
batch = (images[:64], labels[:64])
objective = gm.Objective.classification()


def network(depth: int) -> nn.Sequential:
    """`depth` tanh layers and a head."""
    sizes = [64, *[WIDTH] * depth]
    layers = [f(m, n) for m, n in itertools.pairwise(sizes) for f in (nn.Linear, lambda *_: nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def fill(function: Callable[[Tensor], object]) -> Callable[[nn.Sequential], None]:
    def init(net: nn.Sequential) -> None:
        for layer in net:
            if isinstance(layer, nn.Linear):
                function(layer.weight)
                nn.init.zeros_(layer.bias)

    return init


INITS: dict[str, Callable[[nn.Sequential], object]] = {
    "N(0, 0.01²)": fill(lambda w: nn.init.normal_(w, std=0.01)),
    "N(0, 1)": fill(lambda w: nn.init.normal_(w)),
    "torch's default": lambda net: None,
    "Xavier": fill(nn.init.xavier_normal_),
    "He (for ReLU)": fill(lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
    "isometric": lambda net: gm.init.isometric_(net, batch),
}


def made(depth: int, init: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = network(depth)
    INITS[init](net)
    return net


def gradients_of(net: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    """∂L/∂(output) of every tanh, first to last, and ∂L/∂W of the Linear layers but the head; in float64."""
    double = copy.deepcopy(net).double()
    h, outputs = batch[0].double(), []
    for layer in double:
        h = layer(h)
        if isinstance(layer, nn.Tanh):
            outputs.append(h)
    weights = [layer.weight for layer in double if isinstance(layer, nn.Linear)][:-1]
    found = torch.autograd.grad(F.cross_entropy(h, batch[1]), [*outputs, *weights])
    return list(found[: len(outputs)]), list(found[len(outputs) :])


def ratio(net: nn.Sequential) -> float:
    """‖∂L/∂h₁‖ / ‖∂L/∂h_last‖: the share of the gradient that arrives. 1 is ideal, 0 is vanished."""
    outputs, _ = gradients_of(net)
    return (outputs[0].norm() / outputs[-1].norm()).item()


lesson.section("The share of the gradient that reaches the first layer, by depth and initialization")
depths = (2, 5, 10, 20, 50, 100, 300, 1000)
by_depth = {name: torch.tensor([ratio(made(d, name)) for d in depths], dtype=torch.float64) for name in INITS}
print("      depth " + " ".join(f"{d:>9d}" for d in depths))
for name, values in by_depth.items():
    print(f"      {name:16s}" + " ".join(f"{v:9.1e}" for v in values))
lesson.less("depth 100, default: ratio", by_depth["torch's default"][5], 1e-15)
lesson.less("depth 100, isometric: ratio is above", 0.1, by_depth["isometric"][5])
lesson.less("depth 1000, isometric: ratio is above", 0.01, by_depth["isometric"][-1])
lesson.less("depth 1000, Xavier: half way between", by_depth["Xavier"][-1], 0.1 * by_depth["isometric"][-1])
_, weights = gradients_of(made(20, "N(0, 0.01²)"))
lesson.less("a trap: N(0, 0.01²), depth 20, the weights' gradients are of one size, first over last", 0.1,
            weights[1].norm() / weights[-1].norm())  # fmt: skip
lesson.less("because signal and gradient vanish in opposite order: that size is", weights[-1].norm(), 1e-15)
gains = [g.chi for g in layer_gains(made(50, "torch's default"), batch, objective).values() if g is not None]
middle_gain = torch.tensor(gains[5:45]).log().mean().exp().item()
slope = (by_depth["torch's default"][5] / by_depth["torch's default"][4]).item() ** (2 / 50)  # of depths 50 to 100
lesson.close("default: squared gradient per layer, and 1/3 = fan_in · Var(w)", slope, 1 / 3, 0.05)
lesson.close("and the gain χ that gm's layer_gains measures", middle_gain, 1 / 3, 0.05)

lesson.section("The end-to-end Jacobian is a product of matrices: its spectrum at depth 50")
spectra = {}
for name in ("torch's default", "Xavier", "isometric"):
    jacobian = end_to_end_jacobian(made(50, name).double(), (batch[0].double(), batch[1]), objective)
    assert jacobian is not None
    values = torch.linalg.svdvals(jacobian)  # of each of 64 samples, (64, 32)
    spectra[name] = values.median(0).values
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=1e-7).double().median())  # what float32 could tell from zero
    print(f"      {name:16s} σ₁ {values[:, 0].median():.1e}  σ₁₆ {values[:, 15].median():.1e}  rank to 1e-7: {rank}")
lesson.less(
    "Xavier: σ₁₆/σ₁; the mean gain is near one, the directions are lost",
    spectra["Xavier"][15] / spectra["Xavier"][0],
    1e-2,
)
lesson.less("isometric: σ₁₆/σ₁ is above", 0.1, spectra["isometric"][15] / spectra["isometric"][0])
parts = [layer.weight.detach().double() for layer in made(50, "Xavier") if isinstance(layer, nn.Linear)][1:-1]
logs = torch.stack([torch.linalg.slogdet(p)[1] for p in parts])
short = torch.linalg.slogdet(torch.linalg.multi_dot(parts[:4]))[1]
lesson.close("log |det| of a product of 4 layers is the sum", short, logs[:4].sum(), 1e-8)
product = torch.linalg.multi_dot(parts)
lesson.less("of 49 layers the product's rounding has eaten it: apart by", 1.0,
            (torch.linalg.slogdet(product)[1] - logs.sum()).abs())  # fmt: skip
eigenvalue, singular = torch.linalg.eigvals(product).abs().max(), torch.linalg.matrix_norm(product, 2)
lesson.less("the product's largest |eigenvalue| is below its norm", eigenvalue, singular)
deep = [layer.weight.detach() for layer in made(1000, "torch's default") if isinstance(layer, nn.Linear)][1:-1]
plain_product = torch.linalg.multi_dot(deep)
_, log_norm = gm.linalg.product_scaled(deep)
wide = torch.linalg.multi_dot([w.double() for w in deep])
largest = wide.abs().max()  # its square would be zero
log_wide = largest.log10() + (wide / largest).norm().log10()
lesson.close("the product of 999 default layers is zero in float32", plain_product.norm(), 0.0, 0.0)
lesson.close("log₁₀ of its norm, by gm.linalg.product_scaled and by float64", log_norm / math.log(10), log_wide, 1e-3)
nilpotent = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
lesson.close(
    "every eigenvalue 0 and norm 5: eigenvalues do not bound a gradient",
    torch.linalg.matrix_norm(nilpotent, 2),
    5.0,
    1e-6,
)

# --- the remedies -----------------------------------------------------------------------------------------------------

lesson.section("What the usual remedies do, depth 30: ratio before and after 60 steps, and held-out accuracy")
DEPTH, STEPS = 30, 60
train_x, train_y, test_x, test_y = images[:1200], labels[:1200], images[1200:], labels[1200:]


class Factored(nn.Module):
    """x ↦ U(Vx) + b of rank 8."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))


def factored(how: str) -> nn.Sequential:
    """Factors as torch draws them; "orthogonal"; or "aligned", each V the transpose of the U before it."""
    net = made(DEPTH, "torch's default" if how == "default" else "isometric")
    for i in range(2, len(net) - 1, 2):
        net[i] = Factored()
        if how == "default":
            continue
        nn.init.zeros_(net[i].u.bias)
        for factor in (net[i].u, net[i].v):
            factor.weight.data = gm.random.orthogonal(*factor.weight.shape, generator=generator)
        if how == "aligned" and i > 2:
            net[i].v.weight.data = net[i - 2].u.weight.data.mT.clone()
    return net


def tied(init: str) -> nn.Sequential:
    """One matrix used at every depth: a recurrence, whose Jacobian is near a power of it."""
    net = made(DEPTH, init)
    return nn.Sequential(*net[:2], *[net[2], nn.Tanh()] * (DEPTH - 1), net[-1])


def adam(net: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=3e-3, **{"weight_decay": 0.0} | options)


def muon(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda net: gm.optim.Muon(net, lr=lr)


def run(net: nn.Sequential, make: Callable, decay: float = 1.0) -> tuple[float, float, float]:
    """Ratio before, ratio after, accuracy."""
    before = ratio(net)
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(len(train_x), (128,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(train_x[rows]), train_y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (net(test_x).argmax(1) == test_y).double().mean().item()
    return before, ratio(net), accuracy


plain, treated = "torch's default", "isometric"
REMEDIES: dict[str, Callable[[], tuple[float, float, float]]] = {
    "control: default init, Adam": lambda: run(made(DEPTH, plain), adam),
    "learning-rate decay": lambda: run(made(DEPTH, plain), adam, decay=0.95),
    "weight regularization": lambda: run(made(DEPTH, plain), lambda n: adam(n, weight_decay=1.0)),
    "factorization, rank 8": lambda: run(factored("default"), adam),
    "recurrence (a matrix's powers)": lambda: run(tied(plain), adam),
    "Muon": lambda: run(made(DEPTH, plain), muon(0.3)),
    "isometric, Adam": lambda: run(made(DEPTH, treated), adam),
    "isometric, rank 8, orthogonal factors": lambda: run(factored("orthogonal"), adam),
    "isometric, rank 8, aligned factors": lambda: run(factored("aligned"), adam),
    "isometric recurrence": lambda: run(tied(treated), adam),
    "isometric, Muon": lambda: run(made(DEPTH, treated), muon(0.1)),
}
results = {name: call() for name, call in REMEDIES.items()}
for name, (before, after, accuracy) in results.items():
    print(f"      {name:38s} {before:8.1e} → {after:8.1e}   accuracy {accuracy:5.1%}")
control = results["control: default init, Adam"]
lesson.same("learning-rate decay: the ratio before training is the control's, to the last bit",
            results["learning-rate decay"][0], control[0])  # fmt: skip
shrunk = made(DEPTH, plain)
for p in shrunk.parameters():
    p.data *= (1 - 3e-3) ** STEPS  # what decay alone does in 60 steps
lesson.less("weight decay shrinks every factor of the product: ratio", ratio(shrunk), control[0])
lesson.less("factorization has two small gains in place of one: ratio", results["factorization, rank 8"][0], control[0])
for name in ("learning-rate decay", "weight regularization", "factorization, rank 8", "recurrence (a matrix's powers)"):
    lesson.less(f"{name}: accuracy stays near chance", results[name][2], 0.4)
lesson.less("Muon alone: every direction of the update is of size one, the gradient's signal is still lost: accuracy",
            results["Muon"][2], 0.5)  # fmt: skip
lesson.less("orthogonal factors lose ¾ of the energy at every layer, unless aligned: ratios",
            results["isometric, rank 8, orthogonal factors"][0],
            1e-3 * results["isometric, rank 8, aligned factors"][0])  # fmt: skip
for name in ("isometric, Adam", "isometric recurrence", "isometric, Muon"):
    lesson.less(f"{name}: accuracy is above", 0.5, results[name][2])

# --- the picture ------------------------------------------------------------------------------------------------------

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1, 1, 1.1))
for name, values in by_depth.items():
    left.loglog(depths, values.clamp(1e-80, 1e80), "o-", ms=3, label=name)
left.set(xlabel="depth (layers)", ylabel="‖∂L/∂h₁‖ / ‖∂L/∂h_last‖", ylim=(1e-40, 1e40))
left.set_title("The gradient that arrives, by initialization")
left.legend(fontsize=7.5, loc="upper left")
for name, values in spectra.items():
    middle.semilogy(range(1, 33), values.clamp_min(1e-30), "o-", ms=3, label=name)
middle.set(xlabel="index i", ylabel="singular value σᵢ", title="End-to-end Jacobian at depth 50 (flat tails: rounding)")
middle.legend(fontsize=7.5)
names = list(results)[::-1]
for row, name in enumerate(names):
    accuracy = results[name][2]
    color = "#3a8f5c" if name.startswith("isometric") else "#5f6b76" if name.startswith("control") else "#d1602a"
    right.barh(row, 100 * accuracy, color=color)
    right.text(100 * accuracy + 1, row, f"{results[name][0]:.0e}", va="center", fontsize=7.5)
right.axvline(10, color="k", ls=":", lw=1)
right.set_yticks(range(len(names)), names, fontsize=7.5)
right.set(xlabel="held-out accuracy after 60 steps, % (dotted: chance)", xlim=(0, 112))
right.set_title("Remedies, depth 30; number: gradient that arrives", fontsize=9)
lesson.finish(figure)
