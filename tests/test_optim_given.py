"""An optimizer is taken in the same forms by every verb that makes one, and refused in one line otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import gramian as gm
from cases import untyped
from gramian.errors import GramianWarning, InputError, TaskError

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, (x[:, :2].sum(1) > 0).long()) for x in X.split(16)]
CLASSIFY = gm.Objective.classification()


class Net(nn.Module):
    """Unlike `nn.Sequential`, not iterable."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(functional.relu(self.one(x)))


def task(make: Callable[[], nn.Module] = Net) -> gm.Task:
    return gm.Task(make, CLASSIFY, BATCHES, lambda model: {"one": 1.0})


def function(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)


WITH_RATE: dict[str, Any] = {
    "name": "sgd",
    "class": torch.optim.SGD,
    "own class": gm.optim.Muon,
    "partial of a class": partial(torch.optim.SGD, momentum=0.5),
    "partial of an own class": partial(gm.optim.Muon, momentum=0.8),
    "function": function,
    "a second argument of another name": lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate),
    "a default rate": lambda model, lr=0.3: torch.optim.SGD(model.parameters(), lr=lr),
    "any options": lambda model, **options: torch.optim.SGD(model.parameters(), **options),
}


@pytest.mark.parametrize("name", WITH_RATE)
def test_every_form_with_a_rate_is_suggested_one_and_trained_at_it(name: str) -> None:
    optimizer = WITH_RATE[name]
    found = gm.suggest_lr(Net(), BATCHES[:5], CLASSIFY, optimizer=optimizer)
    run = gm.train(task(), optimizer=optimizer, lr=found.lr, steps=2, warmup=0, schedule="constant")
    assert run.lr == pytest.approx(found.lr)
    assert run.rate == pytest.approx(found.lr)


def test_a_class_has_its_default_rate_and_auto_suggests_one() -> None:
    assert gm.train(task(), optimizer=torch.optim.AdamW, steps=1).lr == 1e-3
    by_class, by_name = (gm.train(task(), optimizer=o, lr="auto", steps=1).lr for o in (torch.optim.SGD, "sgd"))
    assert by_class == by_name != 0.1
    assert gm.train(task(), optimizer=function, lr="auto", steps=1).optimizer == "function"


def test_a_function_of_the_model_alone_has_its_own_rate() -> None:
    alone = lambda model: torch.optim.SGD(model.parameters(), 0.25)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gm.train(task(), optimizer=alone, steps=1).lr == 0.25
    with pytest.warns(GramianWarning, match="lr is ignored, since .*<lambda> takes none"):
        assert gm.train(task(), optimizer=alone, lr=0.5, steps=1).lr == 0.25
    with pytest.raises(InputError, match=r"suggest_lr: .* takes no rate, .* lambda model, lr: torch\.optim\.SGD"):
        gm.suggest_lr(Net(), BATCHES[:5], CLASSIFY, optimizer=alone)


def suggested(optimizer: Any) -> Any:
    return gm.suggest_lr(Net(), BATCHES[:5], CLASSIFY, optimizer=optimizer)


def trained(optimizer: Any, make: Callable[[], nn.Module] = Net) -> Any:
    return gm.train(task(make), optimizer=optimizer, lr=0.1, steps=1)


@pytest.mark.parametrize("verb", [suggested, trained])
def test_what_is_no_form_gets_one_line(verb: Callable[[Any], Any]) -> None:
    made = torch.optim.AdamW(Net().parameters())
    own = gm.optim.Muon(Net())
    wrong: list[tuple[Any, str]] = [
        (made, r"got AdamW with parameters of its own.* class AdamW, .* AdamW\(model\.parameters\(\), lr=lr\)"),
        (own, r"Give the class Muon, .* Muon\(model, lr=lr\)"),
        (3, r"must be a name, a class or a function, got int"),
        ("adam", r"unknown optimizer 'adam'; wanted auto, .* or in Python a class, or a function of the model"),
        (lambda p, lr: torch.optim.SGD(p, lr), r"called with the model .*Write model\.parameters\(\) where it wants"),
    ]  # fmt: skip
    for optimizer, line in wrong:
        with untyped(), pytest.raises(InputError, match=line) as caught:
            verb(optimizer)
        assert "\n" not in str(caught.value)


def test_a_model_that_can_be_iterated_is_told_too() -> None:
    with pytest.raises(InputError, match=r"Write model\.parameters\(\)"):
        trained(lambda p, lr: torch.optim.SGD(p, lr), lambda: nn.Sequential(nn.Linear(8, 2)))


def test_the_users_own_error_is_not_blamed_on_the_task() -> None:
    def failing(model: nn.Module) -> torch.optim.Optimizer:
        raise RuntimeError("out of ideas")

    with pytest.raises(TaskError, match=r"^train: optimizer\(model\) raised RuntimeError: out of ideas \(test_optim_g"):
        gm.train(task(), optimizer=failing, steps=1)
    needs = lambda model, lr: torch.optim.SGD(model.parameters(), lr)  # noqa: E731
    with pytest.raises(InputError, match=r"train: .*<lambda> needs a learning rate; give lr="):
        gm.train(task(), optimizer=needs, steps=1)
