"""Whether a plain network of depth 20 to 1,000 will train, predicted before its first step and checked by training.

    python benchmarks/trainability.py label development   # trains; keeps labels in results/trainability_labels.json
    python benchmarks/trainability.py label held-out
    python benchmarks/trainability.py score development   # areas under ROC curves; the predictor is chosen on these
    python benchmarks/trainability.py score held-out      # once it is frozen; writes results/trainability.json

A network is drawn by `drawn`: depth, width, activation (tanh, ReLU, GELU), variances of weights and biases, Gaussian or
orthogonal weights. The generator and the rule for labels were fixed before any predictor was scored; that hopeless
trainings are given up, and torch's fused optimizers, came after the development labels and before the held-out ones.
Development seeds count from 0, held-out seeds from 100,000.

A network is trained five times for `STEPS` steps on scikit-learn's digits: by Adam at three rates and by SGD with
momentum at two, gradients being clipped to a norm of 1. Its accuracy is the best over windows of 20 steps and over the
five trainings, measured on the batches as they are trained on. The majority class has 10.2 %. A network trains if it
exceeds that by 30 points, and does not if it stays within 15 (a network whose samples have collapsed onto a line
reaches some 10 points more than the majority). What lies between is dropped, and counted. A training that is within 5
points of the majority after half of the steps is given up.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import gramian as gm
from gramian.bench.machine import features
from gramian.inspection.trainability import decades_lost

RESULTS = Path(__file__).parent / "results" / "trainability.json"
LABELS = RESULTS.with_name("trainability_labels.json")
FIRST_SEED = {"development": 0, "held-out": 100_000}
# The first seeds of each; how many was set by processor time, and not by what came out.
NUM_NETWORKS = {"development": 29, "held-out": 23}

BATCH, STEPS, WINDOW = 64, 400, 20
ADAM, SGD, MOMENTUM, CLIP = (1e-5, 1e-4, 1e-3), (3e-3, 3e-2), 0.9, 1.0
MAJORITY, ABOVE, WITHIN = 0.102, 0.30, 0.15
FUTILE, NOTHING = 200, 0.05

# Variance of weights, times fan-in, near which signals neither die out nor grow at first order.
CRITICAL = {"tanh": 1.0, "relu": 2.0, "gelu": 2.0}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class Draw(NamedTuple):
    """A network's settings; `weights` and `biases` are variances, that of weights times fan-in."""

    activation: str
    depth: int
    width: int
    weights: float
    biases: float
    is_orthogonal: bool
    seed: int


def drawn(seed: int) -> Draw:
    """The settings of a network. The distance from criticality is log-uniform from 1/depth to 1, in log variance."""
    generator = torch.Generator().manual_seed(seed)
    a, d, w, side, distance, has_bias, bias, orthogonal = torch.rand(8, generator=generator).tolist()
    activation = list(ACTIVATIONS)[int(a * len(ACTIVATIONS))]
    depth = round(20 * 50**d)
    away = depth ** (distance - 1) * (1 if side < 0.5 else -1)
    biases = 0.0 if has_bias < 0.5 else 10 ** (-3 + 2.5 * bias)
    width = 32 + 4 * int(9 * w)
    return Draw(activation, depth, width, CRITICAL[activation] * math.exp(away), biases, orthogonal < 0.3, seed)


