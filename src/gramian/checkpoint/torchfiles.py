"""torch's own files: `torch.save` in its zip format and in the one before it, and TorchScript archives.

A file is loaded with `torch.load(weights_only=True)`. What that refuses, because it holds objects of classes that are
not tensors, is read by `unpickling`, which calls nothing: the tensors come out, and the objects are named in the notes.
A pickle that wants functions of the system called is refused.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint.budgets import OverBudgetError
from gramian.checkpoint.containers import Module, find_state
from gramian.checkpoint.faults import damaged, plain, refused
from gramian.checkpoint.formats import Content, Entry, dtype_name, find_tied, is_plain, open_once
from gramian.checkpoint.unpickling import Record, Storage, TensorPart, read_pickle
from gramian.errors import CheckpointError, some

__all__ = ["LEGACY", "as_plain", "bare_pickle", "read_legacy", "read_zip"]

LARGEST_REPEATED = 1 << 26  # bytes that a tensor may take whose memory is smaller
LARGEST_PACKED = 1 << 26  # bytes to which compressed parts of an archive may grow
LARGEST_PICKLE = 1 << 27  # bytes of a pickle, whose tensors lie beside it

LEGACY = (119547037146038801333356).to_bytes(10, "little")  # the number that opens torch.save's format before 1.6


def read_zip(file: Path) -> Content:
    """A file that `torch.save` or `torch.jit.save` wrote."""
    script = _is_script(file)
    _check_packed(file)
    if not script and _is_affordable(file):
        try:
            loaded = open_once(file, lambda: torch.load(file, weights_only=True, mmap=True, map_location="cpu"))
        except Exception:  # objects of other classes, or damage: the other way says which
            pass
        else:
            return _content(file, loaded, [])
    try:
        tree, numbers = open_once(file, lambda: _open_zip(file))
        loaded, notes = as_plain(file, tree, numbers)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise damaged(file, error) from error
    return _content(file, loaded, ["a TorchScript archive: its tensors alone, its code is not run"] * script + notes)


def read_legacy(file: Path) -> Content:
    """A file in torch.save's format before 1.6: pickles, then the storages one after the other."""
    try:
        tree, numbers = open_once(file, lambda: _open_legacy(file))
        loaded, notes = as_plain(file, tree, numbers)
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(file, error) from error
    return _content(file, loaded, notes)


def bare_pickle(file: Path) -> CheckpointError | None:
    """The error for a pickle without torch's format around it; `None` where the file is no pickle."""
    try:
        with file.open("rb") as stream:
            tree = read_pickle(stream, file.stat().st_size)
        as_plain(file, tree, {})
    except CheckpointError as error:
        return error
    except OverBudgetError as error:
        return damaged(file, error)
    except Exception:
        return None
    return CheckpointError(
        f"{file}: a bare pickle, which is not read. If you trust it, load it yourself and save its tensors: "
        "safetensors.torch.save_file(state, 'model.safetensors')."
    )


