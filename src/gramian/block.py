"""Blocks: which matrices does each parameter of a model hold?

A parameter is a tensor; a `Block` says which matrices it holds, and how to go from one to the other and back. Every
verb of gramian is a map over blocks. What holds no matrix (biases, norms, vectors) is in the `Rest`, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from gramian.calls import as_module
from gramian.checkpoint import clean_name
from gramian.errors import InputError, ShapeError
from gramian.layers import Role, config_of, families, find_head, layer_of
from gramian.layers.lookup import Lookup, Owned, host_of, is_lazy, look_up, match_pattern
from gramian.layout import Layout
from gramian.rows import Rows

__all__ = ["METADATA", "Block", "Blocks", "Layout", "Rest", "blocks"]

METADATA = "gramian.blocks"
"""The key under which a safetensors file keeps what `Blocks.metadata` says."""


@dataclass(frozen=True, eq=False)
class Block:
    """A parameter that holds one or more matrices.

    Args:
        owners: the modules that hold it, each with the parameter's full name, without the prefixes of wrappers: one,
            or several where the parameter is tied.
        parameter: the tensor.
        layout: which matrices it holds.
        role: `"embedding"`, `"hidden"`, `"head"`, or `"elementwise"` (depthwise kernels).
        reason: why the layout was chosen.
    """

    owners: tuple[tuple[str, nn.Module], ...]
    parameter: nn.Parameter
    layout: Layout
    role: Role
    reason: str

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {self.kind}, {' × '.join(map(str, self.shape))}, {self.role})"

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

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each matrix: the parameter's, with the part in brackets where there are several."""
        return self.layout.names(self.name, self.role == "elementwise")

    def pieces(self) -> Iterator[Tensor]:
        """Each matrix by itself, in the order of `names`; fused parts of unequal size are apart here alone.

        A depthwise kernel is one, (channels, taps): a row for each channel.
        """
        return self.layout.pieces(self.parameter.detach(), self.role == "elementwise")

    def split(self, tensor: Tensor | None = None) -> Tensor:
        """The matrices `(..., m, n)` of the parameter, or of a tensor of its shape (a gradient, a momentum)."""
        return self.layout.split(self.parameter.detach() if tensor is None else tensor)

    def join(self, matrices: Tensor) -> Tensor:
        """The tensor of the parameter's shape that holds `matrices`."""
        return self.layout.join(matrices)


@dataclass(frozen=True, eq=False)
class Rest:
    """A parameter that holds no matrix.

    Args:
        name: the parameter's, the first where it is tied.
        parameter: the tensor.
        reason: why it holds no matrix.
        aliases: its other names.
        elementwise: whether it is known to act element by element (a norm's weight, a bias).
    """

    name: str
    parameter: nn.Parameter
    reason: str
    aliases: tuple[str, ...] = ()
    elementwise: bool = False

    def __repr__(self) -> str:
        return f"Rest({self.name!r}, {' × '.join(map(str, self.parameter.shape))}, {self.reason})"


class Blocks(NamedTuple):
    """Every parameter of a model exactly once.

    Args:
        blocks: the parameters that hold matrices.
        rest: the others.
    """

    blocks: tuple[Block, ...]
    rest: tuple[Rest, ...]

    def __repr__(self) -> str:
        rest = f"{len(self.rest)} other parameter{'s' * (len(self.rest) != 1)}"
        return f"<Blocks: {len(self.blocks)} with matrices, {rest}; see explain()>"

    def _repr_html_(self) -> str:
        return self.explain()._repr_html_()

    def explain(self) -> Rows:
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
                "parts": ", ".join(b.layout.parts),
                "reason": b.reason,
            }
            for b in self.blocks
        ]
        empty = {"role": "", "matrices": "", "parts": ""}
        rows += [
            {"name": " = ".join((r.name, *r.aliases)), "group": "rest", **empty, "reason": r.reason} for r in self.rest
        ]
        return Rows(rows)

    def metadata(self) -> dict[str, str]:
        """What a file of the model's tensors lacks, as text for its metadata: layouts, parts, roles and classes.

        A file holds names and shapes, but no classes: it cannot tell the groups of a convolution, nor a transposed one.
        `gramian inspect` of a file with this metadata shows the same matrices as the model.

        >>> import safetensors.torch, tempfile
        >>> from torch import nn
        >>> conv, path = nn.Conv2d(4, 8, 3, groups=2), tempfile.mkdtemp() + "/conv.safetensors"
        >>> safetensors.torch.save_file(conv.state_dict(), path, blocks(conv).metadata())
        """
        rows: dict[str, Any] = {
            b.name: {
                "layout": b.layout.pattern,
                "sizes": dict(b.layout.sizes),
                "parts": b.layout.parts,
                "rows": b.layout.rows,
                "role": b.role,
                "kind": b.kind,
                "aliases": b.aliases,
            }
            for b in self.blocks
        }
        return {METADATA: json.dumps(rows | {r.name: {"rest": r.reason} for r in self.rest})}


