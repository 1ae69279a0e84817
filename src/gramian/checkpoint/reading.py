"""Reading a checkpoint, a file or a folder, tensor by tensor and without executing anything in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gramian.checkpoint.faults import damaged, plain, some
from gramian.checkpoint.formats import READERS, Entry, get, reader
from gramian.errors import CheckpointError, InputError

__all__ = ["Checkpoint", "clean_name", "open_checkpoint"]

# Where a Hugging Face folder keeps its weights, in the order in which transformers looks.
FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# A wrapper adds its attribute's name to those of the module that it wraps, anywhere in the model; DataParallel and DDP
# only wrap the whole model.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
PARALLEL = "module."


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file or folder; iterating loads them one by one as `(name, tensor)`, in the order of `entries`.

    Tensors are memory-mapped: change a clone of them.

    Attributes:
        path: of the file or folder.
        entries: every tensor's description, by name.
        notes: what was unwrapped or left out.
        metadata: the text that the file carries about itself.
    """

    path: Path
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[Entry]] = {}
        for entry in self.entries.values():
            by_file.setdefault(entry.file, []).append(entry)
        for file, entries in by_file.items():
            with reader(file) as content:
                for entry in entries:
                    yield entry.name, get(content, entry)

    def load(self, name: str) -> Tensor:
        """One tensor by name. Raises `InputError` where there is none of that name."""
        if name not in self.entries:
            raise InputError(f"{self.path}: holds no tensor {plain(name)!r}; see Checkpoint.entries.")
        entry = self.entries[name]
        with reader(entry.file) as content:
            return get(content, entry)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint for reading: nothing in it is executed, and a tensor is loaded only when asked for.

    A state dict inside what a training loop wrote (`{"model": …, "optimizer": …}`) is found, and `notes` say so. Names
    lose their wrappers' prefixes; see `clean_name`.

    Args:
        path: a `.safetensors` file; a Hugging Face folder, sharded or not; or a `.pt`, `.pth`, `.ckpt` or `.bin` state
            dict, read with `torch.load(weights_only=True, mmap=True)`.

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
    path = Path(path)
    if path.is_dir():
        stored, notes, metadata = _open_folder(path)
    elif path.exists():
        with reader(path) as content:
            stored, notes, metadata = content.entries, content.notes, content.metadata
    else:
        raise CheckpointError(f"{path}: no such file or folder. Check the path.")
    if not stored:
        raise CheckpointError(f"{path}: holds no tensors, wanted a model's state dict. Save model.state_dict().")
    entries: dict[str, Entry] = {}
    for entry in stored:
        name = clean_name(entry.key)
        if name in entries:
            raise CheckpointError(
                f"{path}: {plain(entries[name].key)!r} and {plain(entry.key)!r} are both {plain(name)!r} once "
                "wrappers' prefixes are dropped. Save the state dict of one of the two models."
            )
        tied_to = clean_name(entry.tied_to)
        entries[name] = Entry(name, entry.shape, entry.dtype, entry.file, entry.key, tied_to)
    return Checkpoint(path, entries, tuple(notes), metadata)


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP (`module.`), `torch.compile`, FSDP and activation checkpointing.

    Args:
        name: as in `named_parameters` or a state dict.

    Returns: the name in the plain model.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> clean_name("_orig_mod.module.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    for wrapper in WRAPPERS:
        # only whole components are dropped: "my_orig_mod." is the user's own name
        name = f".{name}".replace(f".{wrapper}", ".")
        while f".{wrapper}" in name:  # a component that was wrapped twice
            name = name.replace(f".{wrapper}", ".")
        name = name[1:]
    while name.startswith(PARALLEL) and name != PARALLEL:
        name = name.removeprefix(PARALLEL)
    return name


# ---- folders ---------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> tuple[list[Entry], list[str], dict[str, str]]:
    found = next((folder / name for name in FOLDER if (folder / name).exists()), None)
    if found is None:
        raise _no_weights(folder)
    if found.suffix != ".json":
        with reader(found) as content:
            return content.entries, content.notes, content.metadata
    files = _read_index(found)
    missing = sorted({file for file in files.values() if not (folder / file).exists()})
    if missing:
        raise CheckpointError(f"{found}: names files that are not there: {some(missing)}. Download the folder again.")
    stored: dict[str, Entry] = {}
    notes: list[str] = []
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(files.values()):
        with reader(folder / file) as content:
            held = {entry.key: entry for entry in content.entries}
            notes += content.notes
            metadata |= content.metadata
        listed = [key for key, place in files.items() if place == file]
        absent = [key for key in listed if key not in held]
        unread = {note.split(": left out", 1)[0] for note in content.notes}
        absent = [key for key in absent if plain(key) not in unread]
        if absent:
            raise CheckpointError(
                f"{found}: places tensors in {file} that are not in it: {some(absent)}. Download the folder again."
            )
        stored |= {key: held[key] for key in listed if key in held}
        extra = len(held.keys() - set(listed))
        if extra:
            notes.append(f"{file}: {extra} tensors that the index does not name, left out")
    return list(stored.values()), notes, metadata


def _read_index(index: Path) -> dict[str, str]:
    """`{tensor: file}` from a sharded folder's index."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise TypeError("weight_map is not a map of names to files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(index, error) from error
    outside = [file for file in files.values() if file in ("", ".", "..") or Path(file).name != file]
    if outside:  # an index must not point elsewhere
        raise CheckpointError(
            f"{index}: names files outside its folder: {some(outside)}, wanted plain names. Do not trust this folder."
        )
    return files


def _no_weights(folder: Path) -> CheckpointError:
    held = sorted(file.name for file in folder.iterdir())
    weights = [name for name in held if Path(name).suffix in READERS]
    if ".metadata" in held:
        advice = (
            "Convert this distributed checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch."
        )
    elif weights:
        advice = f"Give one of its files: {some(weights)}."
    else:
        advice = f"It holds {some(held) if held else 'nothing'}: check the path."
    return CheckpointError(f"{folder}: a folder without weights; looked for {', '.join(FOLDER)}. {advice}")
