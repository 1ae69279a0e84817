"""Two layers of low rank in place of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from gramian.layers import layout_of, operation_of

__all__ = ["FACTORS", "LowRank", "matrix_of"]


class LowRank(nn.Sequential):
    """A linear layer or a convolution as two of rank `rank`: `W ≈ L R`, the first without a bias.

    Args:
        layer: the dense layer, with a row in the table of layers whose operation has factors. Its options are kept;
            its values are not copied, see `set_`.
        rank: columns of L and rows of R.

    Raises: nothing of its own.
    Cost: memory for two uninitialized layers; nothing is drawn from a random generator.
    Source: the definition.

    >>> low = LowRank(nn.Linear(9, 6), 2)
    >>> low.rank, tuple(low.weight.shape)
    (2, (6, 9))
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        layout = layout_of(layer)
        assert layout is not None
        super().__init__(*FACTORS[operation_of(layer).factors](layer, rank, layout.matrices))
        self._layout = layout
        # Code reads a layer's options, as it reads its weight: Whisper the stride, others in_features.
        options = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        vars(self).update(options)
        weight = layer.get_parameter("weight")
        self.train(layer.training).requires_grad_(weight.requires_grad)

    @property
    def rank(self) -> int:
        """The number of columns of L and rows of R."""
        return self.get_parameter("1.weight").shape[1]

    @property
    def weight(self) -> Tensor:
        """`L R` in the shape of the layer's own weight, for code that reads a layer's weight (torch's encoder does)."""
        left, right = self.get_parameter("1.weight"), self.get_parameter("0.weight")
        return self._layout.join(left.flatten(1) @ right.flatten(1))

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return dict(self.named_parameters()).get("1.bias")

    @torch.no_grad()
    def set_(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        """Copies the factors and the bias in.

        Args:
            left: L, `(m, rank)`.
            right: R, `(rank, n)`.
            bias: `(m,)`, or `None`.
        """
        values = {"0.weight": right, "1.weight": left} | ({} if bias is None else {"1.bias": bias})
        for name, value in values.items():
            parameter = self.get_parameter(name)
            parameter.copy_(value.reshape(parameter.shape))


def _linear(layer: nn.Module, rank: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    (m, n), kind = shape, _kind_of(layer)
    # Uninitialized, so that nothing is drawn from the global generator.
    return skip_init(nn.Linear, n, rank, bias=False, **kind), skip_init(nn.Linear, rank, m, **_with_bias(layer, kind))


def _convolution(layer: Any, rank: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A convolution to `rank` channels with the layer's own kernel, and one by a kernel of size one."""
    conv, kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[layer.weight.ndim], _kind_of(layer)
    options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    first = skip_init(conv, layer.in_channels, rank, layer.kernel_size, bias=False, **options, **kind)
    return first, skip_init(conv, rank, layer.out_channels, 1, **_with_bias(layer, kind))


def _kind_of(layer: nn.Module) -> dict[str, Any]:
    weight = layer.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def _with_bias(layer: nn.Module, kind: dict[str, Any]) -> dict[str, Any]:
    return kind | {"bias": getattr(layer, "bias", None) is not None}


FACTORS: dict[str, Callable[[Any, int, tuple[int, ...]], tuple[nn.Module, nn.Module]]] = {
    "linear": _linear,
    "convolution": _convolution,
}
"""The two layers of a rank that replace a dense one of shape (m, n), by the `factors` of its operation."""


def matrix_of(layer: nn.Module) -> Tensor:
    """The layer's whole matrix (m, n), its rows in the order of the outputs."""
    layout = layout_of(layer)
    assert layout is not None
    return layout.split(layer.get_parameter("weight").detach())