def blocks(model: nn.Module, layouts: Mapping[str, Any] | None = None) -> Blocks:
    """Every parameter of `model` exactly once, as a block of matrices or in the rest.

    What a parameter holds is looked up in the table of `gramian.layers`, by the class of its module, or by its name and
    the model's config; what neither tells is not guessed.

    Args:
        model: any module. Names are the user's: prefixes of `DataParallel`, `torch.compile` and checkpoint wrappers
            are dropped. A parameter reached under several names (tied, shared) is one block with `aliases`.
        layouts: what the table does not say, by name pattern: `{"*.c_attn.weight": "i (three o) -> three o i"}`,
            or with sizes, `{"*.qkv.weight": ("(h o) i -> h o i", {"h": 12})}`. First match wins.

    Returns:
        `Blocks`, a pair `(blocks, rest)`, with `explain()`.

    Raises:
        InputError: it is no model, a pattern matches no parameter, or the model has no parameters.
        ShapeError: a pattern does not fit the parameter that it matches; the error shows both.

    Cost: no arithmetic, one pass over the modules.
    Source: this library's own.

    >>> from torch import nn
    >>> found, rest = blocks(nn.Conv2d(3, 8, 5))
    >>> found[0].shape, rest[0].reason
    ((8, 75), 'bias: a vector')
    """
    overrides = dict(layouts or {})
    used: set[str] = set()
    owners = _owners(as_module(model, "blocks"))
    if not owners:
        raise InputError(f"blocks: {type(model).__name__} has no parameters; pass a model with weights")
    found: list[Block] = []
    rest: list[Rest] = []
    configs = _configs(model)
    family = families({names[0][0]: tuple(p.shape) for p, names in owners.values() if not is_lazy(p)})
    for parameter, names in owners.values():
        held = tuple((name, module) for name, module, _ in names)
        name, module, prefix = names[0]
        pattern = match_pattern(overrides, name)
        if pattern is None:
            config = configs[prefix]
            config = config if config.get("model_type") else {**config, "model_type": family(name)}
            answer = look_up(Owned(name, *host_of(model, name, module, parameter), parameter, config))
        else:
            used.add(pattern)
            answer = _overridden(name, parameter, pattern, overrides[pattern])
        if answer.layout is None:
            others = tuple(other for other, _ in held[1:])
            rest.append(Rest(name, parameter, answer.reason, others, answer.role == "elementwise"))
        else:
            is_table = any(layer_of(m).operation in _TABLES for _, m in held)
            role: Role = "embedding" if is_table else answer.role
            found.append(Block(held, parameter, answer.layout, role, answer.reason))
    for pattern in overrides:
        if pattern not in used:
            some = next(iter(owners.values()))[1][0][0]
            raise InputError(f"blocks: the layout for {pattern!r} matches no parameter; names are like {some!r}")
    return Blocks(tuple(_with_head(found)), tuple(rest))


_TABLES = ("embedding", "bag of embeddings")


def _overridden(name: str, parameter: Tensor, pattern: str, given: Any) -> Lookup:
    text, sizes = given if isinstance(given, list | tuple) and len(given) == 2 else (given, {})
    if not isinstance(text, str) or not isinstance(sizes, Mapping):
        raise InputError(f"blocks: layouts[{pattern!r}] must be a layout or (layout, sizes), got {given!r:.80}")
    try:
        layout = Layout(text, tuple(parameter.shape), dict(sizes))
    except ShapeError as error:
        raise ShapeError(f"blocks: parameter {name!r}: {error}") from None
    return Lookup(layout, "hidden", f"layouts[{pattern!r}]")


def _owners(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]]:
    """Each distinct parameter with all its (clean name, owning module, that module's raw name), as registered."""
    owners: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = clean_name(f"{prefix}.{local}" if prefix else local)
            names = owners.setdefault(id(parameter), (parameter, []))[1]
            if name not in (other for other, *_ in names):
                names.append((name, module, prefix))
    return owners


def _configs(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """The config that holds in each module, by raw name: its own, or that of the nearest module around it."""
    configs: dict[str, Mapping[str, Any]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = getattr(module, "config", None)
        configs[prefix] = configs.get(prefix.rpartition(".")[0], {}) if own is None else config_of(own)
    return configs


def _with_head(found: list[Block]) -> list[Block]:
    """Marks the head: the matrix whose name says so, or the last one; none where an embedding is the head too.

    Where tokens are looked up, a last matrix that gives vectors as wide as theirs is no head: the model ends before it,
    or uses its table by a function.
    """
    tables = [b for b in found if b.role == "embedding"]
    if any(len(b.owners) > 1 and layer_of(m).operation not in _TABLES for b in tables for _, m in b.owners):
        return found
    roles: list[Role] = [b.role for b in found]
    hidden = [b for b in found if b.role == "hidden"]
    last = bool(hidden) and hidden[-1].shape[-2] not in {b.shape[-1] for b in tables}
    at = find_head([[name for name, _ in b.owners] for b in found], roles, last=last)
    if at is None:
        return found
    head = replace(found[at], role="head", reason=f"{found[at].reason}; the head")
    return [*found[:at], head, *found[at + 1 :]]
