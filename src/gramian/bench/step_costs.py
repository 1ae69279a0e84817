"""What an optimizer's step costs: sixteen matrices of a transformer, an autoencoder, and a whole training step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from gramian import optim
from gramian.bench.competitors import DEFAULT, TORCH_MUON, Competitor, Stepper, chosen, hidden_and_rest, ours
from gramian.bench.learning_networks import Transformer, autoencoder, mlp
from gramian.bench.learning_tasks import images
from gramian.bench.race import clock
from gramian.bench.table import Goal, Measurement, Row

__all__ = ["COSTS", "Steps", "matrices", "orthogonality"]

WIDTH, DEPTH = 384, 4
MOMENTUM = 0.95
STEPS_PER_REPEAT = 8
"""With the usual five repeats forty steps: whole cycles of a basis refreshed every ten or twenty."""

PEER_SOAP, OUR_SOAP = "pytorch_optimizer SOAP", ours("soap")
OUR_MUON = ours("muon")
WHOLE_MUON, ACCURATE_MUON = f"{OUR_MUON}, whole", f"{OUR_MUON}, whole, rtol 0.03"


def _whole(rtol: float) -> Competitor:
    return Competitor(lambda model, lr, rest_lr: optim.Muon(model, lr=lr, rtol=rtol, part_size=None), 0.1, ours=True)


WHOLE_DEFAULT = f"{OUR_MUON}, whole, default rtol"

VARIANTS: dict[str, Competitor] = {WHOLE_MUON: _whole(0.1), ACCURATE_MUON: _whole(0.03)}
"""Competitors in the cost of a step only: by default a large matrix is cut into parts, each orthogonal by itself."""


def _at_least_one(m: int, n: int, num_matrices: int) -> float:
    return math.sqrt(max(1.0, m / n))


LENGTHS: dict[str, Callable[[int, int, int], float]] = {
    TORCH_MUON: _at_least_one,
    "pytorch_optimizer Muon": _at_least_one,
    **dict.fromkeys((OUR_MUON, WHOLE_MUON, ACCURATE_MUON), lambda m, n, num_matrices: math.sqrt(m / n) / num_matrices),
}
"""`length(m, n, number of matrices)`: of orthogonal updates at rate 1, what all singular values should be."""


@dataclass
class Steps:
    """The steps of one competitor: its model, its optimizer, and the seconds of each step."""

    model: nn.Module
    optimizer: Stepper
    first: float = math.nan
    times: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One timed step on the present gradients; the first is kept apart."""
        start = clock()
        self.optimizer.step()
        taken = clock() - start
        if math.isnan(self.first):
            self.first = taken
        else:
            self.times.append(taken)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.times)

    def as_text(self) -> str:
        """Mean, worst and first step in ms."""
        return f"mean {1e3 * self.mean:.3g}, worst {1e3 * max(self.times):.3g}, first {1e3 * self.first:.3g}"


