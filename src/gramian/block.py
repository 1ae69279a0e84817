"""Blocks: which matrices does each parameter of a model hold?

A parameter is a tensor; a `Block` says which matrices it holds, and how to go from one to the other and back. Every
verb of gramian is a map over blocks. What holds no matrix (biases, norms, vectors) is in the `Rest`, with the reason.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import einops
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from gramian.checkpoint import clean_name
from gramian.errors import InputError, ShapeError

__all__ = ["Block", "Blocks", "Layout", "Rest", "blocks"]

Role = Literal["embedding", "hidden", "head"]

# Axis names that are numbers: "i (three o) -> three o i".
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}

_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)

# Modules whose parameters multiply or shift element by element, whatever their number of dimensions.
_ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm)

# The parameters of torch's own modules that hold matrices. `g` is the module's number of groups.
_LINEAR = {"weight": "o i -> o i"}
_LAYOUTS: dict[type[nn.Module], dict[str, str]] = {
    nn.Linear: _LINEAR,
    nn.Bilinear: {"weight": "b o i -> b o i"},
    nn.Embedding: {"weight": "v d -> v d"},
    nn.EmbeddingBag: {"weight": "v d -> v d"},
    nn.Conv1d: {"weight": "(g o) i w -> g o (i w)"},
    nn.Conv2d: {"weight": "(g o) i h w -> g o (i h w)"},
    nn.Conv3d: {"weight": "(g o) i d h w -> g o (i d h w)"},
    nn.ConvTranspose1d: {"weight": "(g i) o w -> g (o w) i"},
    nn.ConvTranspose2d: {"weight": "(g i) o h w -> g (o h w) i"},
    nn.ConvTranspose3d: {"weight": "(g i) o d h w -> g (o d h w) i"},
    nn.MultiheadAttention: {
        "in_proj_weight": "(three o) i -> three o i",
        "q_proj_weight": "o i -> o i",
        "k_proj_weight": "o i -> o i",
        "v_proj_weight": "o i -> o i",
    },
    nn.RNN: {"weight_*": "o i -> o i"},
    nn.RNNCell: {"weight_*": "o i -> o i"},
    nn.LSTM: {"weight_hr_*": "o i -> o i", "weight_*": "(four o) i -> four o i"},
    nn.LSTMCell: {"weight_*": "(four o) i -> four o i"},
    nn.GRU: {"weight_*": "(three o) i -> three o i"},
    nn.GRUCell: {"weight_*": "(three o) i -> three o i"},
}

# Known by name, since torch does not have them, and by an attribute that tells them from others of the name.
_LAYOUTS_BY_NAME: dict[tuple[str, str], dict[str, str]] = {
    ("Conv1D", "nf"): {"weight": "i o -> o i"},  # GPT-2's linear layer in transformers: (in, out)
}


@dataclass(frozen=True)
class Layout:
    """How a tensor of `shape` holds its matrices: an einops `pattern` whose right side ends in rows and columns.

    `split` gives `(..., m, n)` and `join` inverts it bitwise: `layout.join(layout.split(t)) == t`. Number words are
    axes of that size.

    Raises `ShapeError`, with the pattern and the shape, where they do not fit.

    >>> qkv = Layout("i (three o) -> three o i", (8, 24))
    >>> qkv.matrices
    (3, 8, 8)
    """

    pattern: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pattern.count("->") != 1 or "..." in self.pattern:
            raise ShapeError(f"layout {self.pattern!r} must be 'axes -> axes', with every axis named: 'o i -> o i'")
        try:
            matrices = self.matrices
        except (einops.EinopsError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ShapeError(f"layout {self.pattern!r} does not fit a tensor of shape {self.shape}: {reason}") from None
        if len(matrices) < 2:
            raise ShapeError(
                f"layout {self.pattern!r} turns shape {self.shape} into {matrices}; "
                "the right side must end in two axes, the rows and columns of a matrix"
            )

    def split(self, tensor: Tensor) -> Tensor:
        """The matrices of `tensor` (shape `self.shape`) as one tensor `(..., m, n)`; a view where strides allow."""
        if self.is_identity:
            return tensor
        return einops.rearrange(tensor, self.pattern, **self._used_sizes)

    def join(self, matrices: Tensor) -> Tensor:
        """The tensor of shape `self.shape` that holds `matrices` (`(..., m, n)`)."""
        if self.is_identity:
            return matrices
        left, right = (side.strip() for side in self.pattern.split("->"))
        return einops.rearrange(matrices, f"{right} -> {left}", **self.axes)

    @cached_property
    def matrices(self) -> tuple[int, ...]:
        """The shape `(..., m, n)` that `split` gives."""
        return tuple(self.split(torch.empty(self.shape, device="meta")).shape)

    @cached_property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The names of the axes in each dimension of the tensor."""
        return tuple(_names_of(group) for group in _axes_of(self.pattern.partition("->")[0]))

    @cached_property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The names of the axes that count the matrices, that make up their rows, and their columns."""
        *leading, rows, columns = [_names_of(group) for group in _axes_of(self.pattern.partition("->")[2])]
        return sum(leading, ()), rows, columns

    @cached_property
    def is_identity(self) -> bool:
        """Whether the tensor is its own matrix, or stack of matrices."""
        left, _, right = self.pattern.partition("->")
        return left.split() == right.split() and "(" not in left and len(left.split()) == len(self.shape)

    @cached_property
    def _used_sizes(self) -> dict[str, int]:
        names = set(re.findall(r"\w+", self.pattern.partition("->")[0]))
        return {name: size for name, size in (_NUMBERS | dict(self.sizes)).items() if name in names}

    @cached_property
    def axes(self) -> dict[str, int]:
        """The size of every axis by name."""
        axes = dict(self._used_sizes)
        for names, size in zip(self.dims, self.shape, strict=True):
            unknown = [name for name in names if name not in axes]
            if unknown:
                known = math.prod(axes[name] for name in names if name in axes)
                axes[unknown[0]] = size // known if known else 0
        return axes


@dataclass(frozen=True, eq=False)
class Block:
    """A parameter that holds one or more matrices.

    `owners` are the modules that hold it, each with the parameter's name there, without the prefixes of wrappers: one,
    or several where the parameter is tied. `reason` says why the layout was chosen.
    """

    owners: tuple[tuple[str, nn.Module], ...]
    parameter: nn.Parameter
    layout: Layout
    role: Role
    reason: str

    @property
    def name(self) -> str:
        """The parameter's name, the first where it is tied."""
        return self.owners[0][0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a tied parameter."""
        return tuple(name for name, _ in self.owners[1:])

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter, the first where it is tied."""
        return self.owners[0][1]

    @property
    def kind(self) -> str:
        """That module's class name."""
        return type(self.module).__name__

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., m, n)`: the shape of the block's matrices."""
        return self.layout.matrices

    def split(self, tensor: Tensor | None = None) -> Tensor:
        """The matrices `(..., m, n)` of the parameter, or of a tensor of its shape (a gradient, a momentum)."""
        return self.layout.split(self.parameter.detach() if tensor is None else tensor)

    def join(self, matrices: Tensor) -> Tensor:
        """The tensor of the parameter's shape that holds `matrices`."""
        return self.layout.join(matrices)


@dataclass(frozen=True, eq=False)
class Rest:
    """A parameter that holds no matrix, and why."""

    name: str
    parameter: nn.Parameter
    reason: str
    aliases: tuple[str, ...] = ()


class Blocks(NamedTuple):
    """Every parameter of a model exactly once: in `blocks` or in `rest`."""

    blocks: tuple[Block, ...]
    rest: tuple[Rest, ...]

    def explain(self) -> list[dict[str, str]]:
        """One row for each parameter: its name, whether it is a block, its matrices, role, and the reason.

        >>> from torch import nn
        >>> for row in blocks(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))).explain():
        ...     print(row["name"], row["group"], row["matrices"])
        0.weight block 3 × 4
        2.weight block 2 × 3
        0.bias rest
        2.bias rest
        """
        rows = [
            {
                "name": " = ".join((b.name, *b.aliases)),
                "group": "block",
                "role": b.role,
                "matrices": " × ".join(map(str, b.shape)),
                "reason": b.reason,
            }
            for b in self.blocks
        ]
        rows += [
            {"name": " = ".join((r.name, *r.aliases)), "group": "rest", "role": "", "matrices": "", "reason": r.reason}
            for r in self.rest
        ]
        return rows


def blocks(model: nn.Module, layouts: Mapping[str, str | tuple[str, Mapping[str, int]]] | None = None) -> Blocks:
    """Every parameter of `model` exactly once, as a block of matrices or in the rest.

    Args:
        model: any module. Names are the user's: prefixes of `DataParallel`, `torch.compile` and checkpoint wrappers
            are dropped. A parameter reached under several names (tied, shared) is one block with `aliases`.
        layouts: what a module's class does not say, by name pattern: `{"*.c_attn.weight": "i (three o) -> three o i"}`,
            or with sizes, `{"*.qkv.weight": ("(h o) i -> h o i", {"h": 12})}`. First match wins.

    Raises:
        InputError: a pattern matches no parameter, or the model has no parameters.
        ShapeError: a pattern does not fit the parameter that it matches; the error shows both.

    Cost: no arithmetic, one pass over the modules.

    >>> from torch import nn
    >>> found, rest = blocks(nn.Conv2d(3, 8, 5))
    >>> found[0].shape, rest[0].reason
    ((8, 75), 'bias: a vector')
    """
    overrides = dict(layouts or {})
    used: set[str] = set()
    owners = _owners(model)
    if not owners:
        raise InputError(f"blocks: {type(model).__name__} has no parameters; pass a model with weights")
    found: list[Block] = []
    rest: list[Rest] = []
    names: list[tuple[str, nn.Module]] = []
    for parameter, names in owners.values():
        name, module = names[0]
        host, local = _host(model, name, module, parameter)
        pattern, reason = _layout(name, local, host, parameter, overrides, used)
        if pattern is None:
            rest.append(Rest(name, parameter, reason, tuple(other for other, _ in names[1:])))
            continue
        text, sizes = (pattern, {}) if isinstance(pattern, str) else pattern
        if hasattr(host, "groups"):
            sizes = {"g": host.groups, **sizes}
        try:
            layout = Layout(text, tuple(parameter.shape), sizes)
        except ShapeError as error:
            raise ShapeError(f"blocks: parameter {name!r}: {error}") from None
        role: Role = "embedding" if any(isinstance(m, _EMBEDDING) for _, m in names) else "hidden"
        found.append(Block(tuple(names), parameter, layout, role, reason))
    for pattern in overrides:
        if pattern not in used:
            raise InputError(f"blocks: the layout for {pattern!r} matches no parameter; names are like {names[0][0]!r}")
    return Blocks(tuple(_with_head(found)), tuple(rest))


def _owners(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Each distinct parameter with all its (name, owning module), in registration order."""
    owners: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module]]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = clean_name(f"{prefix}.{local}" if prefix else local)
            names = owners.setdefault(id(parameter), (parameter, []))[1]
            if name not in (other for other, _ in names):
                names.append((name, module))
    return owners


def _host(model: nn.Module, name: str, module: nn.Module, parameter: Tensor) -> tuple[nn.Module, str]:
    """The module whose class says what a parameter is, and the name of the weight there that it makes up.

    That is another than its owner's and its own where the weight is parametrized. An empty name: it holds no matrix of
    the weight's, only a scale.
    """
    local = name.rpartition(".")[2]
    if isinstance(module, ParametrizationList):
        dicts = ((m, getattr(m, "parametrizations", {})) for m in model.modules())
        host, weight = next(
            (m, w) for m, d in dicts if isinstance(d, nn.ModuleDict) for w, p in d.items() if p is module
        )
        largest = max((p for p in module.parameters(recurse=False)), key=Tensor.numel)
        return host, weight if parameter is largest else ""
    for weight, scale, suffix in ((local[:-2], "_g", "_v"), (local[:-2], "_v", "_g"), (local[:-5], "_u", "_orig")):
        if local.endswith(suffix) and hasattr(module, weight + scale):  # torch.nn.utils.weight_norm, spectral_norm
            return module, "" if suffix == "_g" else weight
    return module, local


def _layout(
    name: str, local: str, module: nn.Module, parameter: Tensor, overrides: Mapping, used: set[str]
) -> tuple[str | tuple[str, Mapping[str, int]] | None, str]:
    """The layout pattern of a parameter (`None`: it belongs to the rest) and the reason."""
    for pattern, layout in overrides.items():
        if fnmatch.fnmatchcase(name, pattern):
            used.add(pattern)
            return layout, f"layouts[{pattern!r}]"
    if not local:
        return None, f"{name.rpartition('.')[2]}: a scale of the parametrized weight"
    for cls in type(module).__mro__:
        by_name = next(
            (table for (n, a), table in _LAYOUTS_BY_NAME.items() if cls.__name__ == n and hasattr(module, a)), {}
        )
        for known, layout in (_LAYOUTS.get(cls) or by_name).items():
            if fnmatch.fnmatchcase(local, known) and parameter.ndim == len(_axes_of(layout.partition("->")[0])):
                if getattr(module, "groups", 1) == 1:
                    layout = layout.replace("(g o)", "o").replace("(g i)", "i").replace("-> g ", "-> ")
                return layout, f"{cls.__name__}.{known}"
    if isinstance(parameter, UninitializedParameter):
        return None, "not initialized yet: run a batch through the lazy module first"
    if parameter.ndim < 2:
        return None, f"{'bias' if 'bias' in local else local}: a {'vector' if parameter.ndim else 'scalar'}"
    if isinstance(module, _ELEMENTWISE) or local.startswith("bias"):
        return None, f"{local} of {type(module).__name__}: acts element by element"
    if parameter.ndim == 2:
        return "o i -> o i", f"unknown class {type(module).__name__}: taken as one matrix (out, in)"
    return None, f"unknown class {type(module).__name__} with {parameter.ndim} dimensions: give layouts={{'{name}': …}}"


def _axes_of(side: str) -> list[str]:
    """The axes of one side of a pattern, each a name or a group in parentheses."""
    return re.findall(r"\([^)]*\)|\w+", side)


def _names_of(group: str) -> tuple[str, ...]:
    """The names in an axis or group; einops allows a 1, which is no axis."""
    return tuple(name for name in group.strip("()").split() if not name.isdigit())


def _with_head(found: list[Block]) -> list[Block]:
    """Marks the head: the last registered block, if the model has more than one and no head is tied to an embedding."""
    last = next((i for i in reversed(range(len(found))) if found[i].role == "hidden"), None)
    tied = any(b.role == "embedding" and not isinstance(m, _EMBEDDING) for b in found for _, m in b.owners)
    if last is None or tied or len(found) < 2:
        return found
    head = found[last]
    marked = replace(head, role="head", reason=f"{head.reason}; the last block")
    return [*found[:last], marked, *found[last + 1 :]]
