"""Reading a checkpoint, a file or a folder, tensor by tensor and without executing anything in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from gramian.checkpoint.derived import with_derived
from gramian.checkpoint.faults import damaged, plain
from gramian.checkpoint.folders import open_file, open_folder, open_index, read_json
from gramian.checkpoint.formats import Entry, get
from gramian.checkpoint.names import as_path, clean_name
from gramian.checkpoint.packing import RANKS
from gramian.checkpoint.readers import reader
from gramian.errors import CheckpointError, InputError

__all__ = ["Checkpoint", "open_checkpoint"]

# JSON files beside the weights that say how quantized weights and adapters are to be read.
SETTINGS = ("config.json", "adapter_config.json", "quantize_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file or folder; iterating loads them one by one as `(name, tensor)`, in the order of `entries`.

    Tensors are memory-mapped: change a clone of them. An open checkpoint stands wherever its path does, as in
    `gm.inspect(open_checkpoint(path, verify=False))`.

    Attributes:
        path: of the file or folder.
        entries: every tensor's description, by name.
        notes: what was unwrapped or left out.
        metadata: the text that the file carries about itself.
        beside: loads the numbers of a tensor that is no entry (an optimizer's, a second network's, a sparse one).
        verify: whether a tensor is compared with its checksum when it is loaded, where the file has them.
    """

    path: Path
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    verify: bool = True

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[Entry]] = {}
        for entry in self.entries.values():
            by_file.setdefault(entry.file, []).append(entry)
        for file, entries in by_file.items():
            content = reader(file, verify=self.verify)
            for entry in entries:
                yield entry.name, _compute(entry, self.verify) if entry.made else get(content, entry)

    def load(self, name: str) -> Tensor:
        """One tensor by name. Raises `InputError` where there is none of that name."""
        if name not in self.entries:
            raise InputError(f"{self.path}: holds no tensor {plain(name)!r}; see Checkpoint.entries.")
        return _load(self.entries[name], self.verify)


def _load(entry: Entry, verify: bool) -> Tensor:
    if entry.made:
        return _compute(entry, verify)
    return get(reader(entry.file, verify=verify), entry)


def _compute(entry: Entry, verify: bool) -> Tensor:
    """A weight from its parts."""
    assert entry.made is not None
    parts = {word: _load(part, verify) for word, part in entry.made.parts.items()}
    try:
        weight = entry.made.compute(parts)
        if tuple(weight.shape) != entry.shape:
            raise ValueError(f"{entry.name} is {tuple(weight.shape)}, wanted {entry.shape}")
    except (RuntimeError, ValueError, IndexError) as error:  # parts that do not fit each other
        raise damaged(entry.file, error) from error
    return weight


def open_checkpoint(path: str | os.PathLike[str], *, stored: bool = False, verify: bool = True) -> Checkpoint:
    """Opens a checkpoint for reading: nothing in it is executed, and a tensor is loaded only when asked for.

    A state dict inside what a training loop wrote (`{"model": …, "optimizer": …}`) is found, and `notes` say so. Names
    lose their wrappers' prefixes; see `clean_name`. A weight that is stored in parts (quantized, weight norm, LoRA) is
    an entry under its name in the model, and is computed when it is loaded; `entry.made` says how.

    Args:
        path: a file of safetensors, torch (`.pt`, `.pth`, `.ckpt`, `.bin`, TorchScript) or NumPy (`.npz`), told apart
            by its contents; the index of a sharded model; or a folder of Hugging Face, of an adapter, or of
            torch.distributed.checkpoint; or a checkpoint that is open, which is returned.
        stored: give the tensors as they are stored, and compute none.
        verify: compare each tensor that is loaded with its checksum, where the file has them, as those that gramian
            writes. The header's is always compared.

    Returns: the checkpoint.
    Raises:
        CheckpointError: the path is missing, damaged or of an unknown kind, holds no tensors or two of one name, or
            loading it would execute code. The message is one line that says what to do.
    Cost: reads headers only; a tensor maps its file.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"model": {"module.w": torch.ones(2, 3)}, "step": 7}, path)
    >>> checkpoint = open_checkpoint(path)
    >>> checkpoint.entries["w"].shape, checkpoint.entries["w"].kind
    ((2, 3), 'float')
    >>> checkpoint.notes
    ("weights found under 'model'; left out: step",)
    >>> [(name, float(tensor.sum())) for name, tensor in checkpoint]
    [('w', 6.0)]
    """
    if isinstance(path, Checkpoint):
        if not stored:
            return path
        verify = path.verify
    path = as_path(path, "open_checkpoint")
    if path.is_dir():
        opened = open_folder(path)
    elif path.name.endswith(".index.json") and path.exists():
        opened = open_index(path)
    elif path.exists():
        opened = open_file(path)
    else:
        raise CheckpointError(f"{path}: no such file or folder. Check the path.")
    found, notes, metadata, beside = opened
    if not found:
        raise CheckpointError(f"{path}: holds no tensors, wanted a model's state dict. Save model.state_dict().")
    entries: dict[str, Entry] = {}
    for entry in found:
        name = clean_name(entry.name)
        if name in entries:
            raise CheckpointError(
                f"{path}: {plain(entries[name].key)!r} and {plain(entry.key)!r} are both {plain(name)!r} once "
                "wrappers' prefixes are dropped. Save the state dict of one of the two models."
            )
        entries[name] = replace(entry, name=name, tied_to=clean_name(entry.tied_to))
    if not stored:
        folder, load = path if path.is_dir() else path.parent, partial(_load, verify=verify)
        settings = {name: read_json(folder / name) for name in SETTINGS}
        told = {name: found for name, (found, _) in settings.items()} | _ranks(metadata)
        entries, more = with_derived(entries, told, load)
        notes = [*notes, *(note for _, note in settings.values() if note), *more]
    return Checkpoint(path, entries, tuple(notes), metadata, beside, verify)


def _ranks(metadata: Mapping[str, str]) -> dict[str, object]:
    """What a file says of layers that gramian factored or quantized; nothing where that cannot be read."""
    try:
        return {RANKS: json.loads(metadata[RANKS])}
    except (KeyError, ValueError, RecursionError):
        return {}
