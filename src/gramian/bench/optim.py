"""`gramian bench optim`: time and steps to a held-out target, and what a step costs.

The rate of each optimizer is tuned on one seed and raced on three others (`race`). `--only "time to target: cnn"` runs
a part; GRAMIAN_BENCH_COMPETITORS names the competitors. GRAMIAN_BENCH_RATES names a JSON file that keeps tuned rates,
so that tuning (`--only "rates: cnn"`) and racing can be separate runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gramian.bench import step_costs
from gramian.bench.competitors import ADAMW, COMPETITORS, DEFAULT, TORCH_MUON, Competitor, chosen
from gramian.bench.learning_tasks import LEARNING, RATES, SCORING_SEEDS, TUNING_SEED, LearningTask
from gramian.bench.race import Make, Result, Score, race, tune
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.errors import TaskError
from gramian.report.files import write_text

__all__ = ["TIME_GOAL", "rows", "time_ratio"]

RATES_VARIABLE = "GRAMIAN_BENCH_RATES"

TIME_GOAL = Goal("time to target ÷ the best other's", "<=", 0.7)
MEAN_GOAL = Goal("time to target ÷ the best other's, geometric mean", "<=", 0.5)
STEPS_GOAL = 0.8


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """The rows whose name contains `only`: rates, time to target (on `repeats` seeds, at most three), step costs."""
    ratios: list[float] = []
    for name, learning in LEARNING.items():
        for kind, make in (("rates", _rates), ("time to target", partial(_time_to_target, repeats=repeats))):
            title = f"{kind}: {name}"
            # The time to target tunes the rates anyway: they have a row of their own only where `only` asks for it.
            if only not in title or (kind == "rates" and "rates" not in only):
                continue
            tell(title)
            row = make(title, learning, tell=lambda what, title=title: tell(f"{title}: {what}"))
            ratios += [ratio for goal, ratio in row.goals if goal == TIME_GOAL]
            yield row
    if len(ratios) == len(LEARNING):
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        yield Row("time to target: all", "", (), ((MEAN_GOAL, mean),))
    for title, cost in step_costs.COSTS.items():
        if only in title:
            tell(title)
            yield cost(title, repeats)


def time_ratio(times: Mapping[str, float]) -> float | None:
    """The default's time over the least of fused AdamW's and the peers'; `None` where either is missing."""
    others = [t for name, t in times.items() if not COMPETITORS[name].ours]
    return times[DEFAULT] / min(others) if DEFAULT in times and others else None


def _rates(title: str, learning: LearningTask, *, tell: Tell) -> Row:
    """Every competitor's best rate on the tuning seed."""
    measurements: list[Measurement] = []
    try:
        for name, _, best, remark in _tuned(learning, title.partition(": ")[2], tell):
            measurements.append(Measurement(name, best.seconds if best else None, remark=remark))
    except TaskError as error:
        return Row(title, str(error), ())
    return Row(title, _conditions(learning, f"seed {TUNING_SEED}"), tuple(measurements))


def _time_to_target(title: str, learning: LearningTask, *, repeats: int, tell: Tell) -> Row:
    seeds = SCORING_SEEDS[:repeats]
    remarks: dict[str, str] = {}
    entries: dict[str, tuple[Make, float]] = {}
    try:
        for name, make, best, remark in _tuned(learning, title.partition(": ")[2], tell):
            remarks[name] = remark
            if best is not None:
                entries[name] = (make, best.rate)
        scores = race(learning, entries, seeds=seeds, tell=tell)
    except TaskError as error:
        return Row(title, str(error), ())
    measurements = [
        Measurement(name, scores[name].median_seconds, remark=f"{scores[name].as_text()}; {remark}")
        if name in scores
        else Measurement(name, None, remark=remark)
        for name, remark in remarks.items()
    ]
    conditions = _conditions(learning, f"median of seeds {', '.join(map(str, seeds))}, steps × mean step in turns")
    return Row(title, conditions, tuple(measurements), _goals(scores))


def _goals(scores: Mapping[str, Score]) -> tuple[tuple[Goal, float], ...]:
    goals = []
    ratio = time_ratio({name: score.median_seconds for name, score in scores.items()})
    if ratio is not None:
        goals.append((TIME_GOAL, ratio))
    # torch's Muon refuses convolutions, for which pytorch_optimizer's takes its place.
    peer = next((name for name in (TORCH_MUON, "pytorch_optimizer Muon") if name in scores), None)
    if DEFAULT in scores and peer is not None:
        steps = scores[DEFAULT].median_steps / scores[peer].median_steps
        goals.append((Goal(f"steps to target ÷ {peer}'s", "<=", STEPS_GOAL), steps))
    return tuple(goals)


def _conditions(learning: LearningTask, what: str) -> str:
    clock = "process time of one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"held-out {learning.metric} ≤ {learning.target:g}, at most {learning.limit:g} s; {what}; {clock}"


def _tuned(learning: LearningTask, task: str, tell: Tell) -> Iterator[tuple[str, Make, Result | None, str]]:
    """`(name, make, best run of the grid, remark)` of every competitor; AdamW first, since the others use its rate."""
    model = learning.make(TUNING_SEED).model()
    rest_lr = math.nan
    for name, competitor in chosen().items():
        make = partial(_make, competitor, rest_lr)
        obstacle = competitor.obstacle(model)
        if obstacle:
            yield name, make, None, obstacle
            continue
        best, remark = _kept(
            f"{task}, {name}, {learning.metric} {learning.target:g}, {learning.limit:g} s",
            lambda make=make, competitor=competitor, name=name: _tune(
                learning, make, competitor.start, lambda what: tell(f"{name}: {what}")
            ),
        )
        if name == ADAMW:
            rest_lr = best.rate if best else competitor.start
        yield name, make, best, "; ".join(part for part in (remark, competitor.remark) if part)


def _make(competitor: Competitor, rest_lr: float, model: Any, lr: float) -> Any:
    return competitor.make(model, lr, rest_lr)


def _tune(learning: LearningTask, make: Make, start: float, tell: Tell) -> tuple[Result | None, str]:
    best, tried = tune(learning, make, start, seed=TUNING_SEED, tell=tell)
    if best is None:
        nearest = min(tried, key=lambda result: result.held_out)
        return None, f"missed the target at all {len(tried)} rates; nearest {nearest.held_out:.3g} at {nearest.rate:g}"
    end = ", an end of the grid" if best.rate in (RATES[0], RATES[-1]) else ""
    return best, f"rate {best.rate:g}{end}, {best.steps} steps on seed {best.seed}, of {len(tried)} rates tried"


def _kept(key: str, tune_it: Callable[[], tuple[Result | None, str]]) -> tuple[Result | None, str]:
    """The result under `key` in the file of GRAMIAN_BENCH_RATES; measured and added where it is not there."""
    path = os.environ.get(RATES_VARIABLE)
    if path is None:
        return tune_it()
    known: dict[str, Any] = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    if key in known:
        best = known[key]["best"]
        return (Result(**best) if best else None), known[key]["remark"]
    best, remark = tune_it()
    known[key] = {"best": asdict(best) if best else None, "remark": remark}
    write_text(path, json.dumps(known, indent=1) + "\n")
    return best, remark
