"""Parameters that are zero, for a while with other values: what they multiply shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["drawn_anew", "unzeroed"]

# Size of the values.
SIZE = 0.1


@contextmanager
def drawn_anew(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A context in which parameters of zeros have random values.

    Args:
        parameters: which are zero, and are again afterwards.
    """
    zeros, generator = list(parameters), torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in zeros:
                p.copy_(SIZE * torch.randn(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


@contextmanager
def unzeroed(model: nn.Module) -> Iterator[bool]:
    """A context in which parameters that are zero have random values; gives whether there are any.

    Args:
        model: its zeros are put back.
    """
    zeros = [p for p in model.parameters() if p.numel() and not bool(p.any())]
    with drawn_anew(zeros):
        yield bool(zeros)
