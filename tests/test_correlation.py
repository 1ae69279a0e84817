"""The second moment of a convolution's windows, from the image's autocorrelation, equals the product of the windows."""

from __future__ import annotations

import pytest
import torch

from cases import seeded
from gramian.recording.correlation import moment_of_windows, pays
from gramian.recording.windows import windows

CASES = {
    "1d": ((3, 2, 7), (3,), [(1, 1)], (1,)),
    "same": ((3, 2, 7, 8), (3, 3), [(1, 1), (1, 1)], (1, 1)),
    "even and asymmetric": ((2, 3, 9, 8), (3, 2), [(0, 0), (1, 0)], (1, 1)),
    "dilated": ((2, 3, 9, 11), (3, 3), [(2, 2), (1, 3)], (2, 2)),
    "3d": ((2, 2, 5, 6, 7), (3, 2, 3), [(1, 1), (0, 1), (3, 3)], (1, 1, 1)),
    "padded beyond the kernel": ((2, 2, 9, 9), (5, 5), [(6, 6), (2, 2)], (1, 1)),
    "valid": ((2, 3, 6, 6), (3, 3), [(0, 0), (0, 0)], (1, 1)),
    "one output": ((2, 3, 3, 3), (3, 3), [(0, 0), (0, 0)], (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_moment_of_the_windows(name: str, scale: float, dtype: torch.dtype) -> None:
    shape, kernel, pads, dilation = CASES[name]
    x = (1 + torch.randn(shape, generator=seeded(0), dtype=torch.float64)) * scale
    x = x.to(dtype)
    rows = windows(x.double(), kernel, (1,) * len(kernel), pads, dilation).flatten(0, len(kernel)).flatten(1)
    total, first, count, unit = moment_of_windows(x, kernel, pads, dilation)
    unit = 1.0 if unit is None else unit.double()
    wanted = rows.T @ rows
    tolerance = 30 * torch.finfo(dtype).eps
    assert (total.double() * unit * unit - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (first * unit - rows.sum(0)).abs().max() <= tolerance * rows.abs().sum(0).max()
    assert count == len(rows)


def test_is_taken_where_it_is_less_work() -> None:
    ones, same = (1, 1), [(1, 1), (1, 1)]
    assert pays((64, 16, 32, 32), (3, 3), same, ones)
    assert not pays((64, 16, 32, 32), ones, [(0, 0), (0, 0)], ones)
    assert not pays((1, 16, 4, 4), (3, 3), same, ones)
    assert not pays((0, 16, 32, 32), (3, 3), same, ones)
