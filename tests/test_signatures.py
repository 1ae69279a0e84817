"""The checks of signatures that the other tests rely on do refuse what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import beartype
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from cases import untyped
from gramian.layout import Layout, num_axes
from gramian.linalg.products import syrk
from signatures import checked

if TYPE_CHECKING:
    from collections import ChainMap


def check(of):
    return checked(of, typechecker=beartype.beartype)


@check
def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], *, times: int = 1) -> Float[Tensor, "m n"]:
    return times * (a @ b if times else b)


@check
def plain(count: int, *, of: list[str] | None = None, hidden: ChainMap | None = None) -> str:
    """`hidden` is for pyright alone."""
    return "" if count else count


@check
@dataclass
class Record:
    count: int
    square: Float[Tensor, "n n"]

    @check
    def times(self, factor: float) -> Tensor:
        return factor * self.square


WRONG = [
    lambda: product(torch.ones(2, 3), torch.ones(2, 3)),
    lambda: product(torch.ones(2, 3), torch.ones(3, 4), times=0),
    lambda: product(torch.ones(2, 3), torch.ones(3, 4), times="1"),
    lambda: plain("1"),
    lambda: plain(1, of=[2]),
    lambda: plain(0),
    lambda: Record("1", torch.ones(2, 2)),
    lambda: Record(1, torch.ones(2, 3)),
    lambda: Record(1, torch.ones(2, 2)).times("2"),
]


@pytest.mark.parametrize("call", WRONG)
def test_what_does_not_fit_is_refused(call) -> None:
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        call()
    with untyped():
        try:
            call()
        except (TypeCheckError, BeartypeCallHintViolation):
            raise
        except Exception:  # what Python or torch makes of it
            pass


def test_what_fits_passes() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4), times=2).shape == (2, 4)
    assert plain(1, of=["a"], hidden=3) == ""
    assert Record(1, torch.ones(2, 2)).times(2.0).sum() == 8


def test_the_modules_of_the_library_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        syrk(torch.ones(3))
    with pytest.raises(BeartypeCallHintViolation):
        num_axes(3)
    with pytest.raises(BeartypeCallHintViolation):
        Layout(3, (2, 2))
