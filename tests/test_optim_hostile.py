"""No gradient poisons a weight, whatever the optimizer: outcomes are counted, and neighbors unharmed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from directions import checks_of, may_keep_direction, variants
from gramian.errors import InputError, UnsupportedError
from gramian.optim import Muon

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")

OPTIMIZERS = variants(2, lr=0.1, scale="match_rms_adamw")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SHAPES = ((5, 5), (4, 9), (1, 7), (7, 1), (20, 33))
STEPS = 4

Shape = tuple[int, int]


def noise(shape: Shape, step: int) -> Tensor:
    return torch.randn(shape, generator=seeded(step), dtype=torch.float64)


def with_spectrum(shape: Shape, step: int, sigma: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(noise(shape, step), full_matrices=False)
    return u * sigma @ vt


def first_entry(shape: Shape, value: float) -> Tensor:
    g = torch.zeros(shape, dtype=torch.float64)
    g[0, 0] = value
    return g


# name -> the gradient of a step, in float64
GRADIENTS: dict[str, Callable[[Shape, int], Tensor]] = {
    "nan": lambda s, i: torch.full(s, math.nan),
    "one_nan": lambda s, i: noise(s, i) + first_entry(s, math.nan),
    "inf": lambda s, i: torch.full(s, math.inf),
    "one_minus_inf": lambda s, i: noise(s, i) + first_entry(s, -math.inf),
    "nan_at_first": lambda s, i: noise(s, i) * (math.nan if i < 2 else 1.0),
    "nan_between": lambda s, i: noise(s, i) * (math.nan if i == 2 else 1.0),
    "zero": lambda s, i: torch.zeros(s),
    "zero_at_first": lambda s, i: noise(s, i) * (i > 1),
    "rank_one": lambda s, i: noise((s[0], 1), i) @ noise((1, s[1]), i + 9),
    "the_same_rank_one": lambda s, i: torch.ones(s),
    "one_entry": lambda s, i: first_entry(s, 1e-20),
    "huge": lambda s, i: 1e30 * noise(s, i),
    "largest": lambda s, i: torch.full(s, 3e38, dtype=torch.float64),
    "tiny": lambda s, i: 1e-30 * noise(s, i),
    "subnormal": lambda s, i: 1e-42 * noise(s, i),
    "float64_huge": lambda s, i: 1e300 * noise(s, i),
    "float64_tiny": lambda s, i: 1e-300 * noise(s, i),
    "condition": lambda s, i: with_spectrum(s, i, torch.logspace(0, -16, min(s), dtype=torch.float64)),
    "equal": lambda s, i: with_spectrum(s, i, torch.ones(min(s), dtype=torch.float64)),
    "growing": lambda s, i: 10.0 ** (12 * i - 30) * noise(s, i),
    "shrinking": lambda s, i: 10.0 ** (30 - 12 * i) * noise(s, i),
    "alternating": lambda s, i: 10.0 ** (30 * (-1) ** i) * noise(s, i),
}


def members() -> Iterator[tuple[str, Shape, torch.dtype]]:
    for dtype in DTYPES:
        for shape in SHAPES:
            yield f"{str(dtype).removeprefix('torch.')} {shape[0]} × {shape[1]}", shape, dtype


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stay_finite_and_outcomes_are_counted(name: str, gradient: str) -> None:
    """All dtypes and shapes in one optimizer: what must move does, by a bounded length, and nothing else."""
    params = {key: nn.Parameter(torch.zeros(shape, dtype=dtype)) for key, shape, dtype in members()}
    empty = nn.Parameter(torch.zeros(0, 4))
    optimizer = OPTIMIZERS[name]([*params.items(), ("empty", empty)], routes={"*": "matrix"})
    skipped = dict.fromkeys([*params, "empty"], 0)
    pushed, went = set(), set()
    for step in range(STEPS):
        before = {key: p.detach().clone() for key, p in params.items()}
        for key, p in params.items():
            p.grad = GRADIENTS[gradient](tuple(p.shape), step).to(p.dtype)
            skipped[key] += not p.grad.isfinite().all()
        empty.grad = torch.zeros_like(empty)
        optimizer.step()
        for key, p in params.items():
            assert p.isfinite().all(), (key, step)
            moved = torch.linalg.vector_norm((p.detach() - before[key]).double())
            bad = not p.grad.isfinite().all()
            # lr · s · √min(m, n), s = 0.2 √max(m, n); and the rounding of weights below one.
            longest = (0.1 * 0.2 + torch.finfo(p.dtype).eps) * p.numel() ** 0.5
            assert moved <= (0 if bad else 1.3 * longest), (key, step)
            pushed |= {key} if not bad and p.grad.any() else set()
            went |= {key} if moved else set()
    # A direction that is kept may be zero, until it is recomputed.
    assert went <= pushed if may_keep_direction(name) else went == pushed
    assert {key: row["skipped"] for key, row in optimizer.health().items()} == skipped


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_rest_stays_finite_and_goes_on(gradient: str) -> None:
    """Vectors of all dtypes; after five hostile gradients, ordinary ones move every one of them again."""
    params = {str(dtype): nn.Parameter(torch.zeros(7, dtype=dtype)) for dtype in DTYPES}
    optimizer = Muon(
        [*params.items(), ("matrix", nn.Parameter(torch.ones(2, 2))), ("none", nn.Parameter(torch.ones(0)))]
    )
    skipped = dict.fromkeys(params, 0)
    for step in range(10):
        for key, p in params.items():
            make = GRADIENTS[gradient] if step < 5 else noise
            p.grad = make((7, 1), step).flatten().to(p.dtype)
            skipped[key] += not p.grad.square().isfinite().all()
        before = {key: p.detach().clone() for key, p in params.items()}
        optimizer.step()
        for key, p in params.items():
            assert p.isfinite().all(), (key, step)
            assert torch.equal(p, before[key]) or p.grad.square().isfinite().all(), (key, step)
    for key, p in params.items():
        assert optimizer.health()[key]["skipped"] == skipped[key]
        assert not torch.equal(p, before[key]) or optimizer.state[p]["exp_avg_sq"].max() > 1e5, key


def test_what_cannot_be_stepped_is_refused() -> None:
    with pytest.raises(InputError, match=r"'w' is of torch\.complex64"):
        Muon([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Muon(nn.Sequential(embedding, nn.Linear(3, 3), nn.Linear(3, 2)))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_health_has_numbers_for_every_state(name: str) -> None:
    for gradient, make in GRADIENTS.items():
        p = nn.Parameter(torch.zeros(5, 4))
        optimizer = OPTIMIZERS[name]([p])
        for step in range(3):
            p.grad = make((5, 4), step).float()
            optimizer.step()
        row = optimizer.health("spectra")["0"]
        recipe = optimizer.recipe
        if recipe.momentum is None:
            assert row["condition"] is None
            assert row["effective_rank"] is None
        else:
            assert row["condition"] >= 1, gradient
            assert 1 - 1e-6 <= row["effective_rank"] <= 4 + 1e-6, gradient
        nothing_kept = recipe.staleness is None or (checks_of(name).keeps_direction and not may_keep_direction(name))
        assert (row["drift"] is None) == nothing_kept
        assert row["drift"] is None or 0 <= row["drift"] <= 1 + 1e-6, gradient


# name -> what each step's gradient is multiplied by
FADING: dict[str, list[float]] = {
    "suddenly": [1.0] * 20 + [1e-30] * 200,
    "through zeros": [1.0] * 3 + [0.0] * 200 + [1e-30] * 5,
    "in steps": [10.0 ** (-5 * (i // 10)) for i in range(90)],
    "and back": [1e30] * 3 + [1e-30] * 40 + [1.0] * 40,
}


@pytest.mark.parametrize(
    ("fading", "momentum"), [*((fading, 0.9) for fading in FADING), ("through zeros", 0.0), ("and back", 0.0)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_may_fade(name: str, fading: str, momentum: float) -> None:
    """No step is longer than Adam's after a sudden gradient, 1/√(1 − β) of the usual, and nothing stays broken."""
    p = nn.Parameter(torch.zeros(20, 33))
    optimizer = OPTIMIZERS[name]([p])
    if "momentum" in optimizer.recipe.options:
        optimizer.param_groups[0]["momentum"] = momentum
    longest = 0.05**-0.5 * 0.1 * 0.2 * math.sqrt(33 * 20)
    for i, factor in enumerate([*FADING[fading], *[1.0] * 20]):
        before = p.detach().clone()
        p.grad = (factor * noise((20, 33), i)).float()
        optimizer.step()
        assert torch.linalg.matrix_norm(p.detach() - before) <= longest, i
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