def matrices(width: int = WIDTH, depth: int = DEPTH) -> nn.Sequential:
    """The matrices of a transformer's blocks, each a Linear, and a head of one number."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * depth
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes), nn.Linear(1, 1, bias=False))


def orthogonality(updates: list[Tensor], lengths: list[float]) -> float:
    """rms|σ − 1| over all singular values of the updates, each divided by its nominal length."""
    values = [torch.linalg.svdvals(update.double()) for update in updates]
    deviations = torch.cat([s / length - 1 for s, length in zip(values, lengths, strict=True)])
    return float(deviations.square().mean().sqrt())


def _field(make: Callable[[], nn.Module], competitors: Mapping[str, Competitor]) -> tuple[dict[str, Steps], list[str]]:
    """A model of the same weights and an optimizer for each competitor; and lines about those that are missing."""
    entries: dict[str, Steps] = {}
    missing: list[str] = []
    for name, competitor in competitors.items():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = make()
        obstacle = competitor.obstacle()
        if obstacle:
            missing.append(f"{name}: {obstacle}")
        else:
            # A tenth of the usual rate keeps the weights small; the cost does not depend on it.
            rate = competitor.start / 10
            entries[name] = Steps(model, competitor.make(model, rate, 1e-4))
    return entries, missing


def _turns(entries: Mapping[str, Steps], round_: int) -> list[str]:
    names = list(entries)
    return names[round_ % len(names) :] + names[: round_ % len(names)]


def _sixteen_matrices(title: str, repeats: int) -> Row:
    """Steps on gradients whose momentum is a new Gaussian matrix every time, so that no warm start can profit."""
    entries, missing = _field(matrices, chosen() | (VARIANTS if OUR_MUON in chosen() else {}))
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.zeros_like(p) for p in next(iter(entries.values())).model.parameters()]
    errors: dict[str, float] = {}
    num_rounds = STEPS_PER_REPEAT * repeats + 1
    for round_ in range(num_rounds):
        # With B ← μ B + g, the momentum B is then the new matrix itself, whatever came before.
        gradients = [w.mul(-MOMENTUM) for w in wanted]
        for w, g in zip(wanted, gradients, strict=True):
            g.add_(w.normal_(generator=generator))
        for name in _turns(entries, round_):
            entry = entries[name]
            for p, g in zip(entry.model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            if round_ == num_rounds - 1 and name in LENGTHS:
                errors[name] = _measured_error(name, entry)
            else:
                entry.step()
    note = "rms|σ − 1| of the update; fresh direction each step" + "".join(f"; {line}" for line in missing)
    measurements = tuple(
        Measurement(name, entry.median, errors.get(name), f"{entry.as_text()} ms") for name, entry in entries.items()
    )
    return Row(title, note, measurements, tuple(_matrix_goals(entries, errors)))


def _measured_error(name: str, entry: Steps) -> float:
    """rms|σ − 1| of a step at rate 1 from zero weights, after which the weights are the update itself."""
    hidden = list(entry.model.parameters())[:-1]
    lengths = [LENGTHS[name](p.shape[0], p.shape[1], len(hidden)) for p in hidden]
    return orthogonality(_updates(entry, hidden), lengths)


def _updates(entry: Steps, hidden: Sequence[Tensor]) -> list[Tensor]:
    """What a step at rate 1 makes of these weights from zero: their update itself."""
    with torch.no_grad():
        for p in hidden:
            p.zero_()
    for group in entry.optimizer.param_groups:
        group["lr"] = 1.0
    entry.optimizer.step()
    return [p.detach() for p in hidden]


def _matrix_goals(entries: Mapping[str, Steps], errors: Mapping[str, float]) -> list[tuple[Goal, float]]:
    goals: list[tuple[Goal, float]] = []
    for name, ratio, error in ((WHOLE_MUON, 0.45, 0.11), (ACCURATE_MUON, 1.0, 0.03)):
        if name in entries and TORCH_MUON in entries:
            goals.append((Goal(f"{name}'s step ÷ torch Muon's", "<=", ratio), _ratio(entries, name, TORCH_MUON)))
            goals.append((Goal(f"{name}'s rms|σ − 1|", "<=", error), errors[name]))
    if OUR_SOAP in entries and PEER_SOAP in entries:
        figure = entries[OUR_SOAP].mean / entries[PEER_SOAP].mean
        goals.append((Goal("SOAP's mean step ÷ pytorch_optimizer SOAP's", "<=", 0.2), figure))
    if OUR_SOAP in entries:
        figure = max(entries[OUR_SOAP].times) / entries[OUR_SOAP].median
        goals.append((Goal("SOAP's worst step ÷ median", "<=", 1.5), figure))
    if DEFAULT in entries:
        goals.append((Goal("first step of the default, s", "<=", 1.0), entries[DEFAULT].first))
    return goals


def _ratio(entries: Mapping[str, Steps], name: str, other: str) -> float:
    return entries[name].median / entries[other].median


def _autoencoder(title: str, repeats: int) -> Row:
    """Whole steps of every optimizer in training, each on its own model and real gradients."""
    entries, missing = _field(autoencoder, chosen())
    task = images(0)
    batches = task.batches(4)
    for round_ in range(STEPS_PER_REPEAT * repeats + 1):
        for name in _turns(entries, round_):
            _backward(entries[name].model, batches[round_ % len(batches)][0])
            entries[name].step()
    goals = []
    if DEFAULT in entries and TORCH_MUON in entries:
        figure = entries[DEFAULT].mean / entries[TORCH_MUON].mean
        goals.append((Goal("mean step of the default ÷ torch Muon's", "<=", 0.15), figure))
    measurements = tuple(
        Measurement(name, entry.median, None, entry.as_text() + " ms") for name, entry in entries.items()
    )
    return Row(title, "; ".join(["whole step(), real gradients", *missing]), measurements, tuple(goals))


def _backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    (0.5 * (model(x) - x).square().sum() / len(x)).backward()


def _overhead(title: str, repeats: int) -> Row:
    """Mean step() over forward and backward at 4,096 tokens; five steps a pass, each on gradients with fresh noise."""

    def transformer() -> nn.Module:
        return Transformer(width=WIDTH, depth=DEPTH, heads=6, context=256)

    entries, missing = _field(transformer, chosen())
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformer()
    tokens = torch.randint(65, (16, 257), generator=generator)
    passes: list[float] = []
    for round_ in range(repeats + 1):
        model.zero_grad()
        start = clock()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        passes.append(clock() - start)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for _ in range(STEPS_PER_REPEAT):
            fresh = [_with_noise(g, generator) for g in gradients]
            for name in _turns(entries, round_):
                for p, g in zip(entries[name].model.parameters(), fresh, strict=True):
                    p.grad = g.clone()
                entries[name].step()
    whole = statistics.median(passes[1:])
    measurements = tuple(
        Measurement(name, entry.median, None, f"{entry.as_text()} ms; {entry.mean / whole:.1%} of forward + backward")
        for name, entry in entries.items()
    )
    goals = []
    if DEFAULT in entries:
        goals.append(
            (Goal("mean step of the default ÷ (forward + backward)", "<=", 0.05), entries[DEFAULT].mean / whole)
        )
    return Row(title, "; ".join([f"forward + backward {1e3 * whole:.4g} ms", *missing]), measurements, tuple(goals))


def _with_noise(gradient: Tensor, generator: torch.Generator) -> Tensor:
    rms = gradient.square().mean().sqrt()
    return torch.empty_like(gradient).normal_(generator=generator).mul_(rms).add_(gradient)


class _Beside(nn.Module):
    """A network whose head is a matrix like the others, since another layer comes after it, which is not called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.last = network, nn.Linear(1, 1, bias=False)


