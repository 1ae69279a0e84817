"""The optimizers that can be asked for by name. A new direction is one file beside this one, and one row here.

The rows drive `gramian train --optimizer`, `gm.train`, `gm.suggest_lr`, `gramian bench optim` and `rates`, the names in
`gm.optim`, the table of the documentation, and the tests in tests/test_optim_*.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gramian.errors import InputError
from gramian.optim.balanced import BalancedMuon
from gramian.optim.muon import Muon
from gramian.optim.shampoo import Shampoo
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.soap import SOAP

Property = Literal["signed permutations", "rotations", "ranks on singular gradients"]


@dataclass(frozen=True)
class Checks:
    """What the tests need to know about a direction; nothing else reads it.

    Args:
        small: options that suit matrices of a few rows.
        exact: options under which two ways to compute the same step differ by rounding only.
        accuracy: the largest such difference of a weight in float64, at steps of length 0.1. Take 2e-6, as for Muon, if
            the direction uses its polar factor; otherwise leave it out.
        keeps_direction: whether with `refresh` above one it keeps its whole direction, so that a matrix may stand still
            until its first recomputation with a gradient.
        roundings: by how many roundings of float32 the steps of a matrix may depend on the other matrices in its stack.
            Take 4, as for Muon, if the direction uses its polar factor, whose linear systems are solved for the whole
            stack at once; otherwise leave it out, and the steps must be the same to the bit.
        exempt: the properties that it does not have. All others are tested:

            - "signed permutations": permuting the rows and columns of all gradients, and flipping their signs, does the
              same to the steps.
            - "rotations": rotating all gradients does the same to the steps.
            - "ranks on singular gradients": several ranks agree with one process also where gradients are singular.
    """

    small: Mapping[str, Any] = field(default_factory=dict)
    exact: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float = 1e-8
    keeps_direction: bool = False
    roundings: int = 0
    exempt: frozenset[Property] = frozenset()


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Args:
        optimizer: its class.
        summary: one line for `gramian train --help`.
        formula: the direction of a matrix's step, for the docs, in Markdown.
        cost: what costs most in a step, for the docs.
        usual_lr: the learning rate where none is given; by default the one in the signature of the class.
        usual: the same in words, where it depends on the model; the class then takes `lr=None`.
        options: fixed options with which it is built.
        checks: what the tests need to know.
    """

    optimizer: type[torch.optim.Optimizer]
    summary: str
    formula: str = ""
    cost: str = ""
    usual_lr: float | None = None
    usual: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    checks: Checks = Checks()

    @property
    def lr(self) -> float:
        """The learning rate where none is given."""
        return inspect.signature(self.optimizer).parameters["lr"].default if self.usual_lr is None else self.usual_lr

    @property
    def rate(self) -> str:
        """That in words."""
        return self.usual or f"{self.lr:g}"

    def make(self, model: nn.Module, lr: float | None) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters; at the usual rate where `lr` is `None`."""
        make: Any = self.optimizer
        if lr is None and not self.usual:
            lr = self.lr
        if issubclass(make, MatrixOptimizer):
            return make(model, lr=lr, **self.options)
        options = dict(self.options)
        if options.get("fused"):  # torch's fused steps ignore strides on a CPU, and write to memory beside the tensor
            options["fused"] = all(p.is_contiguous() for p in model.parameters())
        return make(model.parameters(), lr=lr, **options)


OPTIMIZERS: dict[str, Entry] = {
    "muon": Entry(
        Muon,
        summary="the momentum, orthogonalized",
        usual_lr=Muon.base_lr,
        usual="0.1 √(L/2)",
        formula="`polar(B)`",
        cost="a polar factor in every step",
        checks=Checks(exact={"rtol": 1e-10}, accuracy=2e-6, keeps_direction=True, roundings=4),
    ),
    "balanced": Entry(
        BalancedMuon,
        summary="the momentum between damped inverse roots of the gradients' second moments, orthogonalized",
        usual_lr=BalancedMuon.base_lr,
        usual="0.1 √(L/2)",
        formula="`P polar(P B Q) Q`, with `P = (L + 1)^(-1/2)`, `Q = (R + 1)^(-1/2)`",
        cost="a polar factor in every step, and Cholesky factors, every 10 steps",
        checks=Checks(exact={"rtol": 1e-10}, accuracy=2e-6, roundings=4),
    ),
    "soap": Entry(
        SOAP,
        summary="Adam in the eigenbasis of the gradients' second moments",
        formula="`Q_L D Q_Rᵀ`, with `D` Adam's of `Q_Lᵀ g Q_R`, and `Q_L`, `Q_R` the eigenvectors of `L`, `R`",
        cost="eigendecompositions, every 10 steps",
        # Its basis of a null space is made of rounding.
        checks=Checks(exempt=frozenset({"ranks on singular gradients"})),
    ),
    "shampoo": Entry(
        Shampoo,
        summary="the momentum between inverse roots of the gradients' second moments",
        formula="`L^(-1/4) B R^(-1/4)`",
        cost="inverse roots, every 10 steps",
        checks=Checks(exact={"damping": 1e-2, "rtol": 1e-9, "rest_lr": 1e-3}),
    ),
    "adamw": Entry(torch.optim.AdamW, summary="torch's AdamW, fused", usual_lr=1e-3, options={"fused": True}),
    "sgd": Entry(torch.optim.SGD, summary="torch's gradient descent", usual_lr=0.1),
}

MATRIX_OPTIMIZERS: dict[str, Entry] = {
    name: entry for name, entry in OPTIMIZERS.items() if issubclass(entry.optimizer, MatrixOptimizer)
}

AUTO = "muon"
"""What `"auto"` stands for: the best in `gramian bench optim`."""


def known_name(caller: str, name: str, otherwise: str = "") -> str:
    """The name in the table that `name` stands for.

    Raises `InputError` for one that is not there; the error says what `caller` takes `otherwise`, if anything.

    >>> known_name("train", "auto", "a function")
    'muon'
    """
    if name != "auto" and name not in OPTIMIZERS:
        *known, last = ["auto", *OPTIMIZERS, *filter(None, [otherwise])]
        raise InputError(f"{caller}: unknown optimizer {name!r}; wanted {', '.join(known)} or {last}")
    return AUTO if name == "auto" else name


def with_rate(caller: str, text: str) -> tuple[str, float | Literal["auto"] | None]:
    """An optimizer's name and its rate, from `name`, `name:lr=0.01` or `name:lr=auto`; no rate is `None`.

    Raises `InputError` for an unknown name, or what is no rate.

    >>> with_rate("train", "adamw:lr=3e-4"), with_rate("train", "sgd")
    (('adamw', 0.0003), ('sgd', None))
    """
    name, colon, rest = text.strip().partition(":")
    name = known_name(caller, name)
    key, equals, value = rest.partition("=")
    if not colon:
        return name, None
    try:
        rate = "auto" if value == "auto" else float(value)
    except ValueError:
        rate = math.nan
    if key.strip() != "lr" or not equals or not (rate == "auto" or 0 <= rate < math.inf):
        raise InputError(f"{caller}: after an optimizer's name a rate is taken, as in adamw:lr=3e-4; got {text!r}")
    return name, rate


def table() -> str:
    """The table of directions as Markdown, which docs/conf.py puts into docs/optim.md."""
    rows = ["| | by name | usual `lr` | direction of a matrix's step | costly part |", "|-|-|-|-|-|"]
    for name, e in MATRIX_OPTIMIZERS.items():
        rows.append(f"| `{e.optimizer.__name__}` | `{name}` | {e.rate} | {e.formula} | {e.cost} |")
    return "\n".join(rows)


# The classes of the rows are public: gramian.optim takes its names from here.
__all__ = ["OPTIMIZERS", *sorted(e.optimizer.__name__ for e in MATRIX_OPTIMIZERS.values())]  # pyright: ignore[reportUnsupportedDunderAll]
