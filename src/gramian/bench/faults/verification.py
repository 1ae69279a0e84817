"""Whether a case's fault does harm, by training it and its twin; and the list of the cases where it does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from gramian.bench.faults.architectures import Options, healthy
from gramian.bench.faults.cases import Case
from gramian.bench.faults.kinds import KINDS
from gramian.bench.faults.setup import Setup
from gramian.errors import InputError
from gramian.report.files import write_text
from gramian.texts import read_text

__all__ = ["Harm", "fingerprint", "frozen", "harm_of", "keep", "trained", "verify"]

ABOVE_CHANCE = 0.3
CLEARLY = 0.15
"""On 400 held-out samples and more, six standard errors of a difference of accuracies near 85 %."""

GENERATOR = ("setup.py", "data.py", "networks.py", "architectures.py", "cases.py", "kinds")
"""The files on which cases depend."""


@dataclass(frozen=True)
class Harm:
    """The scores of a case and of its twin after the same training.

    Args:
        kind, architecture, seed: the case.
        chance: accuracy of always predicting the commonest label.
        twin, faulty: accuracies on held-out data.
        failed: the exception that ended the faulty training, or empty.
    """

    kind: str
    architecture: str
    seed: int
    chance: float
    twin: float
    faulty: float
    failed: str = ""

    @property
    def valid(self) -> bool:
        """Whether the twin learns, and clearly better than the faulty run."""
        return self.twin >= self.chance + ABOVE_CHANCE and self.faulty <= self.twin - CLEARLY

    @property
    def case(self) -> Case:
        """The case itself."""
        return Case(self.kind, self.architecture, self.seed)


def trained(setup: Setup, steps: int) -> tuple[float, str]:
    """The score after training, and the exception that ended it, or empty; then the score is that of chance."""
    try:
        setup.train(steps)
    except (RuntimeError, IndexError, ValueError) as error:  # as it would end the user's training
        return setup.chance, type(error).__name__
    return setup.score(), ""


@lru_cache(maxsize=256)
def _twin(architecture: str, seed: int, options: Options, steps: int) -> tuple[float, float]:
    setup = healthy(architecture, seed, options)
    return setup.chance, trained(setup, steps)[0]


def harm_of(case: Case) -> Harm:
    """Train a case and its twin, and score both."""
    kind = KINDS[case.kind]
    chance, twin = _twin(case.architecture, case.seed, kind.options, kind.trained + kind.steps)
    faulty, failed = trained(case.build(), kind.steps)
    return Harm(case.kind, case.architecture, case.seed, round(chance, 4), round(twin, 4), round(faulty, 4), failed)


def verify(cases: Iterable[Case], tell: Callable[[Harm], None] = lambda harm: None) -> list[Harm]:
    """The harm of each case, on one thread so that it repeats."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for case in cases:
            found.append(harm_of(case))
            tell(found[-1])
    finally:
        torch.set_num_threads(threads)
    return found


def fingerprint() -> str:
    """A hash of the generator's source. Cases that were verified by another generator are other cases."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for name in GENERATOR:
        path = here / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def keep(path: Path | str, harms: Sequence[Harm]) -> None:
    """Write the list: the cases that count, and those that were dropped.

    A list that is there by the same generator is added to: it keeps its cases of other seeds.
    """
    target = Path(path)
    old = []
    if target.exists():
        body = json.loads(target.read_text())
        old = [Harm(**row) for row in body["cases"] + body["dropped"]] if body["generator"] == fingerprint() else []
    fresh = {harm.case for harm in harms}
    every = [harm for harm in old if harm.case not in fresh] + list(harms)
    every.sort(key=lambda harm: (harm.seed, harm.kind, harm.architecture))
    lists = {
        name: ",\n  ".join(json.dumps(asdict(harm)) for harm in every if harm.valid == valid)
        for name, valid in (("cases", True), ("dropped", False))
    }
    parts = ",\n ".join(f'"{name}": [\n  {rows}\n ]' for name, rows in lists.items())
    write_text(target, f'{{\n "generator": "{fingerprint()}",\n {parts}\n}}\n')


def frozen(path: Path | str) -> list[Harm]:
    """The cases of a list that count. Raises `InputError` where it is missing or by another generator."""
    target = Path(path)
    if not target.is_file():
        raise InputError(f"faults: there is no list of cases at {target}. Write: gramian bench faults --freeze")
    try:
        body = json.loads(read_text(target))
        generator, found = str(body["generator"]), [Harm(**row) for row in body["cases"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"faults: {target} is no list of cases ({type(error).__name__}: {error})") from None
    if generator != fingerprint():
        raise InputError(
            f"faults: {target} was verified with another generator ({generator[:12]}; this one is "
            f"{fingerprint()[:12]}). Verify its cases again: gramian bench faults --freeze"
        )
    assert not any(math.isnan(harm.twin) for harm in found)
    return found
