"""A layer whose matrix is held in integers of few bits, and computed from them when it is used."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gramian.checkpoint.packing import pack, spread, unpack
from gramian.compression.layers.factored_weight import FactoredWeight
from gramian.compression.layers.lowrank import HOOKS
from gramian.compression.layers.rounding import BITS, Codes
from gramian.errors import InputError, UnsupportedError
from gramian.layers import layout_of, operation_of

__all__ = ["Quantized", "multiplies_integers", "num_bytes_of", "pack", "unpack"]


def num_bytes_of(shape: tuple[int, int], bits: int, group: int) -> int:
    """Bytes of the codes and the scales of a matrix (m, n)."""
    m, n = shape
    return m * (bits * -(-n // 8) + 2 * -(-n // min(group, n)))


@functools.cache
def multiplies_integers(device: str) -> bool:
    """Whether products of int8 matrices are right on a device: on x86 without VNNI, pairs are summed in 16 bits.

    Args:
        device: its type.

    Returns:
        Whether the product of the largest integers is exact.

    Cost: one small product, once.
    Source: oneDNN's documentation on int8 arithmetic: `vpmaddubsw` saturates.

    >>> multiplies_integers("meta")
    False
    """
    if device == "meta":
        return False
    large = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    try:
        found = [torch._int_mm(large, sign * large.mT) for sign in (1, -1)]
    except RuntimeError:  # a device without such a product
        return False
    return all(bool((one == sign * 127**2 * 64).all()) for one, sign in zip(found, (1, -1), strict=True))


class Quantized(nn.Module):
    """A linear layer or a convolution whose matrix is held in integers of `bits` bits, with a scale for groups of them.

    The matrix is computed anew at every pass, in about the time of a product with a few dozen rows: what is saved is
    memory. With `integer = True`, a linear layer of eight bits and one scale for each row rounds its inputs to eight
    bits as they come and multiplies integers, where `multiplies_integers` says that this machine can. That is up to
    twice as fast from some dozens of rows on, and adds twice the error of the weights. The integers are not trained;
    the bias is.

    Args:
        layer: with a row in the table of layers whose operation has factors. Its options are kept; its values are not
            copied, see `set_`.
        bits: of each integer, 2 to 8.
        group: columns that share a scale; `n` or more for one scale for each row.

    Raises:
        InputError: the bits or the group are out of range.
    Cost: memory for the integers and scales.
    Source: the definition.

    >>> layer = Quantized(nn.Linear(64, 6), 4, 32)
    >>> layer.in_features, layer.weight.dtype, layer.codes.numel() + 2 * layer.scales.numel()
    (64, torch.float32, 216)
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Module, bits: int, group: int) -> None:
        if bits not in BITS or not (isinstance(group, int) and group > 0):
            raise InputError(
                f"compress: {bits!r} bits in groups of {group!r}; a code has 2 to 8 bits, a group 1 column"
            )
        super().__init__()
        layout = layout_of(layer)
        assert layout is not None
        weight = layer.get_parameter("weight")
        m, n = layout.matrices
        self._layout, self._dtype = layout, weight.dtype
        self.bits, self.group, self._integer = bits, min(group, n), False
        device = weight.device
        self.register_buffer("codes", torch.zeros(m, bits * -(-n // 8), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(m, -(-n // self.group), dtype=torch.bfloat16, device=device))
        bias: Any = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self._forward = FORWARDS[operation_of(layer).factors]
        # Code reads a layer's options; what others have set on the layer, and its hooks, stay too.
        own = vars(self)
        own.update({name: value for name, value in vars(layer).items() if name not in own})
        own.update({name: copy.copy(value) for name, value in vars(layer).items() if name in HOOKS})
        self.train(layer.training)

    @property
    def integer(self) -> bool:
        """Whether inputs are rounded and integers multiplied. Raises `UnsupportedError` where this machine cannot."""
        return self._integer

    @integer.setter
    def integer(self, value: bool) -> None:
        if value and not multiplies_integers(self.codes.device.type):
            raise UnsupportedError(
                "compress: sums of products of 8-bit integers overflow on this processor (oneDNN without VNNI). Leave "
                "integer=False: the matrix is then multiplied in floats"
            )
        self._integer = value

    @property
    def weight(self) -> Tensor:
        """The weight in the shape of the layer's own, computed only where its entries are asked for."""

        def product() -> Tensor:
            return self._layout.join(self.matrix())

        # A graph drops a product that nothing uses, and traces no tensor without storage.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return product()
        like = torch.empty(0, dtype=self._dtype, device=self.scales.device)
        return FactoredWeight(product, like, self._layout.shape)

    @property
    def about(self) -> dict[str, Any]:
        """What the integers are, for JSON: bits, group, the shape of the weight, and whether it is transposed."""
        m, n = self._layout.matrices
        places = torch.arange(m * n, device="cpu").view(m, n)
        transposed = not torch.equal(self._layout.join(places).flatten(), places.flatten())
        shape = list(self._layout.shape)
        return {"bits": self.bits, "group": self.group, "shape": shape, "transposed": transposed}

    def matrix(self, rows: Tensor | None = None) -> Tensor:
        """The matrix (m, n), in the layer's floating-point type; or some of its rows, by their numbers."""
        n = self._layout.matrices[1]
        codes, scales = (self.codes, self.scales) if rows is None else (self.codes[rows], self.scales[rows])
        return (unpack(codes, self.bits, n) * spread(scales.float(), self.group, n)).to(self._dtype)

    @torch.no_grad()
    def set_(self, codes: Codes, bias: Tensor | None = None) -> Quantized:
        """Copies integers, scales and the bias in.

        Args:
            codes: of the layer's whole matrix.
            bias: `(m,)`; by default the bias stays.

        Returns:
            The layer.
        """
        self.codes.copy_(pack(codes.codes, self.bits))
        self.scales.copy_(codes.scales)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """What the layer computed, with the matrix that the integers stand for."""
        return self._forward(self, input)

    def extra_repr(self) -> str:
        """The shape of the matrix, the bits and the group."""
        m, n = self._layout.matrices
        return f"{n}, {m}, bits={self.bits}, group={self.group}"

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        scales = self.scales
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scales.device)).dtype
        if (
            self.scales.dtype != scales.dtype
        ):  # a cast of the model is not one of the scales, which float16 may not hold
            self.scales = scales.to(self.scales.device)
        return self


def _linear(layer: Any, input: Tensor) -> Tensor:
    # torch 2.13's product of int8 matrices that share one column reads memory that is not theirs, on a CPU.
    if layer.integer and layer.bits == 8 and layer.scales.shape[1] == 1 and layer._layout.matrices[1] > 1:
        return _of_integers(layer, input)
    return functional.linear(input, layer.matrix(), layer.bias)


def _of_integers(layer: Any, input: Tensor) -> Tensor:
    """With the inputs rounded to 8 bits, a scale for each row (ZeroQuant, Yao et al. 2206.01861, §4.1)."""
    m, n = layer._layout.matrices
    rows = input.reshape(-1, n).float()
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    product = torch._int_mm((rows / scale).round().to(torch.int8), unpack(layer.codes, 8, n).mT)
    output = (product * scale * layer.scales.float().mT).to(input.dtype)
    output = output if layer.bias is None else output + layer.bias
    return output.reshape(*input.shape[:-1], m)


def _convolution(layer: Any, input: Tensor) -> Tensor:
    weight = layer._layout.join(layer.matrix())
    conv: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    return conv._conv_forward(layer, input, weight, layer.bias)  # with the options that it finds on the layer


def _table(layer: Any, input: Tensor) -> Tensor:
    return layer.matrix(input.flatten()).unflatten(0, input.shape) if input.ndim else layer.matrix(input[None])[0]


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": _linear,
    "convolution": _convolution,
    "table": _table,
}
"""How a matrix (m, n) is applied, by the `factors` of the layer's operation."""
