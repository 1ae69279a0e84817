"""What a forward pass may change, kept and put back: values, storage, attributes and gradients."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gramian.seeding import kept_random

__all__ = ["Kept", "keeping", "own_gradients"]

# How far objects and containers in a module's attributes are followed.
DEPTH = 4

_CONTAINERS = (dict, OrderedDict, list, set)

# Integers of the same size, by which values are compared bit for bit: NaN equals itself, and -0 is not 0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept:
    """What objects hold, to be put back after code of the user's has run on them.

    Of modules: parameters and buffers bit for bit in their storage, their attributes, and what their classes hold as
    data, such as counters, where they are the user's own. Of tensors, arrays and
    generators: their values. Containers, and objects of the user's own classes, are followed. The objects themselves
    stay: only what is in them is put back. Tensors without values of their own here (sharded, sparse, quantized, on the
    meta device) are put back as attributes, and their values are not; neither are attributes of `torch.jit` modules.

    Args:
        objects: modules, batches, functions.
        but: a module that is left out, with all that is in it, where these hold it.

    Cost: a copy of all tensors, in main memory.

    >>> layer = nn.Linear(2, 2)
    >>> layer.calls = [1]
    >>> kept = Kept(layer)
    >>> layer.calls.append(2)
    >>> layer.weight.data = torch.zeros(3)
    >>> kept.put_back()
    >>> layer.calls, tuple(layer.weight.shape)
    ([1], (2, 2))
    """

    def __init__(self, *objects: Any, but: nn.Module | None = None) -> None:
        out = () if but is None else (*but.modules(), *but.parameters(), *but.buffers())
        self._known: dict[int, Any] = {id(one): one for one in out}  # so that their ids are not given to others
        self._values: dict[int, Tensor] = {}
        self._undo: list[Callable[[], Any]] = []
        self._empty: list[Any] = []  # containers, of which a module has a dozen
        for value in objects:
            self._keep(value, 0)

    def put_back(self) -> None:
        """Everything as it was."""
        for undo in self._undo:
            undo()
        for container in self._empty:
            if container:
                container.clear()

    def changed(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The parameters and buffers of a model whose values are others now, with those that they had, in main memory.

        Args:
            model: among the objects.
        """
        kept = [(t, self._values[id(t)]) for t in (*model.parameters(), *model.buffers()) if id(t) in self._values]
        return [(t, old) for t, old in kept if t.shape == old.shape and not _same(t.detach(), old.to(t.device))]

    def _keep(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, str, bytes, type)) or id(value) in self._known:
            return
        self._known[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, MethodType):
            self._keep(value.__self__, depth + 1)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # a cell without contents yet
                    self._keep(cell.cell_contents, depth + 1)
        elif depth < DEPTH:
            self._holder(value, depth)

    def _tensor(self, t: Tensor) -> None:
        if t.is_leaf:
            self._undo.append(partial(_as_leaf, t, t.requires_grad))
        plain = type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.layout is torch.strided
        if not plain or t.is_meta or t.is_quantized or t.is_nested:
            return
        held = t.data  # of the same storage, with a count of versions of its own
        values = self._values[id(t)] = held.to("cpu", copy=True)

        def undo() -> None:
            if (t.data_ptr(), t.shape, t.stride(), t.dtype) != (held.data_ptr(), held.shape, held.stride(), held.dtype):
                t.data = held
            now = values.to(held.device)
            if not _same(held, now):
                held.copy_(now)

        self._undo.append(undo)

    def _module(self, module: nn.Module) -> None:
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if is_lazy(t):
                return  # a lazy module becomes another by its first call
            self._keep(t, 0)
        if isinstance(module, torch.jit.ScriptModule):
            for child in module.children():
                self._keep(child, 0)
            return
        self._attributes(module, 0)
        self._class(type(module))

    def _class(self, kind: type) -> None:
        """What a class of the user's, and those it is made of, hold for all their objects: counters and caches."""
        for one in kind.__mro__:
            if not _is_own(one) or id(one) in self._known:
                continue
            self._known[id(one)] = one
            kept = {k: v for k, v in vars(one).items() if not k.startswith("__") and _is_value(v)}

            def undo(one: type = one, kept: dict[str, Any] = kept) -> None:
                now = vars(one)
                for k, v in kept.items():
                    if k not in now or now[k] is not v:
                        setattr(one, k, v)
                for k in [k for k, v in now.items() if not k.startswith("__") and k not in kept and _is_value(v)]:
                    delattr(one, k)

            self._undo.append(undo)
            for value in kept.values():
                self._keep(value, 1)

    def _attributes(self, owner: Any, depth: int) -> None:
        attributes = vars(owner)
        kept = dict(attributes)

        def undo() -> None:
            if attributes.keys() != kept.keys() or any(attributes[k] is not v for k, v in kept.items()):
                attributes.clear()
                attributes.update(kept)

        self._undo.append(undo)
        for value in kept.values():
            self._keep(value, depth + 1)

    def _holder(self, value: Any, depth: int) -> None:
        """A container, an array, or an object of a class of the user's."""
        if type(value) in _CONTAINERS and not value:
            self._empty.append(value)
            return
        if isinstance(value, MutableMapping):
            held = dict(value)
            self._contents(value, held, list(held.items()), lambda: list(value.items()), value.update)
            inside = list(held.values())
        elif isinstance(value, (MutableSequence, MutableSet, deque)):
            inside = list(value)
            add = value.update if isinstance(value, set) else getattr(value, "extend", None)
            if add is None:
                return
            self._contents(value, inside, inside, lambda: list(value), add)
        elif isinstance(value, (tuple, frozenset)):
            inside = list(value)
        elif isinstance(value, np.ndarray):
            self._undo.append(_array(value))
            return
        elif isinstance(value, np.random.Generator):
            source = value.bit_generator
            self._undo.append(lambda state=source.state: setattr(source, "state", state))
            return
        else:
            if _is_own(value):
                self._attributes(value, depth)
            return
        for part in inside:
            self._keep(part, depth + 1)

    def _contents(self, value: Any, held: Any, items: list, read: Callable[[], list], add: Callable) -> None:
        def undo() -> None:
            now = read()
            if len(now) != len(items) or any(not _identical(a, b) for a, b in zip(now, items, strict=True)):
                value.clear()
                add(held)

        self._undo.append(undo)


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:  # of a mapping
        return a[0] is b[0] and a[1] is b[1]
    return a is b


