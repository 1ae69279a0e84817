"""Watching: runs of a model in which outputs of layers are set to zero, and what other layers then see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gramian.batch import tensors
from gramian.layers import layer_of, operation_of
from gramian.recording.hooks import hooks

__all__ = ["Watch", "channel_dim", "is_elementwise", "is_near"]

NEAR = 1e-4
"""A relative difference that is rounding: heads that are summed in another order differ by it."""


def channel_dim(layer: nn.Module, *, inputs: bool) -> int:
    """Where a layer's inputs or outputs have its channels."""
    if layer_of(layer).operation == "convolution":
        return -1 - (cast(Tensor, layer.weight).ndim - 2)  # computed by a parametrization, it is no parameter
    if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return 1
    return -1


def is_elementwise(layer: nn.Module) -> bool:
    """Whether a layer has a number for each channel: a norm (an activation may be in it), a depthwise convolution."""
    own = list(layer.parameters(recurse=False))
    held = [*own, *(t for t in layer.buffers(recurse=False) if t.ndim)]
    if not own or len(list(layer.parameters())) > len(own) or any(len(t) != len(own[0]) for t in held if t.ndim):
        return False
    depthwise = layer_of(layer).operation == "convolution" and getattr(layer, "groups", 1) == own[0].shape[0]
    return depthwise or all(t.ndim == 1 for t in own)


def is_near(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return one.shape == other.shape and float((one - other).abs().max()) <= NEAR * float(other.abs().max())


class Watch:
    """Runs of a model in which outputs of layers are set to zero, with the inputs that layers then have."""

    def __init__(self, layers: Mapping[str, nn.Module], call: Callable[[nn.Module], Tensor]) -> None:
        self.layers, self.call = layers, call
        self.model = layers[""]
        self.given: list[Tensor] = []
        self.recurrent: list[Tensor] = []
        self.order: list[str] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.output = torch.empty(0)

    def record(self) -> None:
        """One run as the model is."""
        calls: list[tuple[str, Any, Any]] = []
        handles = []
        for name, layer in self.layers.items():
            affine = operation_of(layer).factors in ("linear", "convolution")
            if affine or is_elementwise(layer):
                hook = lambda module, args, output, name=name: calls.append((name, args, output))  # noqa: E731
                handles.append(layer.register_forward_hook(hook))
            if isinstance(layer, nn.RNNBase):
                handles.append(layer.register_forward_hook(lambda *call: self.recurrent.extend(tensors(call[-1]))))
        keep = lambda module, args, kwargs: self.given.extend(t.clone() for t in tensors((args, kwargs)))  # noqa: E731
        handles.append(self.model.register_forward_pre_hook(keep, with_kwargs=True))
        with hooks(handles):
            self.output = self.call(self.model)
        names = [name for name, _, _ in calls]
        for name, args, output in calls:
            if names.count(name) == 1 and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.order.append(name)
                self.inputs[name], self.outputs[name] = args[0].clone(), output

    def run(self, zero: Mapping[str, Tensor], *, until: str) -> Tensor | None:
        """The input of a layer, with outputs of others at zero."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: Any) -> None:
            seen.append(args[0].clone())
            raise _Stopped

        with self._zeroed(zero), hooks([self.layers[until].register_forward_pre_hook(stop)]):
            try:
                self.call(self.model)
            except _Stopped:
                return seen[0]
        return None

    def all_of(self, name: str) -> Tensor:
        """The numbers of all outputs of a layer."""
        return torch.arange(self.outputs[name].shape[channel_dim(self.layers[name], inputs=False)])

    def reaches(self, consumer: str, *producers: str) -> bool:
        """Whether a layer's inputs depend on the outputs of others; so also where it then is not run."""
        into = self.run({name: self.all_of(name) for name in producers}, until=consumer)
        return into is None or bool(self.changed(consumer, into).any())

    def only_through(self, consumer: str, zero: Mapping[str, Tensor]) -> bool:
        """Whether the output is as it was where the consumer's input is put back."""
        before = self.inputs[consumer]
        back = lambda module, args: (before, *args[1:])  # noqa: E731
        with self._zeroed(zero), hooks([self.layers[consumer].register_forward_pre_hook(back)]):
            return is_near(self.call(self.model), self.output)

    def changed(self, consumer: str, into: Tensor) -> Tensor:
        """Which of a layer's inputs differ from those of the model as it is."""
        before = self.inputs[consumer]
        if before.shape != into.shape:
            return torch.ones(before.shape[channel_dim(self.layers[consumer], inputs=True)], dtype=torch.bool)
        return _differ(into, before, channel_dim(self.layers[consumer], inputs=True))

    def mixes(self, norm: str, given: Tensor) -> bool:
        """Whether all outputs of a norm differ from those of the model as it is."""
        output = self.layers[norm](given)
        return bool(_differ(output, self.outputs[norm], channel_dim(self.layers[norm], inputs=False)).all())

    @contextmanager
    def _zeroed(self, zero: Mapping[str, Tensor]) -> Iterator[None]:
        handles = []
        for name, outputs in zero.items():
            dim = channel_dim(self.layers[name], inputs=False)
            hook = lambda module, args, output, dim=dim, at=outputs: output.index_fill(  # noqa: E731
                dim, at.to(output.device), 0.0
            )
            handles.append(self.layers[name].register_forward_hook(hook))
        with hooks(handles):
            yield


def _differ(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Along a dimension, where two tensors are not near."""
    return (one - other).abs().movedim(dim, 0).flatten(1).amax(1).cpu() > NEAR * float(other.abs().max())


class _Stopped(Exception):
    """The layer that was waited for has been reached."""
