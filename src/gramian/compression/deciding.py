"""From a model, data and a target to one compressed model, and what a person needs to decide whether to use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian.batch import first_samples
from gramian.block import blocks
from gramian.calls import as_model, prepared, unwrapped
from gramian.compression.measuring import FORMS, latencies, num_bytes, samples
from gramian.compression.mixing import Form
from gramian.compression.plan import Plan, check_budget
from gramian.compression.planning import compress
from gramian.compression.plans import load_plan, save_plan
from gramian.compression.searching import TooSlowError, Tried, by_drop, by_speed, judged, shares
from gramian.errors import CheckpointError, GramianError, InputError
from gramian.objective import Objective, as_objective
from gramian.report.compression import FOUR_BITS, Contender, FactoredLayer, Outcome

MOST_OUTPUTS = 32

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
    """

    keep: float | None = None
    max_drop: float | None = None
    speedup: float | None = None
    size: float | None = None
    bits: int | None = None
    sparsity: float | str | None = None
    by: Literal["parameters", "bytes"] = "parameters"

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

    def __str__(self) -> str:
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
        model: `plan.apply()`.
        outcome: what was measured.
    """

    plan: Plan
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
    plan_file: str | Path | None = None,
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
        plan_file: a plan that is read in place of a calibration; where there is no such file, it is written.
        progress: called as `progress(stage, share done, remark)`.

    Returns:
        A `Decision`.

    Raises:
        InputError: the target cannot be reached, with the best that was; or as `gm.compress`.

    Cost: a calibration, a factorization, an evaluation for each share that is tried (about 10, and 8 more for a
    search), and the latencies of up to 6 forms.
    Source: this library's own.

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.randn(64, 16)
    >>> batches, error = [(x, x[:, :2])], lambda m: {"error": float((m(x) - x[:, :2]).square().mean())}
    >>> made = decide(net, batches, Objective.regression(), error, Target(keep=0.6))
    >>> made.outcome.compressed.parameters <= 0.6 * made.outcome.dense.parameters
    True
    """
    tell = progress or (lambda stage, share, remark: None)
    model = unwrapped(as_model(model, "compress"))
    begin = time.perf_counter()
    was = model.training
    model.eval()
    try:
        plan = _planned(model, batches, objective, plan_file, tell)
        seconds = time.perf_counter() - begin
        if plan.smallest >= 1:
            raise InputError(
                f"compress: no layer has factors smaller than itself{plan.left_dense()}; quantize it instead"
            )
        if target.options:
            plan = plan.at(**target.options)  # refused before anything is evaluated
        tell("Evaluate", 0.0, "")
        budget = target.budget
        tried = judged(plan, evaluate, measure, better, budget)
        tried.tell = lambda share, value: tell("Evaluate", len(tried.points) / 20, f"{budget} {share:.3f}: {value:.4g}")
        speeds = _Speeds(model, as_objective(objective), batches[0], batch)
        keep = _share(target, tried, speeds, tell)
        plan = plan.at(**target.options) if target.options else tried.at(keep)
        small = plan.apply()
        if not target.bits and not target.sparsity:
            tried(keep)
        if curve:
            for share in shares(plan, budget):
                tried(share)
        tell("Evaluate", 1.0, f"{budget} {keep:.3f}")
        contenders = _contenders(plan, model, small, tried, speeds, tell)
    finally:
        model.train(was)
    outcome = Outcome(
        title=title or type(model).__name__,
        asked=str(target),
        measure=tried.quality.measure,
        better=tried.quality.better,
        keep=keep,
        contenders=contenders,
        curve=tuple(sorted(tried.points.items())),
        layers=_layers(plan),
        batch=speeds.num,
        predicted=plan.predicted.rise,
        seconds=seconds,
        notes=(*plan.notes, *_notes(tried, target, contenders)),
        for_speed=target.speedup is not None,
        share_of="bytes" if target.budget == "size" else "parameters",
    )
    return Decision(plan, small, outcome)


def _planned(
    model: nn.Module, batches: Sequence[Any], objective: Any, plan_file: str | Path | None, tell: Progress
) -> Plan:
    if plan_file is not None and Path(plan_file).exists():
        tell("Plan", 1.0, f"read from {Path(plan_file).name}")
        plan = load_plan(model, plan_file)
        if not isinstance(plan, Plan):
            raise CheckpointError(
                f"{plan_file} is a plan of gm.narrow, which this command does not apply. Give the plan of a "
                "compression, or a new path; in Python, gm.load_plan(model, path).apply() applies it."
            )
        return plan
    tell("Calibrate", 0.0, f"{len(batches)} batches")
    layers = max(1, len(blocks(model).blocks))
    plan = compress(
        model,
        batches=batches,
        objective=_exact(as_objective(objective), model, batches[0]),
        progress=lambda done: tell("Calibrate", min(0.99, done / layers), f"{done} layers factored"),
    )
    tell("Calibrate", 1.0, f"{len(plan.spectra)} layers can be factored")
    if plan_file is not None:
        save_plan(plan, plan_file)
    return plan


def _exact(objective: Objective, model: nn.Module, batch: Any) -> Objective:
    """The objective with Gauss–Newton's G where that costs few backward passes, one for each output; else as it is."""
    try:
        with torch.no_grad():
            output = objective.predict(model, first_samples(prepared(model, batch), 1))
    except GramianError:
        raise
    except Exception as error:
        raise InputError(f"compress: {type(model).__name__} fails on the first batch: {_line(error)}") from error
    if objective.gauss_newton is None or objective.fisher == "gauss_newton":
        return objective
    few = isinstance(output, Tensor) and output.shape[-1] <= MOST_OUTPUTS
    return replace(objective, fisher="gauss_newton") if few else objective


