"""`watch`: the checks of `inspect` inside the user's own training loop, on a few of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.batch import described, fields, tensors
from gramian.calls import as_model, unwrapped, wrappings
from gramian.errors import FindingError, InputError
from gramian.inspection.causes import Context, ordered
from gramian.inspection.causes.modules import RULES as MODULES
from gramian.inspection.causes.norms import RULES as NORMS
from gramian.inspection.causes.norms import SETTLED, norm_statistics
from gramian.inspection.causes.parameters import RULES as PARAMETERS
from gramian.inspection.causes.reach import numbers, shared, unreached
from gramian.inspection.causes.stepping import RULES as STEPPING
from gramian.inspection.live_log import as_log
from gramian.inspection.observed import Observed
from gramian.inspection.origin import Pass, are_finite, find_origin, values_of
from gramian.inspection.signal import in_words
from gramian.inspection.stepping import Steps
from gramian.inspection.watching import Watcher
from gramian.placement import is_sharded
from gramian.recording.taps import in_backward
from gramian.report import SEVERITIES, Finding

__all__ = ["Watch", "watch"]

MODULE_CHECKS = "modules"
MODULE_RULES: tuple[Callable, ...] = (numbers, unreached, shared, *PARAMETERS, *MODULES, *NORMS)

# What every watch leaves to `inspect`.
_LEFT = {
    "data, loss and labels": "they are outside of the model's forward pass; call gm.inspect",
    "attention and gates inside torch's fused functions": "they run as they are; call gm.inspect",
    "frozen and rank-one parameters": "they are judged beside the spectra; call gm.inspect",
    "spectra": "they cost more than a step; call gm.inspect",
}


class _Hook:
    """A hook that stays behind when its module is copied or pickled."""

    def __init__(self, function: Callable | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple]:
        return _Hook, ()


class Watch:
    """A model that is watched in its training loop, until `close()` or the end of the `with`; made by `watch`.

    `findings` is what was found so far, each code and place once; `not_looked_at` says what is not looked at, and why.
    `step` is the number of steps that were taken: of the optimizer, or forward passes in training where none is given.
    `numbers` has those of the last step that was looked at: `gradient`, the norm of all gradients, and `change`, the
    ‖ΔW‖_F / ‖W‖_F of the median matrix.

    Args:
        model: as it is trained.
        optimizer: whose steps are counted, or `None`.
        every: steps from one look to the next.
        on_finding: called with each finding and the step.
        raise_on: severity, or codes, for which `FindingError` is raised.
        log: called with the numbers, the findings and the step.

    Raises:
        InputError: nothing could be watched.
    Cost: as `watch`.
    Source: this library's own.

    >>> net = nn.Linear(2, 1)
    >>> with watch(net, torch.optim.SGD(net.parameters(), lr=0.1)) as watching:
    ...     watching.step, watching.findings
    (0, [])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        every: int,
        on_finding: Callable[[Finding, int], Any] | None,
        raise_on: str | Collection[str] | None,
        log: Any,
    ) -> None:
        self.findings: list[Finding] = []
        self.not_looked_at: dict[str, str] = dict(_LEFT)
        self.numbers: dict[str, float] = {}
        self.step = 0
        self._root = unwrapped(model)
        self._parallel = next((m for m in wrappings(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        self._optimizer, self._every, self._on_finding, self._log = optimizer, every, on_finding, log
        self._raise_on = raise_on
        self._parameters = {n: p for n, p in self._root.named_parameters() if p.requires_grad}
        self._checked = self._chosen()
        self._seen: Observed | None = None
        self._watcher: _Safe | None = None
        self._inside = ExitStack()  # the hooks and the mode of the forward pass that is watched
        self._passes = 0  # in training, since the last step
        self._last: Pass | None = None
        self._replays = self._lost = self._skipped = False
        self._before: dict[str, Tensor] = {}  # the matrices before the step, and what was found by then
        self._found: list[Finding] = []
        reason = _hidden(model)
        self._handles: list[Any] = []
        if reason:
            if optimizer is None:
                raise InputError(f"watch: {reason}; without an optimizer nothing is left to watch. Pass optimizer=")
            self.not_looked_at[MODULE_CHECKS] = reason
        else:
            before, after = _Hook(self._before_forward), _Hook(self._after_forward)
            self._handles.append(self._root.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(self._root.register_forward_hook(after, with_kwargs=True, always_call=True))
        if optimizer is None:
            self.not_looked_at["gradients and steps"] = "no optimizer was given"
        else:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks; `findings` stay."""
        self._inside.close()
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._seen, self._watcher = [], None, None, None
        self._before = {}

    # ---- the forward pass ----

    @property
    def _is_due(self) -> bool:
        return self.step == 0 or (self.step + 1) % self._every == 0

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is not self._root or self._replays or not module.training or not torch.is_grad_enabled():
            return
        if in_backward():  # a recomputation
            return
        self._passes += 1
        self._last = Pass.of(args, kwargs)
        if self._is_due and self._seen is None and self._watcher is None:
            self._seen = Observed()
            self._watcher = watcher = _Safe(module, self._seen, live=True)
            self._inside.enter_context(watcher.installed())
            watcher.entering("")(module, args, kwargs)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if module is not self._root or self._replays or in_backward():
            return
        if output is None:  # it raised
            self._inside.close()
            self._watcher = self._seen = None
            return
        if self._watcher is not None and self._seen is not None:
            self._watcher.leaving("")(module, args, kwargs, output)
            self._inside.close()
            if self._watcher.failure:
                self.not_looked_at[MODULE_CHECKS] = self._watcher.failure
            self._watcher, self._seen.output = None, None
            self._seen.loss = self._seen.first_loss = _loss_in(output)
        if self._optimizer is None and module.training and torch.is_grad_enabled():
            made = [t.detach() for t in tensors(output) if t.is_floating_point()]
            if not are_finite(made):
                self._explain()
            elif self._is_due:
                self._tell(ordered(self._judge_modules()))
            self._next()

    # ---- the optimizer's step ----

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # of a GradScaler that leaves the skipping to the optimizer
        self._skipped = skipped is not None and bool(skipped)
        if self._skipped:
            return
        if not are_finite([values_of(p.grad) for p in self._checked if p.grad is not None]):
            if not self._lost:
                self._explain()
            self._lost = True
            return
        self._lost = False
        if self._is_due:
            self._seen = self._seen or Observed()
            if any(p.grad is not None for p in self._parameters.values()):  # a closure makes them within the step
                self._measure_gradients(getattr(optimizer, "grad_scale", None))
            matrices = {n: p for n, p in self._parameters.items() if p.ndim >= 2 and self._seen.gradients.get(n)}
            self._before = {n: values_of(p).clone() for n, p in matrices.items()}
            self._found = self._judge_modules()

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._skipped:
            self._passes, self._seen = 0, None  # no step was taken
            return
        if self._is_due and self._seen is not None and not self._lost:
            changes: dict[str, float] = {}
            for name, old in self._before.items():
                size = float(torch.linalg.vector_norm(old, dtype=torch.float32))
                moved = torch.linalg.vector_norm(values_of(self._parameters[name]) - old, dtype=torch.float32)
                changes |= {name: float(moved) / size} if size > 0 else {}
            if changes:
                self.numbers["change"] = median(changes.values())
            self._tell(ordered((*self._found, *self._judge(STEPPING, changes))))
        self._next()

    def _measure_gradients(self, scale: Tensor | None) -> None:
        assert self._seen is not None
        factor = 1.0 if scale is None else 1.0 / float(scale)
        total = 0.0
        for name, p in self._parameters.items():
            grad = None if p.grad is None else values_of(p.grad)
            norm = 0.0 if grad is None else float(torch.linalg.vector_norm(grad, dtype=torch.float64)) * factor
            total += norm * norm
            rms = norm / math.sqrt(max(1, p.numel()))
            self._seen.gradients[name] = None if grad is None else rms
            self._seen.zero_gradients[name] = float(rms == 0.0)
        self.numbers["gradient"] = math.sqrt(total)

    def _next(self) -> None:
        self.step += 1
        self._passes, self._seen, self._before, self._found = 0, None, {}, []

    # ---- what it means ----

    def _judge(self, rules: Iterable[Callable], changes: Mapping[str, float] | None = None) -> list[Finding]:
        """Runs rules on what was seen of this step."""
        seen = self._seen or Observed()
        seen.batches = [None] * self._passes
        gradients = [g for g in seen.gradients.values() if g is not None]
        steps = Steps(changes=dict(changes), gradient=max(gradients, default=0.0)) if changes else None
        context = Context(self._root, seen, self._optimizer, steps)
        found: list[Finding] = []
        for rule in rules:
            try:
                found += rule(context)
            except Exception as error:  # a rule must not stop a training
                self.not_looked_at[rule.__name__.replace("_", " ")] = f"the rule failed: {in_words(error)}"
        return found

    def _judge_modules(self) -> list[Finding]:
        """Of the weights as they were in the forward pass, before the step."""
        if MODULE_CHECKS in self.not_looked_at or self._seen is None or not self._seen.called:
            return []
        settled = _is_settled(self._root)
        return self._judge([rule for rule in MODULE_RULES if settled or rule is not norm_statistics])

    def _explain(self) -> None:
        """Finds where the first value that is not finite came from, before the step spoils the weights."""
        self._replays = True
        try:
            self._tell([find_origin(self._root, self._last, self._parallel, f"step {self.step + 1}")])
        finally:
            self._replays = False

    def _tell(self, found: list[Finding]) -> None:
        known = {(f.code, f.where) for f in self.findings}
        new = [f for f in found if (f.code, f.where) not in known]
        self.findings += new
        if self._log is not None and not (dist.is_initialized() and dist.get_rank()):
            self._log(self.numbers, new, self.step + 1)
        for finding in new:
            if self._on_finding is not None:
                self._on_finding(finding, self.step + 1)
        for finding in new:
            if self._raises(finding):
                self.close()
                raise FindingError(finding, self.step + 1)

    def _raises(self, finding: Finding) -> bool:
        if isinstance(self._raise_on, str):
            return SEVERITIES.index(finding.severity) <= SEVERITIES.index(self._raise_on)  # type: ignore[arg-type]
        return self._raise_on is not None and finding.code in self._raise_on

    def _chosen(self) -> list[nn.Parameter]:
        """Whose gradients are checked at every step: vectors, which see each layer's output gradient, if there are."""
        vectors = [p for p in self._parameters.values() if p.ndim < 2]
        return vectors or [*self._parameters.values()]


class _Safe(Watcher):
    """A watcher of the user's own forward pass, which no error of ours may stop."""

    failure = ""

    def _try(self, what: Callable, *args: Any) -> None:
        if not self.failure:
            try:
                what(*args)
            except Exception as error:
                self.failure = f"watching failed: {in_words(error)}"

    def _see(self, name: str, func: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        self._try(super()._see, name, func, args, kwargs, output)

    def _returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._try(super()._returned, name, module, args, kwargs, output)

    def _compare_statistics(self, name: str, module: nn.modules.batchnorm._BatchNorm, given: Tensor) -> None:
        self._try(super()._compare_statistics, name, module, given)


def _hidden(model: nn.Module) -> str:
    """Why a model's modules cannot be watched, or empty."""
    for name, module in model.named_modules():
        named = f"{name or 'the model'} is"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return f"{named} compiled, and hooks do not see into compiled code"
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        return "the model is a ScriptModule, which takes no hooks"
    if any(map(is_sharded, model.parameters())):
        return "parameters are sharded (FSDP2); numbers are of this rank's shards"
    return ""


def _loss_in(output: Any) -> float:
    """The loss, where the model returns it; else NaN."""
    named = fields(output)
    found = named.get("loss") if named is not None else getattr(output, "loss", output)
    return float(found.detach()) if isinstance(found, Tensor) and found.numel() == 1 else math.nan


def _is_settled(root: nn.Module) -> bool:
    """Whether all running statistics have seen enough batches to be those of the data."""
    counts = (getattr(module, "num_batches_tracked", None) for module in root.modules())
    return all(int(count) >= SETTLED for count in counts if count is not None)


def watch(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    every: int = 50,
    on_finding: Callable[[Finding, int], Any] | None = None,
    raise_on: str | Collection[str] | None = None,
    log: Any = None,
) -> Watch:
    """Watch a model in your own training loop: what goes wrong, at the step at which it does.

    The first step and every `every`-th are looked at, with the rules of `inspect` for modules, parameters, norms,
    gradients and the optimizer's steps. At every step it is checked that the gradients are finite (without an
    optimizer: the outputs); when they are not, the last batch is run again, and the module and operation are named
    that made the first such value, before the optimizer moves the weights.

    The run stays as it is, to the last bit: weights, buffers, random state.

    Args:
        model: as it is trained; wrapped in `DistributedDataParallel` too, then on every rank.
        optimizer: whose steps are counted and looked at. Without one, forward passes in training mode are counted.
        every: steps from one look to the next.
        on_finding: called as `on_finding(finding, step)`, on the rank that found it.
        raise_on: raise `FindingError` for findings of this severity and above (`"error"`, `"warning"`), or of these
            codes. A rank raises what it found itself; gradients that are not finite are seen by all ranks under
            `DistributedDataParallel`.
        log: a path, to which JSON lines are written, or a logger with `log(metrics, step)`; on rank 0.

    Returns: a `Watch`, which ends with `close()` or its `with` block.
    Raises:
        InputError: an argument is not one of the above, or nothing could be watched.
    Cost: at the steps in between, a norm of the gradients of vectors and one synchronization with the device. At a step
        that is looked at, a few passes over activations, weights and gradients, and a copy of the matrices. The last
        batch is kept until the next.
    Source: this library's own.

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
    if on_finding is not None and not callable(on_finding):
        raise InputError(f"watch: on_finding is {described(on_finding)}; wanted a function of a finding and the step")
    if isinstance(raise_on, str) and raise_on not in SEVERITIES:
        raise InputError(f"watch: raise_on is {raise_on!r}; wanted 'error', 'warning', 'info', or a list of codes")
    return Watch(model, optimizer, every, on_finding, raise_on, as_log(log))
