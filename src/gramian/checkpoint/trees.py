"""Nested Python values with tensors in them, such as an optimizer's state, in one safetensors file, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint.containers import find_state
from gramian.checkpoint.faults import damaged, plain
from gramian.checkpoint.formats import Content, Entry
from gramian.checkpoint.names import as_path
from gramian.checkpoint.writing import check_writable, load_tensors, memory_of, save_tensors
from gramian.errors import UnsupportedError

__all__ = ["PackedTree", "load_tree", "pack_tree", "save_tree", "unpack_tree", "weights_in_tree"]

TREE = "gramian.tree"

# What is said of a run's checkpoint that is read as a model.
UNFINISHED = "the weights of an unfinished run: the same `gramian train` with --resume ends it"


@dataclass(frozen=True)
class PackedTree:
    """A nested value as `save_tree` writes it: its tensors by name, and the rest as JSON."""

    tensors: Mapping[str, Tensor]
    text: str

    def copied(self) -> PackedTree:
        """The same with copies of the tensors in CPU memory, which a training may not change while they are written.

        A tensor that occurs twice is copied once.
        """
        copies: dict[Any, Tensor] = {}
        for name, tensor in self.tensors.items():
            check_writable(name, tensor)
            if memory_of(tensor) not in copies:
                copies[memory_of(tensor)] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return PackedTree({name: copies[memory_of(t)] for name, t in self.tensors.items()}, self.text)

    def save(self, path: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None) -> None:
        """Write the value to a file, as `save_tree` does."""
        save_tensors(path, self.tensors, {TREE: self.text}, previous=previous)


def pack_tree(tree: Any) -> PackedTree:
    """Dicts, lists and tuples of tensors, numbers, text and `None` as a `PackedTree`.

    Args:
        tree: of these; its tensors are not copied.

    Returns: the tensors by number, and the rest as JSON.
    Raises:
        UnsupportedError: it holds anything else; the message says where.
    Cost: none for the tensors.

    >>> len(pack_tree({"a": torch.ones(2), "b": [1, None]}).tensors)
    1
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(tree, "", tensors))
    return PackedTree(tensors, text)


def unpack_tree(packed: PackedTree) -> Any:
    """The value that `pack_tree` was given.

    Args:
        packed: from it.

    Returns: the value, with the tensors of `packed`, of the same strides.
    Cost: a copy of tensors that are not contiguous.

    >>> unpack_tree(pack_tree({"a": (1, None)}))
    {'a': (1, None)}
    """
    return _unpack(json.loads(packed.text), lambda held: _strided(packed.tensors, held))


def save_tree(path: str | os.PathLike[str], tree: Any, *, previous: str | os.PathLike[str] | None = None) -> None:
    """Writes dicts, lists and tuples of tensors, numbers, text and `None` to one file, whole or not at all.

    Args:
        path: the file to write or replace; its folder must exist.
        tree: the value. Keys of dicts are text or numbers.
        previous: as in `save_tensors`.

    Raises:
        UnsupportedError: the value holds anything else; the message says where.
        InputError, CheckpointError: as `save_tensors`.
    Cost: as `save_tensors`.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> save_tree(path, {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, float("inf"))})
    >>> load_tree(path)
    {'state': {0: {'step': tensor(3.)}}, 'betas': (0.9, inf)}
    """
    pack_tree(tree).save(path, previous)


def load_tree(path: str | os.PathLike[str]) -> Any:
    """Reads a value that `save_tree` wrote: the same types and bits, each tensor in memory and strides of its own.

    Args:
        path: the file.

    Returns: the value.
    Raises:
        CheckpointError: the file is missing or damaged, or was not written by `save_tree`.
    Cost: one read, and one copy in memory.
    Source: this library's own.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> save_tree(path, [1, (2, None)])
    >>> load_tree(path)
    [1, (2, None)]
    """
    path = as_path(path, "load_tree")
    tensors, metadata = load_tensors(path)
    try:
        return _unpack(json.loads(metadata[TREE]), lambda held: _strided(tensors, held))
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise damaged(path, error) from error


def weights_in_tree(content: Content) -> Content:
    """What a file of `save_tree` holds as a model: the weights in the tree, as in a training loop's other files.

    So the checkpoint of an unfinished run is read as its model, and the optimizer's state is named as left out.

    Args:
        content: of the file, as it is stored; it is returned where no tree is in it.

    Returns: the content, whose entries have the names of the weights in their state dict.
    Raises:
        CheckpointError: the tree is damaged.
    Cost: that of parsing the tree; no tensor is read.

    >>> from gramian.checkpoint.formats import read_safetensors
    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> save_tree(path, {"model": {"0.weight": torch.ones(2, 3)}, "steps": 7})
    >>> read = weights_in_tree(read_safetensors(path))
    >>> [(entry.name, entry.key) for entry in read.entries], read.notes
    ([('0.weight', '/model/0.weight')], ["weights found under 'model'; left out: steps"])
    """
    if TREE not in content.metadata or not content.entries:
        return content
    file, stored = content.entries[0].file, {entry.key: entry for entry in content.entries}
    try:
        tree = _unpack(json.loads(content.metadata[TREE]), lambda held: stored[held["tensor"]])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    found = find_state(file, tree, Entry)
    names: dict[str, str] = {}
    for name, entry in found.state.items():
        names.setdefault(entry.tied_to or entry.key, name)
    entries = []
    for name, entry in found.state.items():
        first = names[entry.tied_to or entry.key]
        entries.append(replace(entry, name=name, tied_to="" if first == name else first))
    beside = {name: partial(content.get, entry.key) for name, entry in found.beside.items()}
    unfinished = [UNFINISHED] if isinstance(tree, dict) and {"identity", "steps", "model"} <= tree.keys() else []
    return replace(content, entries=entries, notes=[*content.notes, *unfinished, *found.notes], beside=beside)


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; what JSON lacks is an object: `{"tensor": name}`, `{"tuple": items}` or `{"dict": pairs}`."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"tensor": where, **({} if value.is_contiguous() else {"stride": value.stride()})}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int, float, bool):
                raise _refused(f"{where}/{plain(key)}", key)
        return {"dict": [[key, _pack(item, f"{where}/{key}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_pack(item, f"{where}/{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _refused(where, value)


def _unpack(packed: Any, leaf: Callable[[dict[str, Any]], Any]) -> Any:
    """The value of a tree; `leaf` gives the tensor that `{"tensor": name}` stands for."""
    if isinstance(packed, list):
        return [_unpack(item, leaf) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return leaf(packed)
    if "tuple" in packed:
        return tuple(_unpack(item, leaf) for item in packed["tuple"])
    return {key: _unpack(item, leaf) for key, item in packed["dict"]}


def _strided(tensors: Mapping[str, Tensor], held: dict[str, Any]) -> Tensor:
    """A copy of a tree's tensor, with the strides that it had."""
    found, stride = tensors[held["tensor"]], held.get("stride")
    if stride is None or not _is_permutation(found.shape, stride):
        # a copy has torch's alignment, on which the rounding of BLAS depends
        return found.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(found.shape, stride, dtype=found.dtype, device=found.device).copy_(found)


def _is_permutation(shape: torch.Size, stride: list[int]) -> bool:
    """Whether the strides are those of a dense tensor with its dimensions in another order."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _refused(where: str, value: object) -> UnsupportedError:
    return UnsupportedError(
        f"save_tree: {where.lstrip('/') or 'the value'} is a {type(value).__module__}.{type(value).__name__}; "
        "a checkpoint holds tensors, numbers, text, lists, tuples and dicts. Keep it elsewhere."
    )
