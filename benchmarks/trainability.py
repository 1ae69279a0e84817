"""Does a diagnosis of a fresh network tell whether it will train? Plain networks of depth 20 to 1,000, by training.

    python benchmarks/trainability.py             # development draws, some 15 minutes on one core
    python benchmarks/trainability.py --held-out  # the draws on which a claim rests; writes benchmarks/results

A network is drawn by `drawn`: depth, activation (tanh, ReLU, GELU), and the deviations of weights, √fan_in σ_w, and
biases; the generator was written before any score, and development and held-out draws differ in their seeds. It trains
if one of three rates of Adam reaches an accuracy of one half on 512 of scikit-learn's digits within `STEPS` steps. A
score is a number that should be larger for networks that train; each is judged by the area under its ROC curve, with an
interval of 95 % by resampling. "gramian" is `gm.inspect`'s, before any step: minus the distance in decades of the
gradient at the first layer, against the last, from one, and of the variation between samples at the last layer from one
where it is lost. The others: minus the depth; minus the depth in mean-field correlation lengths ξ; the logarithm of the
first layer's gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import gramian as gm
from gramian.bench.machine import features
from gramian.inspection.observing import observe

RESULTS = Path(__file__).parent / "results" / "trainability.json"
WIDTH, BATCH, STEPS, RATES, GOAL = 48, 64, 150, (3e-5, 3e-4, 3e-3), 0.5
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
# Around each activation's critical √fan_in σ_w: below it signals die out, above it they grow or become chaotic.
CRITICAL = {"tanh": 1.0, "relu": math.sqrt(2), "gelu": 1.48}


class Draw(NamedTuple):
    activation: str
    depth: int
    weights: float
    biases: float
    seed: int


def drawn(seed: int) -> Draw:
    """A network's settings."""
    generator = torch.Generator().manual_seed(seed)
    u, v, w, a = torch.rand(4, generator=generator).tolist()
    activation = list(ACTIVATIONS)[int(a * len(ACTIVATIONS))]
    depth = round(20 * 50**u)
    spread = 6.0 / depth**0.5  # deeper networks are more sensitive
    weights = CRITICAL[activation] * math.exp((v - 0.5) * spread)
    return Draw(activation, depth, weights, 0.0 if w < 0.5 else 0.2 * (w - 0.5), seed)


def build(draw: Draw) -> nn.Sequential:
    generator = torch.Generator().manual_seed(draw.seed)
    layers: list[nn.Module] = []
    for i in range(draw.depth):
        layer = nn.Linear(64 if i == 0 else WIDTH, WIDTH)
        nn.init.normal_(layer.weight, 0.0, draw.weights / layer.in_features**0.5, generator=generator)
        nn.init.normal_(layer.bias, 0.0, draw.biases, generator=generator) if draw.biases else nn.init.zeros_(
            layer.bias
        )
        layers += [layer, ACTIVATIONS[draw.activation]()]
    head = nn.Linear(WIDTH, 10)
    nn.init.normal_(head.weight, 0.0, WIDTH**-0.5, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float()[:512]
    return (x - x.mean()) / x.std(), torch.from_numpy(labels)[:512]


def trains(draw: Draw, x: Tensor, y: Tensor) -> bool:
    for rate in RATES:
        model, generator = build(draw), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for step in range(STEPS):
            rows = torch.randint(len(x), (BATCH,), generator=generator)
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if not bool(loss.isfinite()):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 25 == 24:
                with torch.no_grad():
                    if float((model(x).argmax(1) == y).float().mean()) >= GOAL:
                        return True
    return False


def scores(draw: Draw, x: Tensor, y: Tensor) -> dict[str, float]:
    """Each predictor's number, from the network as it is initialized."""
    model, batch = build(draw), (x[:128], y[:128])
    objective = gm.Objective.classification()
    report = gm.inspect(model, [batch], objective, quick=True)
    ratio = float(report.facts.get("gradient, first layer against last", 0.0))
    seen = observe(model, [batch], objective)
    last = seen.calls[-2].output
    variation = last.between / last.rms if last.is_finite and last.rms > 0 else 0.0
    lost = max(0.0, -_decades(10 * variation))
    first = seen.gradients["0.weight"] or 0.0
    return {
        "gramian": -max(abs(_decades(ratio)), lost),
        "gradient ratio alone": -abs(_decades(ratio)),
        "no error found": -float(any(f.severity == "error" for f in report.findings)),
        "depth": -float(draw.depth),
        "mean-field depth": -draw.depth / _length(draw),
        "first layer's gradient": _decades(first),
    }


def _decades(value: float) -> float:
    """log₁₀, held within ±60."""
    return (
        min(60.0, max(-60.0, math.log10(value)))
        if value > 0 and math.isfinite(value)
        else (-60.0 if value <= 0 else 60.0)
    )


def _length(draw: Draw) -> float:
    """ξ = 1/|ln χ| at the fixed point of the mean-field length map, by quadrature (Schoenholz et al. 1611.01232)."""
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    weight /= weight.sum()
    function = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}[draw.activation]
    q = 1.0
    for _ in range(200):
        q = draw.weights**2 * float((weight * function(z * q**0.5).square()).sum()) + draw.biases**2
        q = min(max(q, 1e-12), 1e12)
    u = (z * q**0.5).requires_grad_()
    (slope,) = torch.autograd.grad(function(u).sum(), u)
    chi = draw.weights**2 * float((weight * slope.square()).sum())
    return 1.0 / max(abs(math.log(max(chi, 1e-300))), 1e-6)


def area(labels: list[bool], values: list[float]) -> tuple[float, float, float]:
    """Area under the ROC curve, with its 95 % interval over resampled networks."""
    generator = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(1000):
        rows = torch.randint(len(labels), (len(labels),), generator=generator).tolist()
        if len({labels[i] for i in rows}) == 2:
            resampled.append(roc_auc_score([labels[i] for i in rows], [values[i] for i in rows]))
    low, high = torch.tensor(resampled).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(roc_auc_score(labels, values)), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--networks", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = digits()
    start, rows = time.monotonic(), []
    for seed in range(options.networks):
        draw = drawn(seed + (100_000 if options.held_out else 0))
        rows.append({**draw._asdict(), "trains": trains(draw, x, y), "scores": scores(draw, x, y)})
        print(f"{time.monotonic() - start:5.0f} s {rows[-1]}", flush=True)
    labels = [row["trains"] for row in rows]
    table = {name: area(labels, [row["scores"][name] for row in rows]) for name in rows[0]["scores"]}
    print(f"{sum(labels)} of {len(labels)} train")
    for name, (value, low, high) in table.items():
        print(f"{name:24} {value:.3f} ({low:.3f} to {high:.3f})")
    if options.held_out:
        found = {"machine": features(), "train": sum(labels), "areas": table, "networks": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
