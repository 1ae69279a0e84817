"""Folders of torch.distributed.checkpoint, read without a process group.

The folder's `.metadata` is a pickle that says where each chunk of each tensor lies. It is read by `unpickling`, which
calls nothing; a chunk is a file of `torch.save` within a file.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.checkpoint.containers import find_state
from gramian.checkpoint.faults import damaged, plain
from gramian.checkpoint.formats import Content, Entry, dtype_name, get
from gramian.checkpoint.unpickling import Global, Record, read_pickle
from gramian.errors import CheckpointError, some

__all__ = ["METADATA_FILE", "read_distributed"]

METADATA_FILE = ".metadata"


class _Chunk(NamedTuple):
    """A part of a tensor: where it begins in the tensor, and where it is in which file."""

    offsets: tuple[int, ...]
    file: str
    start: int
    length: int


def read_distributed(folder: Path) -> Content:
    """An open folder of torch.distributed.checkpoint."""
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            metadata = read_pickle(stream, os.fstat(stream.fileno()).st_size)
        entries, beside, chunks, notes = _listed(folder, metadata)
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(file, error) from error
    by_key = {entry.key: entry for entry in entries}

    def load(entry: Entry) -> Tensor:
        return _load(folder, entry, chunks[entry.key])

    content = Content(entries, lambda key: load(by_key[key]), notes, {})
    around = Content(beside, lambda key: load(others[key]), [], {})
    others = {entry.key: entry for entry in beside}
    return replace(content, beside={entry.name: partial(get, around, entry) for entry in beside})


def _listed(folder: Path, metadata: Any) -> tuple[list[Entry], list[Entry], dict[str, list[_Chunk]], list[str]]:
    """The entries, those of other things than the model, the chunks of each by key, and notes."""
    entries: dict[str, Entry] = {}
    tree: dict[Any, Any] = {}
    paths = metadata.state.get("planner_data") or {}
    for key, stored in metadata.state["state_dict_metadata"].items():
        leaf: Any = None
        if stored.of.name == "TensorStorageMetadata":
            dtype = _dtype(stored.state["properties"])
            leaf = entries[key] = Entry(key, tuple(stored.state["size"]), dtype_name(dtype), folder, key)
        path = paths.get(key)
        *parents, last = path if isinstance(path, tuple) and path else (key,)
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    chunks: dict[str, list[_Chunk]] = {key: [] for key in entries}
    missing = set()
    for index, place in metadata.state["storage_data"].items():
        key = index.state["fqn"]
        if key in chunks:
            name = str(place.state["relative_path"])
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{folder}: names a file outside its folder, {plain(name)}. Do not trust it.")
            if not (folder / name).exists():
                missing.add(name)
            offsets = tuple(index.state.get("offset") or (0,) * len(entries[key].shape))
            chunks[key].append(_Chunk(offsets, name, int(place.state["offset"]), int(place.state["length"])))
    if missing:
        raise CheckpointError(
            f"{folder}: names files that are not there: {some(map(plain, sorted(missing)))}. Copy the folder again."
        )
    found, notes, beside = find_state(folder, tree, Entry)
    named, others = ([replace(entry, name=name) for name, entry in part.items()] for part in (found, beside))
    return named, others, chunks, notes


def _dtype(properties: Record) -> torch.dtype:
    """The dtype of a tensor's properties, which are pickled as a tuple that begins with it or as attributes."""
    found: Any = properties.state.get("dtype") or (properties.elements or [None])[0]
    if not isinstance(found, Global) or found.module != "torch":
        raise ValueError(f"no dtype of torch in {found!r}")
    return getattr(torch, found.name)


def _load(folder: Path, entry: Entry, chunks: list[_Chunk]) -> Tensor:
    """One tensor, put together from its chunks. Raises `ValueError` where they do not fill it."""
    whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    filled = 0
    for chunk in chunks:
        with (folder / chunk.file).open("rb") as stream:
            stream.seek(chunk.start)
            part = torch.load(io.BytesIO(stream.read(chunk.length)), weights_only=True, map_location="cpu")
        if not isinstance(part, Tensor) or part.ndim != whole.ndim:
            raise ValueError(f"a chunk of {plain(entry.key)} is no tensor of its dimensions")
        target = whole
        for dim, (start, length) in enumerate(zip(chunk.offsets, part.shape, strict=True)):
            target = target.narrow(dim, start, length)
        target.copy_(part)
        filled += part.numel()
    if filled != math.prod(entry.shape):
        raise ValueError(f"chunks hold {filled} of {math.prod(entry.shape)} numbers of {plain(entry.key)}")
    return whole
