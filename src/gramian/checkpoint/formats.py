"""The formats of single files, one reader for each in `READERS`.

A reader lists a file's tensors without loading them, and gives single tensors that are memory-mapped. So a checkpoint
larger than memory can be read: the system takes pages of the file back when it needs them. safetensors is imported
where it is used, since `block` needs this package's `clean_name` and must load only torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from gramian.checkpoint.faults import damaged, not_a_zip, plain, refuse_pointer, refused, unsafe_globals
from gramian.errors import CheckpointError

__all__ = [
    "READERS",
    "SAFETENSORS_DTYPES",
    "TIED",
    "Content",
    "Entry",
    "Kind",
    "dtype_name",
    "find_tied",
    "get",
    "is_plain",
    "read_safetensors",
    "reader",
]

Kind = Literal["float", "complex", "integer", "quantized", "empty"]

TIED = "gramian.tied"  # the metadata key under which a safetensors file of ours records {alias: name} as JSON

# Training loops write their state dict under one of these keys, next to an optimizer and counters.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")

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
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: str
    tied_to: str = ""

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


@dataclass(frozen=True)
class Content:
    """An open file: its entries, under the names in the file, and a function that loads one tensor."""

    entries: list[Entry]
    get: Callable[[str], Tensor]
    notes: list[str]
    metadata: dict[str, str]


def reader(file: Path) -> AbstractContextManager[Content]:
    """The open file, by the reader for its suffix."""
    if file.suffix not in READERS:
        raise CheckpointError(
            f"{file}: unknown suffix {plain(file.suffix)!r}, wanted one of {', '.join(READERS)}, or a folder. "
            "Save the weights as safetensors, or rename the file if it is one of these."
        )
    return READERS[file.suffix](file)


def get(content: Content, entry: Entry) -> Tensor:
    """One tensor of an open file."""
    try:
        return content.get(entry.key)
    except Exception as error:  # a damaged file may raise anything
        raise damaged(entry.file, error) from error


@contextmanager
def read_safetensors(file: Path) -> Iterator[Content]:
    """An open safetensors file."""
    import safetensors

    refuse_pointer(file)
    try:
        handle = _open_once(file, lambda: safetensors.safe_open(file, "pt"))
    except Exception as error:
        raise damaged(file, error) from error
    with handle as opened:
        metadata = dict(opened.metadata() or {})
        entries, notes = {}, []
        for key in opened.keys():  # noqa: SIM118 - not a dict
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
            target = entries[key]
            aliases.append(Entry(alias, target.shape, target.dtype, file, alias, tied_to=key))
        where = {entry.key: entry.tied_to or entry.key for entry in (*entries.values(), *aliases)}
        yield Content([*entries.values(), *aliases], lambda key: opened.get_tensor(where[key]), notes, metadata)


def _open_once(file: Path, opening: Callable[[], Any]) -> Any:
    """Opens a file that may be replaced meanwhile: libraries open it twice by its name, for its header and its data."""

    def identity() -> tuple[int, ...]:
        status = file.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

    while True:
        before = identity()
        try:
            opened = opening()
        except Exception:
            if identity() == before:
                raise
        else:
            if identity() == before:
                return opened


def _read_tied(file: Path, text: str) -> dict[str, str]:
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(tied, dict) or not all(isinstance(key, str) for key in tied.values()):
        raise damaged(file, ValueError(f"metadata {TIED!r} is not a map of names"))
    return tied


@contextmanager
def _read_pickle(file: Path) -> Iterator[Content]:
    refuse_pointer(file)
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise not_a_zip(file)
    try:
        loaded = _open_once(file, lambda: torch.load(file, weights_only=True, mmap=True, map_location="cpu"))
    except Exception as error:
        wanted = unsafe_globals(file)
        raise refused(file, wanted) if wanted else damaged(file, error) from error
    state, notes = _find_state(file, loaded)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if is_plain(value):
            tensors[key] = value.detach()
        else:
            kind = "quantized" if value.is_quantized else f"{type(value).__name__} with layout {value.layout}"
            notes.append(f"{plain(key)}: left out, a {kind} tensor on {value.device}")
    tied = find_tied(tensors)
    entries = [Entry(key, tuple(t.shape), dtype_name(t), file, key, tied.get(key, "")) for key, t in tensors.items()]
    yield Content(entries, tensors.__getitem__, notes, {})


def _find_state(file: Path, loaded: object) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by dotted name, taken out of the containers that training loops put around them."""
    notes, under = [], []
    while isinstance(loaded, Mapping):
        inner = next((key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        under.append(inner)
        left_out = [plain(key) for key in loaded if key != inner]
        notes.append(
            f"weights found under {'.'.join(under)!r}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
        )
        loaded = loaded[inner]
    if isinstance(loaded, Tensor) or not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{file}: holds a {type(loaded).__name__}, wanted a state dict of tensors. Save model.state_dict()."
        )
    state: dict[str, Tensor] = {}
    others: list[str] = []
    _flatten("", loaded, state, others)
    if others:
        notes.append(f"not tensors, left out: {', '.join(others[:8])}" + (", …" if len(others) > 8 else ""))
    return state, notes


def _flatten(prefix: str, tree: Mapping[Any, Any], state: dict[str, Tensor], others: list[str]) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(key, str) and isinstance(value, Tensor) and name not in state:
            state[name] = value
        elif isinstance(key, str) and isinstance(value, Mapping):
            _flatten(f"{name}.", value, state, others)
        else:  # an optimizer's state is keyed by numbers, and is not weights
            others.append(plain(name))


READERS: dict[str, Callable[[Path], AbstractContextManager[Content]]] = {
    ".safetensors": read_safetensors,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
    ".ckpt": _read_pickle,
    ".bin": _read_pickle,
}


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`{alias: first name}` of the names that share all of their memory."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, t in tensors.items():
        if t.numel():  # empty tensors are all at address 0
            memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())
            if first.setdefault(memory, name) != name:
                tied[name] = first[memory]
    return tied


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether the value is a dense tensor in memory: no subclass such as DTensor, not sparse, meta or quantized."""
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return False
    assert isinstance(value, Tensor)
    return value.layout == torch.strided and value.device.type != "meta" and not value.is_quantized


def dtype_name(value: Tensor | torch.dtype) -> str:
    """torch's name of a dtype, or of a tensor's: `"float32"`."""
    return str(value.dtype if isinstance(value, Tensor) else value).removeprefix("torch.")
