"""`gramian bench remedies`: whether the remedies that `gm.inspect(verify=True)` offers cure, by training.

Each remedy that is offered for a planted fault is performed on a fresh copy of the case, which is then trained as long
as the check of harm trains it. It cures where that check no longer finds harm: the accuracy on held-out data is less
than 0.15 below that of the healthy twin, which gets the same training. Beside it stand doing nothing, which cures none
of the cases by their choice, and `isometric_` on the whole model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from gramian.bench.faults.architectures import ARCHITECTURES
from gramian.bench.faults.cases import DEVELOPMENT_SEEDS, HELD_OUT_SEEDS, Case, chosen
from gramian.bench.faults.kinds import KINDS
from gramian.bench.faults.rows import share, verified_cases
from gramian.bench.faults.scoring import SERIOUS
from gramian.bench.faults.setup import Setup
from gramian.bench.faults.verification import CLEARLY, Harm, trained
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.errors import GramianWarning, InputError, some
from gramian.remedies import Setting, inspect, perform
from gramian.report import Action

__all__ = ["Offer", "Outcome", "cured", "outcome", "rows"]


@dataclass(frozen=True)
class Offer:
    """A remedy that was offered, and what training shows of it.

    Args:
        code: of the finding.
        action: the action's name.
        score: accuracy after it and the training.
        cures: whether that is less than 0.15 below the twin's.
    """

    code: str
    action: str
    score: float
    cures: bool


@dataclass(frozen=True)
class Outcome:
    """What was offered for a case.

    Args:
        case: the case.
        offers: the remedies, in the order of the findings.
        dropped: actions that were tried and not offered, as (code of the finding, what its advice says).
        isometric: whether `isometric_` on the whole model cures the case.
        nothing: whether training without any remedy does.
        seconds: of the diagnosis and the verification.
    """

    case: Case
    offers: tuple[Offer, ...]
    dropped: tuple[tuple[str, str], ...]
    isometric: bool
    nothing: bool
    seconds: float

    @property
    def offered(self) -> bool:
        return bool(self.offers)

    @property
    def first_cures(self) -> bool:
        """Whether the first remedy cures."""
        return bool(self.offers) and self.offers[0].cures


def cured(case: Case, twin: float, actions: Sequence[Action]) -> tuple[float, bool]:
    """The accuracy of a fresh case after actions and the training of its check of harm, and whether that cures."""
    setup = case.build()
    try:
        with warnings.catch_warnings():  # about what is left as it was
            warnings.simplefilter("ignore", GramianWarning)
            for action in actions:
                _apply(action, setup)
    except (RuntimeError, ValueError, AttributeError):
        return setup.chance, False
    score, _ = trained(setup, KINDS[case.kind].steps)
    return round(score, 4), score > twin - CLEARLY


def _apply(action: Action, setup: Setup) -> None:
    after = perform(action, Setting(setup.model, list(setup.batches), setup.objective, setup.optimizer))
    setup.model, setup.batches, setup.objective = after.model, after.batches, after.objective
    assert after.optimizer is not None
    setup.optimizer = after.optimizer


def outcome(harm: Harm) -> Outcome:
    """Diagnose a case, verify its remedies, and train with each that is offered."""
    case = harm.case
    setup, start = case.build(), time.perf_counter()
    findings = inspect(
        setup.model, setup.batches, setup.objective, optimizer=setup.optimizer, verify=True, quick=True
    ).findings
    seconds = time.perf_counter() - start
    serious = [f for f in findings if f.severity in SERIOUS]
    helped = [(f.code, f.action) for f in serious if f.action is not None and f.rehearsal is not None]
    offers = []
    for i, (code, action) in enumerate(helped):  # on top of those before it, as it was verified
        offers.append(Offer(code, action.name, *cured(case, harm.twin, [one for _, one in helped[: i + 1]])))
    dropped = [(f.code, f.advice.partition("Tried")[2]) for f in serious if "Tried on a copy" in f.advice]
    isometric = cured(case, harm.twin, [Action("isometric_")])[1]
    return Outcome(case, tuple(offers), tuple(dropped), isometric, harm.faulty > harm.twin - CLEARLY, round(seconds, 2))


def outcomes(harms: Iterable[Harm], tell: Callable[[Outcome], None] = lambda found: None) -> list[Outcome]:
    """The outcome of each case, on one thread so that it repeats."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for harm in harms:
            found.append(outcome(harm))
            tell(found[-1])
    finally:
        torch.set_num_threads(threads)
    return found


def rows(
    repeats: int,
    only: str,
    tell: Tell,
    *,
    held_out: bool = False,
    seeds: Sequence[int] = (),
    kinds: Sequence[str] = (),
    architectures: Sequence[str] = (),
    cases: Path | None = None,
) -> Iterator[Row]:
    """The rows: shares over all cases, and one line for each kind.

    Args:
        repeats, only: not used.
        tell: called with what is done.
        held_out: whether to score on the held-out seeds rather than on those for development.
        seeds: only these of them; all where empty.
        kinds, architectures: only these; all where empty.
        cases: the list of verified cases.
    """
    kinds, architectures = chosen("kind", kinds, KINDS), chosen("architecture", architectures, ARCHITECTURES)
    every = HELD_OUT_SEEDS if held_out else DEVELOPMENT_SEEDS
    if unknown := set(seeds).difference(every):
        raise InputError(
            f"remedies: expected seeds of {', '.join(map(str, every))}; got {some(sorted(map(str, unknown)))}"
        )
    harms = verified_cases(cases, seeds or every, kinds, architectures, tell)
    found = outcomes(harms, lambda one: tell(f"{one.case}: {_words(one)}"))
    offers = [offer for one in found for offer in one.offers]
    cures = sum(offer.cures for offer in offers)
    yield Row(
        "remedies",
        "share (Wilson's 95 % interval)",
        (
            Measurement("offered remedies that cure", None, None, share(cures, len(offers))),
            Measurement("cases with an offered remedy", None, None, share(sum(o.offered for o in found), len(found))),
            Measurement("cases cured by the first", None, None, share(sum(o.first_cures for o in found), len(found))),
            Measurement("cured by isometric_", None, None, share(sum(o.isometric for o in found), len(found))),
            Measurement("cured by nothing", None, None, share(sum(o.nothing for o in found), len(found))),
            Measurement("median time with verification", median([o.seconds for o in found] or [0.0])),
        ),
        ((Goal("offered remedies that cure", ">=", 0.9), cures / max(1, len(offers))),),
    )
    lines = []
    for kind in kinds:
        mine = [one for one in found if one.case.kind == kind]
        theirs = [offer for one in mine for offer in one.offers]
        if mine:
            names = ", ".join(dict.fromkeys(offer.action for offer in theirs))
            remark = f"{sum(o.offered for o in mine)} of {len(mine)} cases offered"
            remark += f"; {sum(o.cures for o in theirs)} of {len(theirs)} cure: {names}" if theirs else ""
            lines.append(Measurement(kind, None, None, remark))
    yield Row("remedies, by kind", "cases", tuple(lines))


def _words(one: Outcome) -> str:
    told = [f"{o.code}: {o.action} {'cures' if o.cures else 'does not cure'} ({o.score})" for o in one.offers]
    told += [f"{code}: dropped{why}" for code, why in one.dropped]
    return "; ".join(told) or "no remedy"
