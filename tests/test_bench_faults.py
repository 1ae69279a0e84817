"""`gramian bench faults`: cases repeat, hold the fault that they say, and are scored as the README of the list says."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gramian.bench import faults
from gramian.bench.faults.diagnosers import checklist
from gramian.cli import app
from gramian.errors import InputError
from gramian.objective import as_objective

LIST = Path(__file__).parent.parent / "benchmarks/faults/cases.json"
SOME = [faults.Case(name, kind.architectures[0], 0) for name, kind in faults.KINDS.items()]


def named(of: list[faults.Case]) -> dict:
    return {"argvalues": of, "ids": [str(case) for case in of]}


def loss_of(setup: faults.Setup) -> float:
    total, units = as_objective(setup.objective).loss(setup.model, setup.batches[0])
    return float((total / units).detach())


def gradients(setup: faults.Setup) -> dict[str, torch.Tensor | None]:
    total, units = as_objective(setup.objective).loss(setup.model, setup.batches[0])
    (total / units).backward()
    return {name: p.grad for name, p in setup.model.named_parameters()}


def weight(setup: faults.Setup, truth: faults.Truth) -> torch.Tensor:
    return setup.model.get_parameter(truth.places[0]).detach()


def ratio(s: faults.Setup, twin: faults.Setup, name: str) -> float:
    return float(s.model.get_parameter(name).detach().norm() / twin.model.get_parameter(name).norm())


def inputs(setup: faults.Setup) -> torch.Tensor:
    return torch.cat([x for x, _ in setup.batches])


def labels(setup: faults.Setup) -> torch.Tensor:
    return torch.cat([y for _, y in setup.batches])


def inner_ratios(s: faults.Setup, twin: faults.Setup) -> list[float]:
    names = [n for n, p in twin.model.named_parameters() if p.dim() > 1 and n.startswith("blocks.")]
    return [ratio(s, twin, name) for name in names]


def outputs_of(setup: faults.Setup, classes: tuple[type[nn.Module], ...]) -> dict[str, torch.Tensor]:
    found, handles = {}, []
    for name, module in setup.model.named_modules():
        if isinstance(module, classes):
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: found.update({name: o.detach()})))
    setup.model(setup.batches[0][0])
    for handle in handles:
        handle.remove()
    return found


def scores_before_loss(setup: faults.Setup) -> torch.Tensor:
    """What cross-entropy receives."""
    seen = []
    whole = nn.functional.cross_entropy

    def spy(scores, *args, **options):
        seen.append(scores.detach())
        return whole(scores, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "cross_entropy", spy)
        as_objective(setup.objective).loss(setup.model, setup.batches[0])
    return seen[0]


def norms(setup: faults.Setup) -> list:
    return [m for m in setup.model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def group(setup: faults.Setup) -> dict:
    return setup.optimizer.param_groups[0]


Check = Callable[[faults.Setup, faults.Setup, faults.Truth], bool]
CHECKS: dict[str, Check] = {
    "layer-gain-small": lambda s, w, t: ratio(s, w, t.places[0]) < 1e-3,
    "layer-gain-large": lambda s, w, t: ratio(s, w, t.places[0]) > 40,
    "all-gains-small": lambda s, w, t: max(inner_ratios(s, w)) < 0.31,
    "all-gains-large": lambda s, w, t: min(inner_ratios(s, w)) > 2.9,
    "randn-weights": lambda s, w, t: 0.9 < float(s.model.get_parameter("head.weight").std()) < 1.1,
    "constant-layer": lambda s, w, t: float(weight(s, t).std()) < 1e-6 < float(weight(s, t).mean()),
    "constant-layers": lambda s, w, t: all(float(s.model.get_parameter(n).std()) < 1e-7 for n in t.places[1:]),
    "zero-stem": lambda s, w, t: t.places[0].startswith("stem") and not weight(s, t).any(),
    "zero-layer": lambda s, w, t: t.places[0].startswith("blocks") and not weight(s, t).any(),
    "rank-one-layer": lambda s, w, t: int(torch.linalg.matrix_rank(weight(s, t).flatten(1), rtol=1e-5)) == 1,
    "nan-parameter": lambda s, w, t: int((~weight(s, t).isfinite()).sum()) == 1,
    "input-nan": lambda s, w, t: not inputs(s).isfinite().all() and bool(s.held_out[0][0].isfinite().all()),
    "input-offset": lambda s, w, t: float(inputs(s).mean().abs()) > 10 * float(inputs(s).std()),
    "input-scale-large": lambda s, w, t: float(inputs(s).std() / inputs(w).std()) > 100,
    "input-scale-small": lambda s, w, t: float(inputs(s).std() / inputs(w).std()) < 0.01,
    "input-dominated": lambda s, w, t: int((inputs(s).flatten(1).std(0) > 50).sum()) == 1,
    "input-constant": lambda s, w, t: bool((inputs(s) == inputs(s)[:1]).all()),
    "input-duplicates": lambda s, w, t: len(inputs(s).flatten(1).unique(dim=0)) <= 8,
    "labels-constant": lambda s, w, t: len(labels(s).unique()) == 1,
    "labels-shuffled": lambda s, w, t: float((labels(s) == labels(w)[: len(labels(s))]).float().mean()) < 0.2,
    "labels-rolled": lambda s, w, t: any(torch.equal(labels(s), labels(w).roll(by)) for by in (1, -1, 64)),
    "labels-from-one": lambda s, w, t: int(labels(s).max()) >= 10,
    "softmax-twice": lambda s, w, t: torch.allclose(scores_before_loss(s).sum(-1), torch.ones(64)),
    "relu-on-scores": lambda s, w, t: float(scores_before_loss(s).min()) == 0,
    "loss-nan": lambda s, w, t: not math.isfinite(loss_of(s)) and math.isfinite(loss_of(w)),
    "deep-sigmoid": lambda s, w, t: not outputs_of(s, (nn.ReLU, nn.Tanh, nn.GELU)) and len(s.model.blocks) == 7,
    "wrong-init-for-depth": lambda s, w, t: all(0.3 < r < 0.5 for r in inner_ratios(s, w)),
    "dead-relu": lambda s, w, t: float((outputs_of(s, (nn.ReLU,))[t.places[1]] > 0).float().mean()) < 0.05,
    "saturated-units": lambda s, w, t: float(outputs_of(s, (nn.Tanh,))[t.places[1]].abs().median()) > 0.99,
    "norm-zero-gain": lambda s, w, t: not s.model.get_submodule(t.places[0]).weight.any(),
    "norm-buffers-lost": lambda s, w, t: s.score() < w.score() - 0.15,
    "norm-momentum": lambda s, w, t: all(m.momentum <= 1e-3 for m in norms(s)),
    "norm-evaluation-mode": lambda s, w, t: not any(m.training for m in norms(s)) and all(m.training for m in norms(w)),
    "dropout-high": lambda s, w, t: all(m.p >= 0.9 for m in s.model.modules() if isinstance(m, nn.Dropout)),
    "embedding-scale": lambda s, w, t: ratio(s, w, t.places[0]) > 40,
    "head-scale": lambda s, w, t: ratio(s, w, "head.weight") > 40,
    "attention-saturated": lambda s, w, t: ratio(s, w, t.places[0]) > 5,
    "residual-growth": lambda s, w, t: (
        float(outputs_of(s, (type(s.model.blocks[0]),))["blocks.5"].std())
        > 4 * float(outputs_of(w, (type(s.model.blocks[0]),))["blocks.5"].std())
    ),
    "gates-shut": lambda s, w, t: float(s.model.get_parameter(t.places[1]).min()) < -14,
    "graph-cut": lambda s, w, t: gradients(s)["stem.linear.weight"] is None,
    "frozen-layers": lambda s, w, t: not s.model.get_parameter("blocks.0.linear.weight").requires_grad,
    "block-not-called": lambda s, w, t: not outputs_of(s, (type(s.model.blocks[0]),)).keys() - {"stem"},
    "layer-shared": lambda s, w, t: len({id(b) for b in s.model.blocks}) == 1 < len({id(b) for b in w.model.blocks}),
    "float16-underflow": lambda s, w, t: not gradients(s)["blocks.0.linear.weight"].any(),
    "float16-overflow": lambda s, w, t: not gradients(s)["blocks.0.linear.weight"].isfinite().all(),
    "rate-too-high": lambda s, w, t: group(s)["lr"] > 40 * group(w)["lr"],
    "rate-too-low": lambda s, w, t: group(s)["lr"] < 0.01 * group(w)["lr"],
    "momentum-too-high": lambda s, w, t: group(s)["momentum"] > 0.99 > group(w)["momentum"],
    "group-without-steps": lambda s, w, t: {id(p) for g in s.optimizer.param_groups if g["lr"] for p in g["params"]}
    == {id(p) for p in s.model.get_submodule("head").parameters()},
    "weight-decay-too-large": lambda s, w, t: group(s)["weight_decay"] * group(s)["lr"] >= 0.19,
}  # fmt: skip


def test_every_kind_has_a_check_here():
    assert set(CHECKS) == set(faults.KINDS)


@pytest.mark.parametrize("case", **named(SOME))
def test_a_case_holds_the_fault_that_it_says(case: faults.Case):
    twin, (setup, truth) = case.twin(), case.planted()
    assert CHECKS[case.kind](setup, twin, truth)
    names = {name for name, _ in setup.model.named_modules(remove_duplicate=False)} | {
        n for n, _ in setup.model.named_parameters()
    }
    assert set(truth.places) <= names | {"data", "labels", "loss", "optimizer", "all layers"}
    assert truth.causes <= faults.CAUSES
    assert not truth.causes & truth.consequences


@pytest.mark.parametrize("case", **named(SOME))
def test_a_case_repeats_whatever_the_global_random_state(case: faults.Case):
    torch.manual_seed(1)
    one, truth = case.planted()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other, again = case.planted()
    assert torch.equal(before, torch.get_rng_state())
    assert truth == again == case.truth
    for mine, theirs in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    for (x, y), (x2, y2) in zip(one.batches, other.batches, strict=True):
        assert torch.equal(x.double().nan_to_num(7.0), x2.double().nan_to_num(7.0))
        assert torch.equal(y, y2)


@pytest.mark.parametrize("architecture", faults.ARCHITECTURES)
def test_training_repeats_and_scoring_leaves_the_modes(architecture: str):
    one, other = faults.healthy(architecture, 5), faults.healthy(architecture, 5)
    next(one.model.children()).eval()
    modes = [m.training for m in one.model.modules()]
    one.score()
    assert [m.training for m in one.model.modules()] == modes
    one.model.train()
    torch.manual_seed(3)
    assert one.train(3) == other.train(3)


PLACES = faults.Places(faults.Case("zero-layer", "mlp", 0).build().model)  # blocks.0 to blocks.2 or more
LOCAL = faults.Truth("k", frozenset({"gain-below-one"}), ("blocks.1.linear.weight",), frozenset({"gradient-vanishes"}))
GLOBAL = dataclasses.replace(LOCAL, places=("all layers",))
DATA = faults.Truth("k", frozenset({"input-scale"}), ("data",))


@pytest.mark.parametrize(
    ("where", "truth", "right"),
    [
        ("blocks.1.linear.weight", LOCAL, True),
        ("blocks.1.linear", LOCAL, True),
        ("blocks.1", LOCAL, True),
        ("blocks.1.linear.weight (Linear)", LOCAL, True),
        ("blocks.0.linear.weight, blocks.1.linear.weight", LOCAL, True),
        ("blocks.0 … blocks.1", LOCAL, True),
        ("blocks.0", LOCAL, False),
        ("blocks.1.act", LOCAL, False),
        ("blocks", LOCAL, False),
        ("stem … head", LOCAL, False),
        ("", LOCAL, False),
        ("", GLOBAL, True),
        ("all layers", GLOBAL, True),
        ("8 of 8 layers", GLOBAL, True),
        ("stem … head", GLOBAL, True),
        ("blocks", GLOBAL, True),
        ("blocks.1", GLOBAL, False),
    ],
)
def test_where_is_matched_as_the_rules_say(where: str, truth: faults.Truth, right: bool):
    assert faults.matches("gain-below-one", where, truth, PLACES) == right
    assert not faults.matches("gain-above-one", where, truth, PLACES)


@pytest.mark.parametrize("where", ["", "stem.linear.weight", "the first batch"])
def test_a_cause_in_the_data_tells_its_place_itself(where: str):
    assert faults.matches("input-scale", where, DATA, PLACES)
    assert not faults.matches("input-offset", where, DATA, PLACES)


RIGHT, WRONG, ELSEWHERE = ("gain-below-one", "blocks.1"), ("dead-units", "blocks.1"), ("gain-below-one", "blocks.0")
FOLLOWS = ("gradient-vanishes", "stem")


@pytest.mark.parametrize(
    ("told", "hit", "first", "misleading"),
    [
        ([RIGHT, WRONG], True, True, False),
        ([WRONG, RIGHT], True, False, True),
        ([ELSEWHERE, RIGHT], True, False, True),
        ([FOLLOWS, RIGHT], True, False, False),
        ([FOLLOWS], False, False, False),
        ([WRONG], False, False, True),
        ([], False, False, False),
    ],
)
def test_findings_are_judged_by_cause_place_and_rank(told: list, hit: bool, first: bool, misleading: bool):
    verdict = faults.judge(SOME[0], told, LOCAL, PLACES)
    assert (verdict.hit, verdict.first, verdict.misleading) == (hit, first, misleading)


def test_infos_do_not_count_and_crashes_do():
    case = faults.Case("zero-layer", "mlp", 0)
    info = SimpleNamespace(code="dead-units", where="", severity="info")
    right = SimpleNamespace(code="parameter-zero", where=case.truth.places[0], severity="warning")

    def crash(setup: faults.Setup) -> list:
        raise RuntimeError("no")

    good, bad = faults.score(lambda s: [info, right], [case]), faults.score(crash, [case])
    assert good.count("first") == (1, 1)
    assert good.count("misleading", kind="zero-layer") == (0, 1)
    assert good.count("hit", kind="dead-relu") == (0, 0)
    assert (bad.count("crashed"), bad.count("hit")) == ((1, 1), (0, 1))
    said = faults.alarms(lambda s: [right], [("mlp", 0, faults.Options())])
    assert [(alarm.trained, len(alarm.told)) for alarm in said] == [(False, 1), (True, 1)]


def test_wilsons_interval_solves_its_equation():
    for count, of in ((0, 7), (3, 10), (10, 10), (412, 496)):
        for end in faults.wilson(count, of):
            assert (count / of - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / of, abs=1e-12)


def test_harm_is_seen_where_it_is_and_not_where_it_is_not():
    harm = faults.harm_of(faults.Case("labels-constant", "mlp", 0))
    assert harm.valid
    assert harm.twin > 0.9
    harmless = faults.harm_of(faults.Case("input-scale-large", "bn-mlp", 0))  # a batch norm takes the scale away
    assert not harmless.valid
    assert faults.harm_of(faults.Case("labels-from-one", "mlp", 0)).failed == "IndexError"


def test_a_list_is_read_by_the_generator_that_made_it_alone(tmp_path: Path):
    harms = [faults.Harm("zero-layer", "mlp", seed, 0.1, 0.9, faulty) for seed, faulty in ((0, 0.1), (1, 0.9))]
    path = tmp_path / "cases.json"
    faults.keep(path, harms[:1])
    faults.keep(path, harms[1:])
    assert faults.frozen(path) == harms[:1]
    body = json.loads(path.read_text())
    assert len(body["dropped"]) == 1
    path.write_text(json.dumps({**body, "generator": "0" * 64}))
    with pytest.raises(InputError, match="another generator"):
        faults.frozen(path)
    with pytest.raises(InputError, match="--freeze"):
        faults.frozen(tmp_path / "none.json")


def test_the_list_is_of_this_generator_and_as_large_as_it_says():
    harms = faults.frozen(LIST)
    assert len(harms) >= 1200
    assert len({harm.kind for harm in harms}) >= 30
    assert {harm.architecture for harm in harms} == set(faults.ARCHITECTURES)
    assert {harm.seed for harm in harms} == {*faults.DEVELOPMENT_SEEDS, *faults.HELD_OUT_SEEDS}
    assert all(harm.valid for harm in harms)


@pytest.mark.slow
def test_cases_of_the_list_do_the_harm_that_it_says():
    by_architecture = {harm.architecture: harm for harm in faults.frozen(LIST) if harm.seed == 0}
    for harm in by_architecture.values():
        again = faults.harm_of(harm.case)
        assert again.valid
        assert again.twin == pytest.approx(harm.twin, abs=0.1)  # other processors round otherwise


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: faults.Case("no-kind", "mlp", 0), "no kind"),
        (lambda: faults.Case("zero-layer", "perceptron", 0), "no architecture"),
        (lambda: faults.Case("gates-shut", "mlp", 0), "makes no sense for mlp"),
        (lambda: list(faults.candidates((0,), ["no-kind"])), "no kind"),
        (lambda: faults.load("json"), "module:function"),
        (lambda: faults.load("json:nothing"), "cannot load"),
        (lambda: faults.load("json:__doc__"), "not a function"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], says: str):
    with pytest.raises(InputError, match=says):
        make()


def test_the_command_scores_a_diagnoser_and_refuses_its_options_elsewhere(tmp_path: Path):
    path, figures = tmp_path / "cases.json", tmp_path / "figures.json"
    faults.keep(path, [faults.Harm("zero-layer", "mlp", 0, 0.1, 0.9, 0.1)])
    named = f"{checklist.__name__}:diagnose"
    run = CliRunner().invoke(
        app, ["bench", "faults", "--diagnose", named, "--cases", str(path), "--json", str(figures), "--quiet"]
    )
    assert run.exit_code == 0, run.output
    overall = json.loads(figures.read_text())["rows"][0]
    assert [goal["met"] for goal in overall["goals"]] == [True] * 5
    refused = CliRunner().invoke(app, ["bench", "rates", "--held-out"])
    assert isinstance(refused.exception, InputError)
    assert "gramian bench faults --held-out" in str(refused.exception)
