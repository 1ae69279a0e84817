"""`gramian bench optim`: what optimizers reach in equal seconds, time to AdamW's final number, and what a step costs.

Every task has a budget, the seconds of so many steps of fused AdamW. Each optimizer's rate is tuned on one seed over
the same half-decades, in runs of the whole budget that decay to zero, and raced on three others. The target is what
tuned AdamW ends at; the time to it comes from runs of shorter budgets, each decayed to zero. Half of the tasks are for
development, the others are held out (`learning_tasks`).

`--only "held out: cnn"` runs a part; `--only "equal steps: development"` races at equal steps in place of seconds.
GRAMIAN_BENCH_COMPETITORS names the competitors; GRAMIAN_BENCH_RUNS a JSON file that keeps the runs, so that a race can
be continued.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gramian.bench import step_costs
from gramian.bench.competitors import ADAMW, COMPETITORS, DEFAULT, TORCH_MUON, Competitor, chosen
from gramian.bench.learning_data import text
from gramian.bench.learning_tasks import LEARNING, SCORING_SEEDS, TUNING_SEED, LearningTask
from gramian.bench.race import Contest, Cost, Runs, costs, share_to_target
from gramian.bench.table import Goal, Measurement, Row, Tell

__all__ = ["Figures", "rows", "summary"]

RUNS_VARIABLE = "GRAMIAN_BENCH_RUNS"

TIME_GOAL = Goal("time to target ÷ the best other's", "<=", 1.05)
MEAN_GOAL = Goal("time to target ÷ the best other's, geometric mean", "<=", 0.75)
ADAMW_GOAL = Goal("time to target ÷ fused AdamW's, geometric mean", "<=", 0.5)
BETTER_GOAL = Goal("share of tasks on which the final number is below torch Muon's", ">=", 5 / 6)


@dataclass(frozen=True)
class Figures:
    """One competitor on one task: its number at the end of the budget, and the share of it to the target."""

    final: float
    share: float


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """The rows whose name contains `only`: equal seconds (on `repeats` seeds, at most three), step costs."""
    runs = Runs(Path(os.environ[RUNS_VARIABLE]) if RUNS_VARIABLE in os.environ else None)
    seeds = SCORING_SEEDS[:repeats]
    for of in ("development", "held out"):
        found: dict[str, dict[str, Figures]] = {}
        tasks = {name: learning for name, learning in LEARNING.items() if learning.half == of}
        for name, learning in tasks.items():
            for kind, race in (("equal steps", _equal_steps), ("equal seconds", _equal_seconds)):
                title = f"{kind}: {of}: {name}"
                if only not in title or (kind == "equal steps" and "equal steps" not in only):
                    continue
                tell(title)
                row, figures = race(title, name, learning, runs, seeds, partial(_tell, tell))
                if figures:
                    found[name] = figures
                yield row
        if tasks and found.keys() == tasks.keys():
            yield summary(f"equal seconds: {of}: all", found)
    for title, cost in step_costs.COSTS.items():
        if only in title:
            tell(title)
            yield cost(title, repeats)


def _tell(tell: Tell, what: str) -> None:
    tell(f"  {what}")


def _peers(names: Mapping[str, Any]) -> list[str]:
    return [name for name in names if not COMPETITORS[name].ours]


def _equal_seconds(
    title: str, task: str, learning: LearningTask, runs: Runs, seeds: Sequence[int], tell: Tell
) -> tuple[Row, dict[str, Figures]]:
    field, missing = _field()
    spent = _costs(task, learning, field, runs)
    measured: list[Measurement] = []
    figures: dict[str, Figures] = {}
    rest_lr, target = COMPETITORS[ADAMW].start, math.nan
    for name, competitor in field.items():
        steps = max(1, round(learning.steps * spent[ADAMW].total / spent[name].total))
        entry = Contest(task, name, learning, partial(_make, competitor, rest_lr), steps, runs, tell)
        rate, remark = _tuned(entry, competitor.start)
        final = entry.median(rate, seeds)
        if name == ADAMW:
            rest_lr, target = rate, final
            share, bound = 1.0, ""
        else:
            share, bound = share_to_target(lambda s, entry=entry, rate=rate: entry.median(rate, seeds, s), target)
        figures[name] = Figures(final, share)
        steps_text = f"{steps} steps of {1e3 * spent[name].total:.3g} ms, {1e3 * spent[name].own:.3g} its own"
        share_text = f"target after {bound + ' ' if bound else ''}{share:.3g} of the budget"
        seconds = share * learning.steps * spent[ADAMW].total
        remarks = [share_text, steps_text, remark, competitor.remark]
        measured.append(Measurement(name, seconds, final, "; ".join(r for r in remarks if r)))
    budget = learning.steps * spent[ADAMW].total
    what = f"held-out {learning.metric} after {budget:.3g} s; ms: to {target:.4g}, which AdamW ends at"
    return Row(title, _conditions(what, task, seeds, missing), tuple(measured), _time_goals(figures)), figures


def _equal_steps(
    title: str, task: str, learning: LearningTask, runs: Runs, seeds: Sequence[int], tell: Tell
) -> tuple[Row, dict[str, Figures]]:
    field, missing = _field()
    measured: list[Measurement] = []
    rest_lr = COMPETITORS[ADAMW].start
    for name, competitor in field.items():
        entry = Contest(task, name, learning, partial(_make, competitor, rest_lr), learning.steps, runs, tell)
        rate, remark = _tuned(entry, competitor.start)
        rest_lr = rate if name == ADAMW else rest_lr
        measured.append(Measurement(name, None, entry.median(rate, seeds), remark))
    what = f"held-out {learning.metric} after {learning.steps} steps"
    return Row(title, _conditions(what, task, seeds, missing), tuple(measured)), {}


def _field() -> tuple[dict[str, Competitor], list[str]]:
    """Those that can take part, AdamW first since the others use its rate; and lines about the others."""
    obstacles = {name: competitor.obstacle() for name, competitor in chosen().items()}
    field = {name: competitor for name, competitor in chosen().items() if not obstacles[name]}
    return field, [f"{name}: {why}" for name, why in obstacles.items() if why]


def _costs(task: str, learning: LearningTask, field: Mapping[str, Competitor], runs: Runs) -> dict[str, Cost]:
    """What a step of each costs; a later one is measured beside AdamW, and kept in units of the first AdamW's step."""
    key = f"{task} | {ADAMW} | cost"
    new = [name for name in field if name != ADAMW and f"{task} | {name} | cost" not in runs.known]
    if new or key not in runs.known:
        entries = {name: (partial(_make, field[name], 1e-3), field[name].start) for name in [ADAMW, *new]}
        found = costs(learning, entries, TUNING_SEED)
        first = runs.get(key, lambda: [found[ADAMW].around, found[ADAMW].own])
        scale = sum(first) / found[ADAMW].total
        for name in new:
            own = scale * found[name].total - first[0]
            runs.get(f"{task} | {name} | cost", lambda own=own: [first[0], own])
    return {name: Cost(*runs.known[f"{task} | {name} | cost"]) for name in field}


