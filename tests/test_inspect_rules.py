"""Every rule is run, and every code that a rule can yield is documented and says what to do."""

from __future__ import annotations

import ast
import inspect as python
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gramian.inspection import across_depth, rules
from gramian.inspection.causes import (
    data,
    folding,
    freezing,
    inputs,
    loss,
    masks,
    modules,
    optimizer,
    parameters,
    precision,
    small_changes,
    wiring,
)
from gramian.inspection.comparing import comparison
from gramian.inspection.live import clipping, forgotten_state, look, loop_faults, skipped_steps
from gramian.inspection.passes import nonfinite_origin
from gramian.inspection.weights import rules as weight_rules

MODULES = (rules, across_depth, weight_rules, comparison)
CAUSES = (inputs, data, loss, small_changes, freezing, masks, modules, parameters, wiring, optimizer)
FINDINGS = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text(encoding="utf-8")


def calls() -> Iterator[ast.Call]:
    """Each `Finding(…)` in the source of the rules."""
    for module in MODULES:
        yield from calls_of(module)


def calls_of(module: Any) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(python.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Finding", "_finding"):
            yield node


def starts(code: ast.expr) -> list[str]:
    """The codes that an expression can give; of an f-string, what it begins with."""
    if isinstance(code, ast.IfExp):
        return starts(code.body) + starts(code.orelse)
    if isinstance(code, ast.JoinedStr):
        return starts(code.values[0])
    assert isinstance(code, ast.Constant)
    return [str(code.value)]


def label(call: ast.Call) -> str:
    return "/".join(starts(call.args[0]))


@pytest.mark.parametrize("call", list(calls()), ids=label)
def test_a_finding_is_documented(call: ast.Call) -> None:
    for start in starts(call.args[0]):
        assert f"`{start}`" in FINDINGS or (start.endswith("-") and f"`{start}" in FINDINGS)


@pytest.mark.parametrize("call", list(calls()), ids=label)
def test_an_error_or_warning_says_what_to_do(call: ast.Call) -> None:
    if starts(call.args[1]) != ["info"]:
        assert {keyword.arg for keyword in call.keywords} & {"action", "advice"}


@pytest.mark.parametrize("module", [rules, across_depth, weight_rules])
def test_every_rule_is_in_the_table(module) -> None:
    functions = [f for f in vars(module).values() if python.isgeneratorfunction(f) and f.__module__ == module.__name__]
    assert {f.__name__ for f in functions} <= {rule.__name__ for rule in rules.RULES}


def test_the_causes_are_documented_and_have_a_rank() -> None:
    """In docs/inspect.md, and among the origins by which findings are ordered."""
    ranked = {code for codes in folding._ORIGINS for code in codes} | folding.SYMPTOMS
    assert not {code for code in ranked if f"`{code}`" not in FINDINGS}
    assert ranked >= folding._SIGNAL | folding._UNITS | folding._GAINS | folding._RATES
    told = {start for module in CAUSES for call in calls_of(module) for start in literals(call.args[0])}
    assert len(told) > 25
    assert not {code for code in told if not any(known.startswith(code) for known in ranked)}


def test_the_codes_of_a_watch_are_those_of_its_rules() -> None:
    """Every code that stands in the source of what it runs, and no other."""
    rules_of_a_look = (*look.EVERY_LOOK, *parameters.RULES, *optimizer.RULES)
    files = {python.getmodule(rule) for rule in rules_of_a_look} - {wiring}
    inside = (*files, wiring.numbers, wiring.unreached, wiring.shared, precision.gradient_overflow, loss.non_finite)
    words = {
        node.value
        for part in (*inside, clipping, forgotten_state, skipped_steps, loop_faults, nonfinite_origin)
        for node in ast.walk(ast.parse(python.getsource(part)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    starts_of_codes = tuple(word for word in words if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-", word))
    ranked = {code for codes in folding._ORIGINS for code in codes} | folding.SYMPTOMS | look.CODES
    assert {code for code in ranked if code in words or code.startswith(starts_of_codes)} == look.CODES


def literals(code: ast.expr) -> list[str]:
    """As `starts`, without codes that are in variables."""
    return [] if isinstance(code, ast.Name) else starts(code)
