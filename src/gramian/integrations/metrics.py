"""What callbacks log: the health of the optimizer, and what inspections find."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gramian.errors import InputError
from gramian.inspection import inspect
from gramian.objective import Objective
from gramian.optim.shell import MatrixOptimizer
from gramian.report import Report

__all__ = ["Inspector", "health_metrics", "unwrapped"]


def unwrapped(optimizer: Any) -> Any:
    """The matrix optimizer inside the wrappers of accelerate, Lightning, DeepSpeed and `Proximal`.

    Args:
        optimizer: of any kind.

    Returns:
        The `MatrixOptimizer`, or the innermost optimizer where there is none.

    >>> from gramian import optim, prox
    >>> base = optim.Muon(nn.Linear(2, 2))
    >>> unwrapped(optim.Proximal(base, {"*": prox.L1(0.1)})) is base
    True
    """
    while not isinstance(optimizer, MatrixOptimizer):
        inner = next((v for key in ("optimizer", "base") if (v := getattr(optimizer, key, None)) is not None), None)
        if inner is None:
            return optimizer
        optimizer = inner
    return optimizer


def health_metrics(optimizer: Any) -> dict[str, float]:
    """What `health()` counts, summed over the parameters: `optimizer/skipped` and `optimizer/fallbacks`.

    Under FSDP2 each rank counts the fallbacks of the matrices that it steps; skipped steps are the same on all.

    Args:
        optimizer: any, also inside a wrapper; one without `health()` has no metrics.

    Returns:
        The numbers by name: steps that parameters missed because their gradient was not finite, and results that were
        not good enough, so that older ones stayed.

    Raises: nothing of its own.
    Cost: one synchronization with the device.
    Source: this library's own.

    >>> from gramian import optim
    >>> health_metrics(optim.Muon(nn.Linear(2, 2)))
    {'optimizer/skipped': 0.0, 'optimizer/fallbacks': 0.0}
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, MatrixOptimizer):
        return {}
    rows = inner.health().values()
    return {f"optimizer/{key}": float(sum(row.get(key) or 0 for row in rows)) for key in ("skipped", "fallbacks")}


class Inspector:
    """Inspects a model at chosen steps of its training, and keeps the reports, in `reports`, by step.

    Args:
        batches, objective: as in `gm.inspect`; without them, the weights alone are inspected.
        every: steps between two inspections; `None`: at the start and at the end only.
        quick: as in `gm.inspect`.

    Raises:
        InputError: `every` is no whole number of steps.

    Cost: that of `gm.inspect`, at each of the steps.
    Source: this library's own.

    >>> inspector = Inspector(every=10)
    >>> inspector(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), step=0)
    {'inspect/errors': 0.0, 'inspect/warnings': 0.0}
    >>> inspector.reports[0].outcome
    'No trouble found in 2 layers. Looked at: weights.'
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        objective: Objective | Any | None = None,
        *,
        every: int | None = None,
        quick: bool = False,
    ) -> None:
        if every is not None and (not isinstance(every, int) or every < 1):
            raise InputError(f"Inspector: every must be a whole number of steps, at least 1, or None; got {every!r}")
        self.batches, self.objective, self.every, self.quick = batches, objective, every, quick
        self.reports: dict[int, Report] = {}

    def is_due(self, step: int) -> bool:
        """Whether a step in the middle of training is to be inspected.

        >>> [step for step in range(1, 7) if Inspector(every=3).is_due(step)]
        [3, 6]
        """
        return self.every is not None and step % self.every == 0 and step not in self.reports

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Inspects the model, which stays as it is, and returns the number of errors and warnings found."""
        with torch.enable_grad():
            report = self.reports[step] = inspect(model, self.batches, self.objective, quick=self.quick)
        count = [finding.severity for finding in report.findings].count
        return {"inspect/errors": float(count("error")), "inspect/warnings": float(count("warning"))}