def _make(competitor: Competitor, rest_lr: float, model: Any, lr: float) -> Any:
    return competitor.make(model, lr, rest_lr)


def _tuned(entry: Contest, start: float) -> tuple[float, str]:
    scores = entry.tune(start, TUNING_SEED)
    best = min(scores, key=lambda rate: (scores[rate], rate))
    return best, f"rate {best:.3g} of " + ", ".join(f"{rate:.2g}: {score:.3g}" for rate, score in scores.items())


def _conditions(what: str, task: str, seeds: Sequence[int], missing: Sequence[str]) -> str:
    clock = "process time of one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    source = [text()[0]] if task in ("characters", "lstm", "recurrence", "experts") else []
    return "; ".join([what, f"median of seeds {', '.join(map(str, seeds))}", clock, *source, *missing])


def _time_goals(figures: Mapping[str, Figures]) -> tuple[tuple[Goal, float], ...]:
    peers = _peers(figures)
    if DEFAULT not in figures or not peers:
        return ()
    return ((TIME_GOAL, figures[DEFAULT].share / min(figures[name].share for name in peers)),)


def summary(title: str, found: Mapping[str, Mapping[str, Figures]]) -> Row:
    """The geometric mean over the tasks of each one's time to target, in units of AdamW's; and the default's goals.

    `found` has the figures of each task by competitor; those that were not on all tasks are left out.
    """
    tasks = list(found.values())
    means = {
        name: math.exp(math.fsum(math.log(task[name].share) for task in tasks) / len(tasks))
        for name in tasks[0]
        if all(name in task for task in tasks)
    }
    measured = tuple(Measurement(name, None, None, f"{mean:.3g} of AdamW's time") for name, mean in means.items())
    goals: list[tuple[Goal, float]] = []
    if DEFAULT in means:
        ratios = [task[DEFAULT].share / min(task[name].share for name in _peers(task)) for task in tasks]
        goals.append((MEAN_GOAL, math.exp(math.fsum(map(math.log, ratios)) / len(ratios))))
        goals.append((ADAMW_GOAL, means[DEFAULT]))
        both = [task for task in tasks if TORCH_MUON in task]
        if both:
            better = sum(task[DEFAULT].final < task[TORCH_MUON].final for task in both)
            goals.append((BETTER_GOAL, better / len(both)))
    return Row(title, "geometric mean of the time to target over the tasks", measured, tuple(goals))
