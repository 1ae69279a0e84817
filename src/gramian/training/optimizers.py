"""The optimizer of a run."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from gramian.block import blocks
from gramian.errors import GramianWarning, InputError, TaskError
from gramian.optim.given_optimizer import given
from gramian.optim.proximal import Proximal
from gramian.optim.registry import OPTIMIZERS
from gramian.optim.scaling import for_short_run
from gramian.optim.shell import MatrixOptimizer
from gramian.prox import Penalty
from gramian.training.argument_errors import check
from gramian.training.options import Options, penalty

__all__ = ["Choice", "choose", "rate_from", "skips_itself"]


TO_ZERO = ("linear", "cosine")
"""The schedules that end at a rate of zero."""


class Choice(NamedTuple):
    """An optimizer's name, its learning rate (`None`: its usual one), and the function that makes it from a model."""

    name: str
    lr: float | None
    make: Callable[[nn.Module], torch.optim.Optimizer]


def choose(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    lr: float | str | None,
    options: Options,
    steps: Callable[[], float] = lambda: math.inf,
) -> Choice:
    """The optimizer of a name, at its usual rate where `lr` is `None`; or of the class or function that was given.

    A usual rate that depends on the model grows in runs of fewer than 300 steps that decay to zero; `steps` is asked
    when the optimizer is made.
    """
    found = given("train", optimizer)
    name = found.name
    if lr is not None and not found.takes_rate:
        warnings.warn(f"train: lr is ignored, since {name} takes none", GramianWarning, stacklevel=3)
        lr = None
    if lr is not None:
        check("lr", lr, lambda x: 0 <= x < math.inf, "zero, a positive number or 'auto'")
        lr = float(lr)
    if not isinstance(optimizer, str):
        if lr is None and found.needs_rate:
            raise InputError(f"train: {name} needs a learning rate; give lr=")
        return Choice(name, lr, lambda model: _completed(found.make(model, lr), model, options))
    entry = OPTIMIZERS[name]
    if lr is None and entry.usual:

        def make(model: nn.Module) -> torch.optim.Optimizer:
            growth = _growth(options, steps)
            made = entry.make(model, None)
            return made if growth == 1 else entry.make(model, growth * made.defaults["lr"])

        return Choice(name, None, lambda model: _completed(make(model), model, options))
    rate = entry.lr if lr is None else lr
    return Choice(name, rate, lambda model: _completed(entry.make(model, rate), model, options))


def rate_from(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    lr: float | str | None,
    options: Options,
    steps: Callable[[], float],
) -> str:
    """Where the rate of what `choose` was asked for comes from, in words.

    >>> rate_from("muon", None, Options(), lambda: 60), rate_from("adamw", None, Options(), lambda: 60)
    ('the usual one for a run of 60 steps', 'the usual one')
    """
    if lr is not None or not isinstance(optimizer, str):
        return "given"
    entry = OPTIMIZERS[given("train", optimizer).name]
    short = entry.usual and _growth(options, steps) > 1
    return f"the usual one for a run of {steps():,.0f} steps" if short else "the usual one"


def _growth(options: Options, steps: Callable[[], float]) -> float:
    """By how much a usual rate that depends on the model grows in a short run."""
    return for_short_run(steps()) if options.schedule in TO_ZERO else 1.0


def skips_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves a parameter as it is where its gradient is not finite."""
    return isinstance(optimizer.base if isinstance(optimizer, Proximal) else optimizer, MatrixOptimizer)


def _completed(optimizer: Any, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer with the weight decay and the penalty of the options; without fused steps where a batch is in
    slices, since those round an entry by its place in a tensor, of which a rank may have a part.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TaskError(
            f"train: optimizer(model) must return a torch.optim.Optimizer, got a {type(optimizer).__name__}"
        )
    if options.weight_decay is not None:
        for group in optimizer.param_groups:
            if "weight_decay" not in group:
                raise InputError(f"train: {type(optimizer).__name__} has no weight decay; use regularize l2 instead")
            group["weight_decay"] = options.weight_decay
    if options.slices is not None and isinstance(optimizer, MatrixOptimizer):
        for group in optimizer.param_groups:
            group["fused"] = False
    found = penalty(options.regularize)
    return optimizer if found is None else _proximal(optimizer, model, found)


def _proximal(optimizer: torch.optim.Optimizer, model: nn.Module, found: Penalty) -> Proximal:
    """The optimizer with the proximal map of a penalty on every parameter that holds matrices."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group.setdefault("param_names", [names.get(p, "") for p in group["params"]])
    matrices = {block.parameter for block in blocks(model).blocks}
    patterns = [
        glob.escape(name)
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group["param_names"], strict=True)
        if p in matrices and name
    ]
    if not patterns:
        raise InputError("train: regularize acts on matrices, and none of the optimizer's parameters holds one")
    return Proximal(optimizer, dict.fromkeys(patterns, found), model=model)
