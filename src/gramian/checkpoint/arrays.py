"""NumPy's archives of arrays by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gramian.checkpoint.faults import damaged, plain
from gramian.checkpoint.formats import Content, Entry

__all__ = ["read_arrays"]


def read_arrays(file: Path) -> Content:
    """An open `.npz` file; arrays of Python objects are left out, since they are pickles."""
    entries, notes = [], []
    try:
        with zipfile.ZipFile(file) as archive:
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
    except Exception as error:
        raise damaged(file, error) from error

    def load(key: str) -> Tensor:
        with np.load(file, allow_pickle=False) as arrays:
            array = arrays[key]
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))

    return Content(entries, load, notes, {})
