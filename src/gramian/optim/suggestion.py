"""A learning rate before training: curvature along the optimizer's own direction, and a rehearsal of a few steps."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.calls import as_model, prepared
from gramian.errors import InputError, UnsupportedError
from gramian.loader import as_batches, is_one_batch, looks_like_one, no_batches
from gramian.objective import Objective, as_objective
from gramian.operators import LineCurvature, line_curvature
from gramian.optim.proximal import Proximal
from gramian.optim.registry import OPTIMIZERS, known_name
from gramian.optim.shell import MatrixOptimizer
from gramian.recording.measuring import eager
from gramian.rows import Rows

__all__ = ["LearningRate", "suggest_lr"]

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


@dataclass(frozen=True)
class LearningRate:
    """A suggested rate, and the measurements behind it.

    Args:
        lr: the suggestion.
        line: η*, where the parabola along the first direction is lowest on the held-out batch.
        curvature: that parabola.
        range: the rates whose rehearsal gained at least half as much as the best one.
        before: the held-out loss at which all rehearsals start.
        rehearsed: pairs of a rehearsed rate and the held-out loss after it, in order of the rate.
        why: how `lr` was found, in words.
    """

    lr: float
    line: float
    curvature: LineCurvature
    range: tuple[float, float]
    before: float
    rehearsed: tuple[tuple[float, float], ...]
    why: str

    def __repr__(self) -> str:
        return f"<LearningRate: {self}>"

    def _repr_html_(self) -> str:
        rows = Rows({"rate": rate, "held-out loss": loss} for rate, loss in self.rehearsed)
        return f"<p>{html.escape(str(self))} It starts at a loss of {self.before:.4g}.</p>{rows._repr_html_()}"

    def __str__(self) -> str:
        low, high = self.range
        return f"lr = {self.lr:.2g} (between {low:.2g} and {high:.2g}): {self.why}"


def suggest_lr(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    optimizer: str | type[torch.optim.Optimizer] | Make = "auto",
    num_steps: int = NUM_STEPS,
) -> LearningRate:
    """A learning rate for a model, from the curvature along the optimizer's own direction and short rehearsals.

    With D the optimizer's first direction (of all parameters whose rate follows `lr`) and G the Gauss–Newton matrix,
    `η* = gᵀD / (DᵀGD)` is where the loss along D is lowest to second order. Training is then rehearsed for `num_steps`
    steps at η*, with a warm-up over the first quarter, and at three half-decades above and below, and further until the
    best rate lies between worse ones, judged by the loss of a batch on which no step was taken. The suggestion is 0.7
    of the best rehearsed rate (interpolated by a parabola over its logarithm), since a short run tolerates larger steps
    than a long one; or the best rate itself, where that gains less than half as much. A gain of less than 1e-5 of the
    loss is taken for rounding, and is none.

    What a matrix optimizer steps at a rate of its own (embeddings, the head, vectors) may learn all in so few steps.
    Where no rate adds a hundredth to that, it is rehearsed again with these moving in every fourth step only, and at
    last not at all; `why` says so.

    Args:
        model: in the mode in which it is to be trained. Weights, buffers, gradients, mode and random state are restored
            afterwards.
        batch: one batch, or many: a `DataLoader`, a list, or another iterable, of which the first `num_steps + 1` are
            read. The last one read judges, the others train. Give several: with only one, the rate is that of a
            gradient without noise. A tuple and a mapping are one batch, and so is a list `[x, y]` of tensors that
            cannot both be inputs; two of one shape are read as two batches, with a warning.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean` (the Hessian then takes G's place).
        optimizer: `"auto"`, as in `gm.train`, another name of `gm.optim.OPTIMIZERS`, a class, or a function
            `(model, lr) -> optimizer`, such as `partial(gm.optim.Muon, scale="match_rms_adamw")`.
        num_steps: number of steps of a rehearsal. Much fewer than 16 mislead: rates that are too small then look best.
    Returns: a `LearningRate`, whose `lr` is the suggestion.
    Raises:
        InputError: for a model without trainable weights or, for a matrix optimizer, without a matrix; a loss or
            gradient that is not finite, or zero; a direction along which the loss does not fall at any rate.
        UnsupportedError: for an operation without a second derivative, sharded parameters, and optimizers whose step
            depends on the weights.
    Cost: about `9 · num_steps` training steps. Accuracy: see docs/learning_rates.md.
    Source: the line minimum under Gauss–Newton: Martens (1412.1193), §6.4; held-out batches against noise: this
    library's own measurements.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> batches = [(x[:32], x[:32, :2]), (x[32:], x[32:, :2])]
    >>> found = suggest_lr(net, batches, Objective.regression(), optimizer="adamw")
    >>> found.range[0] <= found.lr <= found.range[1]
    True
    """
    if num_steps < 1:
        raise InputError(f"suggest_lr: num_steps must be at least 1, got {num_steps}")
    model, make = as_model(model, "suggest_lr"), _maker(optimizer)
    batches = [prepared(model, one) for one in _batches(batch, num_steps + 1)]
    with eager(), _kept(model) as restore:
        return _Rehearsals(model, batches, objective, make, num_steps, restore).suggestion()


class _Rehearsals:
    """Short trainings of a model, all from its present weights and on the same batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        objective: Objective | Callable,
        make: Make,
        num_steps: int,
        restore: Callable[[], None],
    ) -> None:
        self.model, self.make, self.num_steps, self.restore = model, make, num_steps, restore
        self.given, self.objective = objective, as_objective(objective)
        self.training, self.held_out = batches[:-1] or batches, batches[-1]
        self.losses: dict[float, float] = {}
        self.follows: set[Tensor] = set()  # the parameters whose rate is lr
        self.pace = PACES[0]  # the others move in every so many steps; never at zero

    def suggestion(self) -> LearningRate:
        """Takes the parabola, searches from its minimum, and checks the fraction of the best rate."""
        before = self._held_out_loss()
        if not math.isfinite(before):
            raise InputError(f"suggest_lr: the loss is {before} before any step; gm.inspect shows where that begins")
        curvature = self._first_line()
        line = curvature.minimum
        start = line if 0 < line < math.inf else 1.0
        base, best, gain = before, start, 0.0
        for self.pace in PACES:
            self.losses.clear()
            base = self._baseline(before, start / STEP**WINDOW)
            best = self._search(start, base)
            if best is None or not base - self.losses[best] > ROUNDING * abs(before):
                best = self._least()
            if not before - self.losses[best] > ROUNDING * abs(before):
                tried = f"{min(self.losses):.1e} to {max(self.losses):.1e}"
                where = (
                    ""
                    if self.pace == 1
                    else (
                        "gains more than the parameters that do not follow lr gain alone, nor, where these move less, "
                    )
                )
                raise InputError(
                    f"suggest_lr: no rate from {tried} {where}lowers the held-out loss of {before:.4g} by more than "
                    f"rounding and noise in {self.num_steps} steps; give more or larger batches, or repair the model "
                    "first (gm.inspect)"
                )
            gain = base - self.losses[best]
            if gain > max(NOISE * (before - base), ROUNDING * abs(before)):
                break
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
        optimizer, twice = self.make(self.model, 1.0), self.make(self.model, 2.0)
        _check(optimizer)
        rates, doubled = _rates(optimizer), _rates(twice)
        self.follows = {p for p, rate in rates.items() if doubled[p] == 2 * rate}
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
def _kept(model: nn.Module) -> Iterator[Callable[[], None]]:
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


def _batches(batch: Any, num: int) -> list[Any]:
    """At most `num` batches; a tuple is one, and so is a list that looks like one.

    A loader's order does not change the seeds.
    """
    if isinstance(batch, tuple) or is_one_batch(batch) or looks_like_one(batch):
        return [batch]
    with torch.random.fork_rng(devices=[]):
        found = list(islice(as_batches(batch, "suggest_lr"), num))
    if not found:
        raise no_batches(batch, "suggest_lr")
    return found


def _maker(optimizer: Any) -> Make:
    """`(model, lr) -> optimizer` for a name, a class or a function."""
    if isinstance(optimizer, str):
        return OPTIMIZERS[known_name("suggest_lr", optimizer, "a class or a function (model, lr)")].make
    if not callable(optimizer):
        raise InputError(f"suggest_lr: optimizer must be a name, a class or a function, got {type(optimizer).__name__}")
    make: Callable[..., Any] = optimizer
    if isinstance(optimizer, type) and not issubclass(optimizer, MatrixOptimizer):
        return lambda model, lr: make(model.parameters(), lr=lr)
    return lambda model, lr: make(model, lr=lr)


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
