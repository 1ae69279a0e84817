"""Two layers of low rank in place of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from gramian.compression.factored_weight import FactoredWeight
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
        if isinstance(layer, LowRank):
            layout, factors = layer._layout, _fewer(layer, rank)
        else:
            layout = layout_of(layer)
            assert layout is not None
            factors = FACTORS[operation_of(layer).factors](layer, rank, layout.matrices)
        super().__init__(*factors)
        self._layout = layout
        # Code reads a layer's options, as it reads its weight: Whisper the stride, others in_features. What others have
        # set on the layer, and its hooks, stay too.
        own = vars(self)
        own.update({name: value for name, value in vars(layer).items() if name not in own})
        own.update({name: copy.copy(value) for name, value in vars(layer).items() if name in HOOKS})
        parameter = next(layer.parameters())
        self.train(layer.training).requires_grad_(parameter.requires_grad)

    @property
    def rank(self) -> int:
        """The number of columns of L and rows of R."""
        return self[1].weight.shape[1]  # type: ignore[union-attr, return-value]

    @property
    def weight(self) -> Tensor:
        """`L R` in the shape of the layer's own weight, multiplied out only where its entries are asked for."""
        first, second = self  # whose weights may be products, or of integers, themselves
        left: Any = second.weight

        def product() -> Tensor:
            right: Any = first.weight
            return self._layout.join(left.flatten(1) @ right.flatten(1))

        # A graph drops a product that nothing uses, and traces no tensor without storage.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return product()
        return FactoredWeight(product, left, self._layout.shape)

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


HOOKS = frozenset({
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
})  # fmt: skip
"""What a module keeps of the hooks that see its inputs, outputs and their gradients."""


def _fewer(layer: LowRank, rank: int) -> tuple[nn.Module, nn.Module]:
    """The two layers of a factored one, again at another rank: the second is linear, or has a kernel of size one."""
    first, second = copy.deepcopy(layer[0]), copy.deepcopy(layer[1])
    left, right = layer.get_parameter("1.weight"), layer.get_parameter("0.weight")
    first.weight = nn.Parameter(torch.empty_like(right[:1]).expand(rank, *right.shape[1:]).clone())
    second.weight = nn.Parameter(torch.empty_like(left[:, :1]).expand(-1, rank, *left.shape[2:]).clone())
    first.__dict__["out_features" if hasattr(first, "out_features") else "out_channels"] = rank
    second.__dict__["in_features" if hasattr(second, "in_features") else "in_channels"] = rank
    return first, second


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
    """The layer's whole matrix (m, n), its rows in the order of the outputs; of a factored layer the product."""
    if isinstance(layer, LowRank):
        left, right = (cast("Any", factor).weight.detach() for factor in (layer[1], layer[0]))
        return (left.flatten(1).double() @ right.flatten(1).double()).to(left.dtype)
    layout = layout_of(layer)
    assert layout is not None
    return layout.split(layer.get_parameter("weight").detach())
