"""A run spends its budget, repeats itself, writes what it did, and says what a task did wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.checkpoint import load_into
from gramian.errors import GramianWarning, InputError, TaskError
from gramian.optim import OPTIMIZERS
from gramian.report import Action, Finding, Report
from gramian.training import start
from gramian.training.suggesting import suggested
from gramian.training.usual_loss import usual
from zoo import ZOO

X = torch.randn(96, 6, generator=seeded(0))
Y = (X[:, 0] > 0).long()


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def batches(epoch: int, generator: torch.Generator):
    for part in torch.randperm(len(X), generator=generator).split(16):
        yield X[part], Y[part]


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"accuracy": float((model(X).argmax(-1) == Y).float().mean())}


def task(**changes) -> gm.Task:
    parts = {"model": net, "objective": gm.Objective.classification(), "train_batches": batches, "evaluate": evaluate}
    return gm.Task(**(parts | changes))


def weights(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("budgets", [{}, {"steps": 3, "epochs": 1}, {"steps": 1, "seconds": 1.0}], ids=str)
def test_one_budget_and_no_other(budgets: dict) -> None:
    with pytest.raises(InputError, match="give one of steps=, epochs=, seconds="):
        gm.train(task(), **budgets)


@pytest.mark.parametrize("budget", [{"steps": 0}, {"epochs": -1}, {"seconds": 0.0}, {"seconds": math.nan}], ids=str)
def test_a_budget_is_positive(budget: dict) -> None:
    with pytest.raises(InputError, match="must be positive"):
        gm.train(task(), **budget)


BUDGETS = [({"steps": 1}, 1), ({"steps": 37}, 37), ({"epochs": 1}, 6), ({"epochs": 3}, 18)]


@pytest.mark.parametrize(("budget", "steps"), BUDGETS, ids=str)
def test_a_budget_is_spent_exactly(budget: dict, steps: int) -> None:
    epochs: list[int] = []

    def counted(epoch: int, generator: torch.Generator):
        epochs.append(epoch)
        return list(batches(epoch, generator))

    run = gm.train(task(train_batches=counted), **budget)
    assert run.steps == steps
    assert run.history[-1]["step"] == steps
    assert epochs == list(range(math.ceil(steps / 6)))


def test_seconds_are_of_training_alone() -> None:
    shares: list[float] = []
    run = gm.train(task(), seconds=0.2, progress=lambda row, share: shares.append(share))
    assert run.seconds >= 0.2
    assert shares[-1] == 1
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    "optimizer",
    ["auto", *OPTIMIZERS, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)],
    ids=["auto", *OPTIMIZERS, "function"],
)
@pytest.mark.parametrize("init", ["default", "isometric"])
def test_the_same_seed_is_the_same_run(optimizer, init: str) -> None:
    runs = [gm.train(task(), optimizer=optimizer, init=init, steps=15, seed=seed) for seed in (3, 3, 4)]
    for p, q, r in zip(*(weights(run.model) for run in runs), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in runs]
    assert rows[0] == rows[1]


def test_dropout_repeats_too() -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(*net()[:2], nn.Dropout(0.5), *net()[2:])

    torch.manual_seed(1)
    first = weights(gm.train(task(model=dropping), steps=5).model)
    torch.manual_seed(2)
    again = weights(gm.train(task(model=dropping), steps=5).model)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    gm.train(task(), init="isometric", steps=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [100, 200, 7])
def test_about_twenty_evaluations(steps: int) -> None:
    modes: list[bool] = []

    def watched(model: nn.Module) -> dict[str, float]:
        modes.append(model.training or torch.is_grad_enabled())
        return evaluate(model)

    run = gm.train(task(evaluate=watched), steps=steps)
    assert len(run.history) == min(20, steps)
    assert not any(modes)
    assert run.model.training


def test_the_learning_rate_rises_and_ends_near_zero() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    gm.train(task(), optimizer=lambda m: Watched(m.parameters(), lr=0.5), steps=100)
    assert len(rates) == 100
    assert rates[0] < 0.06
    assert max(rates) < 0.5
    assert rates.index(max(rates)) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] <= 0.5 / 100 + 1e-9


def test_learning_rate_is_passed_on() -> None:
    still = gm.train(task(), optimizer="adamw", lr=1e-12, steps=10)
    for p, q in zip(weights(still.model), weights(net()), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    with pytest.warns(GramianWarning, match="lr is ignored"):
        gm.train(task(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lr=0.2, steps=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns(optimizer: str) -> None:
    run = gm.train(task(), optimizer=optimizer, steps=300)
    assert run.metrics["accuracy"] > 0.9
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_what_is_written_is_what_was_done(tmp_path) -> None:
    run = gm.train(task(name="signs"), steps=30, out=tmp_path / "deep" / "run")
    folder = tmp_path / "deep" / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.history
    assert set(rows[0]) == {"step", "seconds", "loss", "accuracy"}
    loaded = load_into(net(), folder / "model.safetensors")
    for p, q in zip(weights(loaded), weights(run.model), strict=True):
        assert torch.equal(p, q)
    assert evaluate(loaded.eval())["accuracy"] == run.metrics["accuracy"]
    again = gm.train(task(), steps=3, out=folder)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(again.history) == 3


def test_the_loss_of_a_row_is_the_mean_over_units_since_the_last() -> None:
    def uneven(epoch: int, generator: torch.Generator):
        return [(X[:90], Y[:90]), (X[90:], Y[90:])]

    run = gm.train(task(train_batches=uneven, model=net), optimizer="adamw", lr=0.0, steps=40)
    whole = nn.functional.cross_entropy(net()(X), Y).item()
    assert [row["loss"] for row in run.history] == pytest.approx([whole] * 20, rel=1e-5)


def test_divergence_stops_with_a_warning(tmp_path) -> None:
    with pytest.warns(GramianWarning, match="the loss is .* stopped"):
        run = gm.train(
            task(), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=math.inf), steps=100, out=tmp_path
        )
    assert run.diverged
    assert run.steps < 100
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


SPENT = iter([(X, Y)])

BAD = {
    "model": ({"model": lambda: "net"}, r"model\(\) must return a torch\.nn\.Module, got str"),
    "evaluate_none": ({"evaluate": lambda m: None}, r"evaluate\(model\) must return a dict of floats, got None"),
    "evaluate_tensor": ({"evaluate": lambda m: {"a": torch.ones(2)}}, "must return a dict of floats"),
    "no_batches": ({"train_batches": lambda epoch, generator: []}, "gave no batches"),
    "spent": ({"train_batches": lambda epoch, generator: SPENT}, r"train_batches\(1, generator\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_task_that_returns_the_wrong_thing_is_told_so(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(TaskError, match=message) as caught:
        gm.train(task(**changes), steps=3)
    assert "\n" not in str(caught.value)


def deep(make: type[nn.Module] = nn.Tanh, num_layers: int = 40) -> nn.Module:
    """A network that PyTorch's initialization makes too deep for its gradients."""
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(16, 16), make())]
    return nn.Sequential(nn.Linear(6, 16), make(), *layers, nn.Linear(16, 2))


