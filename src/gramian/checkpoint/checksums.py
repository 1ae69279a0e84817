"""Checksums in the safetensors files that gramian writes: one for each tensor, and one for the header that holds them.

A checksum is the CRC-32 of the bytes as they lie in the file. It detects every damage that lies within four bytes, and
any other with a probability of 1 − 2⁻³². It is no protection against someone who changes a file on purpose.
The checksums are text in the file's metadata, so that the file stays a plain safetensors file, and other programs read
it as ever. Two keys carry them: a single damaged byte cannot hide both, and so cannot make a file pass for one that
never had checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "CHECKSUMS",
    "HEADER",
    "UNKNOWN",
    "check_tensor",
    "crc",
    "raw_bytes",
    "read_checksums",
    "seal",
]

CHECKSUMS = "gramian.checksums"  # {tensor's name: checksum} as JSON
HEADER = "gramian.header"  # the checksum of the header, with `UNKNOWN` in its own place

UNKNOWN = "crc32:00000000"


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def crc(data: bytes | memoryview) -> str:
    """The checksum of bytes, as text of fixed length."""
    return f"crc32:{zlib.crc32(data):08x}"


def seal(header: bytes) -> bytes:
    """A header, its length before it, whose checksum is still unknown, with that checksum."""
    return header.replace(_entry(UNKNOWN), _entry(crc(header)), 1)


def read_checksums(file: Path, metadata: Mapping[str, str]) -> dict[str, str] | None:
    """The checksums of a file's tensors, after the header was checked; `None` where the file never had any.

    Raises `ValueError` where the header is damaged.
    """
    if CHECKSUMS not in metadata and HEADER not in metadata:
        return None
    with file.open("rb") as stream:
        length = stream.read(8)
        _check_header(length + stream.read(int.from_bytes(length, "little")), metadata.get(HEADER, ""))
    found = json.loads(metadata.get(CHECKSUMS, "null"))
    if not isinstance(found, dict):
        raise ValueError("its header lacks the checksums")
    return found


def _check_header(header: bytes, noted: str) -> None:
    """Raise `ValueError` where a header is not the one whose checksum was noted."""
    own = _entry(noted)
    if header.count(own) != 1 or crc(header.replace(own, _entry(UNKNOWN))) != noted:
        raise ValueError("its header differs from what was written: the checksum is another")


def check_tensor(name: str, tensor: Tensor, checksums: Mapping[str, str]) -> None:
    """Raise `ValueError` where a tensor is not the one whose checksum was noted."""
    if crc(raw_bytes(tensor)) != checksums.get(name):
        raise ValueError(f"{name!r} differs from what was written: the checksum is another")


def _entry(checksum: str) -> bytes:
    """The checksum's place in the header. Quotes within names are escaped, so that it occurs once."""
    return f'"{HEADER}":"{checksum}"'.encode()
