"""A spool: tensors that wait on the disk for their turn, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gramian.checkpoint.faults import first_line
from gramian.errors import CheckpointError

try:
    import fcntl
except ImportError:  # on Windows no folder is found again
    fcntl = None  # type: ignore[assignment]

__all__ = ["JOURNAL", "PREFIX", "Spool"]

PREFIX = "gramian-"
"""What the names of the folders begin with."""
JOURNAL = "journal"
"""Under this name is what is done, for a run that goes on."""


class Spool:
    """Tensors on the disk by name; the folder is deleted with the spool.

    Args:
        parent: where the folder is made; by default where the system keeps temporary files.
        key: what it is for, so that the folder that a run left there is found again; one in use is left alone.

    Raises:
        CheckpointError: the folder cannot be made; later, where the disk is full.
    Cost: one write or read of what is asked for.

    >>> import torch
    >>> spool = Spool()
    >>> spool.put("hidden", {"x": torch.ones(2)})
    >>> spool.get("hidden")["x"], spool.bytes("hidden") > 8
    (tensor([1., 1.]), True)
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None, key: str = "") -> None:
        try:
            self.folder, self._lock = _taken(parent, key)
        except OSError as error:
            raise CheckpointError(
                f"{parent}: no folder can be made there ({first_line(error)}). Give another"
            ) from None
        self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def keep(self) -> None:
        """Lets the folder stay if this process ends, where a spool for the same finds it again."""
        if self._lock is not None:
            self._end.detach()

    def free(self) -> None:
        """Has the folder deleted with the spool, as it is before `keep`."""
        if not self._end.alive:
            self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors under a name, in place of what was there."""
        own = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        try:
            self.path(name).write_bytes(safetensors.torch.save(own))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: could not be written ({first_line(error)}). Free space there, or give another folder "
                "as scratch"
            ) from error

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name, in memory."""
        try:
            return safetensors.torch.load(self.path(name).read_bytes())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read back ({first_line(error)})") from error

    def drop(self, name: str) -> None:
        """Deletes what is under a name."""
        self.path(name).unlink(missing_ok=True)

    def bytes(self, name: str) -> int:
        """What a name takes on the disk."""
        return self.path(name).stat().st_size

    def close(self) -> None:
        """Deletes everything."""
        self.free()
        self._end()

    def path(self, name: str) -> Path:
        """The file of a name."""
        return self.folder / f"{name}.safetensors"


def _taken(parent: str | os.PathLike[str] | None, key: str) -> tuple[Path, IO[str] | None]:
    """A folder that no other process uses, and where another can find it, the lock that keeps it so."""
    if parent is not None and key and fcntl is not None:
        folder = Path(parent) / f"{PREFIX}{key}"
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, lock
        except OSError:  # in use, or a disk without locks
            lock.close()
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)), None
