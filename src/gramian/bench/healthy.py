"""Error rates of `inspect` on matrices of known distribution: false alarms and missed spikes.

Each case has its own seed, so that thresholds can be chosen on one range of seeds and tested on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gramian.inspection import describe, describe_quickly
from gramian.inspection.diagnosis import inspect
from gramian.inspection.weights.noise import LEVEL, tracy_widom_quantile
from gramian.inspection.weights.spectra import energy_rank

__all__ = ["LAWS", "Tally", "score_alarms", "score_quick", "score_spikes", "trained_networks"]

SHAPES = ((16, 16), (24, 96), (64, 64), (128, 32), (48, 200), (128, 128), (256, 64), (192, 384), (256, 256), (300, 100))


@dataclass(frozen=True)
class Tally:
    """A count among so many cases: of errors, or of successes.

    Attributes:
        cases: the number of cases.
        count: how many were counted.
        which: names of some of them, or of the failures.
    """

    cases: int
    count: int
    which: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """The share of cases that were counted."""
        return self.count / self.cases if self.cases else 0.0


def _student(m: int, n: int, g: torch.Generator) -> Tensor:
    degrees = 3 + int(torch.randint(0, 6, (), generator=g))
    chi_square = torch.randn(degrees, m, n, generator=g).square().sum(0)
    return torch.randn(m, n, generator=g) / (chi_square / degrees).sqrt()


def _log_normal(m: int, n: int, g: torch.Generator) -> Tensor:
    sign = torch.randint(0, 2, (m, n), generator=g) * 2.0 - 1
    return sign * (torch.randn(m, n, generator=g) * (0.3 + float(torch.rand((), generator=g)))).exp()


def _orthogonal(m: int, n: int, g: torch.Generator) -> Tensor:
    q = torch.linalg.qr(torch.randn(max(m, n), min(m, n), generator=g)).Q
    return q if m >= n else q.mT


# Untrained matrices by the distribution of their entries; each function maps (m, n, generator) to a matrix.
LAWS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": lambda m, n, g: torch.randn(m, n, generator=g),
    "uniform": lambda m, n, g: torch.rand(m, n, generator=g) * 2 - 1,
    "orthogonal": _orthogonal,
    "student t": _student,
    "log-normal": _log_normal,
}


def trained_networks(seeds: range) -> Iterator[nn.Module]:
    """Yield trained networks: digits classifiers of several widths and depths, trained by Adam to over 95 %."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        width, depth = (32, 64, 96, 128)[seed % 4], (2, 3, 4)[seed % 3]
        sizes = [64, *[width] * depth, 10]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            rows = torch.randint(0, len(x), (256,), generator=g)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        yield model


def score_alarms(seeds: range) -> dict[str, Tally]:
    """Count false alarms on healthy matrices: one per seed and distribution, and a sixth of them from trained networks.

    `"alarms"` counts matrices with a finding of severity warning or error; `"structure"` counts untrained matrices of
    independent entries with a singular value that was called structure.
    """
    alarms: list[str] = []
    structure: list[str] = []
    cases = untrained = 0
    per_law = len(seeds) // (len(LAWS) + 1)
    for law, draw in LAWS.items():
        for seed in seeds[:per_law]:
            m, n = SHAPES[seed % len(SHAPES)]
            w = draw(m, n, torch.Generator().manual_seed(seed)) / math.sqrt(n)
            model = nn.Linear(n, m, bias=False)
            model.weight.data = w
            report = inspect(nn.ModuleList([model, nn.Linear(8, 8, bias=False)]))
            cases, untrained = cases + 1, untrained + 1
            if report.status != "good":
                alarms.append(f"{law} {m}×{n} seed {seed}: {report.verdict}")
            if report.layers[0].above_noise:
                structure.append(f"{law} {m}×{n} seed {seed}: p = {report.layers[0].noise_p_value:.1e}")
    networks = iter(trained_networks(range(seeds[0], seeds[0] + len(seeds))))
    while cases < len(seeds):
        report = inspect(next(networks))
        cases += len(report.layers)
        if report.status != "good":
            named = [f.where for f in report.findings if f.severity != "info"]
            alarms += [f"trained: {report.verdict} {where}" for where in named]
    return {
        "alarms": Tally(cases, len(alarms), tuple(alarms[:20])),
        "structure": Tally(untrained, len(structure), tuple(structure[:20])),
    }