def _of_network(make: Callable[[], nn.Module], goals: Mapping[str, float], of: str, title: str, repeats: int) -> Row:
    """Steps of a whole network on new normal gradients: torch's Muon, the default, and it with whole matrices."""
    variant = {WHOLE_DEFAULT: Competitor(lambda model, lr, rest_lr: optim.Muon(model, lr=lr, part_size=None), 0.1)}
    names = (TORCH_MUON, OUR_MUON, WHOLE_DEFAULT)
    entries, missing = _field(make, {name: c for name, c in (chosen() | variant).items() if name in names})
    generator = torch.Generator().manual_seed(0)
    num_rounds = STEPS_PER_REPEAT * repeats + 1
    errors: dict[str, float] = {}
    for round_ in range(num_rounds + 1):
        shapes = [p.shape for p in next(iter(entries.values())).model.parameters()]
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for name in _turns(entries, round_):
            entry = entries[name]
            for p, g in zip(entry.model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            if round_ < num_rounds:
                entry.step()
            elif name != OUR_MUON:  # whose parts are orthogonal each by itself
                errors[name] = _error_of_network(entry)
    measured = tuple(
        Measurement(name, entry.median, errors.get(name), f"{entry.as_text()} ms") for name, entry in entries.items()
    )
    found = [
        (Goal(f"{name}'s step ÷ torch Muon's, {of}", "<=", goal), _paired_ratio(entries[name], entries[TORCH_MUON]))
        for name, goal in goals.items()
        if name in entries and TORCH_MUON in entries
    ]
    return Row(title, "; ".join(["rms|σ − 1| of the update; normal gradients", *missing]), measured, tuple(found))


def _paired_ratio(entry: Steps, other: Steps) -> float:
    """The median of the ratios of steps in the same turn, whose other load is the same."""
    return statistics.median(a / b for a, b in zip(entry.times, other.times, strict=True))


def _error_of_network(entry: Steps) -> float:
    """rms|σ − 1| of a step's update over all its matrices, each in units of the mean of its singular values.

    In units of its mean and not of its nominal length, since torch's Muon and ours scale by shape in other ways.
    """
    hidden, _ = hidden_and_rest(entry.model)
    updates = [u for u in _updates(entry, hidden) if min(u.shape) > 1]
    return orthogonality(updates, [float(torch.linalg.svdvals(u.double()).mean()) for u in updates])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, float]]] = {
    "autoencoder": (lambda: _Beside(autoencoder()), {OUR_MUON: 0.6, WHOLE_DEFAULT: 0.6}),
    "transformer, 128 wide": (partial(Transformer, width=128, depth=4), {OUR_MUON: 0.6}),
    "transformer, 384 wide": (partial(Transformer, width=WIDTH, depth=DEPTH, heads=6), {OUR_MUON: 0.5}),
    "MLP, 256 wide": (partial(mlp, width=256, depth=4), {OUR_MUON: 1.0}),
}
"""Networks whose whole step is measured beside torch's Muon, and what is to be reached."""

COSTS: dict[str, Callable[[str, int], Row]] = {
    "step cost: 16 matrices": _sixteen_matrices,
    "step cost: autoencoder": _autoencoder,
    "overhead: transformer, 4,096 tokens": _overhead,
    **{f"step of a network: {of}": partial(_of_network, make, goals, of) for of, (make, goals) in NETWORKS.items()},
}
"""Row's name: what measures it."""
