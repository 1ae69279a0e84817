"""Verification: each finding keeps the action that was seen to help, and loses the one that was not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from gramian.errors import GramianError, GramianWarning, some
from gramian.init import signs_of_training
from gramian.inspection import inspect
from gramian.remedies.judging import is_as_low, is_higher, is_lower, is_no_worse, learns, why_not
from gramian.remedies.performing import OF_THE_LOSS, OnInput, Setting, perform
from gramian.remedies.proposals import proposals
from gramian.remedies.rehearsing import MOMENTS, Measure, Rehearsed, rehearse
from gramian.report import Action, Finding, Rehearsal, Report
from gramian.seeding import seeded

__all__ = ["NUM_SEEDS", "verified"]

NUM_SEEDS = 2

# Among candidates whose losses differ by less than this share, the earlier one, which loses less, is taken.
SIMILAR = 0.1

# Cosine of the angle between a parameter before and after, below which what it had learned counts as lost.
KEPT = 0.99

# Characters up to which code is told of an action that is not offered.
SHORT = 60

# Findings about the stored statistics of batch norms.
OF_STATISTICS = ("norm-statistics",)


@dataclass
class _Tried:
    """A candidate: its action, the setting after it, and the losses of a rehearsal."""

    action: Action
    setting: Setting
    losses: Rehearsed
    start: Setting

    @property
    def last(self) -> float:
        return self.losses[-1]

    @cached_property
    def codes(self) -> set[str] | None:
        """Codes of the errors and warnings of a diagnosis after the action; `None` where it fails."""
        return _codes(self.setting)

    def removes(self, finding: Finding) -> bool:
        return self.codes is not None and finding.code not in self.codes


@dataclass
class _State:
    """What the remedies that were offered so far have made: the setting, and the findings that are left."""

    setting: Setting
    moments: Sequence[int]
    num_seeds: int
    offered: list[str] = field(default_factory=list)
    codes: set[str] | None = None
    found: dict[Measure, list[Rehearsed]] = field(default_factory=dict)

    def losses(self, measure: Measure) -> list[Rehearsed]:
        """The losses of rehearsals without a further remedy, one list for each seed."""
        if measure not in self.found:
            seeds = range(self.num_seeds)
            self.found[measure] = [
                rehearse(self.setting, moments=self.moments, seed=seed, measure=measure) for seed in seeds
            ]
        return self.found[measure]


def verified(
    report: Report,
    setting: Setting,
    *,
    moments: Sequence[int] = MOMENTS,
    num_seeds: int = NUM_SEEDS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Try the remedies of a report's errors and warnings on copies, and offer those that help.

    For each finding, the actions of `proposals` are performed on copies of the model and the optimizer, each followed
    by a rehearsal: some training steps from the same random state, on the same batches, at the same rate. The action
    with the lowest loss that removes the finding is rehearsed with another seed. It is offered where the loss in
    evaluation mode is lower than without it by 5 % at one of the moments, with each seed, and not higher at the last,
    and where the finding is gone when the copy is diagnosed. Where it is gone, no trained weights are replaced, and the
    loss is not higher, up to its spread over the seeds, the action is offered too, and a note says that so few steps
    do not tell how much it helps. The loss before any step counts where the weights look
    trained, with the batch's statistics in batch norms unless the finding is about the stored ones; of other networks
    it says nothing. Both trainings are measured by the loss as the remedy leaves it. An action that changes the loss
    itself is offered where the loss after it falls as far, to 5 % of its first value: such findings are exact, and an
    easy problem is learned by a wrong loss too. Findings are taken in their order, each on top of the remedies that
    were offered for those before it: what is gone already with these gets no remedy of its own.

    Args:
        report: of `inspect`.
        setting: what it reports on. The model, its optimizer, the batches and the random state are left as they are.
        moments: numbers of steps after which losses are compared; the last is the length of a rehearsal.
        num_seeds: rehearsals of the best candidate and of the training without it.
        progress: called as `progress(what, done, total)`.

    Returns:
        A report whose findings have an action and a `rehearsal` where the action helps; where none does, no action, and
        advice that says so. Findings that no code can cure are as they were.

    Raises: nothing of its own.

    Cost: a rehearsal for each candidate (1 to 9 for a finding), and `num_seeds` and a diagnosis for the best. Accuracy:
        measured by `gramian bench remedies`, see docs/inspect.md.
    Source: this library's own.

    >>> from torch import nn
    >>> from gramian.objective import Objective
    >>> net, x = nn.Linear(4, 2), torch.randn(16, 4)
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.999)
    >>> setting = Setting(net, [(x, x[:, :2])], Objective.regression(), sgd)
    >>> found = Report("net", [Finding("momentum-too-high", "warning", "A momentum of 0.999")])
    >>> verified(found, setting, moments=(50,)).findings[0].action.name
    'set_momentum'
    """
    progress = progress or (lambda what, done, total: None)
    asked = [(finding, proposals(finding, setting)) for finding in report.findings]
    total, done = sum(bool(actions) for _, actions in asked), 0
    trained = {sign.name for sign in signs_of_training(setting.model)} if total else set()
    state, kept = _State(setting, moments, num_seeds), []
    for finding, actions in asked:
        if actions and state.codes is not None and finding.code not in state.codes:
            line = f"It is gone with the remedy for {', '.join(state.offered)}."
            finding = replace(finding, action=None, advice=f"{finding.advice} {line}".strip())
        elif actions:
            progress("remedies", done, total)
            finding = _verified(finding, actions, state, setting, trained)
        done += bool(actions)
        kept.append(finding)
    progress("remedies", 1, 1)
    if total:
        note = f"Remedies were tried on copies, by {max(moments)} training steps with and without each"
        used = "the given optimizer" if setting.optimizer is not None else "AdamW at a rate of 0.001"
        report = replace(report, notes=[*report.notes, f"{note}, with {used}."])
    return replace(report, findings=kept)


