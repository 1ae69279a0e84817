"""Proposals: the actions that may cure a finding, by its code; which of them does is for a rehearsal to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gramian.alignment import labels_of
from gramian.block import blocks
from gramian.errors import GramianError
from gramian.init.reset import USUAL, sizes
from gramian.objective import as_objective
from gramian.recording.measuring import evaluating
from gramian.remedies.performing import PERFORMED, Setting
from gramian.report import Action, Finding

__all__ = ["CURES", "proposals"]

ISOMETRIC = Action("isometric_")
RESET_ALL = Action("reset_all")

# A rate is searched by half decades.
TOO_HIGH = tuple(round(10 ** (-k / 2), 5) for k in range(1, 8))
TOO_LOW = tuple(round(10 ** (k / 2), 2) for k in range(1, 10))

# Root mean squares of embeddings: torch's, transformers', and one between.
EMBEDDINGS = (1.0, 0.14, 0.02)

# Size rms(W) √fan_in of matrices in branches that no norm divides.
BRANCH = 0.3

USUAL_DROPOUT, USUAL_NORM_MOMENTUM, USUAL_MOMENTUM = 0.1, 0.1, 0.9
# Weight decay of AdamW, and of optimizers that add it to the gradient.
DECOUPLED, COUPLED = 0.01, 1e-4

Propose = Callable[["Asked"], Iterator[Action]]


@dataclass(frozen=True)
class Asked:
    """A finding, and the setting in which it was found."""

    finding: Finding
    setting: Setting

    @property
    def model(self) -> nn.Module:
        return self.setting.model

    @property
    def places(self) -> tuple[str, ...]:
        """The parameters and modules that the finding names; those that it only counts are missing."""
        known = {n for n, _ in self.model.named_parameters()} | {n for n, _ in self.model.named_modules() if n}
        words = self.finding.where.replace(" and ", ", ").split(", ")
        return tuple(word for word in words if word in known)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that the finding names."""
        return {name: module for name, module in self.model.named_modules() if name in self.places}

    def parameters(self, condition: Callable[[Tensor], bool]) -> tuple[str, ...]:
        """The floating-point parameters that meet a condition."""
        return tuple(n for n, p in self.model.named_parameters() if p.is_floating_point() and condition(p.detach()))


def proposals(finding: Finding, setting: Setting) -> list[Action]:
    """The actions that may cure a finding, those that lose less first; empty where no code can cure it.

    Args:
        finding: an error or a warning of `inspect`.
        setting: what it was found in; not changed.

    Returns:
        Actions whose code `perform` can run.

    Raises: nothing of its own.
    Cost: a pass over the parameters; for findings about the loss, a forward pass.
    Source: this library's own.

    >>> net = nn.Linear(4, 4)
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.999)
    >>> setting = Setting(net, [torch.ones(2, 4)], lambda model, batch: model(batch).mean(), sgd)
    >>> print(proposals(Finding("momentum-too-high", "warning", ""), setting)[0].code)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    """
    if finding.severity == "info":
        return []
    found: dict[str, Action] = {}
    for propose in CURES.get(finding.code, ()):
        for action in propose(Asked(finding, setting)):
            found.setdefault(action.code, action)
    own = finding.action
    if own is not None and own.name in PERFORMED:
        found.setdefault(own.code, own)
    return list(found.values())


def _everything(asked: Asked) -> Iterator[Action]:
    yield ISOMETRIC
    yield RESET_ALL


def _places(asked: Asked) -> Iterator[Action]:
    if asked.places:
        yield Action("reset", {"names": asked.places})


def _small_branches(asked: Asked) -> Iterator[Action]:
    """All matrices but the first and the head, so small that the branches that they are in add little."""
    names = [block.name for block in blocks(asked.model).blocks if block.role == "hidden"]
    if len(names) > 1:
        yield Action("reset_to_size", {"names": tuple(names[1:]), "size": BRANCH})


def _zero(asked: Asked) -> Iterator[Action]:
    names = asked.parameters(lambda p: p.ndim > 1 and not bool(p.any()))
    if names:
        yield Action("reset", {"names": names})


def _constant(asked: Asked) -> Iterator[Action]:
    names = asked.parameters(lambda p: p.ndim > 1 and p.numel() > 1 and bool((p == p.flatten()[0]).all()))
    if names:
        yield Action("reset", {"names": names})


