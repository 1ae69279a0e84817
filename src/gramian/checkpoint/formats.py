"""What a reader of files gives: entries, described without loading them, and single tensors; and safetensors' reader.

Tensors are memory-mapped. So a checkpoint larger than memory can be read: the system takes pages of the file back when
it needs them. safetensors is imported where it is used, since `block` needs this package's `clean_name` and must load
only torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from gramian.checkpoint.budgets import OverBudgetError, check_number, size_of
from gramian.checkpoint.checksums import CHECKSUMS, HEADER, check_tensor, read_checksums
from gramian.checkpoint.faults import damaged, plain

__all__ = [
    "SAFETENSORS_DTYPES",
    "TIED",
    "Content",
    "Entry",
    "Kind",
    "Made",
    "dtype_name",
    "find_tied",
    "get",
    "identity",
    "is_plain",
    "memory_of",
    "open_once",
    "read_safetensors",
]

Kind = Literal["float", "complex", "integer", "quantized", "empty"]

TIED = "gramian.tied"  # the metadata key under which a safetensors file of ours records {alias: name} as JSON

# Names of the safetensors format, without those for which torch has no dtype.
SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}

QUANTIZED = ("int8", "uint8", "qint", "quint", "float8", "float4")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, described without loading it.

    Attributes:
        name: in the checkpoint, without wrappers' prefixes.
        shape: of the tensor.
        dtype: torch's name for it, as in `"float32"`.
        file: the file that holds it.
        key: its name in that file.
        tied_to: the name of the entry whose memory it shares, or empty.
        made: where the file holds a weight in parts, such as integers and their scales: how it is computed from them.
        part_of: the name of the weight that is computed from it and others, or empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: str
    tied_to: str = ""
    made: Made | None = None
    part_of: str = ""

    @property
    def weight(self) -> str:
        """The name that the weight has in its module."""
        return self.made.name if self.made else self.name

    @property
    def kind(self) -> Kind:
        """The kind of numbers; only `"float"` has a spectrum. Quantized weights lack their scales here."""
        if 0 in self.shape:
            return "empty"
        if self.dtype.startswith(QUANTIZED):
            return "quantized"
        if self.dtype.startswith("complex"):
            return "complex"
        return "float" if self.dtype in ("float64", "float32", "float16", "bfloat16") else "integer"


@dataclass(frozen=True, eq=False)
class Made:
    """How a weight is computed from the tensors that a file holds.

    Attributes:
        name: of the weight in the module that applies it, where that is another than the entry's.
        how: in words, as in `"dequantized from int4 (GPTQ)"`.
        parts: the stored tensors, by their part.
        compute: the weight, from those tensors.
        low_rank: whether it is a product of thin factors alone, the change that an adapter makes.
    """

    name: str
    how: str
    parts: Mapping[str, Entry]
    compute: Callable[[Mapping[str, Tensor]], Tensor]
    low_rank: bool = False


@dataclass(frozen=True)
class Content:
    """What a file holds: its entries, under the names in the file, and a function that loads one tensor.

    `beside` loads the numbers of tensors that are no entries, such as an optimizer's, to be searched for NaN.
    `verified` says that every tensor is compared with its checksum when it is loaded.
    """

    entries: list[Entry]
    get: Callable[[str], Tensor]
    notes: list[str]
    metadata: dict[str, str]
    beside: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    verified: bool = False


def get(content: Content, entry: Entry) -> Tensor:
    """One tensor of an open file."""
    try:
        return content.get(entry.key)
    except Exception as error:  # a damaged file may raise anything
        raise damaged(entry.file, error) from error


def read_safetensors(file: Path, *, verify: bool = True) -> Content:
    """A safetensors file; where it has checksums, its header is compared with them now and a tensor when it is loaded.

    Args:
        file: the file.
        verify: whether to compare tensors too.
    """
    import safetensors

    def opening() -> tuple[Any, dict[str, str], dict[str, str] | None]:
        opened = safetensors.safe_open(file, "pt")
        metadata = dict(opened.metadata() or {})
        return opened, metadata, read_checksums(file, metadata)

    try:
        opened, metadata, checksums = open_once(file, opening)
    except Exception as error:
        raise damaged(file, error) from error
    metadata = {name: text for name, text in metadata.items() if name not in (CHECKSUMS, HEADER)}
    entries, notes = {}, []
    keys = opened.keys()
    try:
        check_number(len(keys), size_of(file))
    except OverBudgetError as error:
        raise damaged(file, error) from error
    for key in keys:
        part = opened.get_slice(key)
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            notes.append(f"{plain(key)}: left out, torch has no dtype {part.get_dtype()}")
        else:
            entries[key] = Entry(key, tuple(part.get_shape()), dtype, file, key)
    aliases = []
    for alias, key in _read_tied(file, metadata.pop(TIED, "{}")).items():
        if key not in entries or alias in entries:
            raise damaged(file, ValueError(f"{alias!r} is tied to {key!r}, which is not there"))
        aliases.append(replace(entries[key], name=alias, key=alias, tied_to=key))
    for alias, key in metadata.items():  # as safetensors.torch.save_model keeps the names that it drops
        if key and key in entries and alias not in entries and "." in alias:
            aliases.append(replace(entries[key], name=alias, key=alias, tied_to=key))
    where = {entry.key: entry.tied_to or entry.key for entry in (*entries.values(), *aliases)}

    def load(key: str) -> Tensor:
        tensor = opened.get_tensor(where[key])
        if verify and checksums is not None:
            check_tensor(where[key], tensor, checksums)
        return tensor

    verified = verify and checksums is not None
    return Content([*entries.values(), *aliases], load, notes, metadata, verified=verified)


def identity(file: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def open_once(file: Path, opening: Callable[[], Any]) -> Any:
    """Opens a file that may be replaced meanwhile: libraries open it twice by its name, for its header and its data."""
    while True:
        before = identity(file)
        try:
            opened = opening()
        except Exception:
            if identity(file) == before:
                raise
        else:
            if identity(file) == before:
                return opened


def _read_tied(file: Path, text: str) -> dict[str, str]:
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(tied, dict) or not all(isinstance(key, str) for key in tied.values()):
        raise damaged(file, ValueError(f"metadata {TIED!r} is not a map of names"))
    return tied


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`{alias: first name}` of the names that share all of their memory."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, t in tensors.items():
        if t.numel():  # empty tensors are all at address 0
            memory = memory_of(t)
            if first.setdefault(memory, name) != name:
                tied[name] = first[memory]
    return tied


def memory_of(t: Tensor) -> tuple[Any, ...]:
    """What two tensors share that are the same memory, seen in the same way."""
    return (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether the value is a dense tensor in memory: not a DTensor, sparse, nested, on meta or quantized."""
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return False
    assert isinstance(value, Tensor)
    dense = value.layout == torch.strided and not value.is_nested
    return dense and value.device.type != "meta" and not value.is_quantized


def dtype_name(value: Tensor | torch.dtype) -> str:
    """torch's name of a dtype, or of a tensor's: `"float32"`."""
    return str(value.dtype if isinstance(value, Tensor) else value).removeprefix("torch.")
