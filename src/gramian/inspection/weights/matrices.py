"""Which matrices does each tensor of a checkpoint hold? From the table of layers, without the model.

A file that gramian wrote keeps what the table said of the model (`Blocks.metadata`). Of any other file the names, the
shapes and a `config.json` are asked. What they do not tell is not guessed: such a tensor is left out, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gramian.block import METADATA
from gramian.checkpoint import Checkpoint
from gramian.checkpoint.folders import read_json
from gramian.checkpoint.formats import Entry
from gramian.errors import InputError, ShapeError
from gramian.inspection.weights.auxiliary import find_auxiliary
from gramian.layers import Role, config_of, families, role_by_name
from gramian.layers.kernels import Kernels
from gramian.layers.listed import look_up_name, natural_order, settle_roles
from gramian.layers.lookup import match_pattern
from gramian.layout import Layout
from gramian.texts import read_text

__all__ = ["Holding", "find_holdings", "read_config", "read_layouts"]

ROLES = ("embedding", "hidden", "head", "elementwise")

UNKNOWN = "the parameter of a parametrization that names do not tell, not the weight that is applied"


@dataclass(frozen=True)
class Holding:
    """The matrices of one tensor of a file: a layout, a word for their kind, their role, and what that assumes."""

    entry: Entry
    layout: Layout
    kind: str
    role: Role
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each matrix: the tensor's, with the part in brackets where there are several."""
        return self.layout.names(self.entry.name, self.role == "elementwise")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shape of each matrix."""
        return self.layout.piece_shapes(self.role == "elementwise")

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """The matrices, in the order of `names`; views where strides allow."""
        return self.layout.pieces(tensor, self.role == "elementwise")

    @property
    def kernel(self) -> bool:
        """Whether the tensor is the kernel (o, i, h, w) of a two-dimensional convolution, as far as a file tells."""
        plain = self.role != "elementwise" and len(self.layout.matrices) == 2
        return self.kind in ("conv2d", "Conv2d") and plain and len(self.entry.shape) == 4


def find_holdings(
    checkpoint: Checkpoint, layouts: Mapping[str, Any] | None = None
) -> tuple[list[Holding], dict[str, list[str]]]:
    """Return the tensors that hold matrices, embedding to head, and the names of the others by the reason.

    Args:
        checkpoint: an open one. Its entries and a `config.json` beside it are read, and a few rows of tensors that may
            be masks or tables.
        layouts: override by name pattern, `{"*.c_attn.weight": "i (three o) -> three o i"}`, or with sizes,
            `{"*.qkv.weight": ["(h o) i -> h o i", {"h": 12}]}`; `"skip"` leaves a tensor out.

    Raises:
        InputError: an override that matches nothing, or does not fit what it matches.
    """
    config, overrides, used, taken = read_config(checkpoint.path), dict(layouts or {}), set(), []
    known = _metadata(checkpoint)
    auxiliary = {} if known else find_auxiliary(checkpoint)
    kernels = Kernels({e.weight: e.shape for e in checkpoint.entries.values() if not e.part_of})
    family = families({name: entry.shape for name, entry in checkpoint.entries.items()})
    holdings: list[Holding] = []
    left_out: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        reason = auxiliary.get(name) or _not_numbers(entry)
        if not reason:
            pattern = match_pattern(overrides, name)
            if pattern is None:
                here = config if config.get("model_type") else config | {"model_type": family(name)}
                held = (
                    _of_metadata(entry, known) if _is_known(entry, known) else _hold(entry, here, checkpoint, kernels)
                )
                if isinstance(held, Holding):
                    holdings.append(held)
                    continue
                reason = held
            else:
                used.add(pattern)
                taken.append(name)
                if overrides[pattern] != "skip":
                    holdings.append(_overridden(entry, pattern, overrides[pattern], checkpoint))
                    continue
                reason = "left out by --layouts"
        if reason != "vector":
            left_out.setdefault(reason, []).append(name)
    unused = [pattern for pattern in overrides if pattern not in used]
    if unused:
        some = next(iter(checkpoint.entries))
        shadowed = any(match_pattern({unused[0]: ""}, name) for name in taken)
        what = "only tensors that an earlier pattern matches" if shadowed else "no matrix"
        raise InputError(f"layouts: {unused[0]!r} matches {what} of {checkpoint.path}; names are like {some!r}")
    return _with_head(holdings, checkpoint, known), left_out


def read_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` in a checkpoint's folder, or nothing; text models nested in a config come to the top."""
    found, _ = read_json((path if path.is_dir() else path.parent) / "config.json")  # open_checkpoint notes a broken one
    return config_of(found)


