"""Actions, performed: one function for each cure of the closed table `gramian.report.ACTIONS`.

A function does what its line of code does that users see; `tests/test_remedies.py` runs both and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from gramian.errors import InputError, some
from gramian.init import isometric_, reset_
from gramian.objective import Objective, as_objective
from gramian.report import Action
from gramian.report.access import get, put

__all__ = ["OF_THE_LOSS", "PERFORMED", "OnInput", "Setting", "perform"]


@dataclass(frozen=True)
class Setting:
    """What an action's code may name, as a user has it before the first step.

    Args:
        model: the network.
        batches: a few batches.
        objective: the loss.
        optimizer: made for the model, or `None`.
    """

    model: nn.Module
    batches: list[Any]
    objective: Objective | Callable
    optimizer: Optimizer | None = None

    def copied(self) -> Setting:
        """The same with copies of the model and of its optimizer, which belong together. Batches are shared."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return replace(self, model=model, batches=list(self.batches), optimizer=optimizer)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, none where there is none."""
        return self.optimizer.param_groups if self.optimizer is not None else []


def perform(action: Action, setting: Setting) -> Setting:
    """Do what an action's code does, and return what the code's names stand for afterwards.

    Args:
        action: one of those in `PERFORMED`.
        setting: its model and optimizer are changed in place: pass `setting.copied()` to keep them.

    Returns:
        The setting afterwards: some actions make new batches.

    Raises:
        InputError: an action that is no cure, such as a command line; or one that does not fit the model.

    Cost: the action's.
    Source: this library's own.

    >>> setting = Setting(nn.Linear(2, 2), [torch.ones(1, 2)], lambda model, batch: model(batch).sum())
    >>> bool(perform(Action("rescale", {"name": "weight", "factor": 0.0}), setting).model.weight.any())
    False
    """
    if action.name not in PERFORMED:
        raise InputError(f"perform: {action.name} is no cure that can be tried; those are {some(PERFORMED)}")
    return PERFORMED[action.name](setting, **action.arguments) or setting


def _isometric(setting: Setting, predict: str = "", overwrite: bool = False) -> None:
    objective = setting.objective
    how = objective.predict if isinstance(objective, Objective) else objective
    isometric_(setting.model, setting.batches[0], predict=how if predict else None, overwrite=overwrite)


def _reset(setting: Setting, names: tuple[str, ...] = (), size: float | None = None) -> None:
    reset_(setting.model, names, size=size)


def _rescale(setting: Setting, name: str, factor: float) -> None:
    setting.model.get_parameter(name).data.mul_(factor)


def _zero_non_finite(setting: Setting) -> None:
    for p in setting.model.parameters():
        p.data.nan_to_num_(0.0, 0.0, 0.0)


def _fill_with_ones(setting: Setting, names: tuple[str, ...]) -> None:
    for name in names:
        nn.init.ones_(setting.model.get_parameter(name))


def _rectify(setting: Setting, names: tuple[str, ...], predict: str = "", overwrite: bool = False) -> None:
    for name in names:
        setting.model.set_submodule(name, nn.ReLU())
    _isometric(setting, predict, overwrite)


def _remove(setting: Setting, module: str) -> None:
    setting.model.set_submodule(module, nn.Identity())


def _set(setting: Setting, names: tuple[str, ...], attribute: str, value: float) -> None:
    for name in names:
        setattr(setting.model.get_submodule(name), attribute, value)


def _set_norm_momentum(setting: Setting, names: tuple[str, ...], momentum: float) -> None:
    _set(setting, names, "momentum", momentum)
    _update_statistics(setting)


def _update_statistics(setting: Setting) -> None:
    update_bn(setting.batches, setting.model)


def _update_statistics_by_loss(setting: Setting, loss: str) -> None:
    objective, model = as_objective(setting.objective), setting.model
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    mode = model.training
    model.train()
    with torch.no_grad():
        for batch in setting.batches:
            objective.loss(model, batch)
    model.train(mode)
    for norm, momentum in norms.items():
        norm.momentum = momentum


def _tie(setting: Setting, module: str, attribute: str, source: str) -> None:
    setattr(setting.model.get_submodule(module), attribute, setting.model.get_parameter(source))


def _unshare(setting: Setting, module: str) -> None:
    children = setting.model.get_submodule(module)
    assert isinstance(children, nn.ModuleList)
    setting.model.set_submodule(module, nn.ModuleList(copy.deepcopy(child) for child in children))
    _add_to_optimizer(setting)


def _unfreeze(setting: Setting) -> None:
    setting.model.requires_grad_(True)


def _train_mode(setting: Setting) -> None:
    setting.model.train()


def _unfreeze_and_add(setting: Setting) -> None:
    _unfreeze(setting)
    _add_to_optimizer(setting)