def _verified(
    finding: Finding,
    actions: Sequence[Action],
    state: _State,
    start: Setting,
    trained: set[str],
) -> Finding:
    """The finding with the action that helps on top of what was offered before; the state then moves on."""
    tried, failures, moments = [], {}, state.moments
    measure = Measure(stored=finding.code in OF_STATISTICS)
    for action in actions:
        try:
            with warnings.catch_warnings(), seeded(0):
                warnings.simplefilter("ignore", GramianWarning)  # it warns when the user performs it
                changed = perform(action, state.setting.copied())
            tried.append(_Tried(action, changed, rehearse(changed, moments=moments, measure=measure), start))
        except Exception as error:  # the action does not fit this model; that is said
            failures[action.code] = _in_words(error)
    if not tried:
        return _not_offered(finding, actions[0], f"it fails: {next(iter(failures.values()))}")
    best = _best(finding, tried)
    after = [best.losses]
    after += [rehearse(best.setting, moments=moments, seed=seed, measure=measure) for seed in range(1, state.num_seeds)]
    changes_loss = best.action.name in OF_THE_LOSS
    without = state.losses(replace(measure, after=best.action) if changes_loss else measure)
    pairs = [[(old[i], new[i]) for old, new in zip(without, after, strict=True)] for i in range(len(moments))]
    last = len(moments) - 1
    counts = [i for i, steps in enumerate(moments) if steps or trained or measure.stored or last == 0]
    moment = next((i for i in reversed(counts) if is_lower(pairs[i])), last)
    does_learn = [learns(old, new) for old, new in zip(without, after, strict=True)]
    helps = is_lower(pairs[moment]) and not is_higher(pairs[last]) and all(does_learn)
    moment = moment if helps else last
    is_as_good = changes_loss and not helps and is_no_worse(pairs[last], [losses[0] for losses in without])
    notes = [f"Together with the remedy for {', '.join(state.offered)}."] if state.offered else []
    if changes_loss:
        notes.append("Both are measured by the loss as the remedy leaves it.")
    lost, is_gone = _lost(state.setting, best.setting, trained), best.removes(finding)
    if is_as_good:
        notes.append("Training without it comes as far in these steps.")
    elif (
        not helps
        and is_gone
        and not lost
        and all(does_learn)
        and is_as_low(pairs[last])
        and finding.code in (_codes(state.setting) or ())
    ):
        is_as_good = True
        notes.append(f"{moments[last]} steps are too few to tell how much it helps: train with and without it.")
    notes += lost
    before, now = zip(*pairs[moment], strict=True)
    shown = Rehearsal(
        moments[moment],
        len(after),
        fmean(before),
        fmean(now),
        _spread(before),
        _spread(now),
        is_gone=is_gone,
        note=" ".join(notes),
    )
    if not ((helps or is_as_good) and shown.is_gone):
        others = [_in_short(one.action) for one in tried if one is not best]
        among = f" (the best of {len(tried)}; also tried: {some(others)})" if others else ""
        why = why_not(shown, helps=helps, learns=all(does_learn), is_higher=is_higher(pairs[last]))
        return _not_offered(finding, best.action, f"{why} ({shown.told})", among)
    state.setting, state.found, state.codes = best.setting, {measure: after}, best.codes
    state.offered.append(finding.code)
    return replace(finding, action=best.action, rehearsal=shown)


