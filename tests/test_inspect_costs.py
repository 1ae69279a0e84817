"""What a diagnosis asks only where a cheaper question has left it open."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.inspection.causes import dependence, row_agreement
from gramian.inspection.causes.row_agreement import relations
from gramian.inspection.causes.sample_similarity import kernels
from gramian.inspection.experiments.optimizer_steps import FEWEST, NUM_STEPS, take_steps
from gramian.inspection.passes.moments import all_finite
from gramian.inspection.passes.watched_steps import observe
from gramian.objective import as_objective
from gramian.operators import NoJacobian, try_jacobian
from gramian.recording.measuring import batch_statistics


@pytest.mark.parametrize(
    ("growth", "rate", "num_steps"),
    [
        (1.0, 1e-3, FEWEST),
        (1.1, 1e-3, FEWEST),  # by a fifth in two steps: no way to three times in five
        (1.3, 1e-3, NUM_STEPS),
        (1.1, 1.0, NUM_STEPS),  # a step as large as the weights
        (1.1, 1e-6, NUM_STEPS),  # one that hardly moves them
    ],
)
def test_more_steps_are_taken_where_they_may_tell_more(growth: float, rate: float, num_steps: int) -> None:
    values = itertools.accumulate(itertools.repeat(growth), lambda a, b: a * b, initial=1.0)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        slope = model(batch).sum()
        return slope - slope.detach() + next(values)

    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.copy_(torch.rand(8, 8, generator=seeded(0)) / 10)
    taken = take_steps(model, torch.optim.SGD(model.parameters(), rate), [torch.ones(4, 8)], as_objective(loss))
    assert len(taken.losses) == num_steps + 1


def test_labels_made_of_products_are_tried_where_linear_ones_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []
    made_up = dependence._made_up

    def counted(factors: tuple[Tensor, ...], *args: Any) -> Tensor:
        tried.append(len(factors) == 2)
        return made_up(factors, *args)

    monkeypatch.setattr(dependence, "_made_up", counted)
    y = torch.randint(4, (128,), generator=seeded(1))
    for num_features, wanted in ((1000, [False]), (3, [False, True])):
        tried.clear()
        test = dependence.labels_depend([[torch.randn(128, num_features, generator=seeded(0))]], [y])
        assert test is not None
        assert tried == wanted
        assert ("products" in test.evidence) == (True in wanted)


def test_labels_made_up_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 6, generator=seeded(0))
    whole = dependence._made_up((x, x), 3, seeded(1))
    monkeypatch.setattr(dependence, "MOST_DRAWN", 1)
    assert (dependence._made_up((x, x), 3, seeded(1)) == whole).float().mean() > 0.999


def test_two_tensors_belong_together_from_both_sides() -> None:
    x = torch.randn(300, 4, generator=seeded(0))
    joins = relations({"x": x, "y": x[:, :2].roll(3, 0)})
    assert joins["x"].shift == -joins["y"].shift != 0
    assert joins["x"].shifted == joins["y"].shifted < 1e-10


def test_chance_is_the_same_for_all_orders_of_rows() -> None:
    x = torch.randn(120, 4, generator=seeded(0))
    own, around = (row_agreement._Centered.of(kernels(t)) for t in (x, x[:, :2].roll(3, 0)))
    known = row_agreement._chance(own, around)
    for other in (own.rolled(3), own.ordered(torch.randperm(120, generator=seeded(1)))):
        assert row_agreement._test(other, around, known) == row_agreement._test(other, around)


def test_the_local_kernel_is_that_of_distances() -> None:
    x = torch.randn(40, 5, generator=seeded(0), dtype=torch.float64)
    x = (x - x.mean(0)) / (x - x.mean(0)).square().mean(0).sqrt()
    distances = torch.cdist(x, x).square()
    width = distances.kthvalue(11, 1).values.median()
    torch.testing.assert_close(kernels(x)[2], torch.exp(-distances / width).float())


def test_rows_that_mix_are_found_by_few_of_them() -> None:
    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    seen: list[int] = []
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(Noted(), nn.Linear(4, 4), norm, nn.Linear(4, 2))
    batch = torch.randn(64, 4, generator=seeded(0)), torch.zeros(64, dtype=torch.long)
    few = tuple(t[:8] for t in batch)
    with batch_statistics(model):
        assert isinstance(try_jacobian(model, batch, gm.Objective.classification(), few=few), NoJacobian)
    assert seen == [8]
    seen.clear()
    wanted = try_jacobian(model, batch, gm.Objective.classification())
    found = try_jacobian(model, batch, gm.Objective.classification(), few=few)
    assert isinstance(wanted, Tensor)
    assert isinstance(found, Tensor)
    assert torch.equal(found, wanted)
    assert seen == [64, 8, 64]


def test_a_model_of_one_batch_size_has_its_jacobian_all_the_same() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(16, 4)

    model = nn.Sequential(nn.Linear(4, 4), Fixed(), nn.Linear(4, 2))
    batch = torch.randn(16, 4, generator=seeded(0)), torch.zeros(16, dtype=torch.long)
    found = try_jacobian(model, batch, gm.Objective.classification(), few=tuple(t[:8] for t in batch))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, model[0].weight.detach().expand(16, 4, 4))


def test_labels_of_many_features_are_made_of_a_root_of_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    made_up = dependence._made_up

    def noted(factors: tuple[Tensor, ...], *args: Any) -> Tensor:
        given.append(factors[0])
        return made_up(factors, *args)

    monkeypatch.setattr(dependence, "_made_up", noted)
    x, y = torch.randn(128, 2000, generator=seeded(0)), torch.randint(4, (128,), generator=seeded(1))
    assert dependence.labels_depend([[x]], [y]) is not None
    assert given[0].shape == (128, 128)
    x = dependence._standardized(x)
    torch.testing.assert_close(given[0] @ given[0].T, x @ x.T, rtol=1e-4, atol=0.1)


def test_a_sum_that_overflows_is_looked_at_again() -> None:
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.full((4,), largest))
    assert all_finite(torch.zeros(0))
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.tensor([largest, value, -largest]))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))


def test_samples_that_are_equal_stay_so_in_float32() -> None:
    x = torch.randn(20, 3, generator=seeded(0), dtype=torch.float64).repeat(8, 1) * 1e3
    local = kernels(x)[2]
    assert bool((local[:20, 20:40].diagonal() == 1).all())  # ten neighbors of each are not as many as its equals


def test_inputs_that_do_not_differ_have_no_directions() -> None:
    x = 0.3 * torch.ones(200, 8) + 1e-7 * torch.randn(200, 8, generator=seeded(0))
    x[:, 0] = torch.randn(200, generator=seeded(1))
    directions = dependence._principal(x, dependence._gram(x))
    assert directions.norm(dim=0).sort().values.tolist() == pytest.approx([0.0] * 7 + [1.0])


class Averaging(nn.Module):
    """A layer that keeps an average of its inputs, which the next pass takes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return y


@pytest.mark.parametrize(("norm", "is_kept"), [(nn.BatchNorm1d(3), True), (Averaging(), False)])
def test_the_first_step_has_the_gradients_of_the_watched_one(norm: nn.Module, is_kept: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), norm, nn.Dropout(), nn.Linear(3, 2))
    batches = [(torch.randn(16, 4, generator=seeded(i)), torch.arange(16) % 2) for i in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    objective = gm.Objective.classification()
    alone = take_steps(model, optimizer, batches, objective)
    observed = observe(model, batches, objective, num_steps=3)
    assert (observed.first_step is not None) is is_kept
    calls: list[int] = []
    counted = gm.Objective(lambda m, b: calls.append(1) or m(b[0]), objective.criterion)
    taken = take_steps(model, optimizer, batches, counted, first=observed)
    assert len(calls) == len(alone.losses) - is_kept
    assert taken.losses == pytest.approx(alone.losses)
    assert taken.changes == pytest.approx(alone.changes)
    assert observed.first_step is None
    assert all(p.grad is None for p in model.parameters())
