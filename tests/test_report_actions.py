"""Actions of findings: their code runs as printed, they survive JSON, and every rule says what to do."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
from typing import Any

import pytest
import torch
import typer
from torch import nn

import gramian as gm
from gramian.cli import app
from gramian.errors import InputError
from gramian.report import ACTIONS, Action, Finding, Report
from gramian.report.actions import parameters
from gramian.report.serial import jsonable
from gramian.training.start import INIT_OF_ACTION, INITS
from test_report_model import HOSTILE_NAMES, TIE, make_report

# Arguments for each action that takes some.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "tie": TIE,
    "compress": {"keep": 0.7},
    "inspect_files": {"model": "a b.pt", "other": "base"},
    "extract_lora": {"model": "a b.pt", "other": "base", "rank": 4},
    "reset": {"names": ("0.weight", "2")},
    "reset_to_size": {"names": ("2.weight",), "size": 0.3},
    "rescale": {"name": "0.weight", "factor": 0.5},
    "fill_with_ones": {"names": ("1.weight",)},
    "rectify": {"names": ("3",)},
    "remove": {"module": "3"},
    "set": {"names": ("4",), "attribute": "p", "value": 0.1},
    "set_norm_momentum": {"names": ("1",), "momentum": 0.1},
    "unshare": {"module": "5"},
    "shift_labels": {"by": 1},
    "set_zero_rates": {"rate": 0.1},
    "scale_rate": {"factor": 0.1},
    "scale_rate_of": {"group": 0, "factor": 0.1},
    "update_statistics_by_loss": {"loss": "objective.loss"},
    "standardize": {"of": "batch[0]", "module": "", "at": "args[0]"},
    "replace_non_finite": {"of": "batch[0]", "module": "", "at": "args[0]"},
    "set_momentum": {"momentum": 0.9},
    "set_beta1": {"beta1": 0.9},
    "set_weight_decay": {"decay": 0.01},
}
# Those that tests/test_remedies.py runs.
CURES = list(ACTIONS)[list(ACTIONS).index("reset") :]

# What stands for each name that code may begin with: the plan is what gm.compress returns.
NAMES = {"gm": gm, "torch": torch, "model": nn.Module, "plan": gm.Plan, "next": next, "iter": iter}


def action(name: str) -> Action:
    return Action(name, ARGUMENTS.get(name, {}))


def resolved(node: ast.expr) -> Any:
    """The object that `gm.init.isometric_` names; an assertion where a step of it is not public."""
    if isinstance(node, ast.Name):
        return NAMES[node.id]
    if isinstance(node, ast.Call):
        called = resolved(node.func)
        return gm.Plan if called in (gm.compress, gm.Plan.at) else called
    assert isinstance(node, ast.Attribute)
    owner = resolved(node.value)
    if owner is gm or getattr(owner, "__name__", "").startswith("gramian."):
        assert node.attr in getattr(owner, "__all__", [node.attr])
        assert not node.attr.startswith("_")
    return getattr(owner, node.attr)


@pytest.mark.parametrize("name", [name for name in ACTIONS if not action(name).is_command and name not in CURES])
def test_code_parses_and_calls_public_functions_with_parameters_that_exist(name: str):
    calls = [node for node in ast.walk(ast.parse(action(name).code)) if isinstance(node, ast.Call)]
    assert calls
    for call in calls:
        function = resolved(call.func)
        is_method = isinstance(call.func, ast.Attribute) and resolved(call.func.value) in (nn.Module, gm.Plan)
        if function in (next, iter):
            continue
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(function).bind(*[None] * (len(call.args) + is_method), **keywords)


@pytest.mark.parametrize("name", [name for name in ACTIONS if action(name).is_command])
def test_commands_name_options_that_exist(name: str):
    program, command, *words = shlex.split(action(name).code)
    options = {o for p in typer.main.get_command(app).commands[command].params for o in p.opts}  # type: ignore[attr-defined]
    assert program == "gramian"
    assert {word for word in words if word.startswith("-")} <= options


RUN = [name for name in ACTIONS if not action(name).is_command and name not in ("tie", *CURES)]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("keys", [False, True], ids=["tuples", "dicts"])
def test_the_line_runs_as_it_stands(name: str, keys: bool):
    """With what `gm.inspect` was given and nothing else; batches as tuples and as dicts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    pairs = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(3)]
    batches = [{"input": x, "labels": y} for x, y in pairs] if keys else pairs
    given = {"model": model, "batches": batches, "objective": gm.Objective.classification()}
    exec(action(name).code, given | {"gm": gm, "torch": torch})


@pytest.mark.parametrize("text", [*HOSTILE_NAMES, "a'b\"c\\", "line\nend", "😀"])
def test_a_name_from_a_file_stays_one_literal(text: str):
    code = Action("tie", TIE | {"module": text}).code
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert sorted(literals) == sorted([text, TIE["source"]])
    assert "\n" not in code


def test_tying_ties():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    exec(action("tie").code, {"model": model})
    assert model["encoder"].weight is model["decoder"].weight


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("reboot", {}, "expected one of isometric_"),
        ("extract_lora", {"rank": 1}, "expected the arguments model, other, rank; got rank"),
        ("isometric_", {"x": 1}, r"expected the arguments \(none\); got x"),
        ("tie", TIE | {"attribute": "weight; import os"}, "the name of an attribute"),
        ("compress", {"keep": None}, "a word, a number or a list of words"),
        ("compress", {"keep": [0.5]}, "a word, a number or a list of words"),
    ],
)
def test_what_is_no_action_is_refused(name: str, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        Action(name, arguments)


@pytest.mark.parametrize("name", ACTIONS)
def test_json_holds_name_arguments_and_code(name: str):
    finding = Finding("c", "error", "t", action=action(name), advice="Or wait.")
    report = Report("net", [finding])
    row = json.loads(report.to_json())["findings"][0]
    assert row["action"] == {"name": name, "arguments": jsonable(ARGUMENTS.get(name, {}))}
    assert row["remedy"] == finding.remedy == f"{action(name).code}\nOr wait."
    assert Report.from_json(report.to_json()).findings == [finding]


def test_files_from_before_there_were_actions_are_read():
    data = make_report().to_dict()
    for row in data["findings"]:
        del row["action"], row["advice"]
    data["findings"][0]["remedy"] = "a lower learning rate"
    again = Report.from_json(json.dumps(data)).findings
    assert [f.remedy for f in again] == [row["remedy"] for row in data["findings"]]
    assert all(f.action is None for f in again)


def test_an_action_of_a_later_version_keeps_its_text():
    data = make_report().to_dict()
    data["findings"][0] |= {"action": {"name": "later", "arguments": {"x": 1}}, "advice": "", "remedy": "gm.later(1)"}
    finding = Report.from_json(json.dumps(data)).findings[0]
    assert (finding.action, finding.remedy) == (None, "gm.later(1)")


@pytest.mark.parametrize("arguments", [{}, {"keep": {}}, {"keep": 1, "more": 2}, 3])
def test_arguments_that_do_not_fit_are_refused_in_a_file(arguments):
    data = make_report().to_dict()
    data["findings"][0]["action"] = {"name": "compress", "arguments": arguments}
    with pytest.raises(InputError):
        Report.from_json(json.dumps(data))


def test_what_a_run_can_apply_is_an_action_and_an_init():
    for name, init_of in INIT_OF_ACTION.items():
        assert set(ARGUMENTS.get(name, {})) == set(parameters(name))
        assert init_of(ARGUMENTS.get(name, {})) in INITS