def test_init_auto_repairs_only_what_cannot_learn() -> None:
    state = torch.get_rng_state()
    left = gm.train(task(), init="auto", optimizer="adamw", lr=0.0, steps=1)
    assert left.init == "as the task makes it: no error was found before the first step"
    for p, q in zip(weights(left.model), weights(net()), strict=True):
        assert torch.equal(p, q)
    repaired = gm.train(task(model=deep), init="auto", optimizer="adamw", lr=0.0, steps=1)
    assert repaired.init.startswith("isometric: Gain ")
    isometric = gm.train(task(model=deep), init="isometric", optimizer="adamw", lr=0.0, steps=1)
    for p, q in zip(weights(repaired.model), weights(isometric.model), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(torch.get_rng_state(), state)


ISOMETRIC = Action("isometric_")
FOUND = {
    "nothing": ([], [], "as the task makes it: no error was found before the first step"),
    "once for the same init": ([("a", "error", ISOMETRIC), ("b", "error", ISOMETRIC)], ["isometric"], "isometric: a"),
    "the first that applies": (
        [("a", "error", None), ("b", "error", Action("cast_to_bfloat16")), ("c", "error", ISOMETRIC)],
        ["isometric"],
        "isometric: c",
    ),
    "no warning's": (
        [("a", "warning", ISOMETRIC)],
        [],
        "as the task makes it: no error was found before the first step; a warning: a",
    ),
    "of labels, a remark too": (
        [("a", "info", None), ("labels-independent", "info", None)],
        [],
        "as the task makes it: no error was found before the first step; a remark: labels-independent",
    ),
    "what draws a layer anew": ([("a", "error", Action("reset", {"names": ("a",)}))], ["isometric"], "isometric: a"),
    "advice only": ([("a", "error", None)], [], "as the task makes it, since no initialization repairs this: a"),
}


@pytest.mark.parametrize(("findings", "applied", "reported"), FOUND.values(), ids=FOUND)
def test_init_auto_applies_the_actions_of_the_errors(monkeypatch, findings, applied, reported) -> None:
    """Exactly the errors' actions, each initialization once, and the run says so."""
    calls: list[str] = []

    def inspected(model, batches=None, objective=None, **options) -> Report:
        left = [] if calls else [Finding(title, severity, title, action=action) for title, severity, action in findings]
        return Report("net", left)

    monkeypatch.setattr(start, "inspect", inspected)
    monkeypatch.setitem(start.INITS, "isometric", lambda *arguments: calls.append("isometric") or "isometric")
    run = gm.train(task(), init="auto", optimizer="adamw", lr=0.0, steps=1)
    assert (calls, run.init) == (applied, reported)


def test_init_auto_keeps_what_has_been_learned() -> None:
    """A network that cannot learn any more as it is, but whose weights hold something that random ones do not."""

    def learned() -> nn.Module:
        model = deep()
        with torch.no_grad():
            model[10].weight += 0.4 * torch.outer(torch.ones(16), torch.ones(16))
        return model

    run = gm.train(task(model=learned), init="auto", optimizer="adamw", lr=0.0, steps=1, seed=1)
    assert run.init.startswith("as the task makes it, since 10.weight has learned something already; but: ")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p, q in zip(weights(run.model), weights(learned()), strict=True):
            assert torch.equal(p, q)


def test_the_seed_is_of_the_model_too() -> None:
    def drawn() -> nn.Module:
        return nn.Linear(6, 2)

    first, second, other = (
        weights(gm.train(task(model=drawn), optimizer="adamw", lr=0.0, steps=1, seed=seed).model) for seed in (1, 1, 2)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])


