"""A model whose parameters are divided over the ranks (FSDP2), and its state as whole tensors.

A checkpoint holds whole tensors, whatever the number of ranks: it is gathered tensor by tensor, and each rank takes its
part when it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.training import agreement
from gramian.training.task import Task, calling

__all__ = ["as_parts", "gathered", "is_divided", "load_model", "optimizer_parts", "shard_", "whole_copy"]


def shard_(model: nn.Module, *, wide: bool = False) -> None:
    """Divide the parameters over all ranks: each block of a list of blocks by itself, then the rest.

    A block is gathered for its forward and backward pass alone. With one rank nothing is done. Gradients are added up
    in their own dtype, or in float64 (`wide`).
    """
    if not placement.is_distributed():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (placement.world().size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if wide else None)
    for module in (*_blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a loss is a sum over the ranks, and so is its gradient
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The items of lists of modules that hold modules themselves and share no parameter with others: called whole."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        for item in module:
            params = list(item.parameters())
            inside = Counter(id(p) for m in item.modules() for p in m._parameters.values() if p is not None)
            if params and any(True for _ in item.children()) and all(uses[i] == num for i, num in inside.items()):
                found.append(item)
    return found


def is_divided(model: nn.Module) -> bool:
    """Whether any parameter of the model is divided over the ranks."""
    return any(map(placement.is_sharded, model.parameters()))


def gathered(tree: Any) -> Any:
    """A nested value with whole tensors on rank 0; on other ranks nothing is kept. Collective where tensors are parts.

    All ranks must pass values of the same form.
    """
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(gathered, tree))
    if not isinstance(tree, Tensor) or not placement.is_sharded(tree):
        return tree
    whole = placement.whole(tree)
    return whole if agreement.first() else None


def whole_copy(model: nn.Module, task: Task) -> nn.Module:
    """The task's model with the weights and buffers of a divided one, whole on every rank. Collective."""
    copy = model
    with placement.agreed("train"), calling(task, "model()"):
        copy = task.model()
    state = model.state_dict()
    copy.load_state_dict({name: placement.whole(v) if isinstance(v, Tensor) else v for name, v in state.items()})
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in copy.named_buffers():  # also those that are in no state dict
            buffer.copy_(buffers[name])
    return copy


def as_parts(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, divided as `like` is; the tensor itself where that is whole."""
    if not placement.is_sharded(like):
        return whole
    return placement.write_whole_(torch.empty_like(like, dtype=whole.dtype, requires_grad=False), whole)


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """`load_state_dict` of whole tensors, of which each rank takes its part."""
    own = model.state_dict()
    model.load_state_dict({name: _like(own.get(name), value) for name, value in state.items()}, strict=strict)


def optimizer_parts(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state in which what has the shape of a divided parameter is divided as that is."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    known = dict(zip(saved, params, strict=False))
    entries = {
        index: {name: _like(known.get(index), value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _like(own: Any, value: Any) -> Any:
    """A value divided as a tensor of its shape is, if both are tensors."""
    fits = isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape
    return as_parts(value, own) if fits else value
