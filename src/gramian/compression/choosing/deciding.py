"""From a model, data and a target to one compressed model, and what a person needs to decide whether to use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gramian.calls import as_model, unwrapped
from gramian.compression.budget.plan import Plan, check_budget
from gramian.compression.choosing.contending import contenders, planned_layers
from gramian.compression.choosing.making import plan_for
from gramian.compression.choosing.measuring import FORMS
from gramian.compression.choosing.searching import TooSlowError, Tried, by_drop, by_speed, judged, shares, smallest
from gramian.compression.choosing.speeds import Speeds, paced
from gramian.compression.fitting.refitting import refit
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.storage.plans import AnyPlan
from gramian.compression.units.narrowing import may_narrow
from gramian.errors import InputError
from gramian.objective import Objective, as_objective
from gramian.report.compression import Contender, Outcome, Ratio

REFITS = 5
"""Halvings of the interval in which a share is looked for that refitting makes good enough."""

__all__ = ["Decision", "Target", "decide"]

Progress = Callable[[str, float, str], None]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Target:
    """What is asked of a compression: one of these, or `keep` with `bits`.

    Args:
        keep: share of all the model's parameters.
        max_drop: by how much the held-out measure may become worse, in its own unit.
        speedup: how many times as fast a forward pass must be, at batch 1 and at the larger batch.
        size: share of all the model's bytes.
        bits: of every layer's integers, 2 to 8.
        sparsity: share of the weights that become zero, or a pattern, `"2:4"`.
        by: what `max_drop` makes small: "parameters", by ranks alone, or "bytes", by all forms.
        narrow: whether heads, units and channels are removed, as by `gm.narrow`, in place of cutting ranks.
    """

    keep: float | None = None
    max_drop: float | None = None
    speedup: float | None = None
    size: float | None = None
    bits: int | None = None
    sparsity: float | str | None = None
    by: Literal["parameters", "bytes"] = "parameters"
    narrow: bool = False

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("keep", "max_drop", "speedup", "size", "bits", "sparsity")}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1 and asked != ["keep", "bits"]:
            raise InputError(
                "compress: give one of keep, max_drop, speedup, size, bits and sparsity, or keep with bits; "
                f"got {' and '.join(asked) or 'none'}"
            )
        check_budget(self.keep, self.size, self.bits, self.sparsity)
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise InputError(f"compress: max_drop must be a number of at least 0, got {self.max_drop:g}")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(f"compress: speedup must be above 1, got {self.speedup:g}")
        if self.by == "bytes" and self.max_drop is None:
            raise InputError("compress: by='bytes' says what max_drop makes small; give max_drop, or size in its place")
        wrong = [name for name in asked if name not in ("keep", "max_drop", "speedup")]
        if self.narrow and (wrong or self.by == "bytes"):
            raise InputError(
                f"compress: narrow takes keep, max_drop or speedup, and not {' and '.join(wrong) or 'by bytes'}. "
                "Narrow first, and compress the narrower model in a second run"
            )

    def __str__(self) -> str:
        text = self._text()
        return f"{text}, by fewer heads, units and channels" if self.narrow else text

    def _text(self) -> str:
        if self.keep is not None:
            return f"keep {self.keep:.0%} of the parameters{f', in {self.bits} bits' if self.bits else ''}"
        if self.max_drop is not None:
            return f"lose at most {self.max_drop:g}{'' if self.by == 'parameters' else ' in the fewest bytes'}"
        if self.size is not None:
            return f"keep {self.size:.0%} of the bytes"
        if self.bits is not None:
            return f"{self.bits} bits"
        return f"{self.sparsity} zeros" if self.sparsity is not None else f"{self.speedup:g}× as fast"

    @property
    def options(self) -> dict[str, Any]:
        """What `Plan.at` is asked for, where nothing has to be searched."""
        given = {name: getattr(self, name) for name in ("keep", "size", "bits", "sparsity")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def budget(self) -> str:
        """What the shares of the search and the curve are of: "keep" of the parameters, "size" of the bytes."""
        return "size" if self.size is not None or self.by == "bytes" else "keep"


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
        if target.max_drop is not None and found.fitted:
            found = fit.smaller(found, target.max_drop)
        plan, keep, small, remark = found.plan, found.keep, found.model, found.remark
        if not target.bits and not target.sparsity:
            tried(keep)
        if curve:
            for share in shares(plan, budget):
                tried(share)
        tell("Evaluate", 1.0, f"{budget} {keep:.3f}")
        made = contenders(plan, model, small, tried, speeds, tell)
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
        remarks=remark,
        for_speed=target.speedup is not None,
        share_of="bytes" if target.budget == "size" else "parameters",
    )
    return Decision(plan, small, outcome)


@dataclass(frozen=True, eq=False)
class _Refitted:
    """A plan's model; `fitted` where it was refit and is better for it, `quality` then its held-out number."""

    plan: AnyPlan
    keep: float
    model: nn.Module
    remark: tuple[str, ...] = ()
    fitted: bool = False
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
            return _Refitted(plan, keep, small, (f"not refit: {error}",))
        before, after = quality.of(small), quality.of(fitted)
        is_better = quality.drop(after) < quality.drop(before)
        self.tell("Refit", 1.0, f"{quality.measure} {before:.4g} → {after:.4g}{'' if is_better else ', dropped'}")
        if not is_better:
            return _Refitted(plan, keep, small)
        change = f"{quality.measure} {before:.4g} before, {after:.4g} after"
        remark = f"layers were refit to the dense model's outputs: {change}; the curve is without"
        return _Refitted(plan, keep, fitted, (remark,), True, after)

    def smaller(self, found: _Refitted, max_drop: float) -> _Refitted:
        """A smaller share whose refit model loses no more than is allowed, since refitting won back a part of it."""
        low = smallest(self.tried.plan, self.tried.budget)
        for _ in range(REFITS):
            middle = math.sqrt(low * found.keep)
            trial = self(self.tried.at(middle), middle)
            if trial.fitted and self.tried.quality.drop(trial.quality) <= max_drop:
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
