"""Scores of a diagnoser over cases: hits, ranks, misleading findings, crashes, and alarms on healthy twins."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch

from gramian.bench.faults.architectures import STEPS, Options, healthy
from gramian.bench.faults.cases import Case
from gramian.bench.faults.matching import Places, matches
from gramian.bench.faults.setup import Setup, Truth
from gramian.errors import InputError

__all__ = ["Alarm", "Diagnoser", "FindingLike", "Verdict", "alarms", "judge", "load", "score", "wilson"]

SERIOUS = ("error", "warning")


class FindingLike(Protocol):
    """What a diagnoser returns a list of, best first: anything with these three texts."""

    code: str
    where: str
    severity: str


Diagnoser = Callable[[Setup], Sequence[Any]]  # of FindingLike


@dataclass(frozen=True)
class Verdict:
    """How a diagnoser did on one case.

    Args:
        case: the case.
        hit: an error or a warning names a right cause at a right place.
        first: it is the first error or warning, those of accepted consequences aside.
        misleading: an error or warning that is neither right nor an accepted consequence comes before the right one,
            or there is no right one.
        crashed: the exception, or empty.
        told: (code, where) of the errors and warnings, in order.
        seconds: that the diagnosis took.
    """

    case: Case
    hit: bool
    first: bool
    misleading: bool
    crashed: str = ""
    told: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Alarm:
    """What a diagnoser said of a healthy run.

    Args:
        architecture, seed: the run.
        trained: whether it was trained before.
        told: (code, where) of the errors and warnings: false alarms.
        crashed: the exception, or empty.
    """

    architecture: str
    seed: int
    trained: bool
    told: tuple[tuple[str, str], ...] = ()
    crashed: str = ""


@dataclass
class Table:
    """Verdicts, and how many of a group have a property."""

    verdicts: list[Verdict] = field(default_factory=list)

    def count(self, what: str, **group: str) -> tuple[int, int]:
        """How many of the group's verdicts have the property, and how many there are."""
        mine = [v for v in self.verdicts if all(getattr(v.case, key) == value for key, value in group.items())]
        return sum(bool(getattr(v, what)) for v in mine), len(mine)


def wilson(count: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share, at 95 %."""
    if not of:
        return 0.0, 1.0
    share, square = count / of, z * z / of
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))  # rounding


def _serious(findings: Iterable[Any]) -> tuple[tuple[str, str], ...]:
    return tuple((str(f.code), str(f.where)) for f in findings if f.severity in SERIOUS)


def judge(case: Case, told: Sequence[tuple[str, str]], truth: Truth, places: Places) -> Verdict:
    """The verdict on findings: (code, where) of the errors and warnings, best first."""
    hit = first = misleading = False
    for rank, (code, where) in enumerate(told):
        if matches(code, where, truth, places):
            hit, first = True, rank == 0
            break
        misleading = misleading or code not in truth.consequences
    return Verdict(case, hit, first, misleading, told=tuple(told))


def _diagnosed(diagnoser: Diagnoser, setup: Setup) -> tuple[tuple[tuple[str, str], ...], str, float]:
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return _serious(diagnoser(setup)), "", time.perf_counter() - start
        except Exception as error:
            return (), f"{type(error).__name__}: {error}".splitlines()[0][:200], time.perf_counter() - start


def score(diagnoser: Diagnoser, cases: Iterable[Case], tell: Callable[[Verdict], None] = lambda v: None) -> Table:
    """The verdict on each case.

    Args:
        diagnoser: `(setup) -> findings, best first`.
        cases: that count.
        tell: called after each.
    """
    table = Table()
    for case in cases:
        setup, truth = case.planted()
        places = Places(setup.model)
        told, crashed, seconds = _diagnosed(diagnoser, setup)
        verdict = judge(case, told, truth, places)
        table.verdicts.append(
            Verdict(case, verdict.hit, verdict.first, verdict.misleading, crashed, told, round(seconds, 3))
        )
        tell(table.verdicts[-1])
    return table


def alarms(diagnoser: Diagnoser, runs: Iterable[tuple[str, int, Options]]) -> list[Alarm]:
    """What a diagnoser says of healthy runs, untrained and after training.

    Args:
        diagnoser: as in `score`.
        runs: architecture, seed and options of each.
    """
    found = []
    for architecture, seed, options in runs:
        for trained in (False, True):
            setup = healthy(architecture, seed, options)
            setup.train(STEPS if trained else 0)
            told, crashed, _ = _diagnosed(diagnoser, setup)
            found.append(Alarm(architecture, seed, trained, told, crashed))
    return found


def load(name: str) -> Diagnoser:
    """The function that "module:function" names. Raises `InputError` where there is none."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f"faults: a diagnoser is named module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"faults: cannot load the diagnoser {name!r}: {error}") from None
    if not callable(found):
        raise InputError(f"faults: {name!r} is not a function")
    return cast(Diagnoser, found)
