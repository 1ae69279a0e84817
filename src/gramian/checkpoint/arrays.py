"""NumPy's archives of arrays by name."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gramian.checkpoint.faults import damaged, plain
from gramian.checkpoint.formats import Content, Entry
from gramian.errors import CheckpointError

__all__ = ["read_arrays"]

# Weights hardly compress. An archive that grows more than this many times over, and beyond these bytes, holds no model
# and would fill the memory.
MOST_GROWTH, LARGEST_GROWN = 20, 1 << 26


def read_arrays(file: Path) -> Content:
    """An open `.npz` file; arrays of Python objects are left out, since they are pickles."""
    entries, notes = [], []
    try:
        with zipfile.ZipFile(file) as archive:
            _check_growth(file, sum(info.file_size for info in archive.infolist()))
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    old = version == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                known = str(dtype.newbyteorder("="))
                if dtype.hasobject or not isinstance(getattr(torch, known, None), torch.dtype):
                    notes.append(f"{plain(key)}: left out, torch has no dtype {plain(dtype)}")
                else:
                    entries.append(Entry(key, tuple(shape), known, file, key))
                    # NumPy allocates what the header says before it reads
                    if math.prod(shape) * dtype.itemsize > archive.getinfo(member).file_size:
                        raise ValueError(f"{plain(key)}: its header promises more numbers than there are")
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(file, error) from error

    def load(key: str) -> Tensor:
        with np.load(file, allow_pickle=False) as arrays:
            array = arrays[key]
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))

    return Content(entries, load, notes, {})


def _check_growth(file: Path, grown: int) -> None:
    """Refuse an archive that grows beyond bounds."""
    stored = file.stat().st_size
    if grown > max(LARGEST_GROWN, MOST_GROWTH * stored):
        raise CheckpointError(
            f"{file}: an archive of {stored:,} bytes that grows to {grown:,}, wanted weights, which hardly compress. "
            "Save them without compression: numpy.savez('model.npz', **arrays)."
        )
