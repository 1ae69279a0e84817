"""Proposals: the actions that may cure a finding, by its code; which of them does is for a rehearsal to show."""

from __future__ import annotations

from gramian.remedies import loop_cures, model_cures
from gramian.remedies.asked import Asked, Propose
from gramian.remedies.performing import PERFORMED, Setting
from gramian.report import Action, Finding

__all__ = ["CURES", "proposals"]


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

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Linear(4, 4)
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.999)
    >>> setting = Setting(net, [torch.ones(2, 4)], lambda model, batch: model(batch).mean(), sgd)
    >>> print(proposals(Finding("momentum-too-high", "warning", ""), setting)[0].code)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    """
    if finding.severity == "info":
        return []
    asked = Asked(finding, setting)
    found: dict[str, Action] = {}
    for propose in CURES.get(finding.code, ()):
        for action in map(asked.fitting.fitted, propose(asked)):
            found.setdefault(action.code, action)
    own = finding.action
    if own is not None and own.name in PERFORMED:
        found.setdefault(own.code, own)
    return list(found.values())


def _always(name: str) -> Propose:
    return lambda asked: iter([Action(name)])


CURES: dict[str, tuple[Propose, ...]] = {
    "input-non-finite": (loop_cures.on_input("replace_non_finite"),),
    "input-offset": (loop_cures.on_input("standardize"),),
    "input-scale": (loop_cures.on_input("standardize"),),
    "input-dominated": (loop_cures.on_input("standardize"),),
    "labels-out-of-range": (loop_cures.labels,),
    "loss-double-softmax": (loop_cures.last_function,),
    "loss-rectified": (loop_cures.last_function,),
    "parameter-frozen": (model_cures.unfreeze,),
    "parameter-shared": (model_cures.unshared,),
    "parameter-not-stepped": (loop_cures.not_stepped,),
    "non-finite-weights": (model_cures.non_finite,),
    "zero-weights": (model_cures.zero,),
    "parameter-constant": (model_cures.constant,),
    "parameter-rank-one": (model_cures.places,),
    "parameter-scale-small": (model_cures.rescaled, model_cures.places),
    "parameter-scale-large": (model_cures.rescaled, model_cures.places),
    "head-scale": (model_cures.rescaled, model_cures.places),
    "embedding-scale": (model_cures.rescaled_embedding,),
    "gain-below-one": (model_cures.everything, model_cures.sigmoids),
    "gain-above-one": (model_cures.everything,),
    "dead-units": (model_cures.places, model_cures.everything),
    "saturated-units": (model_cures.places, model_cures.everything, model_cures.sigmoids),
    "gate-shut": (model_cures.gates,),
    "norm-zero-gain": (model_cures.norm_gain,),
    "norm-statistics": (model_cures.statistics,),
    "norm-evaluation-mode": (_always("train_mode"),),
    "dropout-rate": (model_cures.dropout,),
    "attention-saturated": (model_cures.places, model_cures.everything),
    "residual-growth": (model_cures.small_branches, model_cures.everything),
    "gradient-vanishes": (model_cures.everything, model_cures.sigmoids),
    "gradient-explodes": (model_cures.everything,),
    "jacobian-vanishes": (model_cures.everything,),
    "jacobian-explodes": (model_cures.everything,),
    "samples-indistinguishable": (model_cures.everything_by_depth,),
    "parameter-float16": (model_cures.half_precision,),
    "gradient-overflow": (model_cures.half_precision,),
    "gradient-underflow": (model_cures.half_precision,),
    "momentum-too-high": (loop_cures.momentum,),
    "weight-decay-too-large": (loop_cures.weight_decay,),
    "rate-too-high": (loop_cures.lower_rates,),
    "rate-too-low": (loop_cures.higher_rates,),
}
"""Code of a finding: what proposes actions for it, in the order in which they are tried. Findings of other codes get
advice in words: a detached graph, say, is repaired in the user's code."""
