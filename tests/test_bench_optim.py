"""`gramian bench optim`: runs stop at a target judged on held-out data, tuning is pruned fairly, tasks are seeded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.bench import competitors, learning_tasks, optim, race, run, step_costs
from gramian.bench.learning_tasks import LEARNING, RATES, LearningTask
from gramian.errors import InputError, TaskError

X = torch.randn(64, 4, generator=seeded(0))
Y = X @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
QUICK = ("autoencoder", "cnn", "deep tanh")


def linear(seed: int, *, evaluate=None) -> gm.Task:
    """A line through 64 points: gradient descent at a rate below 1 converges, above 2 it diverges."""

    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(4, 1, bias=False)

    def batches(epoch: int, generator: torch.Generator):
        for rows in torch.randperm(len(X), generator=generator).split(32):
            yield X[rows], Y[rows]

    def error(net: nn.Module) -> dict[str, float]:
        return {"error": float((net(X) - Y).square().mean())}

    return gm.Task(model, gm.Objective.regression(), batches, evaluate or error, "line")


LINE = LearningTask(linear, "error", 0.01, every=2, seconds=5.0)


def descent(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def finished(learning: LearningTask, rate: float, seed: int = 0, **limits: int) -> race.Run:
    running = race.Run(learning, descent, rate, seed, **limits)
    while not running.ended:
        running.advance()
    return running


def test_a_run_stops_at_the_first_evaluation_at_the_target() -> None:
    running = finished(LINE, 0.3)
    result = running.result()
    assert result.reached
    assert result.held_out <= LINE.target
    assert result.steps == len(running.times) == finished(LINE, 0.3).result().steps
    assert result.steps % LINE.every == 0
    assert not finished(LINE, 0.3, max_steps=result.steps - LINE.every).result().reached


def test_the_target_is_judged_by_the_held_out_number_alone() -> None:
    numbers = iter([9.0, 9.0, 9.0, 0.001])
    modes = []

    def scripted(net: nn.Module) -> dict[str, float]:
        modes.append(net.training or torch.is_grad_enabled())
        return {"error": next(numbers)}

    running = finished(replace(LINE, make=lambda seed: linear(seed, evaluate=scripted)), 0.0)
    assert running.ended == "target"  # though a rate of zero learns nothing
    assert len(running.times) == 3 * LINE.every
    assert not any(modes)
    assert running.model.training


def test_training_seconds_leave_evaluations_out(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(race, "clock", lambda: now[0])

    class Second(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 1.0
            return super().step(closure)

    def slow(net: nn.Module) -> dict[str, float]:
        now[0] += 1000.0
        return {"error": 9.0}

    learning = replace(LINE, make=lambda seed: linear(seed, evaluate=slow), seconds=100.0)
    running = race.Run(learning, lambda model, lr: Second(model.parameters(), lr=lr), 0.1, 0)
    while not running.ended:
        running.advance()
    assert running.ended == "stalled"
    assert running.seconds == len(running.times) == math.ceil(learning.limit * race.STALLED / 2) * 2


def test_a_run_that_is_not_finite_ends() -> None:
    assert finished(LINE, 1e9).ended == "not finite"


def test_rates_warm_up_and_then_stay() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    running = race.Run(replace(LINE, target=-1.0), lambda m, lr: Watched(m.parameters(), lr=lr), 0.5, 0, 20)
    while not running.ended:
        running.advance()
    assert rates == pytest.approx([0.05 * k for k in range(1, 11)] + [0.5] * 10)


def test_the_tuned_rate_is_that_of_a_whole_grid_and_no_run_outlasts_the_best() -> None:
    whole = {rate: finished(LINE, rate, seed=100, max_steps=400).result() for rate in RATES}
    fewest = min((r.steps, rate) for rate, r in whole.items() if r.reached)
    best, tried = race.tune(LINE, descent, 0.01, seed=100)
    assert best is not None
    assert best.steps == fewest[0]
    assert best.rate == fewest[1]
    so_far = math.inf
    for result in tried:
        assert result.steps <= so_far
        so_far = min(so_far, result.steps if result.reached else math.inf)
    assert len({result.rate for result in tried}) == len(tried) <= len(RATES)


def test_tuning_that_reaches_nothing_says_so() -> None:
    told: list[str] = []
    never = replace(LINE, target=-1.0, seconds=0.02)
    best, tried = race.tune(never, descent, 0.01, seed=100, rates=(0.01, 0.1), tell=told.append)
    assert best is None
    assert len(tried) == len(told) == 2


def test_a_race_gives_every_competitor_every_seed() -> None:
    entries = {"slow": (descent, 0.03), "fast": (descent, 0.3)}
    scores = race.race(LINE, entries, seeds=(0, 1, 2))
    for name, (make, rate) in entries.items():
        assert make is descent
        assert scores[name].steps == tuple(finished(LINE, rate, seed).result().steps for seed in (0, 1, 2))
        assert scores[name].num_reached == 3
        assert scores[name].median_seconds == sorted(scores[name].seconds)[1]
    assert scores["fast"].median_steps < scores["slow"].median_steps


@pytest.mark.parametrize("name", QUICK)
def test_tasks_are_seeded_and_their_data_are_fixed(name: str) -> None:
    def first(task: gm.Task, seed: int) -> Tensor:
        return next(iter(task.train_batches(0, seeded(seed))))[0]

    one, again, other = (LEARNING[name].make(seed) for seed in (3, 3, 4))
    p, q, r = (torch.cat([t.flatten() for t in task.model().parameters()]) for task in (one, again, other))
    assert torch.equal(p, q)
    assert not torch.equal(p, r)
    assert torch.equal(first(one, 0), first(other, 0))
    assert not torch.equal(first(one, 0), first(one, 1))
    model = one.model().eval()
    with torch.no_grad():
        assert one.evaluate(model) == other.evaluate(model)


@pytest.mark.parametrize("name", ["cnn", "autoencoder"])
def test_no_held_out_image_is_trained_on(name: str) -> None:
    size = 8 if name == "cnn" else 28
    data = learning_tasks.ShiftedDigits.load(size, 1, 128)
    middle = data.train[:, 1, 1].flatten(1), data.test[:, 1, 1].flatten(1)
    assert float(torch.cdist(*middle).min()) > 0


def test_text_is_split_and_its_absence_told(tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 200)
    learning_tasks.tinyshakespeare.cache_clear()
    monkeypatch.setenv(learning_tasks.TEXT_VARIABLE, str(path))
    train, held_out = learning_tasks.tinyshakespeare()
    assert len(train) + len(held_out) == len(path.read_text())
    batch = next(iter(learning_tasks.characters(0).train_batches(0, seeded(0))))
    assert [tuple(t.shape) for t in batch] == [(16, 128), (16, 128)]
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    learning_tasks.tinyshakespeare.cache_clear()
    monkeypatch.setenv(learning_tasks.TEXT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(TaskError, match="set GRAMIAN_TINYSHAKESPEARE to where it is"):
        learning_tasks.characters(0)
    (row,) = run("optim", only="time to target: transformer")
    assert "set GRAMIAN_TINYSHAKESPEARE" in row.error
    assert row.measurements == ()


def test_hidden_matrices_and_the_rest_are_all_parameters() -> None:
    net = LEARNING["cnn"].make(0).model()
    hidden, rest = competitors.hidden_and_rest(net)
    assert [p.ndim for p in hidden] == [4] * 4
    assert {id(p) for p in hidden + rest} == {id(p) for p in net.parameters()}
    assert competitors.COMPETITORS[competitors.TORCH_MUON].obstacle(net)
    assert not competitors.COMPETITORS[competitors.TORCH_MUON].obstacle(LEARNING["deep tanh"].make(0).model())


@pytest.mark.parametrize("name", competitors.COMPETITORS)
def test_every_competitor_steps(name: str) -> None:
    competitor = competitors.COMPETITORS[name]
    learning = LEARNING["deep tanh"]
    if competitor.obstacle(learning.make(0).model()):
        pytest.skip(competitor.package)
    running = race.Run(replace(learning, every=3), lambda model, lr: competitor.make(model, lr, 1e-3), 1e-3, 0, 3)
    before = [p.detach().clone() for p in running.model.parameters()]
    running.advance()
    moved = [not torch.equal(p, q) for p, q in zip(before, running.model.parameters(), strict=True)]
    assert all(moved)


def test_competitors_are_chosen_by_name(monkeypatch) -> None:
    monkeypatch.setenv(competitors.CHOICE_VARIABLE, "pytorch_optimizer SOAP, torch Muon")
    assert list(competitors.chosen()) == [competitors.ADAMW, competitors.TORCH_MUON, "pytorch_optimizer SOAP"]
    monkeypatch.setenv(competitors.CHOICE_VARIABLE, "Lion")
    with pytest.raises(InputError, match="no optimizer's name contains 'Lion'"):
        competitors.chosen()


def test_a_row_has_goals_and_tuned_rates_are_kept(monkeypatch, tmp_path) -> None:
    def table(factor: float, *, ours: bool) -> competitors.Competitor:
        return competitors.Competitor(lambda model, lr, rest_lr: descent(model, factor * lr), 0.1, ours=ours)

    field = {competitors.ADAMW: table(0.3, ours=False), competitors.DEFAULT: table(1.0, ours=True)}
    monkeypatch.setattr(competitors, "COMPETITORS", field)
    monkeypatch.setattr(optim, "COMPETITORS", field)
    monkeypatch.setattr(optim, "LEARNING", {"line": LINE})
    monkeypatch.setenv(optim.RATES_VARIABLE, str(tmp_path / "rates.json"))
    (rates,) = run("optim", only="rates: line")
    assert [m.method for m in rates.measurements] == list(field)
    monkeypatch.setattr(optim, "tune", lambda *args, **kwargs: pytest.fail("tuned twice"))
    row, mean = run("optim", only="time to target")
    ((goal, figure),) = row.goals
    assert goal == optim.TIME_GOAL
    assert figure == pytest.approx(row.measurements[1].seconds / row.measurements[0].seconds)
    assert mean.goals[0][1] == pytest.approx(figure)


def test_orthogonality_measures_singular_values_against_the_nominal() -> None:
    q = gm.random.orthogonal(6, 4, generator=seeded(0), dtype=torch.float32)
    assert step_costs.orthogonality([0.5 * q], [0.5]) < 1e-6
    assert step_costs.orthogonality([0.5 * q], [1.0]) == pytest.approx(0.5)
    assert step_costs.orthogonality([0.5 * q, q], [0.5, 1.0]) < 1e-6
