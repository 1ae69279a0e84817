"""A batch in slices: the same rows in the same forward passes on any number of ranks, and so the same step.

Slice s of S has the rows s, s + S, s + 2 S … of every batch. Rank r of R takes the slices r, r + R …, one after the
other, so that a pass has the same rows wherever it is taken, and the same random numbers. Gradients of slices are added
in float64: a sum of a few float32 numbers is then exact but for numbers 29 powers of two apart, so that its order does
not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.errors import GramianWarning, InputError, some
from gramian.seeding import seed_all
from gramian.training.agreement import Share

__all__ = ["Slices", "check_slices", "clip_"]


def check_slices(number: int | None) -> None:
    """Raise `InputError` where the ranks cannot take equally many slices."""
    size = placement.world().size
    if number is not None and number % size:
        raise InputError(
            f"train: {number} slices of a batch cannot be shared out evenly over {size} ranks; give a multiple of "
            f"{size}, or another number of ranks"
        )


class Slices:
    """The slices of this rank, and the sums of their gradients.

    Args:
        model: of the run.
        number: of all slices.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, number: int, seed: int) -> None:
        rank, size = placement.world()
        self.shares = [Share(i, number) for i in range(rank, number, size)]
        self.sums: dict[Tensor, Tensor] = {}
        self._model, self._seed = model, seed
        self._params = list(model.parameters())
        self._divided: list[Any] = [m for m in model.modules() if hasattr(m, "set_requires_gradient_sync")]

    def seed(self, share: Share, position: tuple[int, int]) -> None:
        """Let the random numbers of a pass depend on the slice and its batch, of epoch and number, alone."""
        # A polynomial in a prime: two slices of a run meet only by chance, of 1 in 2**63.
        value = self._seed
        for part in (*position, share.number):
            value = (value * 6364136223846793005 + part + 1) % (2**63 - 25)
        seed_all(value)

    def warn_of(self, changed: Sequence[Tensor]) -> None:
        """Warn of buffers that passes change: each process changes its own, as often as it has slices."""
        names = [name for name, buffer in self._model.named_buffers() if any(buffer is one for one in changed)]
        warnings.warn(
            f"train: the forward pass changes buffers, {some(names)}, once for each slice and on each process by "
            "itself, so that the run is not the same on other numbers of processes",
            GramianWarning,
            stacklevel=2,
        )

    def begin(self) -> None:
        """Forget the sums of the step before."""
        self.sums.clear()

    def expect(self, *, last: bool) -> None:
        """Tell a divided model whether the next backward pass is the step's last, after which its ranks add up."""
        for module in self._divided:
            module.set_requires_gradient_sync(last, recurse=False)

    def add(self) -> None:
        """Move the gradients of the slice into the sums. Those of a divided model are its own affair."""
        if self._divided:
            return
        for p in self._params:
            if p.grad is not None:
                own = p.grad.to(torch.complex128 if p.grad.is_complex() else torch.float64)
                self.sums[p] = self.sums[p].add_(own) if p in self.sums else own
                p.grad = None


def clip_(grads: list[Tensor], most: float, *, divided: bool) -> None:
    """Scale the gradients so that their norm is at most `most`; where they are `divided`, this rank's parts of them.

    As torch's `clip_grad_norm_`, but with the norm in float64, which is the same however the gradients are divided.
    """
    wide = {True: torch.complex128, False: torch.float64}
    norms = [torch.linalg.vector_norm(g, dtype=wide[g.is_complex()]) for g in grads]
    square = sum((norm.square() for norm in norms), torch.zeros((), dtype=torch.float64))
    if divided:
        placement.all_reduce_sum([square])
    share = most / (float(square) ** 0.5 + 1e-6)
    if share < 1:
        torch._foreach_mul_(grads, share)
