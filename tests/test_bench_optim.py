"""`gramian bench optim`: runs decay to zero and repeat, rates are tuned alike, time to target is interpolated."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.bench import competitors, learning_data, optim, race, run, step_costs
from gramian.bench.learning_tasks import LADDER, LEARNING, SCORING_SEEDS, LearningTask, half
from gramian.errors import InputError, TaskError

X = torch.randn(64, 4, generator=seeded(0))
Y = X @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])


def linear(seed: int) -> gm.Task:
    """A line through 64 points: gradient descent at a rate below 1 converges, above 2 it diverges."""

    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(4, 1, bias=False)

    def batches(epoch: int, generator: torch.Generator):
        for rows in torch.randperm(len(X), generator=generator).split(32):
            yield X[rows], Y[rows]

    def error(net: nn.Module) -> dict[str, float]:
        assert not net.training
        assert not torch.is_grad_enabled()
        return {"error": float((net(X) - Y).square().mean())}

    return gm.Task(model, gm.Objective.regression(), batches, error, "line")


LINE = LearningTask(linear, "error", 40, "development")


def descent(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_half_of_the_tasks_are_held_out_and_their_names_are_fixed() -> None:
    ours = ["mlp", "autoencoder", "characters", "depthwise", "lstm", "ill-scaled", "recall"]
    assert list(half("development")) == ours
    assert list(half("held out")) == ["cnn", "deep tanh", "patches", "recurrence", "experts", "mnist1d", "waves"]
    assert len(LEARNING) == 14


def test_the_rate_rises_and_falls_linearly_to_zero() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    race.held_out(LINE, lambda m, lr: Watched(m.parameters(), lr=lr), 0.5, 0, 42)
    assert len(rates) == 42
    assert rates[:2] == pytest.approx([0.25, 0.5])
    assert rates[2:] == pytest.approx([0.5 * (42 - k) / 40 for k in range(2, 42)])


def test_a_run_repeats_to_the_bit_and_what_diverges_is_infinite() -> None:
    found = race.held_out(LINE, descent, 0.3, 0, 40)
    assert found == race.held_out(LINE, descent, 0.3, 0, 40) != race.held_out(LINE, descent, 0.3, 1, 40)
    assert found < 0.1 * race.held_out(LINE, descent, 0.0, 0, 1)
    assert race.held_out(LINE, descent, 1e9, 0, 40) == math.inf


def test_costs_separate_an_optimizer_from_what_is_around_it(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(race, "clock", lambda: now[0])

    def taking(seconds: float):
        class Slow(torch.optim.SGD):
            def step(self, closure=None):
                now[0] += seconds

        return lambda model, lr: Slow(model.parameters(), lr=lr)

    forward = nn.Linear.forward

    def slow(self, x: Tensor) -> Tensor:
        now[0] += 10.0
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", slow)
    found = race.costs(LINE, {"one": (taking(1.0), 0.1), "three": (taking(3.0), 0.1)}, 0)
    assert found == {"one": race.Cost(10.0, 1.0), "three": race.Cost(10.0, 3.0)}


@pytest.mark.parametrize("wanted", [0.13, 0.3, 0.5, 0.61, 0.99, 1.2])
def test_time_to_target_is_found_between_two_rungs(wanted: float) -> None:
    asked: list[float] = []

    def number(share: float) -> float:
        asked.append(share)
        return share**-2.0

    share, remark = race.share_to_target(number, wanted**-2.0)
    assert share == pytest.approx(wanted)
    assert remark == ""
    assert len(asked) == len(set(asked))
    assert set(asked) <= set(LADDER)


def test_time_to_target_says_where_it_is_a_bound() -> None:
    assert race.share_to_target(lambda share: 1.0, 0.5) == (race.STEEPEST, "missed at 1.4 budgets, counted as")
    assert race.share_to_target(lambda share: 0.1, 0.5) == (LADDER[0], "at most")
    assert race.share_to_target(lambda share: math.inf if share < 0.4 else 0.1, 0.5) == (0.5, "at most")


@pytest.mark.parametrize("name", LEARNING)
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
        number = one.evaluate(model)[LEARNING[name].metric]
        assert number == other.evaluate(model)[LEARNING[name].metric]
    assert 0.5 < number < 1000


@pytest.mark.parametrize("size", [8, 28])
def test_no_held_out_image_is_trained_on(size: int) -> None:
    data = learning_data.ShiftedDigits.load(size, 1, 128)
    middle = data.train[:, 1, 1].flatten(1), data.test[:, 1, 1].flatten(1)
    assert float(torch.cdist(*middle).min()) > 0


def test_recall_asks_for_values_that_were_shown() -> None:
    tokens, wanted = learning_data.recall(seeded(0), 20)
    for row, answers in zip(tokens.tolist(), wanted.tolist(), strict=True):
        shown = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert answers[:16] == [-100] * 16
        assert [shown[key] for key in row[16::2]] == answers[16::2] == row[17::2]
        assert answers[17::2] == [-100] * 8


def test_text_is_split_and_its_absence_told(tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 200)
    learning_data.text.cache_clear()
    monkeypatch.setenv(learning_data.TEXT_VARIABLE, str(path))
    source, train, held_out = learning_data.text()
    assert source == "tiny Shakespeare"
    assert len(train) + len(held_out) == len(path.read_text())
    batch = next(iter(learning_data.Windows(64, 16).batches(0, seeded(0))))
    assert [tuple(t.shape) for t in batch] == [(16, 64), (16, 64)]
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    learning_data.text.cache_clear()
    monkeypatch.setenv(learning_data.TEXT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(TaskError, match="where there is no file"):
        learning_data.text()
    learning_data.text.cache_clear()


def test_torch_muon_steps_kernels_and_experts_as_matrices() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, bias=False)})
    kernel = model["conv"].weight
    stack = nn.Parameter(torch.randn(2, 5, 3, generator=seeded(0)))
    twins = [nn.Parameter(p.detach().clone()) for p in (kernel.flatten(1), stack[0], stack[1])]
    together = competitors._AsMatrices(model, [kernel, stack], lambda ps: torch.optim.Muon(ps, lr=0.1))
    alone = torch.optim.Muon(twins, lr=0.1)
    kernel.grad, stack.grad = torch.ones_like(kernel).cumsum(0), torch.ones_like(stack).cumsum(-1)
    for twin, grad in zip(twins, (kernel.grad.flatten(1), *stack.grad), strict=True):
        twin.grad = grad.clone()
    together.step()
    alone.step()
    assert torch.equal(kernel.flatten(1), twins[0])
    assert torch.equal(stack, torch.stack(twins[1:]))
    together.zero_grad()
    assert kernel.grad is None


def test_hidden_matrices_and_the_rest_are_all_parameters() -> None:
    net = LEARNING["cnn"].make(0).model()
    hidden, rest = competitors.hidden_and_rest(net)
    assert [p.ndim for p in hidden] == [4] * 4
    assert {id(p) for p in hidden + rest} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("name", competitors.COMPETITORS)
def test_every_competitor_steps(name: str) -> None:
    competitor = competitors.COMPETITORS[name]
    learning = LEARNING["cnn"]
    if competitor.obstacle():
        pytest.skip(competitor.package)
    training = race._Training(learning, lambda model, lr: competitor.make(model, lr, 1e-3), 1e-3, 0)
    before = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(3):
        training.differentiate()
        training.step(1.0)
    assert all(not torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))


def test_competitors_are_chosen_by_name(monkeypatch) -> None:
    monkeypatch.setenv(competitors.CHOICE_VARIABLE, "pytorch_optimizer SOAP, torch Muon")
    assert list(competitors.chosen()) == [competitors.ADAMW, competitors.TORCH_MUON, "pytorch_optimizer SOAP"]
    monkeypatch.setenv(competitors.CHOICE_VARIABLE, "Lion")
    with pytest.raises(InputError, match="no optimizer's name contains 'Lion'"):
        competitors.chosen()


def test_a_half_is_raced_and_continued_from_its_file(monkeypatch, tmp_path) -> None:
    def table(most: float, *, ours: bool) -> competitors.Competitor:
        return competitors.Competitor(lambda model, lr, rest_lr: descent(model, min(lr, most)), 0.1, ours=ours)

    field = {competitors.ADAMW: table(0.03, ours=False), competitors.DEFAULT: table(1.0, ours=True)}
    monkeypatch.setattr(competitors, "COMPETITORS", field)
    monkeypatch.setattr(optim, "COMPETITORS", field)
    monkeypatch.setattr(optim, "LEARNING", {"line": LINE, "other": replace(LINE, half="held out")})
    monkeypatch.setattr(optim, "costs", lambda learning, entries, seed: {name: race.Cost(2.0, 1.0) for name in entries})
    monkeypatch.setenv(optim.RUNS_VARIABLE, str(tmp_path / "runs.json"))
    row, everything = run("optim", only="equal seconds: development")
    slow, fast = row.measurements
    assert slow.error == sorted(race.held_out(LINE, descent, 0.03, seed, 40) for seed in SCORING_SEEDS)[1]
    assert slow.seconds == pytest.approx(40 * 3.0)
    assert fast.error < slow.error
    assert dict(row.goals)[optim.TIME_GOAL] == pytest.approx(fast.seconds / slow.seconds)
    assert dict(everything.goals)[optim.MEAN_GOAL] == pytest.approx(fast.seconds / slow.seconds)
    assert all(key.startswith("line |") for key in json.loads((tmp_path / "runs.json").read_text()))
    monkeypatch.setattr(race, "held_out", lambda *args: pytest.fail("ran twice"))
    assert run("optim", only="equal seconds: development")[0] == row


def test_a_half_is_summed_up_by_geometric_means() -> None:
    adamw, muon, default = competitors.ADAMW, competitors.TORCH_MUON, competitors.DEFAULT
    one = {adamw: optim.Figures(1.0, 1.0), muon: optim.Figures(0.5, 0.5), default: optim.Figures(0.4, 0.4)}
    two = {adamw: optim.Figures(1.0, 1.0), muon: optim.Figures(1.1, 1.6), default: optim.Figures(1.2, 0.9)}
    goals = dict(optim.summary("all", {"one": one, "two": two}).goals)
    assert goals[optim.MEAN_GOAL] == pytest.approx(math.sqrt(0.8 * 0.9))
    assert goals[optim.ADAMW_GOAL] == pytest.approx(math.sqrt(0.4 * 0.9))
    assert goals[optim.BETTER_GOAL] == pytest.approx(0.5)


def test_orthogonality_measures_singular_values_against_the_nominal() -> None:
    q = gm.random.orthogonal(6, 4, generator=seeded(0), dtype=torch.float32)
    assert step_costs.orthogonality([0.5 * q], [0.5]) < 1e-6
    assert step_costs.orthogonality([0.5 * q], [1.0]) == pytest.approx(0.5)
    assert step_costs.orthogonality([0.5 * q, q], [0.5, 1.0]) < 1e-6
