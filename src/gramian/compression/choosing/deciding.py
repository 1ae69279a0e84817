"""From a model, data and a target to one compressed model, and what a person needs to decide whether to use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gramian.calls import as_model, unwrapped
from gramian.compression.budget.plan import Plan
from gramian.compression.choosing.contending import contenders, planned_layers
from gramian.compression.choosing.making import plan_for
from gramian.compression.choosing.measuring import FORMS
from gramian.compression.choosing.searching import TooSlowError, Tried, by_drop, by_speed, judged, shares, smallest
from gramian.compression.choosing.speeds import Speeds, paced
from gramian.compression.choosing.target import Target
from gramian.compression.fitting.refitting import refit
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.storage.plans import AnyPlan
from gramian.compression.units.narrowing import may_narrow
from gramian.errors import InputError
from gramian.objective import Objective, as_objective
from gramian.report.compression import Outcome
from gramian.report.contenders import AS_CUT, Contender, Ratio

REFITS = 5
"""Halvings of the interval in which a share is looked for that refitting makes good enough."""

__all__ = ["Decision", "decide"]

Progress = Callable[[str, float, str], None]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Decision:
    """The plan that was chosen, its model, and the report.

    Args:
        plan: at the chosen share.
        model: of `plan.apply()`, refit where that is better.
        outcome: what was measured.
    """

    plan: AnyPlan
    model: nn.Module
    outcome: Outcome


def decide(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective | Callable,
    evaluate: Evaluate,
    target: Target,
    *,
    measure: str = "",
    better: str = "",
    title: str = "",
    batch: int = 32,
    curve: bool = True,
    plan: AnyPlan | None = None,
    seconds: float = 0.0,
    progress: Progress | None = None,
) -> Decision:
    """Compresses a model to a target, and measures it beside the dense model, bfloat16 and int8.

    A floor of quality is met by bisection on the held-out measure; a speed by bisection on measured latency.

    Args:
        model: left untouched.
        batches: for calibration; the first one is also what latencies are measured on.
        objective: as in `gm.capture`.
        evaluate: `evaluate(model)`, held-out numbers by name.
        target: what is asked.
        measure: the name of the number that counts; by default the first.
        better: `"higher"` or `"lower"`; by default the direction in which the smallest plan does not move it.
        title: for the report.
        batch: samples of the larger batch whose latency is measured; no more than the first batch has.
        curve: whether quality is measured at all shares of the curve, or only where the search needs it.
        plan: of `plan_for`, in place of a calibration.
        seconds: what making it took, for the report.
        progress: called as `progress(stage, share done, remark)`.

    Returns:
        A `Decision`.

    Raises:
        InputError: the target cannot be reached, with the best that was; or as `gm.compress`.

    Cost: a calibration, a factorization, an evaluation for each share that is tried (about 10, and 8 more for a
    search), and the latencies of up to 6 forms.

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.randn(64, 16)
    >>> batches, error = [(x, x[:, :2])], lambda m: {"error": float((m(x) - x[:, :2]).square().mean())}
    >>> made = decide(net, batches, Objective.regression(), error, Target(keep=0.6))
    >>> made.outcome.compressed.parameters <= 0.6 * made.outcome.dense.parameters
    True
    """
    tell = progress or (lambda stage, share, remark: None)
    model = unwrapped(as_model(model, "compress"))
    was = model.training
    model.eval()
    try:
        if plan is None:
            begin = time.perf_counter()
            plan = plan_for(model, batches, objective, narrower=target.narrow, progress=tell)
            seconds = time.perf_counter() - begin
        if plan.smallest >= 1:
            raise InputError(
                f"compress: no layer has factors smaller than itself{plan.left_dense()}; quantize it instead"
            )
        speeds = Speeds(model, as_objective(objective), batches[0], batch)
        if target.speedup is not None and isinstance(plan, Plan):
            plan = paced(plan, speeds, lambda share, name: tell("Time layers", share, name))
            tell("Time layers", 1.0, f"{len(plan.spectra)} are faster when factored")
            if not plan.spectra:
                raise _too_slow(target, speeds, "no layer's factors are measured to be faster than it")
        if target.options:
            plan = plan.at(**target.options)  # refused before anything is evaluated
        tell("Evaluate", 0.0, "")
        budget = target.budget
        tried = judged(plan, evaluate, measure, better, budget)
        tried.tell = lambda share, value: tell("Evaluate", len(tried.points) / 20, f"{budget} {share:.3f}: {value:.4g}")
        keep = _share(target, tried, speeds, tell)
        plan = plan.at(**target.options) if target.options else tried.at(keep)
        fit = _Refitting(model, batches, objective, tried, tell)
        found = fit(plan, keep)
        if target.max_drop is not None and found.cut is not None:
            found = fit.smaller(found, target.max_drop)
            tell("Refit", 1.0, found.told)  # of the one that is taken, not of the last that was tried
        plan, keep, small = found.plan, found.keep, found.model
        if not target.bits and not target.sparsity:
            tried(keep)
        if curve:
            for share in shares(plan, budget):
                tried(share)
        tell("Evaluate", 1.0, f"{budget} {keep:.3f}")
        made = contenders(plan, model, small, tried, speeds, tell, found.cut)
        notes = [*_notes(tried, target, made, speeds, small)]
    finally:
        model.train(was)
    outcome = Outcome(
        title=title or type(model).__name__,
        asked=str(target),
        measure=tried.quality.measure,
        better=tried.quality.better,
        keep=keep,
        contenders=made,
        curve=tuple(sorted(tried.points.items())),
        layers=planned_layers(plan),
        batch=speeds.num,
        predicted=plan.predicted.rise,
        predicted_text=plan.predicted.interval,
        seconds=seconds,
        waited=speeds.waited,
        notes=(*plan.notes, *notes),
        remarks=tuple(filter(None, (found.remark,))),
        max_drop=target.max_drop,
        speedup=target.speedup,
        share_of="bytes" if target.budget == "size" else "parameters",
    )
    return Decision(plan, small, outcome)


@dataclass(frozen=True, eq=False)
class _Refitted:
    """A plan's model; where it was refit and is better for it, also the model before it, and its held-out number.

    Args:
        plan: whose model it is.
        keep: its share.
        model: the better one.
        remark: for the report.
        cut: of `plan.apply()`, where `model` is refit.
        told: for the line of progress.
        quality: of the refit model.
    """

    plan: AnyPlan
    keep: float
    model: nn.Module
    remark: str = ""
    cut: nn.Module | None = None
    told: str = ""
    quality: float = math.nan


@dataclass(frozen=True, eq=False)
class _Refitting:
    """Refits models to the dense one's outputs, where they have factors and that is measured to be better."""

    dense: nn.Module
    batches: Sequence[Any]
    objective: Any
    tried: Tried
    tell: Progress

    def __call__(self, plan: AnyPlan, keep: float) -> _Refitted:
        small, quality = plan.apply(), self.tried.quality
        if not any(isinstance(m, LowRank) for m in small.modules()) or not quality.sign:
            return _Refitted(plan, keep, small)
        self.tell("Refit", 0.0, "")
        try:
            fitted = refit(small, self.dense, self.batches, self.objective)
        except InputError as error:
            return _Refitted(plan, keep, small, f"not refit: {error}")
        before, after = quality.of(small), quality.of(fitted)
        is_better = quality.drop(after) < quality.drop(before)
        change = f"{self.tried.budget} {keep:.3f}: {quality.measure} {before:.4g} → {after:.4g}"
        told = change if is_better else f"{change}, no better: not refit"
        self.tell("Refit", 1.0, told)
        if not is_better:
            return _Refitted(plan, keep, small, told=told)
        remark = f"layers were refit to the dense model's outputs; the curve, and {AS_CUT!r}, are without"
        return _Refitted(plan, keep, fitted, remark, small, told, after)

    def smaller(self, found: _Refitted, max_drop: float) -> _Refitted:
        """A smaller share whose refit model loses no more than is allowed, since refitting won back a part of it."""
        low = smallest(self.tried.plan, self.tried.budget)
        for _ in range(REFITS):
            middle = math.sqrt(low * found.keep)
            trial = self(self.tried.at(middle), middle)
            if trial.cut is not None and self.tried.quality.drop(trial.quality) <= max_drop:
                found = trial
            else:
                low = middle
        return found