def build(draw: Draw) -> nn.Sequential:
    """The network, as it is initialized."""
    generator = torch.Generator().manual_seed(draw.seed)
    layers: list[nn.Module] = []
    for i in range(draw.depth):
        layer = nn.Linear(64 if i == 0 else draw.width, draw.width)
        _fill(layer.weight, draw, generator)
        nn.init.normal_(layer.bias, 0.0, draw.biases**0.5, generator=generator)
        layers += [layer, ACTIVATIONS[draw.activation]()]
    head = nn.Linear(draw.width, 10)
    nn.init.normal_(head.weight, 0.0, draw.width**-0.5, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


def _fill(weight: Tensor, draw: Draw, generator: torch.Generator) -> None:
    if draw.is_orthogonal and weight.shape[0] == weight.shape[1]:
        nn.init.orthogonal_(weight, draw.weights**0.5, generator=generator)
    else:
        nn.init.normal_(weight, 0.0, (draw.weights / weight.shape[1]) ** 0.5, generator=generator)


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 of scikit-learn's digits, as rows of mean zero and variance one over all pixels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float()
    return (x - x.mean()) / x.std(), torch.from_numpy(labels)


def accuracy(draw: Draw, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Best accuracy over windows and trainings, and the step reached.

    Training stops once the network has trained, and halfway where it is still within 5 points of the majority class.

    The five trainings run as one: every weight is a stack of five, and so is every activation.
    """
    runs, function = len(ADAM) + len(SGD), {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}[draw.activation]
    linear = [layer for layer in build(draw) if isinstance(layer, nn.Linear)]
    first, hidden, head = linear[0], linear[1:-1], linear[-1]

    def stacked(t: Tensor) -> Tensor:
        return t.detach().unsqueeze(0).repeat(runs, *(1,) * t.ndim).requires_grad_()

    # Weights of one shape lie in one tensor, so that a step of an optimizer is a few operations.
    parameters = [
        stacked(first.weight.T),
        stacked(torch.stack([layer.weight.T for layer in hidden])),
        stacked(head.weight.T),
        stacked(torch.stack([layer.bias[None] for layer in linear[:-1]])),
        stacked(head.bias[None]),
    ]
    stepper, generator = _Stepper(parameters), torch.Generator().manual_seed(draw.seed)
    right: list[Tensor] = []
    best = 0.0
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        labels = y[rows].expand(runs, BATCH)
        h = x[rows].expand(runs, BATCH, x.shape[1])
        weights = (parameters[0], *parameters[1].unbind(1))
        for weight, bias in zip(weights, parameters[3].unbind(1), strict=True):
            h = function(torch.baddbmm(bias, h, weight))
        scores = torch.baddbmm(parameters[4], h, parameters[2])
        losses = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none").mean(1)
        stepper.step(torch.autograd.grad(losses.sum(), parameters), step)
        right.append((scores.detach().argmax(2) == labels).float().mean(1))
        if step >= WINDOW:
            best = max(best, float(torch.stack(right[-WINDOW:]).mean(0).max()))
        if best >= MAJORITY + ABOVE or (step == FUTILE and best <= MAJORITY + NOTHING):
            return best, step
    return best, STEPS


class _Stepper:
    """Adam and SGD with momentum, each with clipped gradients; run i of the stacks has its own rule and rate."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = [p.detach() for p in parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p[: len(ADAM)]) for p in self.parameters]

    def step(self, grads: tuple[Tensor, ...], step: int) -> None:
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        scales = (norms / CLIP).clamp(min=1.0)  # a run whose gradients are not finite is lost
        for run, rate in enumerate((*ADAM, *SGD)):
            values, slopes, first = ([t[run] for t in of] for of in (self.parameters, grads, self.first))
            if run < len(ADAM):
                second = [t[run] for t in self.second]
                steps = [torch.tensor(float(step)) for _ in values]
                torch._fused_adam_(
                    values, slopes, first, second, [], steps, lr=rate, beta1=0.9, beta2=0.999, weight_decay=0.0,
                    eps=1e-8, amsgrad=False, maximize=False, grad_scale=scales[run],
                )  # fmt: skip
            else:
                torch._fused_sgd_(
                    values, slopes, first, lr=rate, momentum=MOMENTUM, weight_decay=0.0, dampening=0.0, nesterov=False,
                    maximize=False, is_first_step=step == 1, grad_scale=scales[run],
                )  # fmt: skip


def trains(best: float) -> bool | None:
    """The label that follows from an accuracy; `None` where it is ambiguous."""
    return True if best >= MAJORITY + ABOVE else False if best <= MAJORITY + WITHIN else None


def label(split: str) -> None:
    """Trains the networks of a split that have no label yet, and keeps each label as soon as it is there."""
    x, y = digits()
    rows: dict[str, Any] = json.loads(LABELS.read_text()) if LABELS.exists() else {}
    for seed in range(FIRST_SEED[split], FIRST_SEED[split] + NUM_NETWORKS[split]):
        if str(seed) in rows:
            continue
        start, draw = time.process_time(), drawn(seed)
        best, step = accuracy(draw, x, y)
        rows[str(seed)] = {**draw._asdict(), "accuracy": round(best, 4), "step": step, "trains": trains(best)}
        LABELS.write_text(json.dumps(rows, indent=0) + "\n")
        print(f"{time.process_time() - start:6.1f} s {rows[str(seed)]}", flush=True)


def scores(draw: Draw, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Each predictor's number for a network as it is initialized; larger for networks that should train."""
    model = build(draw)
    report = gm.inspect(model, [batch], gm.Objective.classification(), quick=True)
    lost = decades_lost(report)
    assert lost is not None, draw
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), x)
    gradients = [layer.gradient_rms or 0.0 for layer in report.layers]
    return {
        "decades lost (gramian)": -lost,
        "depth": -float(draw.depth),
        "depth / width": -draw.depth / draw.width,
        "mean-field depth / ξ": -draw.depth / correlation_length(draw),
        "gradient, first layer / last": -abs(_decades(gradients[0]) - _decades(gradients[-1])),
        "gradient at the input": -abs(_decades(float(slope.double().norm()))),
        "no error or warning": -float(sum(f.severity != "info" for f in report.findings)),
    }


def _decades(value: float) -> float:
    """log₁₀, held within ±60."""
    return max(-60.0, min(60.0, math.log10(value))) if value > 0 and math.isfinite(value) else -60.0


def correlation_length(draw: Draw) -> float:
    """ξ = 1/|ln χ| at the mean-field fixed point of lengths (Schoenholz et al. 1611.01232), by quadrature."""
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    weight /= weight.sum()
    function = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}[draw.activation]
    q = 1.0
    for _ in range(1000):
        q = draw.weights * float((weight * function(z * q**0.5).square()).sum()) + draw.biases
        q = min(max(q, 1e-12), 1e12)
    u = (z * q**0.5).requires_grad_()
    (slope,) = torch.autograd.grad(function(u).sum(), u)
    chi = draw.weights * float((weight * slope.square()).sum())
    return 1.0 / max(abs(math.log(max(chi, 1e-300))), 1e-6)


