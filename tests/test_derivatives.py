"""`gradient-overflow` names the operation whose derivative is infinite, in `inspect` and in `watch`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.passes.nonfinite_derivatives import first_infinite_derivative


class Scaled(nn.Module):
    """Divides by a function of zeros, whose value is finite and whose derivative is not."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x / (2 + self.function(0 * x))


FUNCTIONS = {
    "sqrt": lambda x: x.square().sum(-1, keepdim=True).sqrt(),
    "pow": lambda x: x.abs().pow(0.5),
    "acos": lambda x: (1 + x).acos(),
    "where": lambda x: torch.where(x > 0, x.log(), x),
}


def net(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Scaled(function), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return x, (x @ torch.arange(12.0).view(4, 3).sin()).argmax(-1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inspect_and_watch_name_the_module_and_the_operation(name: str) -> None:
    model = net(FUNCTIONS[name])
    operation = "log" if name == "where" else name
    found = gm.inspect(model, [batch()], gm.Objective.classification(), quick=True).findings[0]
    assert (found.code, found.where) == ("gradient-overflow", "2")
    assert f"the derivative of {operation} " in found.title

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    with gm.watch(model, optimizer, raise_on="error"):
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(gm.errors.FindingError) as raised:
            optimizer.step()
    assert raised.value.finding.where == "2"
    told = "made by log" if name == "where" else f"the derivative of {operation} "  # log 0 is the first of both
    assert told in raised.value.finding.title
    assert raised.value.finding.cause in str(raised.value)
    assert "loss scale" not in str(raised.value)


def test_an_overflow_in_the_loss_is_not_blamed_on_the_model() -> None:
    model = net(torch.zeros_like)
    x, _ = batch()
    assert first_infinite_derivative(model, lambda: (0 * model(x)).abs().sqrt().sum()) == ("loss", "sqrt")
    assert first_infinite_derivative(model, lambda: model(x).sum()) is None
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_scale_is_blamed_where_numbers_are_half() -> None:
    model = net(torch.zeros_like).to(torch.float16)
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer) as watching:
        (F.cross_entropy(model(x.half()).float(), y) * 1e8).backward()
        optimizer.step()
    (found,) = [f for f in watching.findings if f.code == "gradient-overflow"]
    assert "Lower the loss scale" in found.advice
