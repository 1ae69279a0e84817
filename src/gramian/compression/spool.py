"""A spool: tensors that wait on the disk for their turn, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gramian.checkpoint.faults import first_line
from gramian.errors import CheckpointError

__all__ = ["Spool"]


class Spool:
    """Tensors on the disk by name; the folder is deleted with the spool.

    Args:
        parent: where the folder is made; by default where the system keeps temporary files.

    Raises:
        CheckpointError: the folder cannot be made; later, where the disk is full.
    Cost: one write or read of what is asked for.
    Source: this library's own.

    >>> import torch
    >>> spool = Spool()
    >>> spool.put("hidden", {"x": torch.ones(2)})
    >>> spool.get("hidden")["x"], spool.bytes("hidden") > 8
    (tensor([1., 1.]), True)
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="gramian-", dir=parent))
        except OSError as error:
            raise CheckpointError(
                f"{parent}: no folder can be made there ({first_line(error)}). Give another"
            ) from None
        self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors under a name, in place of what was there."""
        own = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        try:
            self._path(name).write_bytes(safetensors.torch.save(own))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: could not be written ({first_line(error)}). Free space there, or give another folder "
                "as scratch"
            ) from error

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name, in memory."""
        try:
            return safetensors.torch.load(self._path(name).read_bytes())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read back ({first_line(error)})") from error

    def drop(self, name: str) -> None:
        """Deletes what is under a name."""
        self._path(name).unlink(missing_ok=True)

    def bytes(self, name: str) -> int:
        """What a name takes on the disk."""
        return self._path(name).stat().st_size

    def close(self) -> None:
        """Deletes everything."""
        self._end()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