def test_unknown_words_are_refused() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'adagrad'; wanted auto, muon, balanced, soap"):
        gm.train(task(), optimizer="adagrad", steps=1)
    with pytest.raises(InputError, match="init must be one of default, isometric, auto; got 'zeros'"):
        gm.train(task(), init="zeros", steps=1)
    with pytest.raises(InputError, match="sum of losses, number of units"):
        gm.train(task(objective=gm.Objective(lambda m, b: m(b[0]), lambda o, b: o)), steps=1)


def test_batches_are_the_first_epochs() -> None:
    assert [len(x) for x, _ in task().batches()] == [16] * 6
    assert len(task().batches(2)) == 2
    with pytest.raises(TaskError, match="gave no batches"):
        task(train_batches=lambda epoch, generator: []).batches()


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_trains(name: str) -> None:
    case = ZOO[name]

    def loss(model: nn.Module) -> dict[str, float]:
        return {"held_out": float(case.loss(model, case.make_batches(1)[0]))}

    objective = getattr(gm.Objective, case.objective)()
    zoo = gm.Task(lambda: case.make_model(0), objective, lambda epoch, generator: case.make_batches(0), loss, name)
    run = gm.train(zoo, steps=60)
    assert not run.diverged
    # One that is there because it does not learn.
    assert run.metrics["held_out"] < run.history[0]["held_out"] or name == "deep_tanh_mlp"


