"""Actions fitted to a setting: how its model is called, where its inputs stand, and what it has learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import fields, main_input
from gramian.calls import called, prepared
from gramian.errors import GramianError, some
from gramian.inspection.weights.trained import signs_of, trainable
from gramian.objective import Objective, as_objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import evaluating
from gramian.remedies.performing import Setting
from gramian.report import Action, Finding, Layer, Report
from gramian.report.access import path_to, steps_of
from gramian.report.actions import KEYWORDS

__all__ = ["Fitting", "fitted"]


@dataclass(frozen=True)
class Fitting:
    """What actions need to know of a setting, each found out at the first question.

    Args:
        setting: not changed.
        layers: of a report on it, whose singular values need not be computed again.
    """

    setting: Setting
    layers: Sequence[Layer] = ()

    @cached_property
    def trained(self) -> set[str]:
        """Names of the parameters that look trained."""
        known = {layer.name: layer.singular_values for layer in self.layers}
        return {sign.name for sign in signs_of(self.setting.model, trainable(self.setting.model), known)}

    @cached_property
    def loss(self) -> str:
        """How code computes the loss of a batch: `LOSS(model, batch)`."""
        return "objective.loss" if isinstance(self.setting.objective, Objective) else "objective"

    @cached_property
    def predict(self) -> str:
        """The argument `predict` with which this library calls the model; empty where it needs none."""
        if getattr(as_objective(self.setting.objective).predict, "is_call", False):
            return ""
        word = "objective.predict" if isinstance(self.setting.objective, Objective) else "objective"
        calls = self._calls_of("")
        try:
            model = self._twin
            with evaluating(model), torch.enable_grad():
                mine = _recorded(model, lambda: called(model, prepared(model, self.batch)))
        except Exception:  # it is called in another way
            return word
        return "" if len(calls) == len(mine) == 1 and _keys(calls[0]) == _keys(mine[0]) else word

    @property
    def is_called_with_the_first(self) -> bool:
        """Whether the model is called with the batch, or with its first part, and nothing else, as `update_bn` does."""
        batch, calls = self.batch, self._calls_of("")
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        return len(calls) == 1 and isinstance(first, Tensor) and _keys(calls[0]) == {"args[0]": _key(first)}

    def input_of(self, finding: Finding) -> dict[str, str] | None:
        """Where the input that a finding names is in a batch, and in the call of which module.

        That is the input of the layer that the finding names, else the main input of the model.
        """
        batch = self.batch
        modules = dict(self.setting.model.named_modules())
        named = finding.where if finding.where in modules else ""
        places = dict(_leaves(batch, "batch", []))
        wanted = {_key(t): path for path, t in places.items() if t.is_floating_point()}
        if not named:
            try:
                main = _key(main_input(batch))
            except (GramianError, TypeError, ValueError, KeyError, IndexError):
                return None
            wanted = {main: wanted[main]} if main in wanted else {}
        calls = self._calls_of(named)
        if len(calls) != 1:
            return None
        for at, key in _keys(calls[0]).items():
            if key in wanted:
                return {"of": wanted[key], "module": named, "at": at}
        return None

    @cached_property
    def batch(self) -> Any:
        """A copy of the first batch, which a forward pass may write to."""
        try:
            return copy.deepcopy(self.setting.batches[0])
        except Exception:  # an object that cannot be copied
            return self.setting.batches[0]

    @cached_property
    def _twin(self) -> nn.Module:
        """A copy of the model, which a forward pass may change."""
        return copy.deepcopy(self.setting.model)

    def _calls_of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of the calls of a module when the loss of the first batch is computed."""
        objective = as_objective(self.setting.objective)
        try:
            model = self._twin
            with evaluating(model):
                return _recorded(model.get_submodule(name), lambda: objective.loss(model, self.batch))
        except Exception:  # not for this to say
            return []

    def fitted(self, action: Action) -> Action:
        """The action as its code runs in this setting."""
        keywords: dict[str, str | bool] = {}
        if action.name in KEYWORDS:
            keywords |= {"predict": self.predict} if self.predict else {}
            keywords |= {"overwrite": True} if self.trained else {}
        if action.name == "update_statistics" and not self.is_called_with_the_first:
            return Action("update_statistics_by_loss", {"loss": self.loss})
        return replace(action, arguments={**action.arguments, **keywords}) if keywords else action

    def lost(self, action: Action) -> list[str]:
        """The trained parameters that an action draws anew."""
        if action.name in ("isometric_", "rectify", "reset_all"):
            return sorted(self.trained)
        if action.name not in ("reset", "reset_to_size"):
            return []
        names = action.arguments["names"]
        assert isinstance(names, tuple)
        return [n for n in sorted(self.trained) if any(n == name or n.startswith(f"{name}.") for name in names)]


def fitted(report: Report, setting: Setting) -> Report:
    """The report with actions whose code runs in this setting, and what they lose said beside them.

    Args:
        report: of `inspect`.
        setting: what it reports on; left as it is.

    Returns: a report.
    Cost: where an action needs it, a copy of the model, two forward passes, and the signs of training, from singular
        values that the report has.

    >>> from gramian.report import Finding
    >>> net, own = nn.Bilinear(2, 2, 1), lambda model, batch: model(batch[0], batch[1]).square().mean()
    >>> found = Report("net", [Finding("c", "error", "t", action=Action("isometric_"))])
    >>> batch = (torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1))
    >>> fitted(found, Setting(net, [batch], own)).findings[0].remedy
    'gm.init.isometric_(model, next(iter(batches)), predict=objective)'
    """
    fitting, findings = Fitting(setting, report.layers), []
    for finding in report.findings:
        if finding.action is not None:
            action = fitting.fitted(finding.action)
            lost = fitting.lost(action)
            line = f"It replaces trained weights, whose learning is lost: {some(lost)}." if lost else ""
            finding = replace(finding, action=action, advice=f"{line} {finding.advice}".strip())
        findings.append(finding)
    return replace(report, findings=findings)


def _recorded(module: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The arguments of the calls of a module in a run."""
    calls: list[dict[str, Any]] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append({"args": args, "kwargs": kwargs})

    with hooks([module.register_forward_pre_hook(note, with_kwargs=True)]):
        run()
    return calls


def _keys(call: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """What tells the tensors of a call apart, by where they are."""
    return {path: _key(t) for root in ("args", "kwargs") for path, t in _leaves(call[root], root, [])}


def _key(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.numel()


def _leaves(value: Any, root: str, steps: list[int | str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a path leads to, in tuples, lists and mappings, by their paths."""
    if isinstance(value, Tensor):
        path = path_to(root, steps)
        if _is_path(path):
            yield path, value
        return
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = [(key, one) for key, one in value.items() if isinstance(key, str)]
    elif isinstance(value, (tuple, list)) and (fields(value) is None or type(value) is tuple):
        inside = enumerate(value)
    for step, one in inside:
        yield from _leaves(one, root, [*steps, step])


def _is_path(path: str) -> bool:
    try:
        steps_of(path)
    except GramianError:
        return False
    return True