def _cast_to_bfloat16(setting: Setting) -> None:
    setting.model.to(torch.bfloat16)
    setting.model.register_forward_pre_hook(
        lambda _, args, kwargs: (_as_bfloat16(args), _as_bfloat16(kwargs)), with_kwargs=True
    )


def _as_bfloat16(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _as_bfloat16(value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(map(_as_bfloat16, x))
    return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x


@dataclass(frozen=True)
class OnInput:
    """A hook that changes one tensor of those with which a module is called.

    Args:
        of: where it is in a batch.
        at: where it is in the call.
        function: what it is replaced by.
    """

    of: str
    at: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.at.startswith("args"):
            return put(args, self.at, self.function(get(args, self.at))), kwargs
        return args, put(kwargs, self.at, self.function(get(kwargs, self.at)))

    def received(self, batch: Any) -> Any:
        """The batch as the hook changes it."""
        return put(batch, self.of, self.function(get(batch, self.of)))


def _standardize(setting: Setting, of: str, module: str, at: str) -> None:
    std, mean = torch.std_mean(torch.cat([get(batch, of) for batch in setting.batches]), 0)
    std = std.where(std > 1e-6 * mean.abs(), torch.ones_like(std))  # what is constant stays near zero
    _before(setting, module, OnInput(of, at, lambda x: (x - mean.to(x)) / std.to(x)))


def _replace_non_finite(setting: Setting, of: str, module: str, at: str) -> None:
    _before(setting, module, OnInput(of, at, lambda x: x.nan_to_num(0.0, 0.0, 0.0)))


def _before(setting: Setting, module: str, hook: OnInput) -> None:
    setting.model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)


def _log_probabilities(setting: Setting) -> None:
    setting.model.register_forward_hook(lambda module, args, output: output.clamp(min=1e-30).log())


def _shift_labels(setting: Setting, by: int) -> Setting:
    return replace(setting, batches=[(x, y - by) for x, y in setting.batches])


def _add_to_optimizer(setting: Setting) -> None:
    known = {p for group in setting.groups for p in group["params"]}
    assert setting.optimizer is not None
    new = [(name, p) for name, p in setting.model.named_parameters() if p not in known]
    is_named = "param_names" in setting.groups[0]
    setting.optimizer.add_param_group({"params": new if is_named else [p for _, p in new]})


def _set_zero_rates(setting: Setting, rate: float) -> None:
    for group in setting.groups:
        group["lr"] = group["lr"] or rate


def _scale_rate(setting: Setting, factor: float) -> None:
    for group in setting.groups:
        group["lr"] *= factor


def _scale_rate_of(setting: Setting, group: int, factor: float) -> None:
    setting.groups[group]["lr"] *= factor


def _set_beta1(setting: Setting, beta1: float) -> None:
    for group in setting.groups:
        group["betas"] = (beta1, group["betas"][1])


def _set_in_groups(key: str, argument: str) -> Callable[..., None]:
    def performed(setting: Setting, **arguments: float) -> None:
        for group in setting.groups:
            group[key] = arguments[argument]

    return performed


PERFORMED: dict[str, Callable[..., Setting | None]] = {
    "isometric_": _isometric,
    "cast_to_bfloat16": _cast_to_bfloat16,
    "tie": _tie,
    "reset": _reset,
    "reset_to_size": _reset,
    "reset_all": _reset,
    "rescale": _rescale,
    "zero_non_finite": _zero_non_finite,
    "fill_with_ones": _fill_with_ones,
    "rectify": _rectify,
    "remove": _remove,
    "log_probabilities": _log_probabilities,
    "set": _set,
    "unshare": _unshare,
    "unfreeze": _unfreeze,
    "unfreeze_and_add": _unfreeze_and_add,
    "train_mode": _train_mode,
    "update_statistics": _update_statistics,
    "update_statistics_by_loss": _update_statistics_by_loss,
    "set_norm_momentum": _set_norm_momentum,
    "standardize": _standardize,
    "replace_non_finite": _replace_non_finite,
    "shift_labels": _shift_labels,
    "add_to_optimizer": _add_to_optimizer,
    "set_zero_rates": _set_zero_rates,
    "scale_rate": _scale_rate,
    "scale_rate_of": _scale_rate_of,
    "set_momentum": _set_in_groups("momentum", "momentum"),
    "set_beta1": _set_beta1,
    "set_weight_decay": _set_in_groups("weight_decay", "decay"),
}
"""Name of an action that may cure a finding: the function that does it. The other actions show, compare or compress."""

OF_THE_LOSS = ("remove", "log_probabilities", "shift_labels")
"""Actions that change what the loss measures: losses before and after them are not comparable as they are."""
