"""Writing tensors to a file, whole or not at all, and reading them back bit for bit."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gramian.checkpoint.faults import first_line
from gramian.checkpoint.formats import SAFETENSORS_DTYPES, TIED, dtype_name, find_tied, get, is_plain, read_safetensors
from gramian.errors import CheckpointError, InputError

__all__ = ["load_tensors", "save_tensors"]


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as safetensors, atomically: after a crash at any moment the file is the old one or the new one.

    A tensor under several names is written once, and the names are kept in the metadata. Views that merely overlap are
    written as separate tensors. Strides are not kept.

    Args:
        path: the file to write or replace; its folder must exist.
        tensors: dense tensors of any shape and device, by name.
        metadata: text to keep with them.

    Raises:
        InputError: the folder is missing, a tensor is not dense or of a dtype that safetensors lacks, or the metadata
            is not text.
        CheckpointError: the file cannot be written (no permission, no space).
    Cost: one write; a copy in memory of tensors that are non-contiguous or share their storage.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path, w = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors", torch.eye(2)
    >>> save_tensors(path, {"embed": w, "head": w}, {"step": "7"})
    >>> tensors, metadata = load_tensors(path)
    >>> tensors["embed"] is tensors["head"], metadata
    (True, {'step': '7'})
    """
    import safetensors.torch

    path, text = Path(path), dict(metadata or {})
    if TIED in text or not all(isinstance(part, str) for item in text.items() for part in item):
        raise InputError(f"save_tensors: metadata must map str to str, and {TIED!r} is taken; got {text!r}.")
    for name, tensor in tensors.items():
        _check(name, tensor)
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist. Create it, or save elsewhere.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, wanted the name of a file.")
    tied = find_tied(tensors)
    if tied:
        text[TIED] = json.dumps(tied)
    own = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items() if name not in tied}
    # safetensors refuses tensors that share a storage: each of them is copied out
    users = Counter(t.untyped_storage().data_ptr() for t in own.values() if t.numel())
    own = {
        name: t.contiguous()
        if users[t.untyped_storage().data_ptr()] < 2
        else t.clone(memory_format=torch.contiguous_format)
        for name, t in own.items()
    }
    # in the same folder, since a rename is atomic within one file system only; under a name that no other process
    # uses, and with the permissions of the user's umask
    temporary = folder / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(own, temporary, text or None)  # with no tensors and {} it would write a broken file
        temporary.chmod(mode)  # safetensors gives permission to the owner only
        _sync(temporary)
        os.replace(temporary, path)
        _sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({first_line(error)}). Free space or save elsewhere."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file, under the names with which they were saved.

    Names that `save_tensors` found tied give one tensor again. No prefix is dropped, as `open_checkpoint` does.

    Args:
        path: a `.safetensors` file.

    Returns: `(tensors by name, metadata)`.
    Raises:
        CheckpointError: the file is missing or damaged.
    Cost: one read.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_tensors(path, {"module.w": torch.ones(2)})
    >>> load_tensors(path)
    ({'module.w': tensor([1., 1.])}, {})
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Check the path.")
    tensors: dict[str, Tensor] = {}
    content = read_safetensors(path)
    for entry in content.entries:  # aliases come after all others
        tensors[entry.key] = tensors[entry.tied_to] if entry.tied_to else get(content, entry)
    return tensors, dict(content.metadata)


def _check(name: str, tensor: object) -> None:
    """Raises where safetensors cannot hold the tensor, or not under this name."""
    if name == "__metadata__":
        raise InputError("save_tensors: a tensor cannot be named '__metadata__' in a safetensors file. Rename it.")
    if not is_plain(tensor):
        layout = f" with layout {tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else ""
        raise InputError(
            f"save_tensors: expected dense tensors, got a {type(tensor).__name__}{layout} at {name!r}. "
            "Use .to_dense() for a sparse tensor, .full_tensor() for a DTensor."
        )
    if dtype_name(tensor) not in SAFETENSORS_DTYPES.values():
        raise InputError(f"save_tensors: safetensors has no {tensor.dtype}, the dtype of {name!r}. Convert it first.")


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)