def _non_finite(asked: Asked) -> Iterator[Action]:
    yield Action("zero_non_finite")
    yield Action("reset", {"names": asked.parameters(lambda p: not bool(p.isfinite().all()))})


def _rescaled(asked: Asked) -> Iterator[Action]:
    """Keep the directions and change the size: to that of the other matrices."""
    found = sizes(asked.model)
    usual = [s for n, s in found.items() if n not in asked.places and USUAL[0] < s < USUAL[1]]
    odd = [n for n in asked.places if n in found and found[n] > 0 and math.isfinite(found[n])]
    if len(odd) == 1:
        factor = (median(usual) if usual else 1.0) / found[odd[0]]
        yield Action("rescale", {"name": odd[0], "factor": _rounded(factor)})


def _rescaled_embedding(asked: Asked) -> Iterator[Action]:
    for name, p in asked.model.named_parameters():
        rms = float(p.detach().float().square().mean().sqrt())
        if name != (asked.places or ("",))[0] or not 0 < rms < math.inf:
            continue
        for wanted in EMBEDDINGS:
            yield Action("rescale", {"name": name, "factor": _rounded(wanted / rms)})


def _gates(asked: Asked) -> Iterator[Action]:
    """The weights, where no bias shuts the gate, which the finding's own action would reset."""
    if asked.finding.action is None:
        yield from _places(asked)


def _norm_gain(asked: Asked) -> Iterator[Action]:
    names = [
        f"{name}.weight"
        for name, module in asked.modules.items()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and not bool(weight.detach().any())
    ]
    if names:
        yield Action("fill_with_ones", {"names": tuple(names)})


def _sigmoids(asked: Asked) -> Iterator[Action]:
    names = [name for name, module in asked.model.named_modules() if type(module) is nn.Sigmoid and name]
    if len(names) > 1:
        yield Action("rectify", {"names": tuple(names)})


def _dropout(asked: Asked) -> Iterator[Action]:
    for attribute, kinds in (
        ("p", nn.modules.dropout._DropoutNd),
        ("dropout", (nn.MultiheadAttention, nn.RNNBase)),
    ):
        names = [
            name
            for name, module in asked.model.named_modules()
            if isinstance(module, kinds) and getattr(module, attribute) >= 0.5
        ]
        if names:
            yield Action("set", {"names": tuple(names), "attribute": attribute, "value": USUAL_DROPOUT})


def _statistics(asked: Asked) -> Iterator[Action]:
    slow = tuple(
        name
        for name, module in asked.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.momentum is not None
        and module.momentum < USUAL_NORM_MOMENTUM / 10
    )
    if slow:
        yield Action("set_norm_momentum", {"names": slow, "momentum": USUAL_NORM_MOMENTUM})
    else:
        yield Action("update_statistics")


def _last_function(asked: Asked) -> Iterator[Action]:
    """Remove the module without parameters that gives the scores, where it is one of these.

    Where forward() itself ends in a softmax: the logarithm of its output, whose softmax is the output again.
    """
    kinds = (nn.Softmax, nn.LogSoftmax, nn.ReLU, nn.Sigmoid)
    called: list[str] = []
    outputs: list[Any] = []
    leaves = [(n, m) for n, m in asked.model.named_modules() if n and not any(True for _ in m.children())]
    hooks = [m.register_forward_hook(lambda _m, _i, _o, name=n: called.append(name)) for n, m in leaves]
    hooks.append(asked.model.register_forward_hook(lambda _m, _i, output: outputs.append(output)))
    try:
        with evaluating(asked.model), torch.no_grad():
            _predicted(asked.setting)
    finally:
        for hook in hooks:
            hook.remove()
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


def _labels(asked: Asked) -> Iterator[Action]:
    try:
        smallest = min(int(labels_of(batch).min()) for batch in asked.setting.batches)
    except (GramianError, TypeError, ValueError, KeyError, IndexError):
        return
    if smallest > 0 and all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in asked.setting.batches):
        yield Action("shift_labels", {"by": smallest})


