"""Rehearsals of a few training steps, from which a learning rate is suggested."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.errors import InputError, UnsupportedError
from gramian.objective import Objective, as_objective
from gramian.operators import LineCurvature, line_curvature
from gramian.optim.learning_rate import LearningRate
from gramian.optim.proximal import Proximal
from gramian.optim.shell import MatrixOptimizer
from gramian.recording.failing import naming_the_layer

__all__ = ["NUM_STEPS", "Make", "NoRateError", "Rehearsals", "kept"]

Make = Callable[[nn.Module, float], torch.optim.Optimizer]

NUM_STEPS = 16  # of a rehearsal
WARMUP = 4  # a rehearsal's rate rises over a quarter of its steps
STEP = 10**0.5  # between two rates that are rehearsed
WINDOW = 3  # half-decades above and below the start that are rehearsed first
MAX_REHEARSALS = 24
NOISE = 0.01  # of what the rest of the model gains alone: a rate that adds less than this share adds nothing
PACES = (1, 4, 0)  # the rest moves in every step of a rehearsal, in every fourth, never: until the matrices' rate tells
ROUNDING = 1e-5  # of the loss: a gain below this share is taken for rounding (float32, over the steps of a rehearsal)
CLEAR = 10  # a gain is clear of noise if it is so many times what the two smaller rates lose

# The best rate of runs of 100 steps over that of a rehearsal, measured on the networks of `gramian bench rates`.
FRACTION = 0.7

_OFTEN = {
    1: "",
    4: " (what does not follow lr, and learns all alone, moves in every fourth only)",
    0: " (what does not follow lr, and learns all alone, stays)",
}

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
        self.progress = progress
        self.given, self.objective = objective, as_objective(objective)
        self.training, self.held_out = batches[:-1] or batches, batches[-1]
        self.losses: dict[float, float] = {}
        self.follows: set[Tensor] = set()  # the parameters whose rate is lr
        self.pace = PACES[0]  # the others move in every so many steps; never at zero

    def suggestion(self) -> LearningRate:
        """Takes the parabola, searches from its minimum, and checks the fraction of the best rate."""
        with naming_the_layer("suggest_lr", self.held_out, self.objective, self.model):
            before = self._held_out_loss()
        if not math.isfinite(before):
            raise InputError(f"suggest_lr: the loss is {before} before any step; gm.inspect shows where that begins")
        curvature = self._first_line()
        line = curvature.minimum
        start = line if 0 < line < math.inf else 1.0
        paces = self._paces()
        base, best, gain = before, start, 0.0
        for self.pace in paces:
            self.losses.clear()
            base = self._baseline(before, start / STEP**WINDOW)
            best = self._search(start, base)
            if best is None or not base - self.losses[best] > ROUNDING * abs(before):
                best = self._least()
            gain = base - self.losses[best]
            lowers = before - self.losses[best] > ROUNDING * abs(before)
            if lowers and gain > max(NOISE * (before - base), ROUNDING * abs(before)):
                break
        else:
            tried = f"{min(self.losses):.1e} to {max(self.losses):.1e}"
            alone = "" if len(paces) == 1 else "gains more than the parameters that do not follow lr gain alone, nor, "
            alone += "where these move less, " if alone else ""
            raise NoRateError(
                f"suggest_lr: no rate from {tried} {alone}lowers the held-out loss of {before:.4g} by more than "
                f"rounding and noise in {self.num_steps} steps; give more or larger batches, or repair the model "
                "first (gm.inspect)"
            )
        good = [rate for rate, loss in self.losses.items() if base - loss >= gain / 2]
        top = self._top(best)
        lr, how = FRACTION * top, f"{FRACTION:g} × {top:.2g}, the best rate of {self.num_steps} rehearsed steps"
        if not base - self._rehearse(lr) >= gain / 2:  # the best rate stands alone among its neighbors
            lr, how = best, f"the best rate of {self.num_steps} rehearsed steps"
        kind = "Gauss–Newton" if curvature.matrix == "gauss_newton" else "Hessian"
        mode = "training" if self.model.training else "evaluation"
        alone = self.training[-1] is self.held_out
        rest = _OFTEN[self.pace]
        data = "one batch: without its noise" if alone else f"{len(self.training) + 1} batches, the last one judges"
        why = (
            f"{how}; with it, the held-out loss falls from {before:.4g} to {self.losses[lr]:.4g} in {self.num_steps} "
            f"steps{rest}; the first direction alone has its minimum at {line:.2g} ({kind}, {mode} mode, {data})"
        )
        interval = (min(lr, *good), max(lr, *good))
        return LearningRate(lr, line, curvature, interval, before, tuple(sorted(self.losses.items())), why)

    def gains(self, lr: float) -> list[float]:
        """How much lower steps at this rate leave the held-out loss than the rest's steps alone do, at each pace."""
        self.follows = self._following()
        before, found = self._held_out_loss(), []
        for pace in self._paces():
            self.pace = pace
            found.append(self._baseline(before, lr) - self._loss_after(self.make(self.model, lr)))
        return found

    def _search(self, start: float, base: float) -> float | None:
        """The best of the half-decades around `start` that counts, with rates rehearsed above and below it, or none.

        A whole window is rehearsed first, since the loss has a second minimum where small rates only fit the head's
        biases. Smaller rates follow while there is no rate that counts, until they change nothing any more.
        """
        for k in range(-WINDOW, WINDOW + 1):
            self._rehearse(start * STEP**k)
        while True:
            at, best = sorted(self.losses), self._best(base)
            if len(at) >= MAX_REHEARSALS:
                return best
            if best is not None and best == at[-1]:
                self._rehearse(best * STEP)
            elif best is not None and at.index(best) > 1:
                return best
            elif best is None and self._is_still(at[:2]):
                return None
            else:
                self._rehearse(at[0] / STEP)

    def _best(self, base: float) -> float | None:
        """The rate of the least loss that counts, the smallest of several; `None` where none does.

        Rates that are far too large end on a plateau, where noise makes minima. So a rate counts if it gains, and the
        two below it gain too, or lose much less. The lowest two count if they gain, until there are rates below them.
        """
        at, found = sorted(self.losses), []
        for k, rate in enumerate(at):
            gain, below = base - self.losses[rate], [base - self.losses[other] for other in at[max(0, k - 2) : k]]
            if gain > 0 and all(other > 0 or gain > -CLEAR * other for other in below):
                found.append((self.losses[rate], rate))
        return min(found)[1] if found else None

    def _least(self) -> float:
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))

    def _is_still(self, rates: Sequence[float]) -> bool:
        """Whether the losses after these rates are the same to rounding, so that smaller ones would change nothing."""
        losses = [self.losses[rate] for rate in rates]
        return max(losses) - min(losses) <= ROUNDING * abs(min(losses))

    def _top(self, best: float) -> float:
        """Where the parabola through the best rate and its neighbors is lowest, over the logarithm of the rate."""
        at = sorted(self.losses)
        here = at.index(best)
        if not 0 < here < len(at) - 1:
            return best
        left, middle, right = (self.losses[at[here + k]] for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        if not 0 < bend < math.inf:
            return best * (STEP**-0.25 if right == math.inf else 1.0)
        return best * STEP ** (0.5 * (left - right) / bend)

    def _baseline(self, before: float, lr: float) -> float:
        """The held-out loss that a rate must improve on: after the steps in which only the rest of the model moves.

        A matrix optimizer steps embeddings, the head and vectors at a rate of their own: what they gain is not `lr`'s.
        Theirs may grow with a large `lr`; it is the one beside a small one.
        """
        optimizer = self.make(self.model, lr)
        if self.pace == 0 or self.follows == _rates(optimizer).keys():
            return before
        return min(before, self._loss_after(optimizer, still=self.follows))

    def _rehearse(self, lr: float) -> float:
        """The held-out loss after some steps at this rate; infinite where it is not finite."""
        if lr not in self.losses:
            optimizer = self.make(self.model, lr)
            self.losses[lr] = self._loss_after(optimizer)
            if self.progress is not None:
                self.progress(lr, self.losses[lr])
        return self.losses[lr]

    def _loss_after(self, optimizer: torch.optim.Optimizer, still: Collection[Tensor] = ()) -> float:
        """The held-out loss after some steps in which some parameters stay; infinite where it is not finite."""
        rise = max(1, self.num_steps // WARMUP)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(self.num_steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / rise)
            self._gradient([self.training[step % len(self.training)]], seed=step)
            for p in self.model.parameters():
                if p in still or (p not in self.follows and (self.pace == 0 or step % self.pace)):
                    p.grad = None
            optimizer.step()
        loss = self._held_out_loss()
        self.restore()
        return loss if math.isfinite(loss) else math.inf

    def _first_line(self) -> LineCurvature:
        """The parabola of the held-out batch along the optimizer's first direction on the other batches."""
        direction = self._direction()
        with torch.random.fork_rng(_devices(self.model)):
            torch.manual_seed(0)
            curvature = line_curvature(self.model, self.held_out, self.given, direction)
        self.restore()
        if not (math.isfinite(curvature.slope) and math.isfinite(curvature.curvature)):
            raise InputError(f"suggest_lr: slope {curvature.slope} and curvature {curvature.curvature} are not finite")
        return curvature

    def _direction(self) -> dict[Tensor, Tensor]:
        """D of every parameter whose rate follows `lr`: minus the optimizer's first step at a rate of one.

        The weights are zero meanwhile, so that the step is read in full precision and without weight decay.
        """
        optimizer = self.make(self.model, 1.0)
        _check(optimizer)
        self.follows = self._following()
        follows: list[Tensor] = [p for p in self.model.parameters() if p in self.follows and p.requires_grad]
        if not follows:
            raise InputError(
                "suggest_lr: no trainable matrix follows this optimizer's rate: they are frozen, or an embedding or a "
                "head, which step at a rate of their own. Ask for optimizer='adamw', or unfreeze a hidden layer"
            )
        self._gradient(self.training, seed=0)
        grads = [p.grad for p in follows if p.grad is not None]
        if not grads or not all(bool(g.isfinite().all()) for g in grads):
            raise InputError("suggest_lr: the gradient is missing or not finite; gm.inspect shows in which layers")
        if not any(bool(g.any()) for g in grads):
            raise InputError("suggest_lr: the gradient is zero, so that no rate changes the loss")
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        optimizer.step()
        direction = {p: -p.detach().clone() for p in follows if p.grad is not None}
        self.restore()
        return direction

    def _paces(self) -> tuple[int, ...]:
        return PACES if any(p not in self.follows for p in self.model.parameters()) else PACES[:1]

    def _following(self) -> set[Tensor]:
        """The parameters whose rate is a multiple of `lr`."""
        rates, doubled = (_rates(self.make(self.model, lr)) for lr in (1.0, 2.0))
        return {p for p, rate in rates.items() if doubled[p] == 2 * rate}

    def _gradient(self, batches: Sequence[Any], seed: int) -> None:
        """The gradient of the mean loss of some batches, in `grad`."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)  # of dropout
        for batch in batches:
            total, units = self.objective.loss(self.model, batch)
            (total / (units * len(batches))).backward()

    def _held_out_loss(self) -> float:
        torch.manual_seed(0)
        total, units = self.objective.loss(self.model, self.held_out)  # with autograd: a loss may need gradients
        return float(total.detach() / units)


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
    if isinstance(optimizer, MatrixOptimizer) and all(row["direction"] != "matrix" for row in optimizer.explain()):
        raise InputError(f"suggest_lr: {type(optimizer).__name__} finds no matrix in this model, see its explain()")
