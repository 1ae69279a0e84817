"""Losses that differentiate by their inputs, as those of physics-informed networks: every verb takes them."""

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.autograd import Ungraded


class Wave(nn.Module):
    """u(x), and how often the loss began."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def curvature(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """u'' + sin(x), in the mean."""
    return (curvature(model, x) + x.sin()).square().mean()


def batches(num: int = 4) -> list[Tensor]:
    return list(torch.randn(num, 48, 1, generator=torch.Generator().manual_seed(0)).unbind())


@pytest.fixture(scope="module")
def model() -> Wave:
    torch.manual_seed(0)
    model = Wave()
    nn.init.orthogonal_(model.net[2].get_parameter("weight"), 1.5)
    nn.init.normal_(model.net[0].get_parameter("weight"))
    return model


@pytest.fixture(scope="module")
def small(model: Wave) -> nn.Module:
    plan = gm.compress(model, batches(), residual)
    assert torch.isfinite(torch.tensor(plan.at(keep=0.6).predicted.rise))
    return plan.at(keep=0.5, of="factorable").apply()


def test_without_a_graph_the_loss_is_that_with_one(model: Wave) -> None:
    objective, x = gm.objective.as_objective(residual), batches(1)[0]
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            total, units = objective.loss(model, x)
            assert not objective.predict(model, x).requires_grad
        assert not total.requires_grad
        assert float(total / units) == pytest.approx(float(residual(model, x).detach()), rel=1e-6)


def test_a_pair_whose_criterion_differentiates(model: Wave) -> None:
    pair = gm.Objective(
        lambda model, x: (x.requires_grad_(), model(x)),
        lambda out, x: (torch.autograd.grad(out[1].sum(), out[0], create_graph=True)[0].square().sum(), len(x)),
    )
    x = batches(1)[0]
    wanted = float(pair.loss(model, x.clone())[0].detach())
    with torch.no_grad():
        assert float(pair.loss(model, x.clone())[0]) == pytest.approx(wanted, rel=1e-6)


def test_the_need_is_learned_once_and_draws_the_same_numbers(model: Wave) -> None:
    objective, x = gm.objective.as_objective(lambda m, x: residual(m, x + torch.rand_like(x))), batches(1)[0]
    found, begun = [], model.calls
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(float(objective.loss(model, x)[0]))
    assert found[0] == found[1]
    assert model.calls - begun == 3


def test_an_ordinary_loss_has_no_graph_and_its_errors_pass() -> None:
    layer, seen = nn.Linear(1, 1), []
    objective = gm.objective.as_objective(lambda m, x: seen.append(m(x).requires_grad) or m(x).mean())
    with torch.no_grad():
        objective.loss(layer, batches(1)[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            objective.loss(layer, torch.ones(3, 2))
    assert seen == [False]
    frozen = torch.ones(2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        Ungraded()(lambda: torch.autograd.grad(frozen.sum(), frozen))


def test_compress_and_refit(model: Wave, small: nn.Module) -> None:
    better, new = gm.refit(small, model, batches(), residual), torch.randn(500, 1)
    away = lambda one: float((one(new) - model(new)).square().mean().detach())  # noqa: E731
    assert away(better) < away(small)


def test_narrow(model: Wave) -> None:
    narrowed = gm.narrow(model, batches(), residual, keep=0.7).apply()
    assert sum(p.numel() for p in narrowed.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.isfinite(residual(narrowed, batches()[0]))


def test_heal(model: Wave, small: nn.Module) -> None:
    healed = gm.heal(small, model, batches(8), residual, steps=20)
    assert healed.after < healed.before


def test_capture_train_and_suggest_a_rate(model: Wave) -> None:
    x = batches(1)[0]
    assert gm.capture(model, batches(), residual).units == 4 * 48
    task = gm.Task(
        Wave, residual, lambda epoch, generator: batches(), lambda one: {"residual": residual(one, x).item()}
    )
    run = gm.train(task, epochs=1, lr=1e-2)
    assert run.metrics["residual"] == pytest.approx(residual(run.model, x).item())
    assert gm.suggest_lr(model, batches(), residual, optimizer="adamw").lr > 0


def test_inspect_tells_in_one_line_what_such_a_loss_excludes(model: Wave) -> None:
    report = gm.inspect(model, batches(), residual)
    assert not any("torch" in why or "Tensor" in why for why in report.not_looked_at.values())
    told = [what for what in report.not_looked_at if "put outputs in by hand" in what]
    assert len(told) == 1
    assert "differentiates by the inputs" in report.not_looked_at[told[0]]
