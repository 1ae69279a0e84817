"""What the table says of a parameter of a model: by its module's class, its name, and the config around it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from gramian.layers.classes import Layer, layer_of, layout_of
from gramian.layers.configs import declared_family
from gramian.layers.names import find_named
from gramian.layers.roles import Role, acts_by_channel, role_by_name, weight_name
from gramian.layout import Layout

__all__ = ["Lookup", "Owned", "host_of", "is_lazy", "look_up", "match_pattern"]


SCALE = "a scale of the parametrized weight"
"""Why a part of a parametrized weight holds no matrix of its own."""


class Lookup(NamedTuple):
    """The layout of a parameter, `None` where it holds no matrix; its role, and why."""

    layout: Layout | None
    role: Role
    reason: str


class Owned(NamedTuple):
    """A parameter, called `local` in the `module` whose class says what it is, under the config that holds there."""

    name: str
    module: nn.Module
    local: str
    parameter: Tensor
    config: Mapping[str, Any]

    @property
    def full(self) -> str:
        """The name that the weight has without a parametrization."""
        prefix = weight_name(self.name).rpartition(".")[0]
        return f"{prefix}.{self.local}" if prefix else self.local


def look_up(use: Owned) -> Lookup:
    """What the table says of a parameter: by its module's class, refined by its name; or by its name alone."""
    parameter, local, module = use.parameter, use.local, use.module
    if not local:
        return Lookup(None, "hidden", f"{use.name.rpartition('.')[2]}: {SCALE}")
    if is_lazy(parameter):
        return Lookup(None, "hidden", "not initialized yet: run a batch through the lazy module first")
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        dtype = str(parameter.dtype).removeprefix("torch.")
        return Lookup(None, "hidden", f"{local}: {dtype}, not real numbers to compute with")
    shape = tuple(parameter.shape)
    row = layer_of(module)
    weight = row.weight(local, parameter.ndim)
    if weight is not None and row.operation != "linear":
        return _of_class(use, row, weight[2])
    if parameter.ndim >= 2:
        like = weight[0] if weight is not None else ""
        declared = declared_family(module)
        config = {**use.config, "model_type": declared} if declared else use.config
        named = find_named(use.full, shape, config, like=like)
        if named is not None:
            return Lookup(named.layout, named.role or "hidden", named.reason)
    if weight is not None:
        return _of_class(use, row, weight[2])
    kind = type(module).__name__
    if parameter.ndim < 2:
        what = "vector" if parameter.ndim else "scalar"
        return Lookup(None, "hidden", f"{'bias' if 'bias' in local else local}: a {what}")
    if row.operation == "elementwise":
        return Lookup(None, "elementwise", f"{local} of {kind}: acts element by element")
    if parameter.ndim == 2:
        role = role_by_name(use.full, shape, getattr(module, "bias", None) is not None and local == "weight")
        if role == "hidden" and (coefficients := acts_by_channel(use.full, (shape[0], shape[1]))):
            return Lookup(None, "elementwise", coefficients)
        why = f"unknown class {kind}" if row.operation == "unknown" else f"the row of {kind} does not list {local}"
        return Lookup(Layout("o i -> o i", shape), role, f"{why}: taken as one matrix (out, in)")
    reason = f"unknown class {kind} with {parameter.ndim} dimensions: give layouts={{'{use.name}': …}}"
    return Lookup(None, "hidden", reason)


def _of_class(use: Owned, row: Layer, known: str) -> Lookup:
    layout = layout_of(use.module, use.local, use.parameter)
    assert layout is not None
    reason = f"{row.cls if isinstance(row.cls, str) else row.cls.__name__}.{known}"
    if layout.sizes.get("g", 1) > 1 and layout.axes.get("i") == 1:
        return Lookup(layout, "elementwise", f"{reason}: a depthwise kernel, channel by channel")
    return Lookup(layout, "hidden", reason)


def host_of(model: nn.Module, name: str, module: nn.Module, parameter: Tensor) -> tuple[nn.Module, str]:
    """The module whose class says what a parameter is, and the name of the weight there that it makes up.

    That is another than its owner's and its own where the weight is parametrized. An empty name: it holds no matrix of
    the weight's, only a scale.
    """
    local = name.rpartition(".")[2]
    if isinstance(module, ParametrizationList):
        dicts = ((m, getattr(m, "parametrizations", {})) for m in model.modules())
        found = [(m, w) for m, d in dicts if isinstance(d, nn.ModuleDict) for w, p in d.items() if p is module]
        if not found:  # the model is a part of the parametrized module
            return module, local
        host, weight = found[0]
        largest = max((p for p in module.parameters(recurse=False)), key=Tensor.numel)
        return host, weight if parameter is largest else ""
    made_of = (
        (local[:-2], "_g", "_v"),
        (local[:-2], "_v", "_g"),
        (local[:-5], "_u", "_orig"),
        (local[:-5], "_mask", "_orig"),
    )
    for weight, scale, suffix in made_of:
        # torch.nn.utils.weight_norm, spectral_norm and prune, which set the weight itself, no parameter, at each pass
        made = weight in vars(module) and weight not in module._parameters
        if local.endswith(suffix) and hasattr(module, weight + scale) and made:
            return module, "" if suffix == "_g" else weight
    return module, local


def match_pattern(patterns: Mapping[str, Any], name: str) -> str | None:
    """The pattern that a name equals, or else the first that it matches.

    Args:
        patterns: name patterns as `fnmatch` has them.
        name: of a parameter.

    Returns:
        The pattern, or `None`.

    Cost: a look at each pattern.

    >>> match_pattern({"*.weight": "o i -> o i"}, "0.weight")
    '*.weight'
    """
    if name in patterns:
        return name
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def is_lazy(parameter: Tensor) -> bool:
    """Whether a parameter of a lazy module has no shape yet.

    Args:
        parameter: of a module.

    Returns:
        `False` once a batch went through the module.

    Source: torch's lazy modules.

    >>> is_lazy(nn.LazyLinear(2).weight), is_lazy(nn.Linear(2, 2).weight)
    (True, False)
    """
    return isinstance(parameter, UninitializedParameter)
