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

# An array may grow to this size, or else to so many times its compressed one: what is not zeros compresses far less.
LARGEST_PACKED, MOST_GROWTH = 1 << 28, 100


def read_arrays(file: Path) -> Content:
    """An open `.npz` file; arrays of Python objects are left out, since they are pickles."""
    entries, notes = [], []
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if info.file_size > max(LARGEST_PACKED, MOST_GROWTH * info.compress_size):
                    raise CheckpointError(
                        f"{file}: {plain(key)} is compressed {info.file_size // max(info.compress_size, 1):,}-fold and "
                        f"would grow to {info.file_size:,} bytes, wanted an array of weights. If you trust it, save it "
                        "without compression: numpy.savez."
                    )
                with archive.open(info) as stream:
                    version = np.lib.format.read_magic(stream)
                    old = version == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                    size = stream.tell() + math.prod(shape) * dtype.itemsize
                if size != info.file_size and not dtype.hasobject:
                    raise ValueError(f"{plain(key)} has {info.file_size:,} bytes, and its header wants {size:,}")
                known = str(dtype.newbyteorder("="))
                if dtype.hasobject or not isinstance(getattr(torch, known, None), torch.dtype):
                    notes.append(f"{plain(key)}: left out, torch has no dtype {plain(dtype)}")
                else:
                    entries.append(Entry(key, tuple(shape), known, file, key))
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(file, error) from error

    def load(key: str) -> Tensor:
        with np.load(file, allow_pickle=False) as arrays:
            array = arrays[key]
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))

    return Content(entries, load, notes, {})
