"""Remedies for every form of batch: the printed line runs as it stands, and on the input that the finding names."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.errors import InputError
from gramian.init import signs_of_training
from gramian.remedies import Setting, perform, proposals, verified
from gramian.remedies.fitting import fitted
from gramian.remedies.judging import learns
from gramian.remedies.proposals import CURES
from gramian.remedies.rehearsing import Rehearsed
from gramian.report import Action, Finding, Report


class Net(nn.Module):
    """A network of one or two inputs, with what remedies are about."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(3, 8)
        self.norm, self.drop, self.act, self.head = nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Sigmoid(), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.one(x) if t is None else self.one(x) + self.two(t)
        return self.head(self.act(self.drop(self.norm(h))))


class Both(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


def rows() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 12, 4, generator=generator), torch.randn(3, 12, 3, generator=generator)
    y = torch.randint(3, (3, 12), generator=generator)
    return list(zip(x, 50 + t, y, strict=True))


CLASSIFY = gm.Objective.classification()
FORMS: dict[str, tuple[type[Net], Callable[..., Any], Any]] = {
    "(x, y)": (Net, lambda x, t, y: (x, y), CLASSIFY),
    "((x, t), y)": (Both, lambda x, t, y: ((x, t), y), CLASSIFY),
    "dict": (Both, lambda x, t, y: {"x": x, "t": t, "labels": y}, CLASSIFY),
    "(x, y), own loss": (Net, lambda x, t, y: (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1])),
    "(x, t, y), own loss": (Both, lambda x, t, y: (x, t, y), lambda m, b: F.cross_entropy(m(b[0], t=b[1]), b[2])),
    "dict, own loss": (
        Both,
        lambda x, t, y: {"image": x, "time": t, "class": y},
        lambda m, b: F.cross_entropy(m(b["image"], b["time"]), b["class"]),
    ),
    "own predict": (
        Both,
        lambda x, t, y: ({"a": [x, t]}, y),
        gm.Objective.classification(predict=lambda m, b: m(*b[0]["a"])),
    ),
}


def setting(form: str) -> Setting:
    kind, made, objective = FORMS[form]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
    groups = [{"params": model.head.parameters(), "lr": 0.0}, {"params": model.one.parameters(), "lr": 0.1}]
    return Setting(model, [made(*row) for row in rows()], objective, torch.optim.SGD(groups, lr=0.1))


def loss(run: dict[str, Any]) -> Tensor:
    if isinstance(run["objective"], gm.Objective):
        return run["objective"].loss(run["model"], run["batches"][0])[0]
    return run["objective"](run["model"], run["batches"][0])


@pytest.mark.filterwarnings("ignore::gramian.errors.GramianWarning")
@pytest.mark.parametrize("form", FORMS)
def test_every_line_runs_as_it_stands_for_every_form_of_batch(form: str):
    run, ran = setting(form), set()
    for code in CURES:
        for where in ("one", "two", "data"):
            for action in proposals(Finding(code, "error", "t", where), run)[:2]:
                if (action.name, where) in ran:
                    continue
                ran.add((action.name, where))
                names = {"gm": gm, "torch": torch} | vars(run.copied())
                exec(action.code, names)
                assert action.name == "shift_labels" or math.isfinite(loss(names).item())
    assert {"standardize", "isometric_", "unfreeze_and_add", "scale_rate_of"} <= {name for name, _ in ran}


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("(x, y)", "(x, y), own loss")])
def test_the_input_that_is_named_is_standardized_and_no_other(form: str):
    run = setting(form)
    (action,) = proposals(Finding("input-scale", "warning", "t", "two"), run)
    seen: dict[str, Tensor] = {}
    names = {"gm": gm, "torch": torch} | vars(run.copied())
    exec(action.code, names)
    for name in ("one", "two"):
        names["model"].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    loss(names)
    every = torch.cat([t for _, t, _ in rows()])
    (x, t, _), std = rows()[0], every.std(0)
    assert torch.equal(seen["one"], x)
    expected = (t - every.mean(0)) / std.where(std > 1e-6 * every.mean(0).abs(), torch.ones_like(std))
    assert torch.allclose(seen["two"], expected, atol=1e-4)
    hooked = perform(action, run.copied())
    assert torch.equal(loss(vars(hooked) | {}), loss(names)) or hooked.model.drop.training


def test_an_input_that_the_model_does_not_get_as_it_is_has_no_hook():
    run = setting("(x, t, y), own loss")
    doubled = Setting(run.model, run.batches, lambda m, b: F.cross_entropy(m(2 * b[0], b[1]), b[2]), run.optimizer)
    assert proposals(Finding("input-scale", "warning", "t", "data"), doubled) == []