class _Speeds:
    """Latencies of models beside the dense one, at batch 1 and at the larger batch."""

    def __init__(self, dense: nn.Module, objective: Objective, batch: Any, num: int) -> None:
        self.dense, self.predict = dense, objective.predict
        batch = prepared(dense, batch)
        self.one, self.many, self.num = samples(batch, num)

    def __call__(self, models: Mapping[str, nn.Module]) -> list[dict[str, float]]:
        """Milliseconds of each model by name, at batch 1 and at the larger batch."""
        return [latencies(models, self.predict, batch) for batch in (self.one, self.many)]

    def ratio(self, model: nn.Module) -> float:
        """How many times as fast as the dense model a model is, at the batch where it gains less."""
        return min(taken["dense"] / taken["other"] for taken in self({"dense": self.dense, "other": model.eval()}))


def _share(target: Target, tried: Tried, speeds: _Speeds, tell: Progress) -> float:
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
            lambda keep, ratio: tell("Measure speed", min(1.0, next(count) / 17), f"keep {keep:.3f}: {ratio:.2f}×"),
        )
    except TooSlowError as error:
        others = []
        for name, make in FORMS.items():
            try:
                others.append((speeds.ratio(make(tried.plan.model)), name))
            except Exception:  # a form that the model cannot take is no alternative
                continue
        ratio, name = max(others, default=(0.0, ""))
        rest = f"; neither do {' and '.join(FORMS)}" if others else ""
        if ratio >= target.speedup:
            rest = f". Do not factor this model; use {name}, which is {ratio:.2f}× as fast"
        elif others:
            rest = f", and {name} is {ratio:.2f}×"
        raise InputError(
            f"compress: no share makes this model {target.speedup:g}× as fast on this machine, at batch 1 and at "
            f"{speeds.num}; the best is {error.speed:.2f}×, keeping {error.keep:.3f}{rest}"
        ) from None


@torch.no_grad()
def _contenders(
    plan: Plan, dense: nn.Module, small: nn.Module, tried: Tried, speeds: _Speeds, tell: Progress
) -> tuple[Contender, ...]:
    """The dense model, the compressed one, and both in the forms that need no plan; and the plan's 4 bits."""
    models: dict[str, nn.Module] = {"dense": dense, "compressed": small.eval()}
    failed: dict[str, str] = {}
    four = {FOUR_BITS: lambda model: plan.at(bits=4).apply().eval()}
    for prefix, model in (("", dense), ("compressed, ", small)):
        if prefix and any(form.bits for form in plan.forms.values()):
            continue  # its layers are of integers already
        for form, make in (FORMS | ({} if prefix else four)).items():
            try:
                models[prefix + form] = make(model)
                speeds.predict(models[prefix + form], speeds.one)
            except Exception as error:  # whatever keeps a model from this form stands in its row
                models.pop(prefix + form, None)
                failed[prefix + form] = _line(error)
    tell("Measure", 0.1, "latency")
    one, many = speeds(models)
    rows = []
    for place, (name, model) in enumerate(models.items()):
        tell("Measure", 0.5 + place / (2 * len(models)), name)
        note, others = "", {}
        try:
            others = tried.quality.all_of(model)
            quality: float | None = others.pop(tried.quality.measure)
        except InputError:
            raise
        except Exception as error:
            quality, note = None, _line(error)
        parameters = sum(p.numel() for p in (small if "compressed" in name else dense).parameters())
        rows.append(Contender(name, parameters, num_bytes(model), quality, one[name], many[name], note, others))
    tell("Measure", 1.0, "")
    rows += [Contender(name, None, None, note=why) for name, why in failed.items()]
    return tuple(rows)


def _layers(plan: Plan) -> tuple[FactoredLayer, ...]:
    rows = []
    for (name, form), s in zip(plan.forms.items(), plan.spectra, strict=True):
        (m, n), rank = s.shape, form.rank
        if form != Form(rank):
            saved = 0 if rank is None else m * n - rank * (m + n)
            rows.append(FactoredLayer(name, (m, n), rank, saved, str(form)))
            continue
        if rank is None:
            rows.append(FactoredLayer(name, (m, n), None, 0, "dense: worth its parameters, or factors are no smaller"))
            continue
        total, kept = float(s.values.square().sum()), float(s.values[:rank].square().sum())
        why = f"{kept / total:.1%} of its weighted energy" if total > 0 else "the loss does not depend on it"
        rows.append(FactoredLayer(name, (m, n), rank, m * n - rank * (m + n), why))
    return (*rows, *(FactoredLayer(name, (), None, 0, f"dense: {why}") for name, why in plan.reasons.items()))


def _notes(tried: Tried, target: Target, contenders: tuple[Contender, ...]) -> tuple[str, ...]:
    notes = []
    if tried.quality.sign == 0:
        notes.append(
            f"{tried.quality.measure} is the same for the smallest plan as for the dense model, so it tells nothing "
            "about the compression: is the model trained, and does the evaluation use it?"
        )
    dense, small = contenders[:2]
    if target.speedup is not None and dense.latency_one and small.latency_one and dense.latency_many:
        reached = min(dense.latency_one / small.latency_one, dense.latency_many / (small.latency_many or math.inf))
        if reached < target.speedup:
            notes.append(
                f"the search measured {target.speedup:g}× twice, and the last measurement {reached:.2f}×: the machine "
                "is busy, or the speed is at the edge"
            )
    return tuple(notes)


def _line(error: Exception) -> str:
    """An error of someone else's code in a few words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
