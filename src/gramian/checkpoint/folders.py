"""Folders of weights: Hugging Face's, sharded or not, diffusers', PEFT's and torch.distributed.checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gramian.checkpoint.distributed import METADATA_FILE
from gramian.checkpoint.faults import damaged, first_line, plain
from gramian.checkpoint.formats import Entry
from gramian.checkpoint.readers import FORMATS, reader
from gramian.checkpoint.trees import TREE
from gramian.errors import CheckpointError, some
from gramian.texts import read_text

__all__ = ["CHECKPOINT", "WEIGHTS", "open_file", "open_folder", "open_index", "read_json"]

# The names under which libraries keep a folder's weights: transformers, diffusers, PEFT, Mistral, open_clip; and the
# order in which they are looked for, each as one file, in shards, and in torch's format.
STEMS = (("model", "pytorch_model"), ("diffusion_pytorch_model",) * 2, ("adapter_model",) * 2, ("consolidated",) * 2,
         ("open_clip_model", "open_clip_pytorch_model"))  # fmt: skip
WEIGHTS = tuple(
    name
    for safe, old in STEMS
    for name in (f"{safe}.safetensors", f"{safe}.safetensors.index.json", f"{old}.bin", f"{old}.bin.index.json")
)
CHECKPOINT = "checkpoint.safetensors"  # what an unfinished run of gramian keeps in place of its model


class Opened(NamedTuple):
    """What one file or several of a model hold, as `Content` has it."""

    entries: list[Entry]
    notes: list[str]
    metadata: dict[str, str]
    beside: dict[str, Callable[[], Tensor]]


def open_file(path: Path) -> Opened:
    """What a file holds, or a folder of torch.distributed.checkpoint."""
    content = reader(path)
    return Opened(content.entries, content.notes, content.metadata, dict(content.beside))


def open_folder(folder: Path) -> Opened:
    """What a folder holds."""
    found = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if found is None and (folder / METADATA_FILE).is_file():
        found = folder
    if found is None and (folder / CHECKPOINT).is_file() and TREE in reader(folder / CHECKPOINT).metadata:
        found = folder / CHECKPOINT
    if found is None:
        raise _no_weights(folder)
    opened = open_index(found) if found.name.endswith(".index.json") else open_file(found)
    others = [name for name in WEIGHTS if (folder / name).exists() and folder / name != found]
    if others:
        opened.notes.append(f"{found.name} is read, and not what is beside it: {some(others)}")
    return opened


def open_index(index: Path) -> Opened:
    """What a sharded model holds, by its index."""
    folder, files = index.parent, _read_index(index)
    missing = sorted({file for file in files.values() if not (folder / file).exists()})
    if missing:
        raise CheckpointError(
            f"{index}: names files that are not there: {some(map(plain, missing))}. Download the folder again."
        )
    stored: dict[str, Entry] = {}
    notes: list[str] = []
    metadata: dict[str, str] = {}
    beside: dict[str, Callable[[], Tensor]] = {}
    for file in dict.fromkeys(files.values()):
        content = reader(folder / file)
        held = {entry.key: entry for entry in content.entries}
        notes += content.notes
        metadata |= content.metadata
        beside |= content.beside
        listed = [key for key, place in files.items() if place == file]
        absent = [key for key in listed if key not in held]
        unread = {note.split(": left out", 1)[0] for note in content.notes}
        absent = [key for key in absent if plain(key) not in unread]
        if absent:
            raise CheckpointError(
                f"{index}: places tensors in {file} that are not in it: {some(map(plain, absent))}. Download "
                "the folder again."
            )
        stored |= {key: held[key] for key in listed if key in held}
        extra = len(held.keys() - set(listed))
        if extra:
            notes.append(f"{file}: {extra} tensor{'s' * (extra != 1)} that the index does not name, left out")
    return Opened(list(stored.values()), notes, metadata, beside)


def _read_index(index: Path) -> dict[str, str]:
    """`{tensor: file}` from a sharded folder's index."""
    try:
        files = json.loads(read_text(index))["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise TypeError("weight_map is not a map of names to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(index, error) from error
    outside = [file for file in files.values() if file in ("", ".", "..") or Path(file).name != file]
    if outside:  # an index must not point elsewhere
        raise CheckpointError(
            f"{index}: names files outside its folder: {some(map(plain, outside))}, wanted plain names. Do not trust "
            "this folder."
        )
    return files


def read_json(file: Path) -> tuple[dict[str, Any], str]:
    """A JSON file's object, or nothing; and a note where there is a file that cannot be read."""
    try:
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, wanted an object")
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{file.name} cannot be read ({first_line(error)}), so names and shapes alone tell what tensors hold"
    return found, ""


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without weights under the usual names, with what is there."""
    held = sorted(folder.iterdir())
    readable = {end for ends, _ in FORMATS.values() for end in ends}
    weights = [file.name for file in held if file.suffix in readable]
    parts = [file.name for file in held if file.is_dir() and any((file / name).exists() for name in WEIGHTS)]
    if parts:
        what = "a pipeline of models" if (folder / "model_index.json").exists() else "a folder of models"
        return CheckpointError(
            f"{folder}: {what}, wanted one. Give one of {some(map(plain, [f'{folder}/{p}' for p in parts]), 8)}."
        )
    if (folder / "saved_model.pb").exists():
        return CheckpointError(
            f"{folder}: a TensorFlow SavedModel, which is not read. Save its arrays by name: numpy.savez('model.npz', "
            "**arrays)."
        )
    if weights:
        advice = f"Give one of its files: {some(map(plain, weights))}."
    else:
        advice = f"It holds {some(map(plain, [file.name for file in held])) if held else 'nothing'}: check the path."
    return CheckpointError(
        f"{folder}: a folder without weights; looked for {', '.join(WEIGHTS[:4])} and the like. {advice}"
    )