def test_a_printed_initialization_knows_how_the_model_is_called_and_what_it_loses():
    report = Report("net", [Finding("gain-above-one", "error", "t", action=Action("isometric_"))])
    code = "gm.init.isometric_(model, next(iter(batches)){})"
    for form, more in (
        ("(x, y)", ""), ("((x, t), y)", ""), ("dict", ""), ("(x, y), own loss", ""),
        ("(x, t, y), own loss", ", predict=objective"), ("own predict", ", predict=objective.predict"),
    ):  # fmt: skip
        assert fitted(report, setting(form)).findings[0].action.code == code.format(more)
    run = setting("(x, y)")
    with torch.no_grad():  # a large direction, as training leaves it
        run.model.head.weight += 3 * torch.ones(3, 8)
        run.model.one.weight += 20 * torch.outer(torch.ones(8), torch.ones(4))
        run.model.norm.weight.mul_(torch.linspace(0.5, 2, 8))
    found = fitted(report, run).findings[0]
    trained = bool(signs_of_training(run.model))
    assert ("overwrite=True" in found.remedy) == ("learning is lost" in found.advice) == trained


def test_only_the_named_group_gets_another_rate():
    run = setting("(x, y)")
    run.optimizer.param_groups[0]["lr"] = 0.2
    action = proposals(Finding("rate-too-high", "error", "t", "one"), run)[0]
    perform(action, changed := run.copied())
    assert [group["lr"] for group in changed.groups] == [0.2, pytest.approx(0.1 * action.arguments["factor"])]
    assert proposals(Finding("rate-too-high", "error", "t", "optimizer"), run)[0].name == "scale_rate"


def test_what_is_unfrozen_is_given_to_the_optimizer():
    run = setting("(x, y)")
    run.model.one.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    held = Setting(run.model, run.batches, run.objective, optimizer)
    (action,) = proposals(Finding("parameter-frozen", "warning", "t", "one"), held)
    after = perform(action, held.copied())
    assert after.model.one.weight.requires_grad
    assert any(p is after.model.one.weight for group in after.groups for p in group["params"])


@pytest.mark.parametrize(
    ("before", "after", "plain", "is_expected"),
    [
        ([math.inf] * 3, [9.0, 500.0, 600.0], 40.0, False),
        ([3.0, 900.0, 2000.0], [1.1, 1.06, 1.06], 1.06, False),
        ([3.0, 900.0, 2000.0], [1.1, 0.4, 0.01], 1.06, True),
        ([3.0, 2.0, 1.0], [3.0, 1.0, 0.5], 1.06, True),
        ([math.inf] * 3, [2.3, 2.0, 1.5], math.inf, True),
        ([math.inf] * 3, [2.3, 2.3, 2.3], math.inf, False),
        ([3.0, 2.0, 1.0], [3.0, 1.0, math.inf], math.inf, False),
    ],
)
def test_a_loss_that_blew_up_lets_only_pass_what_learns(before: list, after: list, plain: float, is_expected: bool):
    remedied = Rehearsed(after)
    remedied.plain = plain
    assert learns(Rehearsed(before), remedied) == is_expected


def test_what_is_not_offered_is_told_in_one_short_line():
    run = setting("dict")
    hurts = Action("standardize", {"of": 'batch["x"]', "module": "", "at": 'kwargs["x"]'})
    found = verified(Report("net", [Finding("gate-shut", "error", "t", action=hurts)]), run, moments=(1,)).findings[0]
    assert "\n" not in found.advice
    assert "lambda" not in found.advice
    assert "not offered: standardize. The reason" in found.advice


@pytest.mark.parametrize("path", ["batch.x", "batch[x]", 'batch["a"b"]', "batch[0]; import os", "args[-1]"])
def test_a_path_in_an_action_is_nothing_but_a_path(path: str):
    with pytest.raises(InputError, match="path: expected"):
        Action("standardize", {"of": path, "module": "", "at": "args[0]"})


def test_labels_dtypes_and_swapped_arguments_are_told_what_to_write():
    net, x, y = nn.Sequential(nn.Linear(5, 3)), torch.randn(8, 5), torch.arange(8) % 3
    for batch, objective, told in (
        ((x, F.one_hot(y, 3)), CLASSIFY, r"labels.argmax\(-1\)"),
        ((x, y[:, None]), CLASSIFY, r"labels.squeeze\(-1\)"),
        ((x, y.float()), CLASSIFY, r"labels.long\(\)"),
        (((255 * x).byte(), y), CLASSIFY, r"x.to\(torch.float32\)"),
        ((x, y), lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]), "Swap its arguments"),
    ):
        with pytest.raises(InputError, match=told):
            gm.inspect(copy.deepcopy(net), [batch], objective)


def test_positions_that_are_added_are_no_factor():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(48, 3)
            self.P = nn.Parameter(100 * torch.randn(6, 8))
            self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)])
            self.norm = nn.LayerNorm(8)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.table(tokens) + self.P
            for layer in self.layers:
                h = h + layer(h)
            return self.head(self.norm(h).flatten(1))

    torch.manual_seed(0)
    batches = [(torch.randint(9, (16, 6)), torch.randint(3, (16,))) for _ in range(2)]
    report = gm.inspect(Positions(), batches, CLASSIFY)
    found = next(f for f in report.findings if f.code == "parameter-scale-large" and f.where == "P")
    assert "is added to the signal" in found.title
    assert "multiplies" not in found.title
    picture = str(report)
    assert "no single place" not in picture