def read_layouts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the overrides of a JSON file: name pattern to layout, `[layout, sizes]`, or `"skip"`."""
    try:
        layouts = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Give a JSON file of layouts.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}). Expected {{'name pattern': 'layout'}}.") from None
    if not isinstance(layouts, dict):
        raise InputError(f"{path}: expected {{'name pattern': 'layout'}}, got a {type(layouts).__name__}.")
    return layouts


def _not_numbers(entry: Entry) -> str:
    """Why a tensor of whatever name holds no matrix to look at; empty where it may."""
    if entry.tied_to:
        return f"the same memory as {entry.tied_to}"
    if entry.kind == "empty":
        return "of size 0"
    if entry.kind == "quantized" and entry.dtype == "uint8" and len(entry.shape) == 1:
        return "bytes (uint8), as the state of a generator"
    if entry.kind != "float":
        return f"{entry.kind} ({entry.dtype})"
    return "vector" if sum(length > 1 for length in entry.shape) < 2 and len(entry.shape) < 2 else ""


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file keeps of the model's blocks, by name; nothing where it keeps nothing that can be read."""
    try:
        known = json.loads(checkpoint.metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    rows = {name: row for name, row in known.items() if isinstance(row, dict)}
    # A tied tensor may be in the file under any of its names.
    lists = ((row.get("aliases"), row) for row in rows.values())
    aliases = {n: row for names, row in lists if isinstance(names, list) for n in names if isinstance(n, str)}
    return {**aliases, **rows}


def _is_known(entry: Entry, known: Mapping[str, Any]) -> bool:
    """Whether the file's metadata tells what a tensor is. Of integers that stand for a weight, the model has none."""
    return bool(known) and (not entry.made or any(e.name in known for e in (entry, *entry.made.parts.values())))


def _of_metadata(entry: Entry, known: Mapping[str, Any]) -> Holding | str:
    """What the file's metadata says of a tensor, or why it holds no matrix."""
    # Of a weight that is computed from others the model knows the largest, such as the direction of a weight norm.
    parts = entry.made.parts.values() if entry.made else ()
    row = next(
        (known[e.name] for e in (entry, *parts) if e.name in known and "layout" in known[e.name]), known.get(entry.name)
    )
    if row is None:
        return "a buffer of the model, not weights"
    if "rest" in row:
        return "vector" if len(entry.shape) < 2 else "no matrix, as the model's table of layers has it"
    try:
        layout = Layout(
            str(row["layout"]), entry.shape, {str(a): int(n) for a, n in dict(row["sizes"]).items()},
            tuple(map(str, row["parts"])), tuple(map(int, row["rows"])),
        )  # fmt: skip
        role = row["role"]
        if role not in ROLES:
            raise ValueError(role)
        return Holding(entry, layout, str(row["kind"]), role)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a ShapeError is a ValueError
        what = f"{type(error).__name__}: {error}"[:200]
        raise InputError(
            f"{entry.file}: its metadata does not fit {entry.name}: {what}. Save the file again."
        ) from None


def _hold(entry: Entry, config: Mapping[str, Any], checkpoint: Checkpoint, kernels: Kernels) -> Holding | str:
    """What the table of names says of a tensor, or why it holds no matrix that is known."""
    found = look_up_name(entry.weight, entry.shape, config, checkpoint.entries)
    if found.layout is None:
        if found.kind == "unknown":
            return f"of {len(entry.shape)} dimensions and an unknown name: give --layouts"
        return "vector" if found.kind == "vector" else "acts element by element"
    layout, kind = found.layout, found.kind
    note = UNKNOWN if ".parametrizations." in f".{entry.name}" and not entry.made else ""
    if found.is_kernel:
        layout, kind, note = kernels.describe(entry.weight, layout, kind)
    return Holding(entry, layout, kind, found.role or "hidden", note)


def _overridden(entry: Entry, pattern: str, value: Any, checkpoint: Checkpoint) -> Holding:
    text, sizes = value if isinstance(value, list | tuple) and len(value) == 2 else (value, {})
    if not isinstance(text, str) or not isinstance(sizes, Mapping):
        raise InputError(f"layouts: {pattern!r} must map to a layout, [layout, sizes] or 'skip', got {value!r}")
    module, _, local = entry.weight.rpartition(".")
    role = role_by_name(entry.weight, entry.shape, local == "weight" and f"{module}.bias" in checkpoint.entries)
    try:
        return Holding(entry, Layout(text, entry.shape, dict(sizes)), "layouts", role)
    except (ShapeError, TypeError) as error:
        raise InputError(f"layouts: {pattern!r} on {entry.name}: {error}") from None


def _with_head(holdings: list[Holding], checkpoint: Checkpoint, known: Mapping[str, Any]) -> list[Holding]:
    """The holdings from embeddings to head, with the head marked.

    In between they stand as in the file, or, where its names are in the order of the alphabet, `layers.2` before
    `layers.10`. A file need not keep the order of layers, so the last is the head only where no table of tokens is: a
    head that is tied to one may not be in the file. An adapter has those of its modules that it changes.
    """
    names = [name for name, entry in checkpoint.entries.items() if not entry.made]
    kept = {name: i for i, name in enumerate(checkpoint.entries)} if names != sorted(names) else None
    ordered = sorted(holdings, key=lambda h: _place(h.entry.name, h.role, kept))
    if known:
        return ordered
    tied = {e.tied_to for e in checkpoint.entries.values() if e.tied_to}
    settled = settle_roles(
        {h.entry.name: (h.kind, h.entry.shape, h.role) for h in ordered},
        may_be_last=not any(h.entry.made and h.entry.made.low_rank for h in ordered),
        has_head=not any(h.role == "embedding" and h.entry.name in tied for h in ordered),
    )
    ordered = [replace(h, role=settled.get(h.entry.name, h.role)) for h in ordered]
    return sorted(ordered, key=lambda h: h.role == "head" and h.entry.name in settled)


def _place(name: str, role: Role, kept: Mapping[str, int] | None) -> tuple[int, Any]:
    """Order embeddings, the body by its places in the file or with `layers.2` before `layers.10`, then heads."""
    order = natural_order(name) if kept is None else kept.get(name, len(kept))
    return {"embedding": 0, "hidden": 1, "elementwise": 1, "head": 2}[role], order
