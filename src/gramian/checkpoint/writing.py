"""Writing tensors to a file, whole or not at all, and reading them back bit for bit."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from gramian.checkpoint.checksums import CHECKSUMS, HEADER, UNKNOWN, crc, raw_bytes, seal
from gramian.checkpoint.faults import first_line
from gramian.checkpoint.formats import (
    SAFETENSORS_DTYPES,
    TIED,
    dtype_name,
    find_tied,
    get,
    is_plain,
    memory_of,
    read_safetensors,
)
from gramian.checkpoint.names import as_path
from gramian.errors import CheckpointError, InputError

__all__ = ["check_writable", "load_tensors", "memory_of", "save_tensors", "verify_file"]


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Writes tensors as safetensors, atomically: after a crash at any moment the file is the old one or the new one.

    A tensor under several names is written once, and the names are kept in the metadata. Views that merely overlap are
    written as separate tensors. Strides are not kept. A checksum of each tensor and of the header goes into the
    metadata; whatever gramian reads is compared with it.

    Args:
        path: the file to write or replace; its folder must exist.
        tensors: dense tensors of any shape and device, by name.
        metadata: text to keep with them.
        previous: where the file that was at `path` is kept, once the new one was read back and verified.

    Raises:
        InputError: the folder is missing, a tensor is not dense or of a dtype that safetensors lacks, or the metadata
            is not text.
        CheckpointError: the file cannot be written (no permission, no space).
    Cost: one write, and a CRC-32 of it (4 GB/s); a copy in memory of one tensor at a time that is not contiguous or on
    a GPU. One read more with `previous`.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path, w = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors", torch.eye(2)
    >>> save_tensors(path, {"embed": w, "head": w}, {"step": "7"})
    >>> tensors, metadata = load_tensors(path)
    >>> tensors["embed"] is tensors["head"], metadata
    (True, {'step': '7'})
    """
    path, text = as_path(path, "save_tensors"), dict(metadata or {})
    taken = {TIED, CHECKSUMS, HEADER}
    if taken & text.keys() or not all(isinstance(part, str) for item in text.items() for part in item):
        raise InputError(f"save_tensors: metadata must map str to str, and {sorted(taken)} are taken; got {text!r}.")
    for name, tensor in tensors.items():
        check_writable(name, tensor)
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist. Create it, or save elsewhere.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, wanted the name of a file.")
    tied = find_tied(tensors)
    if tied:
        text[TIED] = json.dumps(tied)
    own = {name: tensor for name, tensor in tensors.items() if name not in tied}
    # in the same folder, since a rename is atomic within one file system only; under a name that no other process
    # uses, and with the permissions of the user's umask
    temporary = folder / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            _write(file, own, text)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            verify_file(temporary)
            _keep(path, Path(previous))
        os.replace(temporary, path)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({first_line(error)}). Free space or save elsewhere."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> None:
    """Writes a safetensors file, one tensor in memory at a time, with its checksums."""
    words = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}
    # larger elements first, so that every tensor begins at a multiple of its element's size
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    rows, end = {}, 0
    for name, tensor in named:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        rows[name] = {"dtype": words[dtype_name(tensor)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    checksums = dict.fromkeys(rows, crc(b""))

    def header() -> bytes:
        about = {**text, CHECKSUMS: json.dumps(checksums), HEADER: UNKNOWN}
        packed = json.dumps({"__metadata__": about, **rows}, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        return seal(len(packed).to_bytes(8, "little") + packed)

    file.seek(len(header()))  # the header is known when the tensors are written; its length is known before
    for name, tensor in named:
        data = raw_bytes(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())
        checksums[name] = crc(data)
        file.write(data)
    file.seek(0)
    file.write(header())


def verify_file(path: str | os.PathLike[str]) -> None:
    """Reads a file that `save_tensors` wrote, and compares it with its checksums.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing, damaged, or has no checksums.
    Cost: one read.
    Source: this library's own.

    >>> import tempfile, pathlib, torch
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_tensors(path, {"w": torch.ones(2)})
    >>> verify_file(path)
    """
    content = read_safetensors(as_path(path, "verify_file"))
    if not content.verified:
        raise CheckpointError(f"{path}: has no checksums, so it cannot be verified. Save it with save_tensors.")
    for entry in content.entries:
        get(content, entry)


def _keep(path: Path, previous: Path) -> None:
    """Gives the file at `path` the name `previous` too, so that one of the two is there at any moment."""
    if not path.exists():
        return
    link = previous.with_name(f".{previous.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        os.link(path, link)
    except OSError:  # a file system without links; between these two renames only the previous one is there
        os.replace(path, previous)
        return
    try:
        os.replace(link, previous)
    finally:
        link.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str], *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file, under the names with which they were saved.

    Names that `save_tensors` found tied give one tensor again. No prefix is dropped, as `open_checkpoint` does.

    Args:
        path: a `.safetensors` file.
        verify: compare each tensor with its checksum, where the file has them. The header's is always compared.

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
    path = as_path(path, "load_tensors")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Check the path.")
    tensors: dict[str, Tensor] = {}
    content = read_safetensors(path, verify=verify)
    for entry in content.entries:  # aliases come after all others
        tensors[entry.key] = tensors[entry.tied_to] if entry.tied_to else get(content, entry)
    return tensors, dict(content.metadata)


def check_writable(name: str, tensor: object) -> None:
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
