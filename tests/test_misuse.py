"""What stands in a model's place is refused by every verb, with a line that says what to write."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import gramian as gm
from cases import untyped
from gramian.errors import InputError
from gramian.objective import as_objective
from public import modules

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, (x[:, 0] > 0).long()) for x in X.split(16)]
CLASSIFY = gm.Objective.classification()
FIRST = ("model", "params", "model_or_path")
"""The names of first arguments that are models."""
HELPERS = ("gramian.arguments", "gramian.calls", "gramian.recording", "gramian.inspection", "gramian.checkpoint")
"""Modules whose functions the verbs call with models that are checked, or that take files alone."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.fixture(scope="module")
def plan() -> gm.Plan:
    return gm.compress(net(), BATCHES, CLASSIFY)


def verbs() -> dict[str, Callable]:
    """Every public function, and every optimizer, whose first argument is a model; found, not listed."""
    found: dict[str, Callable] = {}
    for module in modules():
        if module.__name__ in HELPERS:
            continue
        for name in module.__all__:
            item = getattr(module, name)
            if not callable(item) or (isinstance(item, type) and not issubclass(item, torch.optim.Optimizer)):
                continue
            try:
                first = next(iter(signature(item).parameters.values()))
            except (StopIteration, ValueError):
                continue
            if first.name in FIRST:
                found.setdefault(getattr(item, "__name__", name), item)
    return found


def filled(verb: Callable, model: Any, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """A call with a value for each argument that must be given."""
    values = {
        "batches": BATCHES, "batch": BATCHES[0], "objective": CLASSIFY, "original": net(), "teacher": net(),
        "path": folder / "a.safetensors", "optimizer": torch.optim.SGD(net().parameters(), 0.1), "steps": 1,
        "direction": {}, "lr": 0.1, "task": None, "evaluate": len, "sample": X,
    }  # fmt: skip
    args, kwargs = [model], {"steps": 1} if verb is gm.heal else {}
    for p in [*signature(verb).parameters.values()][1:]:
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        value = values.get(p.name)
        if p.kind is p.KEYWORD_ONLY:
            kwargs[p.name] = value
        else:
            args.append(value)
    return args, kwargs


def run_(verb: Callable, model: Any, folder: Path) -> None:
    args, kwargs = filled(verb, model, folder)
    found = verb(*args, **kwargs)
    if hasattr(found, "__enter__"):
        found.__enter__()


@pytest.mark.parametrize("name", verbs())
def test_every_verb_says_what_to_give_in_place_of_a_plan(name: str, plan: gm.Plan, tmp_path: Path) -> None:
    run = gm.Run(net(), out=None, optimizer="muon")
    task = gm.Task(net, CLASSIFY, BATCHES, lambda model: {"a": 1.0})
    lines = {
        r"Plan\. Its \.apply\(\) makes the compressed model, and its \.model": plan,
        r"Run, which has one: give its \.model": run,
        r"Task, which makes one: give its \.model\(\)": task,
        r"the class Linear\. Give an instance": nn.Linear,
    }
    verb = verbs()[name]
    for line, value in lines.items():
        with untyped(), pytest.raises(InputError, match=line) as caught:
            run_(verb, value, tmp_path)
        assert "\n" not in str(caught.value)


def test_the_verbs_are_found() -> None:
    assert {"inspect", "capture", "compress", "narrow", "refit", "heal", "save_compressed", "load_compressed"} <= {
        *verbs()
    }


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("stats", "Statistics, which holds none. Give the model"),
        ("report", "Report, which holds none. Give the model"),
        ("path", "the path 'a.safetensors'. Make the model, load the file into it"),
        ("optimizer", "the optimizer SGD. Give the model whose parameters it has"),
        ("state", "a mapping, perhaps a state dict"),
    ],
)
def test_what_else_is_no_model(given: str, line: str, tmp_path: Path) -> None:
    model = net()
    value: Any = {
        "stats": lambda: gm.capture(model, BATCHES, CLASSIFY), "report": lambda: gm.inspect(model),
        "path": lambda: "a.safetensors", "optimizer": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "state": model.state_dict,
    }[given]()  # fmt: skip
    with untyped(), pytest.raises(InputError, match=line):
        gm.save_compressed(value, tmp_path / "a.safetensors")