def _best(finding: Finding, tried: Sequence[_Tried]) -> _Tried:
    """The candidate to offer.

    Among those that remove the finding, the first whose loss is near the least of them; where none does, the one of
    least loss.
    """
    by_loss = sorted(tried, key=lambda one: one.last)
    least = next((one for one in by_loss if one.removes(finding)), None)
    if least is None:
        return by_loss[0]
    earlier = tried[: tried.index(least)]
    return next((one for one in earlier if one.last <= least.last * (1 + SIMILAR) and one.removes(finding)), least)


def _not_offered(finding: Finding, action: Action, why: str, among: str = "") -> Finding:
    line = f"Tried on a copy and not offered{among}: {_in_short(action)}. The reason: {why}."
    return replace(finding, action=None, advice=f"{finding.advice} {line}".strip())


def _in_short(action: Action) -> str:
    """The action in a few words: its code where that is one short line, else its name and numbers."""
    if "\n" not in action.code and len(action.code) <= SHORT:
        return action.code
    values = [f"{key} {value:g}" for key, value in action.arguments.items() if type(value) in (int, float)]
    return " ".join([action.name.strip("_").replace("_", " "), *values])


def _codes(setting: Setting) -> set[str] | None:
    try:
        seen = _as_received(setting)
        found = inspect(seen.model, seen.batches, seen.objective, optimizer=seen.optimizer, quick=True).findings
    except Exception:  # a network that cannot be diagnosed is not known to be cured
        return None
    return {f.code for f in found if f.severity != "info"}


def _as_received(setting: Setting) -> Setting:
    """The same, the remedies' hooks on inputs being applied to the batches, so that rules see what the network gets."""
    hooks = [h for m in setting.model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, OnInput)]
    if not hooks:
        return setting
    batches: list[Any] = list(setting.batches)
    for hook in hooks:
        batches = [hook.received(batch) for batch in batches]
    setting = setting.copied()
    for module in setting.model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, OnInput)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    return replace(setting, batches=batches)


def _lost(before: Setting, after: Setting, trained: set[str]) -> list[str]:
    """What is said of trained weights that the action replaces; nothing where it replaces none."""
    parameters = dict(after.model.named_parameters())
    lost = [
        name
        for name, p in before.model.named_parameters()
        if name in trained and (name not in parameters or not _is_kept(p.detach(), parameters[name].detach()))
    ]
    return [f"It replaces trained weights, whose learning is lost: {some(lost)}."] if lost else []


def _is_kept(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    a, b = one.flatten().double().nan_to_num(), other.flatten().double().nan_to_num()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > KEPT


def _spread(losses: Sequence[float]) -> float:
    return pstdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0


def _in_words(error: Exception) -> str:
    lines = str(error).splitlines()
    kind = "" if isinstance(error, GramianError) else f"{type(error).__name__}: "
    return kind + (lines[0].rstrip(".") if lines else "no message")