def _is_own(value: Any) -> bool:
    if isinstance(value, (ModuleType, BuiltinFunctionType, torch.optim.Optimizer)) or not hasattr(value, "__dict__"):
        return False
    package = (value if isinstance(value, type) else type(value)).__module__.partition(".")[0]
    return package not in ("torch", "gramian", "numpy", "builtins", "functools", "weakref", "threading", "logging")


def _is_value(value: Any) -> bool:
    """Whether an attribute of a class is data, and not a method, a property or a class."""
    return not (callable(value) or hasattr(type(value), "__get__"))


def _as_leaf(t: Tensor, requires_grad: bool) -> None:
    if not t.is_leaf:  # it was written to within a graph
        t.detach_()
    if t.requires_grad != requires_grad:
        t.requires_grad_(requires_grad)


def _same(one: Tensor, other: Tensor) -> bool:
    bits = _BITS.get(one.dtype.itemsize)
    return torch.equal(one, other) if bits is None else torch.equal(one.view(bits), other.view(bits))


def _array(value: Any) -> Callable[[], None]:
    held = value.copy()

    def undo() -> None:
        if value.tobytes() != held.tobytes():
            value[...] = held

    return undo if value.flags.writeable else _nothing


def _nothing() -> None:
    pass


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter has a gradient at first; then each has again the one that it had.

    Args:
        model: any module.

    Returns: the context manager.
    Cost: a pass over the parameters.

    >>> layer = nn.Linear(1, 1)
    >>> with own_gradients(layer):
    ...     layer(torch.ones(1, 1)).sum().backward()
    >>> layer.weight.grad is None
    True
    """
    gradients = [(p, p.grad) for p in model.parameters() if p.is_leaf]
    try:
        for p, _ in gradients:
            p.grad = None
        yield
    finally:
        for p, grad in gradients:
            p.grad = grad


@contextmanager
def keeping(model: nn.Module, *others: Any) -> Iterator[Kept]:
    """A context after which a model, and what else is given, are as they were, with all random states.

    Within it, no parameter has a gradient of the user's; then each has its own again.

    Args:
        model: whose parameters' `.grad` are kept, too.
        others: as `Kept` takes them.

    Returns: the context manager, which gives the `Kept`.
    Cost: a copy of the parameters and buffers.

    >>> layer = nn.BatchNorm1d(2)
    >>> with keeping(layer):
    ...     layer(torch.ones(4, 2)).sum().backward()
    >>> layer.weight.grad is None, int(layer.num_batches_tracked)
    (True, 0)
    """
    with own_gradients(model), kept_random():
        kept = Kept(model, *others)
        try:
            yield kept
        finally:
            kept.put_back()
