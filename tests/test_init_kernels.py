"""Isometric kernels: energy of the output, and every input pixel that the geometry reaches has an influence."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.init.kernels import isometry
from gramian.layers import layout_of

# name: layer, size of its images, whether it is an exact isometry or projection
KERNELS = {
    "vit patch 16": (nn.Conv2d(3, 32, 16, stride=16), (32, 32), True),
    "swin patch 4, wide": (nn.Conv2d(3, 96, 4, stride=4), (12, 12), True),
    "convnext step 2": (nn.Conv2d(8, 16, 2, stride=2), (6, 6), True),
    "resnet stem 7×7/2": (nn.Conv2d(3, 64, 7, stride=2, padding=3), (16, 16), False),
    "resnet step 3×3/2": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (10, 10), False),
    "step 3×3/2, wide": (nn.Conv2d(2, 64, 3, stride=2, padding=1), (10, 10), False),
    "step 3×3/2, narrow": (nn.Conv2d(16, 4, 3, stride=2, padding=1), (10, 10), False),
    "strides differ": (nn.Conv2d(4, 16, (3, 4), stride=(1, 4), padding=(1, 0)), (5, 8), True),
    "stride and dilation": (nn.Conv2d(4, 16, 3, stride=2, padding=2, dilation=2), (17, 17), False),
    "stride and groups": (nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), (8, 8), False),
    "even, same": (nn.Conv2d(4, 6, 4, padding="same"), (6, 7), True),
    "odd, same, dilated": (nn.Conv1d(4, 6, 5, padding="same", dilation=3), (13,), True),
    "even, same, dilated": (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (40,), False),
    "even, padded on both sides": (nn.Conv1d(4, 6, 4, padding=2), (9,), True),
    "odd, same, reflect": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (6, 7), True),
    "no padding": (nn.Conv2d(4, 16, 3), (16, 16), False),
    "too little padding": (nn.Conv1d(4, 8, 5, padding=1), (12,), False),
    "causal": (nn.Conv1d(4, 6, 4, padding=3), (9,), True),
    "1×1": (nn.Conv2d(4, 8, 1), (5, 6), True),
    "3d": (nn.Conv3d(2, 24, (2, 4, 4), stride=(2, 4, 4)), (4, 8, 8), False),
    "transposed, patches": (nn.ConvTranspose2d(16, 8, 2, stride=2), (5, 5), True),
    "transposed, overlapping": (nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), (6, 6), False),
    "transposed, stride one": (nn.ConvTranspose2d(6, 8, 3, padding=1), (6, 6), True),
    "transposed, groups": (nn.ConvTranspose1d(8, 8, 4, stride=4, groups=2), (6,), True),
}


def jacobian(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """(outputs, inputs) of the linear map, by its application to unit vectors."""
    channels = layer.in_channels
    eye = torch.eye(channels * math.prod(size)).view(-1, channels, *size)
    with torch.no_grad():
        return layer(eye).flatten(1).T.double()


def reached_inputs(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Which inputs the geometry reaches: those that a kernel of ones sees."""
    ones = copy.deepcopy(layer)
    with torch.no_grad():
        ones.weight.fill_(1.0)
        ones.bias.zero_()
    return (jacobian(ones, size) != 0).any(0)


@pytest.mark.parametrize("name", KERNELS)
def test_every_pixel_counts_and_energy_is_kept(name: str) -> None:
    layer, size, exact = KERNELS[name]
    reached = reached_inputs(layer, size)
    gm.init.isometric_(layer)
    j = jacobian(layer, size)
    assert torch.equal((j != 0).any(0), reached)
    assert bool(reached.all()) or max(layer.dilation) > 1
    # The mean squared singular value over the smaller side: one but for what the padding cuts off at the border.
    mean = float(j.square().sum()) / min(len(j), int(reached.sum()))
    assert 0.6 < mean < 1.15
    sigma = torch.linalg.svdvals(j)
    nonzero = sigma[sigma > 1e-6]
    if exact:
        torch.testing.assert_close(nonzero, torch.ones_like(nonzero), rtol=0, atol=1e-5)
    else:
        assert float(nonzero.max()) < 3.0  # no direction is blown up


@pytest.mark.parametrize("name", KERNELS)
def test_white_images_keep_their_energy(name: str) -> None:
    layer, size, _ = KERNELS[name]
    reached = reached_inputs(layer, size)
    gm.init.isometric_(layer)
    x = torch.randn(400, layer.in_channels, *size, generator=seeded(0)) * reached.view(-1, *size)
    with torch.no_grad():
        y = layer(x)
    wanted = min(1.0, y[0].numel() / int(reached.sum()))  # a projection keeps its share
    assert 0.6 * wanted < float(y.square().sum() / x.square().sum()) < 1.15 * wanted


def test_the_kernel_is_orthogonal_over_the_whole_patch() -> None:
    for layer in (nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.Conv2d(3, 96, 4, stride=4), nn.Conv2d(8, 16, 3)):
        gm.init.isometric_(layer)
        w = layer.weight.detach().flatten(1).double()
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        eye = torch.eye(len(gram), dtype=torch.float64)
        torch.testing.assert_close(gram / gram[0, 0], eye, rtol=0, atol=1e-5)


def test_padding_same_keeps_the_image_in_its_place() -> None:
    """With a square Q, a kernel of any size and `padding="same"` maps pixel to pixel."""
    for size in (2, 3, 4, 5):
        for dilation in (1, 2):
            if dilation * (size - 1) // 2 % dilation:
                continue  # no tap sees the pixel itself
            layer = nn.Conv1d(3, 3, size, padding="same", dilation=dilation, bias=False)
            gm.init.isometric_(layer)
            q = layer.weight.detach().sum(-1)
            x = torch.randn(2, 3, 11, generator=seeded(0))
            torch.testing.assert_close(layer(x), torch.einsum("oi,bit->bot", q, x))


def test_fused_parts_of_unequal_size_have_a_matrix_each() -> None:
    layer = nn.Linear(16, 32, bias=False)
    layout = gm.block.Layout("(n o) i -> n o i", (32, 16), {"o": 8}, parts=("q", "k", "v"), rows=(16, 8, 8))
    w = isometry(layer, layout, layer.weight.detach(), seeded(0))
    for part in layout.pieces(w):
        torch.testing.assert_close(part @ part.T, torch.eye(len(part)), rtol=0, atol=1e-5)


def test_the_layout_of_a_transposed_convolution_is_not_asked() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2, bias=False)
    gm.init.isometric_(layer)
    layout = layout_of(layer)
    assert layout is not None
    w = layout.split(layer.weight.detach())
    assert w.shape == (2, 27, 2)
    torch.testing.assert_close(w.mT @ w, torch.eye(2).expand(2, 2, 2), rtol=0, atol=1e-5)