def _unshared(asked: Asked) -> Iterator[Action]:
    holders = {name.rpartition(".")[0] for name in asked.places}
    holder = next(iter(holders)) if len(holders) == 1 else ""
    if holder and isinstance(asked.model.get_submodule(holder), nn.ModuleList) and asked.setting.groups:
        yield Action("unshare", {"module": holder})


def _not_stepped(asked: Asked) -> Iterator[Action]:
    known = {p for group in asked.setting.groups for p in group["params"]}
    if any(p not in known for p in asked.model.parameters()):
        yield Action("add_to_optimizer")
    rates = [float(group.get("lr", 0.0)) for group in asked.setting.groups]
    if 0.0 in rates and max(rates) > 0:
        yield Action("set_zero_rates", {"rate": max(rates)})


def _lower_rates(asked: Asked) -> Iterator[Action]:
    for factor in TOO_HIGH:
        yield Action("scale_rate", {"factor": factor})


def _higher_rates(asked: Asked) -> Iterator[Action]:
    for factor in TOO_LOW:
        yield Action("scale_rate", {"factor": factor})


def _momentum(asked: Asked) -> Iterator[Action]:
    if all("betas" in group for group in asked.setting.groups):
        yield Action("set_beta1", {"beta1": USUAL_MOMENTUM})
    elif all("momentum" in group for group in asked.setting.groups):
        yield Action("set_momentum", {"momentum": USUAL_MOMENTUM})


def _weight_decay(asked: Asked) -> Iterator[Action]:
    decoupled = "AdamW" in type(asked.setting.optimizer).__name__
    yield Action("set_weight_decay", {"decay": DECOUPLED if decoupled else COUPLED})


def _half_precision(asked: Asked) -> Iterator[Action]:
    if asked.parameters(lambda p: p.dtype == torch.float16):
        yield Action("cast_to_bfloat16")


def _standardize(asked: Asked) -> Iterator[Action]:
    if not asked.places:  # else another input than the main one, which the code would not reach
        yield Action("standardize")


def _always(name: str) -> Propose:
    return lambda asked: iter([Action(name)])


def _rounded(factor: float) -> float:
    return float(f"{factor:.3g}")


CURES: dict[str, tuple[Propose, ...]] = {
    "input-non-finite": (_always("replace_non_finite"),),
    "input-offset": (_standardize,),
    "input-scale": (_standardize,),
    "input-dominated": (_standardize,),
    "labels-out-of-range": (_labels,),
    "loss-double-softmax": (_last_function,),
    "loss-rectified": (_last_function,),
    "parameter-frozen": (_always("unfreeze"),),
    "parameter-shared": (_unshared,),
    "parameter-not-stepped": (_not_stepped,),
    "non-finite-weights": (_non_finite,),
    "zero-weights": (_zero,),
    "parameter-constant": (_constant,),
    "parameter-rank-one": (_places,),
    "parameter-scale-small": (_rescaled, _places),
    "parameter-scale-large": (_rescaled, _places),
    "head-scale": (_rescaled, _places),
    "embedding-scale": (_rescaled_embedding,),
    "gain-below-one": (_everything, _sigmoids),
    "gain-above-one": (_everything,),
    "dead-units": (_places, _everything),
    "saturated-units": (_places, _everything, _sigmoids),
    "gate-shut": (_gates,),
    "norm-zero-gain": (_norm_gain,),
    "norm-statistics": (_statistics,),
    "norm-evaluation-mode": (_always("train_mode"),),
    "dropout-rate": (_dropout,),
    "attention-saturated": (_places, _everything),
    "residual-growth": (_small_branches, _everything),
    "gradient-vanishes": (_everything, _sigmoids),
    "gradient-explodes": (_everything,),
    "jacobian-vanishes": (_everything,),
    "jacobian-explodes": (_everything,),
    "samples-indistinguishable": (_everything,),
    "parameter-float16": (_half_precision,),
    "gradient-overflow": (_half_precision,),
    "gradient-underflow": (_half_precision,),
    "momentum-too-high": (_momentum,),
    "weight-decay-too-large": (_weight_decay,),
    "rate-too-high": (_lower_rates,),
    "rate-too-low": (_higher_rates,),
}
"""Code of a finding: what proposes actions for it, in the order in which they are tried. Findings of other codes get
advice in words: a detached graph, say, is repaired in the user's code."""
