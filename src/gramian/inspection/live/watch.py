"""`watch`: the checks of `inspect` inside the user's own training loop, on a few of its steps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gramian.batch import described
from gramian.calls import as_model
from gramian.errors import InputError
from gramian.inspection.live.log import as_log
from gramian.inspection.live.look import CODES
from gramian.inspection.live.watched_model import Watch
from gramian.report import SEVERITIES, Finding

__all__ = ["Watch", "watch"]


def watch(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    every: int = 50,
    share: float | None = 0.02,
    on_finding: Callable[[Finding, int], Any] | None = None,
    raise_on: str | Collection[str] | None = None,
    log: Any = None,
) -> Watch:
    """Watch a model in your own training loop: what goes wrong, at the step at which it does.

    The first step and every `every`-th are looked at, with the rules of `inspect` for modules, parameters, norms,
    gradients and the optimizer's steps; more rarely where that would take more than `share` of the time: `every` is
    then doubled as often as needed, but for the first three looks, if they take at most 0.5 s. Every `every`-th step in
    between gets a brief look, at gradients, rates and what the step changes.

    At every step it is checked that all gradients are finite (without an optimizer: the outputs); when they are not,
    the last batch is run again, and the module and operation are named that made the first such value, before the
    optimizer moves the weights. Many backward passes in a row without a step, as when a GradScaler skips them all, are
    told too.

    The run stays as it is, to the last bit: weights, buffers, random state. An error in the watch itself ends the watch
    with one `GramianWarning`, and not the training.

    Args:
        model: as it is trained; wrapped in `DistributedDataParallel` too, then on every rank.
        optimizer: whose steps are counted and looked at. Without one, forward passes in training mode are counted.
        every: steps from one look to the next, at least; of brief looks usually just that.
        share: of the time that looks and checks may take together, as measured; `None` looks at every `every`-th step
            whatever it takes.
        on_finding: called as `on_finding(finding, step)`, on the rank that found it.
        raise_on: raise `FindingError` for findings of this severity and above (`"error"`, `"warning"`), or of these
            codes. A rank raises what it found itself; gradients that are not finite are seen by all ranks under
            `DistributedDataParallel`.
        log: a path, to which JSON lines are written, or a logger with `log(metrics, step)`; on rank 0.

    Returns: a `Watch`, which ends with `close()` or its `with` block.
    Raises:
        InputError: an argument is not one of the above, or nothing could be watched.
    Cost: at the steps in between, a norm of each gradient and one synchronization with the device. At a step that is
        looked at, a few passes over activations, weights and gradients, and a copy of up to 65,536 entries of each
        matrix; where the model is compiled, an uncompiled forward pass too. The last batch is kept until the next.
    Source: this library's own.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with watch(net, optimizer) as watching:
    ...     net(torch.tensor([[1.0, float("nan")]])).sum().backward()
    ...     optimizer.step()
    >>> [(finding.code, finding.where) for finding in watching.findings]
    [('input-non-finite', 'input')]
    """
    model = as_model(model, "watch")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise InputError(f"watch: optimizer is a torch optimizer made for this model; got {described(optimizer)}")
    if not isinstance(every, int) or every < 1:
        raise InputError(f"watch: every is {every!r}; wanted a whole number of steps, at least 1")
    if share is not None and not 0.0 < share <= 1.0:
        raise InputError(f"watch: share is {share!r}; wanted a share of the time, above 0 and up to 1, or None")
    if on_finding is not None and not callable(on_finding):
        raise InputError(f"watch: on_finding is {described(on_finding)}; wanted a function of a finding and the step")
    if isinstance(raise_on, str) and raise_on not in SEVERITIES:
        raise InputError(f"watch: raise_on is {raise_on!r}; wanted 'error', 'warning', 'info', or a list of codes")
    if not isinstance(raise_on, str) and raise_on is not None:
        raise_on = _known_codes(raise_on)
    return Watch(model, optimizer, every, share, on_finding, raise_on, as_log(log))


def _known_codes(codes: Collection[str]) -> list[str]:
    """The codes, if a watch can make all of them: a training must not run on for want of a letter."""
    for code in (codes := list(codes)):
        if code not in CODES:
            near = difflib.get_close_matches(code, CODES, 1)
            told = f"did you mean {near[0]!r}?" if near else f"those are {', '.join(sorted(CODES))}"
            raise InputError(f"watch: raise_on has {code!r}, which is no code of a watch's findings; {told}")
    return codes