def as_plain(file: Path, tree: Any, numbers: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """A pickle's value with tensors in place and objects as dicts of what they hold; and notes on those objects.

    `numbers` are the bytes of each storage. Raises `CheckpointError` where the pickle wants functions of the system
    called.
    """
    builder = _Builder(numbers)
    value = builder.build(tree)
    if builder.acting:
        raise refused(file, sorted(builder.acting))
    notes = [f"{plain(text)}" for text in builder.notes]
    if builder.modules:
        notes.insert(0, f"a whole model ({plain(builder.modules[0])}): its tensors alone, its class is not built")
    return value, notes


class _Builder:
    """Puts tensors in place of their descriptions, once each, so that shared ones stay shared."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self.numbers = numbers
        self.acting: set[str] = set()
        self.notes: list[str] = []
        self.modules: list[str] = []
        self._open: set[int] = set()
        self._built: dict[int, tuple[Any, Any]] = {}  # with the value, so that its id is not given to another
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def build(self, value: Any) -> Any:
        if isinstance(value, TensorPart):
            return self._tensor(value)
        if not isinstance(value, (dict, list, tuple, Record)):
            return value
        if id(value) in self._open:  # an object that holds itself
            return None
        if id(value) not in self._built:
            self._open.add(id(value))
            self._built[id(value)] = value, self._container(value)
            self._open.discard(id(value))
        return self._built[id(value)][1]

    def _container(self, value: Any) -> Any:
        if isinstance(value, Record):
            return self._record(value)
        if isinstance(value, dict):
            return {self.build(key) if isinstance(key, tuple) else key: self.build(v) for key, v in value.items()}
        built = [self.build(v) for v in value]
        return tuple(built) if isinstance(value, tuple) else built

    def _record(self, record: Record) -> Any:
        if record.acts:
            self.acting.add(str(record.of))
        for part in (*record.args, *record.elements):
            self.build(part)  # for what it wants called
        contents = self.build(record.contents)
        if "_parameters" in contents and "_modules" in contents:
            self.modules.insert(0, str(record.of))
            held = [contents[key] for key in ("_parameters", "_buffers", "_modules") if key in contents]
            return _module({key: v for part in held if isinstance(part, dict) for key, v in part.items()})
        if record.of.module.startswith("__torch__"):  # TorchScript's module, with flags beside its tensors
            return _module(contents)
        return Left(str(record.of), contents)

    def _tensor(self, part: TensorPart) -> Any:
        if part.full_shape and part.full_shape != part.shape:
            return Left(f"one rank's shard {part.shape} of a DTensor {part.full_shape}", {})
        key = (part.storage.key, part.dtype)
        if key not in self._storages:
            data = self.numbers[part.storage.key]
            if data.storage_offset() % part.dtype.itemsize:
                data = data.clone()
            whole = data[: len(data) // part.dtype.itemsize * part.dtype.itemsize]
            self._storages[key] = whole.view(part.dtype)
        return self._storages[key].as_strided(
            part.shape, part.stride, self._storages[key].storage_offset() + self._checked(part, self._storages[key])
        )

    @staticmethod
    def _checked(part: TensorPart, storage: Tensor) -> int:
        """The offset of a tensor that lies within its storage; as_strided knows only the end of the whole file."""
        last = part.offset + sum((n - 1) * step for n, step in zip(part.shape, part.stride, strict=True))
        small = part.offset < 0 or any(step < 0 for step in part.stride) or any(n < 0 for n in part.shape)
        if small or (0 not in part.shape and last >= len(storage)):
            raise ValueError("a tensor beyond the end of its storage")
        return part.offset


def _module(contents: Mapping[Any, Any]) -> Module:
    """A module's tensors and those of its parts that have any."""
    return Module({key: v for key, v in contents.items() if isinstance(v, Tensor) or (isinstance(v, dict) and v)})


class Left(dict):  # type: ignore[type-arg]
    """What an object that was not built holds, and what it is."""

    def __init__(self, of: str, contents: Mapping[Any, Any]) -> None:
        super().__init__(contents)
        self.of = of


def _content(file: Path, loaded: object, notes: list[str]) -> Content:
    state, more, beside = find_state(file, loaded)
    tensors: dict[str, Tensor] = {}
    notes = notes + more
    for key, value in state.items():
        value = _whole(value)
        if not is_plain(value):
            kind = "quantized" if value.is_quantized else f"{type(value).__name__} with layout {value.layout}"
            notes.append(f"{plain(key)}: left out, a {'nested' if value.is_nested else kind} tensor on {value.device}")
            beside[key] = value
        elif _is_blown_up(value):
            notes.append(f"{plain(key)}: left out, a tensor {tuple(value.shape)} of which the file holds a small part")
        else:
            tensors[key] = value.detach()
    loaders: dict[str, Callable[[], Tensor]] = {}
    unread: list[str] = []
    for key, value in beside.items():
        numbers = _numbers(value)
        if numbers is not None:
            loaders[key] = lambda numbers=numbers: numbers
        elif key not in state:
            unread.append(key)
    if unread:
        notes.append(f"not searched for NaN, since they are not plain numbers in memory: {some(map(plain, unread))}")
    tied = find_tied(tensors)
    entries = [Entry(key, tuple(t.shape), dtype_name(t), file, key, tied.get(key, "")) for key, t in tensors.items()]
    return Content(entries, tensors.__getitem__, notes, {}, loaders)


def _is_blown_up(value: Tensor) -> bool:
    """Whether a tensor repeats its memory (as `expand` does) to a size that a small file should not ask for."""
    nbytes = value.numel() * value.element_size()
    return nbytes > LARGEST_REPEATED and nbytes > value.untyped_storage().nbytes()


def _numbers(value: Tensor) -> Tensor | None:
    """The numbers of a tensor that is looked at only for NaN; `None` where they are not in memory."""
    value = _whole(value)
    if value.layout == torch.sparse_coo:
        value = value._values()
    elif value.is_nested or value.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        value = value.values()
    return value.detach() if is_plain(value) and not _is_blown_up(value) else None


def _whole(value: Tensor) -> Tensor:
    """A DTensor's local tensor where that is all of it."""
    local = getattr(value, "_local_tensor", None)
    return local if isinstance(local, Tensor) and local.shape == value.shape else value


def _is_script(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:
        return False


def _check_packed(file: Path) -> None:
    """Refuse an archive that is compressed, which torch never writes, and grows beyond bounds."""
    try:
        with zipfile.ZipFile(file) as archive:
            grown = sum(i.file_size for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED)
    except Exception as error:
        raise damaged(file, error) from error
    if grown > LARGEST_PACKED:
        raise CheckpointError(
            f"{file}: a compressed archive that grows to {grown:,} bytes, wanted one as torch.save writes it. "
            "Unpack it, and zip it again without compression."
        )


def _is_affordable(file: Path) -> bool:
    """Whether the pickles of an archive can be followed within their budget; `torch.load` has none.

    Raises `CheckpointError` for one that goes beyond it. What cannot be followed for another reason is told later.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for name in {name for name in archive.namelist() if name.endswith("data.pkl")}:
                read_pickle(io.BytesIO(_read_pickle(archive, name)), file.stat().st_size)
    except OverBudgetError as error:
        raise damaged(file, error) from error
    except Exception:
        return False
    return True


def _read_pickle(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST_PICKLE:
        raise OverBudgetError(f"a pickle of {size:,} bytes")
    return archive.read(name)


def _open_zip(file: Path) -> tuple[Any, Mapping[str, Tensor]]:
    """The pickle's value, and the storages of a zip archive, mapped."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        members = {info.filename: info for info in archive.infolist()}
        pickle = next(name for name in members if name.endswith("/data.pkl") or name == "data.pkl")
        folder = pickle.removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("written on a big-endian machine")
        tree = read_pickle(io.BytesIO(_read_pickle(archive, pickle)), file.stat().st_size)
        whole = _mapped(file)
        numbers = {}
        for name, info in members.items():
            key = name.removeprefix(f"{folder}data/")
            if key != name and info.compress_type == zipfile.ZIP_STORED:
                raw.seek(info.header_offset + 26)  # the lengths of the name and the extra field of the local header
                head = raw.read(4)
                start = (
                    info.header_offset + 30 + int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
                )
                if start + info.file_size > len(whole):
                    raise ValueError("a storage beyond the end of the file")
                numbers[key] = whole[start : start + info.file_size]
    return tree, numbers


def _open_legacy(file: Path) -> tuple[Any, Mapping[str, Tensor]]:
    """The value, and the storages of the format before 1.6: magic number, version, system, value, keys, storages."""
    with file.open("rb") as stream:
        *_, system = (read_pickle(stream) for _ in range(3))
        if not system.get("little_endian", True):
            raise ValueError("written on a big-endian machine")
        size = file.stat().st_size
        tree, keys = read_pickle(stream, size), read_pickle(stream, size)
        sizes = {storage.key: storage.dtype for storage in _storages(tree)}
        whole, numbers = _mapped(file), {}
        for key in keys:
            length = int.from_bytes(stream.read(8), "little") * (sizes.get(str(key)) or torch.uint8).itemsize
            start = stream.tell()
            if start + length > len(whole):
                raise ValueError("a storage beyond the end of the file")
            numbers[str(key)] = whole[start : start + length]
            stream.seek(length, io.SEEK_CUR)
    return tree, numbers


def _storages(value: Any, seen: set[int] | None = None) -> Iterator[Storage]:
    """All storages in a value."""
    seen = set() if seen is None else seen
    if isinstance(value, TensorPart):
        yield value.storage
    elif isinstance(value, (dict, list, tuple, Record)) and id(value) not in seen:
        seen.add(id(value))
        held = (value.args, value.elements, value.contents) if isinstance(value, Record) else (value,)
        for part in held:
            for item in part.values() if isinstance(part, dict) else part:
                yield from _storages(item, seen)


def _mapped(file: Path) -> Tensor:
    """A file's bytes, mapped."""
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]