def score_spikes(seeds: range) -> Tally:
    """Plant one to three directions above the detection threshold in noise, and count the cases in which all are found.

    The threshold in σ is the noise's quantile at p = 1e-5 plus four standard deviations of the spike's σ, which are
    about 1 in units of the entries' (Benaych-Georges & Nadakuditi 2012, theorem 2.18).
    """
    missed: list[str] = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        m, n = SHAPES[1 + seed % (len(SHAPES) - 1)]
        small, large = sorted((m, n))
        a, b = math.sqrt(large - 0.5), math.sqrt(small - 0.5)
        level = math.sqrt((a + b) ** 2 + (a + b) * (1 / a + 1 / b) ** (1 / 3) * tracy_widom_quantile(LEVEL)) + 4.0
        # The strength θ at which the expected σ, √((θ² + m)(θ² + n)) / θ, equals the level (the larger root).
        middle = level**2 - m - n
        theta = math.sqrt((middle + math.sqrt(max(middle**2 - 4.0 * m * n, 0.0))) / 2)
        noise = torch.randn(m, n, generator=g) if seed % 2 else (torch.rand(m, n, generator=g) * 2 - 1) * 3**0.5
        count = 1 + seed % 3
        u = torch.linalg.qr(torch.randn(m, count, generator=g)).Q
        v = torch.linalg.qr(torch.randn(n, count, generator=g)).Q
        strengths = theta * (1 + torch.rand(count, generator=g))
        found = describe((noise + (u * strengths) @ v.mT) / math.sqrt(n)).noise
        if found is None or found.above < count:
            missed.append(f"{m}×{n} seed {seed}: {found.above if found else None} of {count}")
    return Tally(len(seeds), len(seeds) - len(missed), tuple(missed[:20]))


def score_quick(seeds: range) -> dict[str, Tally]:
    """Compare `describe_quickly` with all singular values on spectra of many forms: is each within its stated error?"""
    outside: dict[str, list[str]] = {"stable rank": [], "rank 90 %": [], "rank 99 %": []}
    forms = ("gaussian", "power", "spiked", "low rank", "exponential", "steps", "orthogonal", "columns")
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        form = forms[seed % len(forms)]
        n = 260 + int(torch.randint(0, 240, (), generator=g))
        m = n + int(torch.randint(0, 400, (), generator=g))
        w = _with_form(form, m, n, g)
        quick = describe_quickly(w)
        sigma = torch.linalg.svdvals(w.double())
        square_sum, first = float(sigma.square().sum()), float(sigma[0])
        norm, error = quick.spectral_norm or 0.0, quick.spectral_norm_error
        if not square_sum / (norm + error) ** 2 <= square_sum / first**2 <= square_sum / (norm - error) ** 2:
            outside["stable rank"].append(f"{form} {m}×{n} seed {seed}")
        for key, share, (least, most) in zip(("rank 90 %", "rank 99 %"), (0.9, 0.99), quick.energy_ranks, strict=True):
            exact = energy_rank(sigma, share)
            if not least <= exact <= most:
                outside[key].append(f"{form} {m}×{n} seed {seed}: {exact} not in {least}–{most}")
    return {key: Tally(len(seeds), len(seeds) - len(bad), tuple(bad[:20])) for key, bad in outside.items()}


def _with_form(form: str, m: int, n: int, g: torch.Generator) -> Tensor:
    if form == "gaussian":
        return torch.randn(m, n, generator=g)
    if form == "columns":
        return torch.randn(m, n, generator=g) * torch.arange(1, n + 1) ** -0.5
    if form == "spiked":
        spikes = torch.randn(m, 12, generator=g) * torch.linspace(1, 4, 12)
        return torch.randn(m, n, generator=g) + spikes @ torch.randn(12, n, generator=g) / 8
    if form == "low rank":
        rank = 5 + int(torch.randint(0, 60, (), generator=g))
        return torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g) + 1e-3 * torch.randn(
            m, n, generator=g
        )
    i = torch.arange(1, n + 1)
    slope = 0.3 + float(torch.rand((), generator=g))
    sigma = {
        "power": i**-slope,
        "exponential": torch.exp(-i / (10 + 100 * slope)),
        "steps": torch.where(i < n * slope / 2, 1.0, 0.3),
        "orthogonal": torch.ones(n),
    }[form]
    u = torch.linalg.qr(torch.randn(m, n, generator=g)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
    return (u * sigma) @ v.mT