def test_arguments_of_files_are_told_when_they_are_swapped(plan: gm.Plan, tmp_path: Path) -> None:
    path, small = tmp_path / "a.safetensors", plan.at(keep=0.5).apply()
    gm.save_compressed(small, path)
    load_plan, save_plan = gm.compression.load_plan, gm.compression.save_plan
    with untyped():
        for verb in (gm.load_compressed, gm.save_compressed, load_plan):
            with pytest.raises(InputError, match=r"got the path .*a\.safetensors'\. Make the model"):
                verb(path, net())
        with pytest.raises(InputError, match=r"load_compressed: expected the path of a file, .* got the class Linear"):
            gm.load_compressed(net(), nn.Linear)
        with pytest.raises(InputError, match=r"save_plan: expected a plan of gm.compress or gm.narrow, got Sequential"):
            save_plan(net(), path)
        with pytest.raises(InputError, match=r"save_compressed: expected the path of a file, .* got Plan"):
            gm.save_compressed(small, plan)


def test_the_compressed_model_and_the_original_are_not_taken_for_each_other(plan: gm.Plan) -> None:
    dense, small = net(), plan.at(keep=0.5).apply()
    line = r"dense in the first, which has 354 parameters .* Swap them: the compressed model comes first"
    with pytest.raises(InputError, match=f"refit: .*{line}"):
        gm.refit(dense, small, BATCHES, CLASSIFY)
    with pytest.raises(InputError, match=f"heal: .*{line}"):
        gm.heal(dense, small, BATCHES, CLASSIFY, steps=1)
    again = gm.compress(small, BATCHES, CLASSIFY).at(keep=0.8).apply()  # what is compressed may be so again
    gm.refit(again, small, BATCHES, CLASSIFY)


def test_the_class_of_objectives_is_none() -> None:
    with untyped(), pytest.raises(InputError, match=r"Write gm\.Objective\.classification\(\), \.regression\(\)"):
        gm.capture(net(), BATCHES, gm.Objective)
    for kind in ("classification", "regression", "next_token", "reconstruction", "self_distillation"):
        with untyped(), pytest.raises(InputError, match=rf"Call it: gm\.Objective\.{kind}\(\)"):
            gm.capture(net(), BATCHES, getattr(gm.Objective, kind))


def test_healing_asks_for_one_budget(plan: gm.Plan) -> None:
    small = plan.at(keep=0.5).apply()
    for budget in ({}, {"steps": 1, "seconds": 1.0}):
        with pytest.raises(InputError, match="heal: give one budget, seconds= or steps="):
            gm.heal(small, net(), BATCHES, CLASSIFY, **budget)


def test_a_finding_that_torch_warns_of_too_is_told_once() -> None:
    model, batches = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), [(x, x[:, 0]) for x in X.split(16)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gm.inspect(model, batches, lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]))
    assert "loss-broadcast" in {finding.code for finding in report.findings}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda plan: gm.inspect(net(), loader=BATCHES), r"'loader'; did you mean 'batches'\?"),
        (lambda plan: gm.inspect(net(), BATCHES, loss=CLASSIFY), r"'loss'; did you mean 'objective'\?"),
        (lambda plan: gm.inspect(net(), zebra=1), r"'zebra'; it takes model_or_path, batches"),
        (lambda plan: plan.at(kep=0.5), r"Plan.at: there is no argument 'kep'; did you mean 'keep'\?"),
        (lambda plan: gm.Task(net, CLASSIFY, batches=BATCHES, evaluate=dict), "did you mean 'train_batches'"),
    ],
)
def test_an_argument_that_is_not_there_is_told_with_the_one_that_is_meant(plan: gm.Plan, call: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call(plan)


@pytest.mark.parametrize(
    "loss",
    [functional.cross_entropy, lambda output, target: output - target, lambda output, target: output.float().mean()],
)
def test_a_loss_of_output_and_target_is_told_how_it_is_called(loss: Any) -> None:
    with pytest.raises(InputError, match=r"Write lambda model, batch: loss\(model\(batch\[0\]\), batch\[1\]\)"):
        gm.inspect(net(), BATCHES, lambda output, target: loss(output, target))


def test_another_error_of_a_loss_is_its_own() -> None:
    with pytest.raises(AttributeError, match="haed"):
        as_objective(lambda model, batch: model.haed(batch[0])).loss(net(), BATCHES[0])
