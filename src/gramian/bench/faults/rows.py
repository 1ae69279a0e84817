"""The rows of `gramian bench faults`: one for each diagnoser, and one for each of its kinds and architectures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from gramian.bench.faults.architectures import ARCHITECTURES
from gramian.bench.faults.cases import DEVELOPMENT_SEEDS, HELD_OUT_SEEDS, candidates, chosen
from gramian.bench.faults.diagnosers import DIAGNOSERS
from gramian.bench.faults.kinds import KINDS
from gramian.bench.faults.scoring import Table, alarms, load, score, wilson
from gramian.bench.faults.verification import Harm, frozen, keep, verify
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.errors import InputError, some

__all__ = ["LIST", "freeze", "rows", "share", "verified_cases"]

LIST = Path("benchmarks/faults/cases.json")
"""The list of verified cases, from the root of the repository."""

SURELY_HEALTHY = 0.5
"""A twin counts as healthy where it is this far above chance after training: an alarm on it is false."""

SCORES = {"hit": "right place and cause", "first": "ranked first", "misleading": "misleading", "crashed": "crashed"}


def rows(
    repeats: int,
    only: str,
    tell: Tell,
    *,
    diagnose: str = "",
    held_out: bool = False,
    seeds: Sequence[int] = (),
    kinds: Sequence[str] = (),
    architectures: Sequence[str] = (),
    cases: Path | None = None,
) -> Iterator[Row]:
    """The rows of the diagnosers whose name contains `only`.

    Args:
        repeats: not used: a case is diagnosed once.
        only: part of a name in `DIAGNOSERS`.
        tell: called with what is done.
        diagnose: "module:function", in place of those in `DIAGNOSERS`.
        held_out: whether to score on the held-out seeds rather than on those for development.
        seeds: only these of them; all where empty.
        kinds, architectures: only these; all where empty.
        cases: the list of verified cases; `LIST` where `None`. Without such a file the cases are verified first,
            which takes about three minutes for each seed.
    """
    kinds, architectures = chosen("kind", kinds, KINDS), chosen("architecture", architectures, ARCHITECTURES)
    every = HELD_OUT_SEEDS if held_out else DEVELOPMENT_SEEDS
    if unknown := set(seeds).difference(every):
        raise InputError(
            f"faults: expected seeds of {', '.join(map(str, every))}; got {some(sorted(map(str, unknown)))}"
        )
    seeds = seeds or every
    diagnosers = {diagnose: diagnose} if diagnose else {name: at for name, at in DIAGNOSERS.items() if only in name}
    loaded = {name: load(at) for name, at in diagnosers.items()}
    harms = verified_cases(cases, seeds, kinds, architectures, tell)
    # A kind's options make another twin: deeper, without norms, with another optimizer.
    healthy = {
        (harm.architecture, harm.seed, KINDS[harm.kind].options)
        for harm in harms
        if harm.twin >= harm.chance + SURELY_HEALTHY
    }
    runs = sorted(healthy, key=repr)
    for name, diagnoser in loaded.items():
        tell(f"{name}: {len(harms)} cases")
        table = score(diagnoser, [harm.case for harm in harms], lambda v, name=name: tell(f"{name}: {v.case}"))
        tell(f"{name}: {2 * len(runs)} healthy runs")
        said = alarms(diagnoser, runs)
        false = sum(bool(alarm.told) for alarm in said), len(said)
        broken = sum(bool(alarm.crashed) for alarm in said)
        yield _overall(name, table, false, broken, goals=bool(diagnose) or name == "gramian")
        yield _by(name, "kind", kinds, table)
        yield _by(name, "architecture", architectures, table)


def freeze(tell: Tell, *, held_out: bool = False, cases: Path | None = None) -> Path:
    """Verify all cases of the development seeds or the held-out ones, and write them into the list."""
    path = cases or LIST
    for seed in HELD_OUT_SEEDS if held_out else DEVELOPMENT_SEEDS:
        keep(path, verify(candidates([seed]), lambda harm: tell(str(harm.case))))
    return path


def verified_cases(
    cases: Path | None, seeds: Sequence[int], kinds: Sequence[str], architectures: Sequence[str], tell: Tell
) -> list[Harm]:
    """The cases of these seeds, kinds and architectures that count, from the list; trained where there is none."""
    if cases is None and not LIST.is_file():
        tell("no list of cases here: training each case and its twin")
        return [harm for harm in verify(candidates(seeds, kinds, architectures)) if harm.valid]
    return [
        harm
        for harm in frozen(cases or LIST)
        if harm.seed in seeds and harm.kind in kinds and harm.architecture in architectures
    ]


def share(count: int, of: int) -> str:
    """A count as a share in percent, with Wilson's interval."""
    low, high = wilson(count, of)
    return f"{count} of {of}: {100 * count / max(of, 1):.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _overall(name: str, table: Table, false: tuple[int, int], broken: int, *, goals: bool) -> Row:
    counts = {what: table.count(what) for what in SCORES}
    found = [Measurement(SCORES[what], None, None, share(*count)) for what, count in counts.items()]
    found.append(Measurement("false alarms on healthy runs", None, None, share(*false)))
    seconds = statistics.median([v.seconds for v in table.verdicts] or [0.0])
    found.append(Measurement("median time of a diagnosis", seconds))
    part = {what: count / max(of, 1) for what, (count, of) in counts.items()}
    wanted = (
        (Goal("right place and cause", ">=", 0.90), part["hit"]),
        (Goal("ranked first", ">=", 0.85), part["first"]),
        (Goal("misleading", "<=", 0.03), part["misleading"]),
        (Goal("crashes, healthy runs included", "<=", 0), counts["crashed"][0] + broken),
        (Goal("false alarms", "<=", 0.02), false[0] / max(false[1], 1)),
    )
    return Row(name, "share of cases (Wilson's 95 % interval)", tuple(found), wanted if goals else ())


def _by(name: str, what: str, names: Sequence[str], table: Table) -> Row:
    found = []
    for each in names:
        hits, of = table.count("hit", **{what: each})
        first, misleading, crashed = (table.count(s, **{what: each})[0] for s in ("first", "misleading", "crashed"))
        if of:
            remark = f"{share(hits, of)}; first {first}, misleading {misleading}, crashed {crashed}"
            found.append(Measurement(each, None, None, remark))
    return Row(f"{name}, by {what}", "hits", tuple(found))