def area(labels: list[bool], values: list[float]) -> tuple[float, float, float]:
    """Area under the ROC curve, with its 95 % interval over networks drawn again with replacement."""
    generator, resampled = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        rows = torch.randint(len(labels), (len(labels),), generator=generator).tolist()
        if len({labels[i] for i in rows}) == 2:
            resampled.append(roc_auc_score([labels[i] for i in rows], [values[i] for i in rows]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return round(float(roc_auc_score(labels, values)), 3), round(float(low), 3), round(float(high), 3)


def score(split: str) -> None:
    """Prints the areas of all predictors; writes those of held-out networks."""
    x, y = digits()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:128]
    every = [row for seed, row in json.loads(LABELS.read_text()).items() if _is_of(int(seed), split)]
    kept = [row for row in every if row["trains"] is not None]
    labels = [row["trains"] for row in kept]
    found = [scores(drawn(row["seed"]), (x[rows], y[rows])) for row in kept]
    table = {name: area(labels, [one[name] for one in found]) for name in found[0]}
    print(f"{len(every)} networks, {len(every) - len(kept)} ambiguous; of the others {sum(labels)} train")
    for name, (value, low, high) in table.items():
        print(f"{name:30} {value:.3f} ({low:.3f} to {high:.3f})")
    if split == "held-out":
        networks = [
            {"seed": r["seed"], **{k: round(v, 3) for k, v in s.items()}} for r, s in zip(kept, found, strict=True)
        ]
        counts = {"networks": len(every), "ambiguous": len(every) - len(kept), "train": sum(labels)}
        RESULTS.write_text(json.dumps({"machine": features(), **counts, "areas": table, "scores": networks}) + "\n")


def _is_of(seed: int, split: str) -> bool:
    return (seed >= FIRST_SEED["held-out"]) == (split == "held-out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["label", "score"])
    parser.add_argument("split", choices=list(FIRST_SEED))
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"label": label, "score": score}[options.what](options.split)


if __name__ == "__main__":
    main()
