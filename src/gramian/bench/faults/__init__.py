"""`gramian bench faults`: planted faults that people make, and how well a diagnoser names them.

A case is a kind of fault, an architecture and a seed; it counts if training shows that its healthy twin does clearly
better. A diagnoser is a function `(setup) -> findings`, best first, each with `code`, `where` and `severity`.

>>> case = Case("zero-layer", "mlp", 0)
>>> setup = case.build()
>>> sorted(case.truth.causes), case.truth.places
(['parameter-zero'], ('blocks.3.linear.weight',))
>>> len(setup.train(2))
2
"""

from gramian.bench.faults.architectures import ARCHITECTURES, STEPS, Options, healthy
from gramian.bench.faults.cases import DEVELOPMENT_SEEDS, HELD_OUT_SEEDS, Case, candidates
from gramian.bench.faults.diagnosers import DIAGNOSERS
from gramian.bench.faults.kinds import CAUSES, KINDS
from gramian.bench.faults.matching import Places, matches
from gramian.bench.faults.rows import freeze, rows
from gramian.bench.faults.scoring import Alarm, Verdict, alarms, judge, load, score, wilson
from gramian.bench.faults.setup import Setup, Truth
from gramian.bench.faults.verification import Harm, fingerprint, frozen, harm_of, keep, verify

__all__ = [
    "ARCHITECTURES",
    "CAUSES",
    "DEVELOPMENT_SEEDS",
    "DIAGNOSERS",
    "HELD_OUT_SEEDS",
    "KINDS",
    "STEPS",
    "Alarm",
    "Case",
    "Harm",
    "Options",
    "Places",
    "Setup",
    "Truth",
    "Verdict",
    "alarms",
    "candidates",
    "fingerprint",
    "freeze",
    "frozen",
    "harm_of",
    "healthy",
    "judge",
    "keep",
    "load",
    "matches",
    "rows",
    "score",
    "verify",
    "wilson",
]
