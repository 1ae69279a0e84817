"""The weight of a factored or quantized layer, which is computed only where its entries are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gramian.errors import UnsupportedError

__all__ = ["FactoredWeight"]

_ABOUT = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda",
                 "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_mkldnn", "is_nested")
    if hasattr(getattr(Tensor, name), "__get__")
) | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_complex,
     Tensor.is_floating_point, Tensor.get_device, Tensor.stride, Tensor.is_contiguous, Tensor.__len__}  # fmt: skip
"""What is answered without the product."""


class FactoredWeight(Tensor):
    """A tensor of the weight's shape, dtype and device, in whose place every function computes with `L R`.

    Models read `layer.weight.dtype` at every call (T5), which must not cost a product.

    Args:
        product: computes `L R` in the shape of the layer's weight.
        like: a factor, whose dtype and device the weight has.
        shape: of the weight.

    Raises:
        UnsupportedError: an operation in place, which would change a product that nobody keeps.
    Cost: none, until its entries are asked for; then one product of the factors, each time.

    >>> weight = FactoredWeight(lambda: torch.ones(2, 1) @ torch.ones(1, 3), torch.ones(1), (2, 3))
    >>> weight.shape, weight.dtype, weight.sum()
    (torch.Size([2, 3]), torch.float32, tensor(6.))
    """

    product: Callable[[], Tensor]
    # transformers' `_init_weights` of some models draws `module.q_proj.weight`, unless it is known to be loaded.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, product: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...]) -> FactoredWeight:
        """A tensor without storage."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.product = product
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answers what is known, and multiplies out for everything else."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], cls):
            if getattr(func, "__self__", None) is Tensor.data and name == "__get__":
                return args[0]  # so that what is written to `.data` is refused too
            if (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__"):
                raise UnsupportedError(
                    f"LowRank.weight: {name} would change a product that nobody keeps. Change the factors, "
                    "layer[0].weight and layer[1].weight, or use layer.set_; of a Quantized layer, use layer.set_"
                )
        args, given = tree_map_only(cls, lambda one: one.product(), (args, {**kwargs}))
        return func(*args, **given)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Multiplies out for what is called below Python's functions."""
        args, kwargs = tree_map_only(cls, lambda one: one.product().detach(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)
