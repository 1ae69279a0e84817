"""Two layers of low rank in place of one: `x` through R and then L; of a table, rows of L and then R."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from gramian.compression.layers.factored_weight import FactoredWeight
from gramian.layers import layout_of, operation_of

__all__ = ["FACTORS", "LowRank", "TransposedLinear", "matrix_of"]


class TransposedLinear(nn.Module):
    """`y = x W` with W of shape (inputs, outputs): so a table and a head share their factors.

    Args:
        in_features, out_features: the sides of W.
        device, dtype: of W.

    Cost: memory for an uninitialized matrix.
    Source: the definition.

    >>> TransposedLinear(2, 3)(torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """

    def __init__(self, in_features: int, out_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The product."""
        return functional.linear(input, self.weight.mT)

    def extra_repr(self) -> str:
        """The sides."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LowRank(nn.Sequential):
    """A linear layer, a convolution or a table as two of rank `rank`: `W ≈ L R`, the first without a bias.

    Of a table, the first layer has the rows of L, and the second multiplies by R.

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
            layout, table, factors = layer._layout, layer.is_table, _fewer(layer, rank)
        else:
            layout = layout_of(layer)
            assert layout is not None
            kind = operation_of(layer).factors
            table, factors = kind == "table", FACTORS[kind](layer, rank, layout.matrices)
        super().__init__(*factors)
        self._layout, self.is_table = layout, table
        # Code reads a layer's options, as it reads its weight: Whisper the stride, others in_features. What others have
        # set on the layer, and its hooks, stay too.
        own = vars(self)
        own.update({name: value for name, value in vars(layer).items() if name not in own})
        own.update({name: copy.copy(value) for name, value in vars(layer).items() if name in HOOKS})
        parameter = next(layer.parameters())
        self.train(layer.training).requires_grad_(parameter.requires_grad)

    @property
    def sides(self) -> tuple[Any, Any]:
        """The layers that hold L and R."""
        first, second = self
        return (first, second) if self.is_table else (second, first)

    @property
    def names(self) -> tuple[str, str]:
        """The names of L and R among the parameters."""
        return ("0.weight", "1.weight") if self.is_table else ("1.weight", "0.weight")

    @property
    def rank(self) -> int:
        """The number of columns of L and rows of R."""
        return self.sides[0].weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """`L R` in the shape of the layer's own weight, multiplied out only where its entries are asked for."""
        second, first = self.sides  # whose weights may be products, or of integers, themselves
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
        values = dict(zip(self.names, (left, right), strict=True)) | ({} if bias is None else {"1.bias": bias})
        for name, value in values.items():
            parameter = self.get_parameter(name)
            parameter.copy_(value.reshape(parameter.shape))

    def tie_(self, other: LowRank, bias: nn.Parameter | None) -> LowRank:
        """Takes the factors of another layer, whose weight the dense layer shared, and its own dense layer's bias.

        Args:
            other: of the same rank; the parameters become those of both.
            bias: the parameter itself, which others may share too.

        Returns:
            This layer.
        """
        for mine, theirs in zip(self.sides, other.sides, strict=True):
            mine.weight = theirs.weight
        if bias is not None:
            cast("Any", self[1]).bias = bias
        return self


HOOKS = frozenset({
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
})  # fmt: skip
"""What a module keeps of the hooks that see its inputs, outputs and their gradients."""


def _fewer(layer: LowRank, rank: int) -> tuple[nn.Module, nn.Module]:
    """The two layers of a factored one, again at another rank: the second is linear, or has a kernel of size one."""
    first, second = copy.deepcopy(layer[0]), copy.deepcopy(layer[1])
    (to_left, to_right), (left, right) = ((second, first), layer.sides)
    if layer.is_table:
        to_left, to_right = first, second
    to_left.weight = nn.Parameter(torch.empty_like(left.weight[:, :1]).expand(-1, rank, *left.weight.shape[2:]).clone())
    to_right.weight = nn.Parameter(torch.empty_like(right.weight[:1]).expand(rank, *right.weight.shape[1:]).clone())
    for one, names in (
        (first, ("out_features", "out_channels", "embedding_dim")),
        (second, ("in_features", "in_channels")),
    ):
        one.__dict__[next(name for name in names if hasattr(one, name))] = rank
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


def _table(layer: Any, rank: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A table of `rank` columns, and the matrix that its rows are multiplied by."""
    (rows, n), kind = shape, _kind_of(layer)
    options = {name: getattr(layer, name) for name in ("padding_idx", "scale_grad_by_freq", "sparse")}
    return skip_init(nn.Embedding, rows, rank, **options, **kind), skip_init(TransposedLinear, rank, n, **kind)


def _kind_of(layer: nn.Module) -> dict[str, Any]:
    weight = layer.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def _with_bias(layer: nn.Module, kind: dict[str, Any]) -> dict[str, Any]:
    return kind | {"bias": getattr(layer, "bias", None) is not None}


FACTORS: dict[str, Callable[[Any, int, tuple[int, ...]], tuple[nn.Module, nn.Module]]] = {
    "linear": _linear,
    "convolution": _convolution,
    "table": _table,
}
"""The two layers of a rank that replace a dense one of shape (m, n), by the `factors` of its operation."""


def matrix_of(layer: nn.Module) -> Tensor:
    """The layer's whole matrix (m, n), its rows in the order of the outputs, of a table in that of its rows.

    Of a factored layer it is the product.
    """
    if isinstance(layer, LowRank):
        left, right = (factor.weight.detach() for factor in layer.sides)
        return (left.flatten(1).double() @ right.flatten(1).double()).to(left.dtype)
    layout = layout_of(layer)
    assert layout is not None
    return layout.split(layer.get_parameter("weight").detach())