def _share(target: Target, tried: Tried, speeds: Speeds, tell: Progress) -> float:
    """The share that the target asks for."""
    if target.options:
        return target.size or target.keep or 1.0
    if target.max_drop is not None:
        return by_drop(tried, target.max_drop)
    assert target.speedup is not None
    count = iter(range(1, 100))
    try:
        return by_speed(
            tried.plan,
            speeds.ratio,
            target.speedup,
            lambda keep, ratio: tell("Measure speed", min(1.0, next(count) / 17), f"keep {keep:.3f}: {ratio}"),
        )
    except TooSlowError as error:
        best = f"the best is {error.speed}, keeping {error.keep:.3f}"
        raise _too_slow(target, speeds, best, speeds.unfused(tried.at(error.keep).apply())) from None


def _too_slow(target: Target, speeds: Speeds, best: str, fused: str = "") -> InputError:
    """A speed that no share reaches, with the best that was measured and what the other forms reach."""
    others = []
    for name, make in FORMS.items():
        try:
            others.append((speeds.ratio(make(speeds.dense)), name))
        except Exception:  # a form that the model cannot take is no alternative
            continue
    (ratio, name), wanted = max(others, default=(Ratio(0.0, 0.0, 0.0), "")), target.speedup or math.inf
    if ratio.median >= wanted and ratio.low > 1:
        rest = f". Do not {'narrow' if target.narrow else 'factor'} this model; use {name}, which is {ratio} as fast"
    else:
        rest = "".join(f"; {name}: {ratio}" for ratio, name in others)
        if not target.narrow and may_narrow(speeds.dense):
            rest += ". With --narrow, heads, units and channels are removed in place of ranks, and layers stay dense"
    return InputError(
        f"compress: nothing makes this model {wanted:g}× as fast on this machine, at batch 1 and at {speeds.num}; "
        f"{best}{rest}" + "".join(f". Note: {note}" for note in (fused, speeds.note) if note)
    )


def _notes(tried: Tried, target: Target, made: tuple[Contender, ...], speeds: Speeds, small: nn.Module) -> list[str]:
    notes = []
    if tried.quality.sign == 0:
        notes.append(
            f"{tried.quality.measure} is the same for the smallest plan as for the dense model, so it tells nothing "
            "about the compression: is the model trained, and does the evaluation use it?"
        )
    reached = min(filter(None, (made[1].speed_one, made[1].speed_many)))
    if target.speedup is not None and reached.median < target.speedup:
        notes.append(
            f"the search measured {target.speedup:g}× twice, and the last measurement {reached}: the machine is busy, "
            "or the speed is at the edge"
        )
    return [note for note in (*notes, speeds.unfused(small), speeds.note) if note]