@pytest.mark.parametrize("gradient", ["nan", "one_minus_inf", "zero", "rank_one", "huge", "tiny", "condition"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neighbors_in_a_batch_are_unharmed(name: str, gradient: str) -> None:
    """As beside a neighbor with an ordinary gradient: to the bit, or to a few roundings where all share solves."""
    ends = []
    for make in (GRADIENTS[gradient], lambda s, i: noise(s, 77 + i)):
        params = [nn.Parameter(torch.ones(6, 5)) for _ in range(3)]
        optimizer = OPTIMIZERS[name](params)
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = (make((6, 5), step) if i == 1 else noise((6, 5), 10 * i + step)).float()
            optimizer.step()
        ends.append([p.detach() for p in params])
    for i in (0, 2):
        rounding = checks_of(name).roundings * torch.finfo(torch.float32).eps
        torch.testing.assert_close(ends[0][i], ends[1][i], rtol=rounding, atol=rounding)  # of weights of size one
    assert not torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_may_miss_gradients(name: str) -> None:
    """It stays, its state too, and its neighbors step as if it had been skipped; frozen, it leaves the batch."""
    ends = []
    for missing in (None, torch.full((6, 5), math.nan)):
        params = [nn.Parameter(torch.ones(6, 5)) for _ in range(3)]
        optimizer = OPTIMIZERS[name](params)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = noise((6, 5), 10 * i + step).float()
            if step in (2, 3):
                params[1].grad = missing
                before = params[1].detach().clone()
            optimizer.step()
            if step in (2, 3):
                assert torch.equal(params[1], before)
        ends.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    params[1].requires_grad_(False)
    params[1].grad = None
    state = {key: value.clone() for key, value in optimizer.state[params[1]].items()}
    for step in range(6, 9):
        for i in (0, 2):
            params[i].grad = noise((6, 5), 10 * i + step).float()
        optimizer.step()
    assert torch.equal(params[1], ends[1][1])
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state[params[1]].items())
    assert not torch.equal(params[0], ends[1][0])


def test_counts_of_many_patterns_add_up() -> None:
    """More sets of parameters that step together than counters that are kept on the device."""
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(8)]
    optimizer = Muon([(f"w{i}", p) for i, p in enumerate(params)])
    wanted = dict.fromkeys((f"w{i}" for i in range(8)), 0)
    for pattern in range(1, 150):
        for i, p in enumerate(params):
            has = pattern >> i & 1
            p.grad = torch.full((2, 2), math.nan if (pattern + i) % 3 == 0 else 1.0) if has else None
            wanted[f"w{i}"] += bool(has and (pattern + i) % 3 == 0)
        optimizer.step()
    assert {key: row["skipped"] for key, row in optimizer.health().items()} == wanted
