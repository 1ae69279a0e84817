"""Actions on data, the loss and the optimizer that may cure a finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.alignment import labels_of
from gramian.batch import main_input, mapped
from gramian.errors import GramianError
from gramian.inspection.experiments.replay import Replay
from gramian.objective import as_objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import evaluating
from gramian.remedies.asked import Asked, Propose
from gramian.remedies.performing import Setting
from gramian.report import Action

__all__ = [
    "higher_rates",
    "labels",
    "last_function",
    "lower_rates",
    "momentum",
    "not_stepped",
    "on_input",
    "weight_decay",
]

# A rate is searched by half decades.
TOO_HIGH = tuple(round(10 ** (-k / 2), 5) for k in range(1, 8))
TOO_LOW = tuple(round(10 ** (k / 2), 2) for k in range(1, 10))

USUAL_MOMENTUM = 0.9
# Weight decay of AdamW, and of optimizers that add it to the gradient.
DECOUPLED, COUPLED = 0.01, 1e-4


def last_function(asked: Asked) -> Iterator[Action]:
    """Remove the module without parameters that gives the scores, where it is one of these.

    Where forward() itself ends in a softmax: the logarithm of its output, whose softmax is the output again.
    """
    kinds = (nn.Softmax, nn.LogSoftmax, nn.ReLU, nn.Sigmoid)
    called: list[str] = []
    outputs: list[Any] = []
    leaves = [(n, m) for n, m in asked.model.named_modules() if n and not any(True for _ in m.children())]
    handles = [m.register_forward_hook(lambda _m, _i, _o, name=n: called.append(name)) for n, m in leaves]
    handles.append(asked.model.register_forward_hook(lambda _m, _i, output: outputs.append(output)))
    with hooks(handles), evaluating(asked.model), torch.enable_grad():
        _predicted(asked.setting)
    if called and isinstance(asked.model.get_submodule(called[-1]), kinds) and called.count(called[-1]) == 1:
        yield Action("remove", {"module": called[-1]})
    elif len(outputs) == 1 and _are_probabilities(outputs[0]):
        yield Action("log_probabilities")


def _are_probabilities(output: Any) -> bool:
    return (
        isinstance(output, Tensor)
        and output.ndim > 1
        and bool((output >= 0).all())
        and bool((output.sum(-1) - 1).abs().max() < 1e-3)
    )


def _predicted(setting: Setting) -> None:
    as_objective(setting.objective).loss(setting.model, setting.batches[0])


def labels(asked: Asked) -> Iterator[Action]:
    """Labels from zero."""
    try:
        smallest = min(int(labels_of(batch).min()) for batch in asked.setting.batches)
    except (GramianError, TypeError, ValueError, KeyError, IndexError):
        return
    if smallest > 0 and all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in asked.setting.batches):
        yield Action("shift_labels", {"by": smallest})


def not_stepped(asked: Asked) -> Iterator[Action]:
    """Give the optimizer what it lacks."""
    known = {p for group in asked.setting.groups for p in group["params"]}
    if any(p not in known for p in asked.model.parameters()):
        yield Action("add_to_optimizer")
    rates = [float(group.get("lr", 0.0)) for group in asked.setting.groups]
    if 0.0 in rates and max(rates) > 0:
        yield Action("set_zero_rates", {"rate": max(rates)})


def lower_rates(asked: Asked) -> Iterator[Action]:
    """Lower rates."""
    yield from _rates(asked, TOO_HIGH)


def higher_rates(asked: Asked) -> Iterator[Action]:
    """Higher rates."""
    yield from _rates(asked, TOO_LOW)


def _rates(asked: Asked, factors: Sequence[float]) -> Iterator[Action]:
    """Scale the rate of the group that the finding names, or of all where it names none."""
    group = asked.group
    for factor in factors:
        if group is None:
            yield Action("scale_rate", {"factor": factor})
        else:
            yield Action("scale_rate_of", {"group": group, "factor": factor})


def on_input(name: str) -> Propose:
    """What a hook does to the input that the finding names; nothing where no code can find it, or it is a target."""

    def proposed(asked: Asked) -> Iterator[Action]:
        where = asked.fitting.input_of(asked.finding)
        if where is not None and not _is_restored(asked):
            yield Action(name, where)

    return proposed


def _is_restored(asked: Asked) -> bool:
    """Whether the loss takes the model's main input itself, beside which a hook would change one of the two alone."""
    try:
        batch = asked.setting.batches[0]
        x = main_input(batch)
        with evaluating(asked.model):
            replay = Replay(asked.model, batch, as_objective(asked.setting.objective))
            moved = replay.gradients(replay.outputs, mapped(batch, lambda t: t.roll(1, 0) if t is x else t))
            pairs = zip(moved, replay.slopes, strict=True)
            return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)  # NaN is what it may replace
    except Exception:  # not for this to say
        return False


def momentum(asked: Asked) -> Iterator[Action]:
    """The usual momentum."""
    if all("betas" in group for group in asked.setting.groups):
        yield Action("set_beta1", {"beta1": USUAL_MOMENTUM})
    elif all("momentum" in group for group in asked.setting.groups):
        yield Action("set_momentum", {"momentum": USUAL_MOMENTUM})


def weight_decay(asked: Asked) -> Iterator[Action]:
    """The usual weight decay."""
    decoupled = "AdamW" in type(asked.setting.optimizer).__name__
    yield Action("set_weight_decay", {"decay": DECOUPLED if decoupled else COUPLED})
