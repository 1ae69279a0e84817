"""Random numbers that are drawn by what a network gives, without a gradient, and go on through its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gramian.inspection.passes.gate_functions import DIFFERENCES, REVERSED
from gramian.inspection.passes.records import Draw
from gramian.inspection.passes.step_records import Observed

__all__ = ["Draws"]

# Functions that draw by their arguments, and those whose numbers have no parameters.
_DRAWS = frozenset(("normal", "_standard_gamma", "_sample_dirichlet"))
_NOISE = frozenset(("randn", "rand", "randn_like", "rand_like", "normal_", "uniform_"))
_COMPARISONS = frozenset(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"))


class Draws:
    """Follows values that are drawn under `torch.no_grad` up to the model's matrices, and adds them to an `Observed`.

    Args:
        seen: gets them.
        names: of the model's parameters, by id.
    """

    def __init__(self, seen: Observed, names: Mapping[int, str]) -> None:
        self.seen, self.names = seen, names
        self.clear()

    def clear(self) -> None:
        """Lets all tensors go."""
        self.noise: dict[int, Tensor] = {}
        self.fresh: dict[int, str] = {}  # of noise that nothing was made of, the function
        self.drawn: dict[int, tuple[Tensor, Draw]] = {}

    def see(
        self, name: str, order: int, func: Callable, given: Sequence[Tensor], made: Tensor, *, is_loss: bool = False
    ) -> None:
        """Keeps what an operation in module `name`, or in the loss, shows of draws."""
        function = getattr(func, "__name__", "")
        if function in _NOISE:
            self.noise[id(made)] = made
            self.fresh[id(made)] = function
            return
        targets = [self.fresh.pop(id(t)) for t in given if id(t) in self.fresh]
        compares = is_loss and (function in _COMPARISONS or func in DIFFERENCES | REVERSED)
        if targets and compares and len(given) == 2 and any(t.requires_grad for t in given):
            self.seen.drawn_target = self.seen.drawn_target or targets[0]
        is_random = function in _DRAWS or any(id(t) in self.noise for t in given)
        draws = [self.drawn[id(t)][1] for t in given if id(t) in self.drawn]
        others = [t for t in given if id(t) not in self.drawn and t.requires_grad]
        if draws and any(id(t) in self.names and t.ndim > 1 for t in others) and made.requires_grad:
            for draw in draws:
                draw.passed_to = draw.passed_to or name
        elif draws and others and func in DIFFERENCES | REVERSED:  # as the log-probability of what was drawn begins
            for draw in draws:
                draw.is_scored = True
        elif draws and not made.requires_grad and made.is_floating_point():
            self.drawn[id(made)] = made, draws[0]
        elif is_random and made.ndim and not torch.is_grad_enabled() and self._is_drawn_from(function, others):
            draw = Draw(name, function, order)
            self.seen.draws.append(draw)
            self.drawn[id(made)] = made, draw
        elif is_random and not made.requires_grad:
            self.noise[id(made)] = made

    @staticmethod
    def _is_drawn_from(function: str, others: Sequence[Tensor]) -> bool:
        """Whether what is drawn depends on values that were computed with a gradient, or on a parameter as its mean.

        A whole network that runs on noise under `torch.no_grad` is no draw: so a critic gets what a generator makes.
        """
        return any(t.grad_fn is not None or (function in _DRAWS and t.is_leaf) for t in others)
