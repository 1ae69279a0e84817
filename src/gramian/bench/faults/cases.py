"""Cases: a kind of fault, an architecture and a seed; with a healthy twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from gramian.bench.faults.architectures import ARCHITECTURES, healthy
from gramian.bench.faults.kinds import KINDS
from gramian.bench.faults.setup import Draw, Setup, Truth
from gramian.errors import InputError

__all__ = ["DEVELOPMENT_SEEDS", "HELD_OUT_SEEDS", "Case", "candidates", "chosen"]

DEVELOPMENT_SEEDS = (0, 1)
HELD_OUT_SEEDS = (2, 3, 4, 5, 6, 7)


@dataclass(frozen=True)
class Case:
    """One fault in one network. Everything follows from the three fields.

    Args:
        kind: a name in `KINDS`.
        architecture: a name in `ARCHITECTURES`.
        seed: of the network, its data, and the fault's place and strength.
    """

    kind: str
    architecture: str
    seed: int

    def __post_init__(self) -> None:
        chosen("kind", [self.kind], KINDS)
        chosen("architecture", [self.architecture], ARCHITECTURES)
        if self.architecture not in KINDS[self.kind].architectures:
            fit = ", ".join(KINDS[self.kind].architectures)
            raise InputError(f"case: {self.kind} makes no sense for {self.architecture}; it has cases for {fit}")

    def __str__(self) -> str:
        return f"{self.kind}/{self.architecture}/{self.seed}"

    def twin(self) -> Setup:
        """A fresh run without the fault."""
        kind = KINDS[self.kind]
        setup = healthy(self.architecture, self.seed, kind.options)
        setup.train(kind.trained)
        return setup

    def planted(self) -> tuple[Setup, Truth]:
        """A fresh run with the fault, and what is wrong with it."""
        setup, kind = self.twin(), KINDS[self.kind]
        return setup, kind.truth(kind.plant(setup, Draw(str(self))))

    def build(self) -> Setup:
        """A fresh run with the fault."""
        return self.planted()[0]

    @cached_property
    def truth(self) -> Truth:
        """What is wrong and where."""
        return self.planted()[1]


def candidates(seeds: Sequence[int], kinds: Sequence[str] = (), architectures: Sequence[str] = ()) -> Iterator[Case]:
    """All cases that make sense, whether they do harm or not.

    Args:
        seeds: of the cases.
        kinds, architectures: only these; all where empty.
    """
    kinds, architectures = chosen("kind", kinds, KINDS), chosen("architecture", architectures, ARCHITECTURES)
    for seed in seeds:
        for name in kinds:
            for architecture in KINDS[name].architectures:
                if architecture in architectures:
                    yield Case(name, architecture, seed)


def chosen(what: str, names: Sequence[str], known: Sequence[str] | dict) -> list[str]:
    """`names`, or all that are known where there are none. Raises `InputError` for one that is not known."""
    for name in names:
        if name not in known:
            raise InputError(f"faults: there is no {what} {name!r}; choose from {', '.join(known)}")
    return list(names or known)