def labeled(y: Tensor, x: Tensor) -> gm.Task:
    def drawn(epoch: int, generator: torch.Generator):
        for part in torch.randperm(len(x), generator=generator).split(32):
            yield x[part], y[part]

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))

    return task(model=make, train_batches=drawn, evaluate=lambda model: {"rows": 544.0})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_automatic_rate_is_the_suggested_one(optimizer: str) -> None:
    x = torch.randn(544, 20, generator=seeded(0))
    learnable = labeled(x[:, :6].argmax(1), x)
    found = suggested(learnable, optimizer, "default", 0)
    assert found is not None
    run = gm.train(learnable, optimizer=optimizer, lr="auto", steps=12)
    assert run.lr == pytest.approx(found.lr, rel=0.05)
    again = gm.train(learnable, optimizer=optimizer, lr=run.lr, steps=12)
    assert all(torch.equal(a, b) for a, b in zip(weights(run.model), weights(again.model), strict=True))


def by_chance(seed: int) -> gm.Task:
    """Labels by chance: no rate lowers the loss of other batches."""
    x = torch.randn(544, 20, generator=seeded(seed))
    return labeled(torch.randint(6, (544,), generator=seeded(seed + 10)), x)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_the_trial_steps_tell_nothing_the_usual_rate_is_kept(optimizer: str) -> None:
    with pytest.warns(GramianWarning, match="trial steps told nothing") as caught:
        run = gm.train(by_chance(0), optimizer=optimizer, lr="auto", steps=2)
    assert "\n" not in str(caught[0].message)
    assert run.lr == gm.train(by_chance(0), optimizer=optimizer, steps=2).lr


@pytest.mark.filterwarnings("ignore:train. the trial steps told nothing")
def test_a_rate_that_chance_suggests_is_seldom_confirmed() -> None:
    """At 95 % for each, three or more of eight are confirmed in fewer than one case of a hundred."""
    confirmed = [seed for seed in range(8) if suggested(by_chance(seed), "adamw", "default", 0) is not None]
    assert len(confirmed) <= 2


@pytest.mark.parametrize("lr", ["fast", "0.1", ""])
def test_a_rate_in_words_is_auto_or_refused(lr) -> None:
    with pytest.raises(InputError, match=f"lr must be zero, a positive number or 'auto'; got '{lr}'"):
        gm.train(task(), steps=2, lr=lr)
    with pytest.raises(InputError, match="unknown optimizer 'adagrad'"):
        gm.train(task(), steps=2, optimizer="adagrad", lr="auto")


def test_a_usual_batch_has_the_loss_and_the_units_of_any_other() -> None:
    """Bitwise, with its gradients; also where labels are ignored, and where something is wrong."""
    network, objective = nn.Linear(5, 3), gm.Objective.classification()
    x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    some, none = y.clone().index_fill_(0, torch.tensor([1, 4]), -100), torch.full((8,), -100)
    summed = usual(network, objective)
    for labels in (y, some, none, y.int()):
        found, wanted = summed((x, labels)), objective.summed(network, (x, labels))
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]
        gradients = [torch.autograd.grad(loss, [*network.parameters()]) for loss, _ in (found, wanted)]
        assert all(map(torch.equal, *gradients))
    for wrong in ((x, y + 1), (x, y[:3]), (x.double(), y)):
        told = []
        for function in (summed, lambda batch: objective.summed(network, batch)):
            with pytest.raises(gm.errors.InputError) as caught:
                function(wrong)
            told.append(str(caught.value))
        assert told[0] == told[1]
    with pytest.raises(gm.errors.InputError, match="no classification"):
        usual(nn.Linear(5, 1), objective)((x, y))
