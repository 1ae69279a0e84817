"""The table of kinds of faults, and the words that name their causes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from gramian.bench.faults.architectures import ARCHITECTURES, STEPS, Options
from gramian.bench.faults.networks import Network
from gramian.bench.faults.setup import Draw, Setup, Truth

__all__ = ["CAUSES", "KINDS", "Kind", "Planted", "kind"]

WORDS = """
input-non-finite input-offset input-scale input-dominated input-constant input-duplicates
labels-constant labels-out-of-range labels-independent
loss-double-softmax loss-rectified loss-non-finite
parameter-non-finite parameter-zero parameter-constant parameter-rank-one parameter-scale-small
parameter-scale-large parameter-shared parameter-frozen parameter-unused graph-cut
dead-units saturated-units norm-zero-gain norm-statistics norm-evaluation-mode dropout-rate
attention-saturated gate-shut embedding-scale head-scale residual-growth gain-below-one gain-above-one
gradient-vanishes gradient-explodes gradient-underflow gradient-overflow
rate-too-high rate-too-low momentum-too-high parameter-not-stepped weight-decay-too-large
"""
CAUSES = frozenset(WORDS.split())
"""The codes that name causes."""


@dataclass(frozen=True)
class Planted:
    """What a planter says of the fault that it planted.

    Args:
        places: where it is.
        strength: what was drawn, for people.
        causes: codes beside the kind's own that are right here too.
    """

    places: tuple[str, ...]
    strength: str = ""
    causes: tuple[str, ...] = ()


Plant = Callable[[Setup, Draw], Planted]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        name: on the command line.
        summary: what the fault is, in a line.
        causes: the codes that name it.
        consequences: codes of what it makes true elsewhere, neither right nor misleading.
        plant: changes a healthy setup, in place.
        architectures: where it makes sense.
        options: what it needs of the faulty run and of its twin.
        steps: of the training check; 0 where harm shows in the scores as they stand.
        trained: steps that the healthy run is trained for before the fault is planted.
    """

    name: str
    summary: str
    causes: frozenset[str]
    consequences: frozenset[str]
    plant: Plant
    architectures: tuple[str, ...]
    options: Options = field(default_factory=Options)
    steps: int = STEPS
    trained: int = 0

    def truth(self, planted: Planted) -> Truth:
        """The truth of a case of this kind."""
        causes = self.causes | frozenset(planted.causes)
        return Truth(self.name, causes, planted.places, self.consequences - causes, planted.strength)


KINDS: dict[str, Kind] = {}
"""Name on the command line: the kind."""


def kind(
    name: str,
    causes: str,
    *,
    consequences: str = "",
    needs: str = "",
    only: Iterable[str] = (),
    options: Options | None = None,
    steps: int = STEPS,
    trained: int = 0,
) -> Callable[[Plant], Plant]:
    """A decorator that enters a planter into the table; its docstring's first line is the summary.

    Args:
        name: of the kind.
        causes, consequences: codes, separated by spaces.
        needs: a trait of architectures, or several of which one is enough, separated by spaces.
        only: names of architectures, where traits do not tell.
        options, steps, trained: as in `Kind`.
    """
    unknown = (set(causes.split()) | set(consequences.split())) - CAUSES
    assert not unknown, unknown
    wanted = set(needs.split())
    fit = tuple(a for a, made in ARCHITECTURES.items() if not wanted or wanted & made.traits)
    fit = tuple(a for a in fit if not only or a in set(only))

    def enter(plant: Plant) -> Plant:
        assert name not in KINDS, name
        summary = (plant.__doc__ or "").splitlines()[0].rstrip(".")
        found = Kind(
            name, summary, frozenset(causes.split()), frozenset(consequences.split()), plant, fit,
            options or Options(), steps, trained,
        )  # fmt: skip
        KINDS[name] = found
        return plant

    return enter


def network(setup: Setup) -> Network:
    """The setup's model, which is always one of ours."""
    assert isinstance(setup.model, Network)
    return setup.model


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights that multiply signals, by name, in forward order; no embeddings, positions or norms."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        held = {nn.LSTM: ("weight_ih_l0", "weight_hh_l0"), nn.MultiheadAttention: ("in_proj_weight",)}
        multiplies = ("weight",) if isinstance(module, (nn.Linear, nn.Conv2d)) else held.get(type(module), ())
        found.update({f"{name}.{weight}": module.get_parameter(weight) for weight in multiplies})
    return found


def inner(model: nn.Module) -> dict[str, Tensor]:
    """The matrices inside the blocks."""
    return {name: w for name, w in matrices(model).items() if name.startswith("blocks.")}


def embedding(model: nn.Module) -> dict[str, Tensor]:
    """The tables of embeddings."""
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Embedding)}


def first(model: nn.Module) -> dict[str, Tensor]:
    """The stem's matrix or embedding."""
    every = {**embedding(model), **matrices(model)}
    return {name: w for name, w in every.items() if name.startswith("stem.")}


def modules_of(model: nn.Module, *classes: type[nn.Module]) -> dict[str, nn.Module]:
    """The modules of some classes, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, classes)}


def bias_of(model: nn.Module, weight: str) -> Tensor | None:
    """The bias beside a weight, or `None`."""
    owner = model.get_submodule(weight.rpartition(".")[0])
    return getattr(owner, "bias", None) if weight.endswith(".weight") else None


def chain(model: nn.Module) -> dict[str, Tensor]:
    """The matrices through which every signal goes: those that no skip goes around."""
    skips = any(type(block).__name__ in ("Residual", "Transforming") for block in network_blocks(model))
    return first(model) if skips else {**first(model), **inner(model)}


def network_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of one of our networks."""
    return list(model.get_submodule("blocks").children())
