"""What losses are applied to: watched in the forward pass where torch's own functions compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.experiments.bootstrapped_targets import is_bootstrapped, is_taught
from gramian.inspection.passes.ctc_labels import sequences_of
from gramian.inspection.passes.gate_functions import ADDITIONS, QUOTIENTS
from gramian.inspection.passes.labeled_classes import see_labels
from gramian.inspection.passes.records import Broadcast, Criterion, Ends
from gramian.inspection.passes.step_records import Observed

__all__ = ["VALUES", "ends_of", "labels_range", "see_loss", "see_pull", "shifted"]

_CLASSES: dict[Callable, str] = {F.cross_entropy: "cross_entropy", F.nll_loss: "nll_loss"}
_BINARY: dict[Callable, str] = {
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.binary_cross_entropy: "binary_cross_entropy",
}
# Losses of log-probabilities: by the dimension of the classes, where it is known.
_LOG_PROBABILITIES: dict[Callable, str] = {F.kl_div: "kl_div", F.ctc_loss: "ctc_loss", torch.ctc_loss: "ctc_loss"}
_VALUES: dict[Callable, str] = {
    F.mse_loss: "mse_loss", F.l1_loss: "l1_loss", F.smooth_l1_loss: "smooth_l1_loss", F.huber_loss: "huber_loss",
}  # fmt: skip
VALUES = ("difference", *_VALUES.values())
"""Functions of an output and a target that are numbers."""
_DIFFERENCES = {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax}

# Functions whose values have ends.
_ENDS: dict[Callable, tuple[str, float, float]] = {
    F.relu: ("ReLU", 0.0, math.inf), torch.relu: ("ReLU", 0.0, math.inf), Tensor.relu: ("ReLU", 0.0, math.inf),
    F.softplus: ("softplus", 0.0, math.inf), F.relu6: ("ReLU6", 0.0, 6.0),
    torch.sigmoid: ("sigmoid", 0.0, 1.0), Tensor.sigmoid: ("sigmoid", 0.0, 1.0), F.sigmoid: ("sigmoid", 0.0, 1.0),
    torch.tanh: ("tanh", -1.0, 1.0), Tensor.tanh: ("tanh", -1.0, 1.0), F.tanh: ("tanh", -1.0, 1.0),
    F.softmax: ("softmax", 0.0, 1.0), torch.softmax: ("softmax", 0.0, 1.0), Tensor.softmax: ("softmax", 0.0, 1.0),
}  # fmt: skip
_CLAMPS = {torch.clamp, Tensor.clamp, Tensor.clip, torch.clip}


def see_loss(
    seen: Observed, inside: str, func: Callable, args: tuple, kwargs: Mapping[str, Any], ends: Ends | None = None
) -> None:
    """Adds what a call of a loss is given; called before it, since it may refuse that.

    Args:
        seen: gets it.
        inside: name of the module in which the call is; empty in the model itself and outside.
        func, args, kwargs: the call.
        ends: of the function that made its first argument.
    """
    name = _name_of(func)
    if name:
        scores, target = _given(func, args, kwargs)
        if not (isinstance(scores, Tensor) and isinstance(target, Tensor)):
            return
        if func in _CLASSES and not target.is_floating_point():
            ignored = kwargs.get("ignore_index", -100)
            seen.labels = labels_range(scores, target, ignored if isinstance(ignored, int) else -100)
        if func in _VALUES:
            _broadcast(seen, name, scores, target)
            seen.bootstrapped = seen.bootstrapped or is_bootstrapped(scores, target)
        if func is F.kl_div or (func in _CLASSES and target.is_floating_point()):
            seen.num_taught += is_taught(scores, target)
        if name == "ctc_loss":
            seen.sequences = seen.sequences or sequences_of(args, kwargs)
        if func is F.kl_div and _argument(args, kwargs, 5, "log_target"):
            target = target.exp()
        _keep(seen, name, scores, target, ends, _argument(args, kwargs, 2, "weight") if func in _CLASSES else None)
        if func in _CLASSES and scores.requires_grad and not target.is_floating_point():
            see_labels(seen, scores, target, is_log=func is F.nll_loss)
        if func is F.cross_entropy and seen.logits is None:
            seen.logits = _rows_of_scores(scores)
    elif inside:
        return
    elif func in _PRODUCTS and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
        if any(a.requires_grad for a in args):
            _broadcast(seen, "the product", *args)
    elif func in _DIFFERENCES and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
        if any(a.requires_grad for a in args):
            _broadcast(seen, "the difference", *args)
        if all(a.requires_grad for a in args):
            seen.bootstrapped = seen.bootstrapped or is_bootstrapped(*args) or is_bootstrapped(*args[::-1])
        for output, target in (args, args[::-1]):
            if seen.output is not None and output.data_ptr() == seen.output.data_ptr() and not target.requires_grad:
                _keep(seen, "difference", output, target)
    elif func in _LOG_SOFTMAX and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
        dim = _argument(args, kwargs, 1, "dim")
        if isinstance(dim, int) and dim % 2 == 0 and len(set(args[0].shape)) == 2 and args[0].requires_grad:
            seen.softmax_over_rows = seen.softmax_over_rows or args[0].shape


def see_pull(seen: Observed, func: Callable, value: Any) -> None:
    """Keeps the smallest and largest gradient of the whole loss by the values of one of torch's losses.

    Args:
        seen: gets it in the backward pass, for the first call of each.
        func: the loss.
        value: what it gave.
    """
    name = _name_of(func)
    if name and name not in seen.pulls and isinstance(value, Tensor) and value.requires_grad and value.numel():
        seen.pulls[name] = (math.nan, math.nan)  # until a gradient arrives

        def keep(gradient: Tensor) -> None:
            seen.pulls[name] = (float(gradient.min()), float(gradient.max()))

        value.register_hook(keep)


def ends_of(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Ends | None:
    """Between which ends the values of a call are, where its function says so."""
    if func in _ENDS:
        dim = _argument(args, kwargs, 1, "dim") if _ENDS[func][0] == "softmax" else None
        given = args[0] if args else kwargs.get("input")
        size = given.shape[dim] if isinstance(dim, int) and isinstance(given, Tensor) and given.ndim else 0
        return Ends(*_ENDS[func], size)
    if func in _CLAMPS:
        low, high = _argument(args, kwargs, 1, "min"), _argument(args, kwargs, 2, "max")
        if not isinstance(low, Tensor) and not isinstance(high, Tensor):
            return Ends("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high))
    return None


def shifted(ends: Ends, func: Callable, by: Any, *, is_reversed: bool = False) -> Ends | None:
    """The ends of values times a number, over one, or plus or minus one; `None` for others. One may be infinite.

    Args:
        ends: of the values.
        func: that takes them and the number.
        by: the number, or a tensor of one entry that nothing trains.
        is_reversed: whether the number is the first argument.
    """
    if isinstance(by, Tensor):
        by = by.item() if by.numel() == 1 and not by.requires_grad and by.is_floating_point() else None
    if not isinstance(by, (int, float)) or not math.isfinite(by):
        return None
    factor, offset = 1.0, 0.0
    if func in _PRODUCTS:
        factor = by
    elif func in QUOTIENTS and not is_reversed and by:
        factor = 1 / by
    elif func in ADDITIONS:
        offset = by
    elif func in _DIFFERENCES and func is not Tensor.__rsub__ and not is_reversed:
        offset = -by
    elif func in _DIFFERENCES:
        factor, offset = -1.0, by
    else:
        return None
    if factor == 0:
        return None
    low, high = sorted((factor * ends.low + offset, factor * ends.high + offset))
    return replace(ends, low=low, high=high)


def labels_range(scores: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[int, int, int] | None:
    """Smallest and largest label, and the number of classes."""
    axis = 1 if target.ndim < scores.ndim and scores.ndim > 1 and target.shape != scores.shape[:-1] else -1
    kept = target[target != ignore_index]
    return (int(kept.min()), int(kept.max()), scores.shape[axis]) if kept.numel() else None


def _name_of(func: Callable) -> str | None:
    return _CLASSES.get(func) or _BINARY.get(func) or _VALUES.get(func) or _LOG_PROBABILITIES.get(func)


def _keep(
    seen: Observed, function: str, given: Tensor, target: Tensor, ends: Ends | None = None, weight: Tensor | None = None
) -> None:
    if all(one.function != function for one in seen.criteria):
        seen.criteria.append(Criterion(function, given.detach(), target.detach(), ends, weight))


def _broadcast(seen: Observed, function: str, left: Tensor, right: Tensor) -> None:
    """Keeps shapes of which each differs from the result's: (N, 1) and (N,) give (N, N)."""
    if left.data_ptr() == right.data_ptr():  # of one tensor with itself, as the differences that ranks are learned from
        return
    if left.shape == right.shape or {left.ndim, right.ndim} != {1, 2}:
        return
    column, row = (left, right) if left.ndim == 2 else (right, left)
    if column.shape[1] == 1 and len(column) == len(row) > 1:
        seen.broadcast = seen.broadcast or Broadcast(function, left.shape, right.shape)


def _given(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a loss compares: the output and the target."""
    names = ("log_probs", "targets") if _LOG_PROBABILITIES.get(func) == "ctc_loss" else ("input", "target")
    first, second = (_argument(args, kwargs, place, name) for place, name in enumerate(names))
    return first, second


def _argument(args: tuple, kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _rows_of_scores(scores: Tensor) -> Tensor:
    scores = scores.detach().float()
    return scores.movedim(1, -1).reshape(-1, scores.shape[1]) if scores.ndim > 1 else scores.reshape(1, -1)
