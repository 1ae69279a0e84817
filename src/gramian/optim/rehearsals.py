"""Rehearsals of a few training steps, from which a learning rate is suggested."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.errors import InputError, UnsupportedError
from gramian.objective import Objective, as_objective
from gramian.optim.learning_rate import LearningRate
from gramian.optim.proximal import Proximal
from gramian.optim.shell import MatrixOptimizer
from gramian.recording.forward_failures import naming_the_layer

__all__ = ["JUDGES", "NUM_STEPS", "Make", "NoRateError", "Rehearsals", "kept"]

Make = Callable[[nn.Module, float], torch.optim.Optimizer]

NUM_STEPS = 8  # of a rehearsal
WARMUP = 2  # a rehearsal's rate rises over a half of its steps
JUDGES = 4  # batches at most, on which no step is taken
STEP = 10**0.5  # between two rates that are rehearsed
MAX_REHEARSALS = 6
MAX_FAILED = 12  # rates that are too large, on the way down to one that lowers the loss
CLOSE = 0.8  # of the best gain: the largest rate that gains as much is the top
ROUNDING = 1e-5  # of the loss: a gain below this share is taken for rounding (float32, over the steps of a rehearsal)
SHARE = 0.1  # of its size that a matrix moves in a first step, at the rate at which an optimizer without a unit starts
T_95 = {2: 6.314, 3: 2.920, 4: 2.353}  # the 0.95 quantile of Student's t for the mean of so many

# Measured on the tasks of docs/measured/learning_rates.md. Where the optimizer has a usual rate for each model, the
# suggestion is FRACTION · usual^(1 - WEIGHT) · top^WEIGHT, and elsewhere HALF · top.
FRACTION, WEIGHT, HALF = 0.8, 1 / 3, 0.5

# Their steps depend on the weights, or on more than one gradient.
_REFUSED = (Proximal, torch.optim.Adafactor, torch.optim.LBFGS)


class NoRateError(InputError):
    """No rehearsed rate lowers the held-out loss by more than rounding and noise."""


class Rehearsals:
    """Short trainings of a model, all from its present weights and on the same batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        objective: Objective | Callable,
        make: Make,
        num_steps: int,
        restore: Callable[[], None],
        progress: Callable[[float, float], None] | None = None,
    ) -> None:
        self.model, self.make, self.num_steps, self.restore = model, make, num_steps, restore
        self.progress, self.objective = progress, as_objective(objective)
        judges = min(JUDGES, max(1, len(batches) // 3))
        self.training, self.held_out = batches[:-judges] or batches, batches[-judges:]
        self.before: list[float] = []
        self.losses: dict[float, list[float]] = {}  # by rate, of each judge

    def suggestion(self) -> LearningRate:
        """Rehearses the usual rate and others around it, and draws the usual one towards the largest that does well."""
        with naming_the_layer("suggest_lr", self.held_out[0], self.objective, self.model):
            self.before = self._held_out_losses()
        before = fmean(self.before)
        if not math.isfinite(before):
            raise InputError(f"suggest_lr: the loss is {before} before any step; gm.inspect shows where that begins")
        usual, start = self._start()
        self._search(start)
        best = self._best()
        if not self._is_above_noise(best):
            raise NoRateError(
                f"suggest_lr: no rate from {min(self.losses):.1e} to {max(self.losses):.1e} lowers the held-out loss "
                f"of {before:.4g} by more than rounding and noise in {self.num_steps} steps; give more or larger "
                "batches, or repair the model first (gm.inspect)"
            )
        top = self._top()
        lr = HALF * top if usual is None else FRACTION * min(usual ** (1 - WEIGHT) * top**WEIGHT, top)
        good = [rate for rate in self.losses if self._gain(rate) >= self._gain(best) / 2]
        mode = "training" if self.model.training else "evaluation"
        judge = "one judges" if len(self.held_out) == 1 else f"{len(self.held_out)} judge"
        data = f"{len(self.training) + len(self.held_out)} batches, the last {judge}"
        if self.training[0] is self.held_out[0]:
            data = "one batch: without its noise"
        how = f"{HALF:g} ×" if usual is None else f"the usual rate for this model, {usual:.2g}, drawn towards"
        why = (
            f"{how} {top:.2g}, the largest rate at which {self.num_steps} rehearsed steps gain {CLOSE:.0%} of the "
            f"most; with {best:.2g}, the held-out loss falls from {before:.4g} to {fmean(self.losses[best]):.4g} "
            f"({mode} mode, {data})"
        )
        rehearsed = tuple((rate, fmean(losses)) for rate, losses in sorted(self.losses.items()))
        return LearningRate(lr, start, top, (min(lr, *good), max(lr, *good)), before, rehearsed, why)

    def _search(self, start: float) -> None:
        """Rehearses half-decades from the start upward until they gain less, and downward while they gain more."""
        self._rehearse(start)
        self._rehearse(start * STEP)
        while len(self.losses) < (MAX_REHEARSALS if self._most() > 0 else MAX_FAILED):
            low, high = min(self.losses), max(self.losses)
            if self._most() > 0 and self._gain(high) >= CLOSE * self._most():
                self._rehearse(high * STEP)
            elif self._most() <= 0 or self._best() == low:
                self._rehearse(low / STEP)
            else:
                break

    def _top(self) -> float:
        """The largest rate that gains `CLOSE` of the most, interpolated to the next one, whose logarithm is a line."""
        at = sorted(self.losses)
        share = [max(self._gain(rate) / self._most(), -1.0) for rate in at]
        last = max(k for k, one in enumerate(share) if one >= CLOSE)
        if last == len(at) - 1:
            return at[last]
        return at[last] * STEP ** ((share[last] - CLOSE) / (share[last] - share[last + 1]))

    def _best(self) -> float:
        return max(self.losses, key=lambda rate: (self._gain(rate), rate))

    def _most(self) -> float:
        return self._gain(self._best())

    def _gain(self, rate: float) -> float:
        """How much lower the held-out loss is after a rehearsal; minus infinity where it is not finite."""
        gain = fmean(self.before) - fmean(self.losses[rate])
        return gain if math.isfinite(gain) else -math.inf

    def _is_above_noise(self, rate: float) -> bool:
        """Whether the judges' gains are above zero: by a one-sided t-test at 95 %, or one alone above rounding."""
        gains = [before - after for before, after in zip(self.before, self.losses[rate], strict=True)]
        if not self._gain(rate) > ROUNDING * abs(fmean(self.before)):
            return False
        return len(gains) == 1 or fmean(gains) > T_95[len(gains)] * stdev(gains) / len(gains) ** 0.5

    def _rehearse(self, lr: float) -> None:
        """Some steps at this rate, which rises at first; then the held-out losses."""
        optimizer = self.make(self.model, lr)
        rise = max(1, self.num_steps // WARMUP)
        rates = [group["lr"] for group in optimizer.param_groups]
        torch.manual_seed(0)  # of dropout
        for step in range(self.num_steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / rise)
            self._gradient(step)
            optimizer.step()
        self.losses[lr] = self._held_out_losses()
        self.restore()
        if self.progress is not None:
            self.progress(lr, fmean(self.losses[lr]))

    def _start(self) -> tuple[float | None, float]:
        """The usual rate, if the optimizer has one for each model, and the rate from which the search starts.

        A matrix optimizer starts at its usual rate. Any other starts where its first step moves the median matrix by a
        share of its size, since the unit of its rate may be that of the weights, of the gradients, or none.
        """
        optimizer = self.make(self.model, 1.0)
        _check(optimizer)
        follows = self._following()
        if not follows:
            raise InputError(
                "suggest_lr: no trainable matrix follows this optimizer's rate: they are frozen, or an embedding or a "
                "head, which step at a rate of their own. Ask for optimizer='adamw', or unfreeze a hidden layer"
            )
        torch.manual_seed(0)
        self._gradient(0)
        grads = [p.grad for p in follows if p.grad is not None]
        if not grads or not all(bool(g.isfinite().all()) for g in grads):
            raise InputError("suggest_lr: the gradient is missing or not finite; gm.inspect shows in which layers")
        if not any(bool(g.any()) for g in grads):
            raise InputError("suggest_lr: the gradient is zero, so that no rate changes the loss")
        if isinstance(optimizer, MatrixOptimizer):
            start = optimizer.usual_lr
            return (start if optimizer.has_usual_lr else None), start
        with torch.no_grad():  # the weights are zero meanwhile, so that the step is read in full precision
            sizes = {p: float(p.norm()) or p.numel() ** 0.25 for p in follows}
            for p in self.model.parameters():
                p.zero_()
        optimizer.step()
        moves = [float(p.detach().norm()) / size for p, size in sizes.items()]
        wide = [move for p, move in zip(sizes, moves, strict=True) if p.ndim > 1 and move > 0]
        self.restore()
        return None, SHARE / median(wide or [move for move in moves if move > 0])

    def _following(self) -> list[Tensor]:
        """The trainable parameters whose rate is a multiple of `lr`."""
        rates, doubled = (_rates(self.make(self.model, lr)) for lr in (1.0, 2.0))
        return [p for p in self.model.parameters() if p.requires_grad and p in rates and doubled[p] == 2 * rates[p]]

    def _gradient(self, step: int) -> None:
        """The gradient of the mean loss of a step's batch, in `grad`."""
        self.model.zero_grad(set_to_none=True)
        total, units = self.objective.loss(self.model, self.training[step % len(self.training)])
        (total / units).backward()

    def _held_out_losses(self) -> list[float]:
        found = []
        torch.manual_seed(0)
        for batch in self.held_out:
            total, units = self.objective.loss(self.model, batch)  # with autograd: a loss may need gradients
            found.append(float(total.detach() / units))
        return found


@contextmanager
def kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields a function that restores weights and buffers; at the end, gradients and the random state too."""
    params = list(model.parameters())
    if not any(p.requires_grad for p in params):
        raise InputError("suggest_lr: the model has no trainable parameter")
    for p in params:
        if placement.is_sharded(p):
            raise UnsupportedError("suggest_lr: the model is sharded; ask for the rate before fully_shard")
    tensors = [*params, *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    grads = [p.grad for p in params]

    def restore() -> None:
        with torch.no_grad():
            for t, value in zip(tensors, values, strict=True):
                t.copy_(value)

    try:
        with torch.random.fork_rng(_devices(model)), torch.enable_grad():
            for p in params:
                p.grad = None
            yield restore
    finally:
        restore()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _devices(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def _rates(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The rate of each parameter."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer._rates()
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"suggest_lr: the function must return a torch optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, _REFUSED):
        raise UnsupportedError(
            f"suggest_lr: a step of {type(optimizer).__name__} is not its rate times a direction of the gradient; "
            "ask for the optimizer inside it, or use a grid"
        )
    if isinstance(optimizer, MatrixOptimizer) and all(r.layout is None for r in optimizer._routes.values()):
        raise InputError(f"suggest_lr: {type(optimizer).__name__} finds no matrix in this model, see its explain()")
