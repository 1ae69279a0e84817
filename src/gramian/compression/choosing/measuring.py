"""What a model weighs, and the alternatives to compressing it: bfloat16, and int8 of its linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import num_samples
from gramian.block import blocks
from gramian.compression.calibration.targets import why_not
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.modules import copied, module_name, replaced
from gramian.compression.layers.quantized import Quantized, multiplies_integers
from gramian.compression.layers.rounding import rounded
from gramian.layers import operation_of
from gramian.recording.tracking import tensors_of
from gramian.samples import first_samples

__all__ = ["FORMS", "in_bfloat16", "in_int8", "num_bytes", "samples"]


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bfloat16 that takes and returns the types that the model does."""
    small = copied(model).bfloat16()
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    wide = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, torch.bfloat16), _cast(kwargs, torch.bfloat16)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, wide)

    small.register_forward_pre_hook(enter, with_kwargs=True)
    small.register_forward_hook(leave)
    return small


def in_int8(model: nn.Module) -> nn.Module:
    """A copy whose linear layers have int8 weights, a scale for each output, and multiply integers where that is right.

    The weights are rounded to the nearest integer, without calibration. Tied layers, and those that have more than a
    weight and a bias, stay as they are.
    """
    small = copied(model)
    for block in blocks(small).blocks:
        if operation_of(block.module).factors == "linear" and not why_not(block):
            w = matrix_of(block.module)
            made = Quantized(block.module, 8, w.shape[1]).set_(rounded(w, 8, w.shape[1]))
            made.integer = multiplies_integers(made.codes.device.type)
            small = replaced(small, module_name(block), made)
    return small


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"bfloat16": in_bfloat16, "int8": in_int8}
"""The forms that a model can take without being factored."""


def num_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors, a shared one once, packed ones of quantized layers included."""
    held = {id(value): value for value in tensors_of(model.state_dict(keep_vars=True).values())}
    return sum(value.numel() * value.element_size() for value in held.values())


def samples(batch: Any, num: int) -> tuple[Any, Any, int]:
    """Of a batch: its first sample, its first `num`, and how many these are."""
    num = min(num, num_samples(batch))
    return first_samples(batch, 1), first_samples(batch, num), num


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with its floating-point tensors cast, in the containers that models take and return."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):  # transformers' outputs are dicts, and are changed in place to stay what they are
        cast = {key: _cast(item, dtype) for key, item in value.items()}
        if type(value) is dict:
            return cast
        for key, item in cast.items():
            value[key] = item
        return value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value
