"""Which reader a file needs, by its first bytes; and what other files are, with what to do about them."""

from __future__ import annotations

import errno
import stat
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from gramian.checkpoint.arrays import read_arrays
from gramian.checkpoint.budgets import OverBudgetError, check_names, check_number, size_of
from gramian.checkpoint.distributed import METADATA_FILE, read_distributed
from gramian.checkpoint.faults import damaged, first_line
from gramian.checkpoint.formats import Content, identity, read_safetensors
from gramian.checkpoint.torchfiles import LEGACY, bare_pickle, read_legacy, read_zip
from gramian.checkpoint.trees import weights_in_tree
from gramian.errors import CheckpointError

__all__ = ["FOREIGN", "FORMATS", "forget", "reader"]

# What is read: the word for it, its usual suffixes, and the reader. Files are told apart by their contents.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path], Content]]] = {
    "safetensors": ((".safetensors",), read_safetensors),
    "torch.save": ((".pt", ".pth", ".ckpt", ".bin", ".pth.tar"), read_zip),
    "torch.save before PyTorch 1.6": ((".pt", ".pth", ".pth.tar"), read_legacy),
    "TorchScript": ((".pt", ".ts"), read_zip),
    "NumPy": ((".npz",), read_arrays),
    "torch.distributed.checkpoint": (("a folder with .metadata",), read_distributed),
}

# What is not read: its first bytes (with an offset), its suffixes, what it is, and what to do.
FOREIGN: tuple[tuple[tuple[int, bytes], tuple[str, ...], str, str], ...] = (
    ((0, b"version https://git-lfs"), (), "a Git LFS pointer", "Run: git lfs pull."),
    (
        (0, b"GGUF"), (".gguf",), "a GGUF file of llama.cpp",
        "Give the safetensors that it was made from; transformers dequantizes some: from_pretrained(gguf_file=…).",
    ),
    ((0, b"lmgg"), (".ggml",), "a GGML file", "Give the safetensors that it was made from."),
    (
        (0, b"\x89HDF\r\n\x1a\n"), (".h5", ".hdf5", ".keras"), "a Keras or HDF5 file",
        "Save its arrays by name: numpy.savez('model.npz', **{w.path: w.numpy() for w in model.weights}).",
    ),
    ((4, b"TFL3"), (".tflite",), "a TensorFlow Lite file", "Give the weights that it was made from."),
    (
        (0, b"\0none"), (".onnx",), "an ONNX file",
        "Save its arrays by name: numpy.savez('model.npz', **{t.name: onnx.numpy_helper.to_array(t) for t in "
        "onnx.load(file).graph.initializer}).",
    ),
    (
        (0, b"\0none"), (".pb", ".index", ".meta"), "a TensorFlow file",
        "Save its arrays by name with tf.train.load_checkpoint and numpy.savez('model.npz', **arrays).",
    ),
    (
        (0, b"\0none"), (".msgpack", ".orbax"), "a Flax file",
        "Save its arrays by name: safetensors.flax.save_file(flax.traverse_util.flatten_dict(params, sep='.'), "
        "'model.safetensors').",
    ),
    ((0, b"\x93NUMPY"), (".npy",), "one NumPy array", "Save arrays by name: numpy.savez('model.npz', weight=array)."),
    ((0, b"\x1f\x8b"), (".gz", ".tgz"), "a gzip archive", "Unpack it, and give the file or folder inside."),
    ((0, b"BZh"), (".bz2",), "a bzip2 archive", "Unpack it, and give the file or folder inside."),
    ((0, b"\xfd7zXZ"), (".xz",), "an xz archive", "Unpack it, and give the file or folder inside."),
    ((0, b"\x28\xb5\x2f\xfd"), (".zst",), "a Zstandard archive", "Unpack it, and give the file or folder inside."),
    ((0, b"7z\xbc\xaf"), (".7z",), "a 7z archive", "Unpack it, and give the file or folder inside."),
    ((257, b"ustar"), (), "a tar archive", "Unpack it, and give the file or folder inside."),
)  # fmt: skip

PICKLES = (".pkl", ".pickle", ".joblib")
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")  # what a failed download leaves


def reader(path: Path, *, verify: bool = True) -> Content:
    """What a file or a folder of torch.distributed.checkpoint holds; parsed again only where it was written anew."""
    try:
        now = identity(path / METADATA_FILE if path.is_dir() else path)
    except OSError as error:
        raise damaged(path, error) from error
    return _parsed(path, now, verify)


def forget() -> None:
    """Drops what is kept of files that were read: a map of a file takes memory for all that was ever read of it."""
    _parsed.cache_clear()


@lru_cache(maxsize=16)
def _parsed(path: Path, written: tuple[int, ...], verify: bool) -> Content:
    """The contents, by the reader for what they are, if they are not too many, nor their names too long."""
    del written  # what was parsed before is kept as long as this is the same
    content = _read(path, verify)
    try:
        check_number(len(content.entries), size_of(path))
        check_names(entry.name for entry in content.entries)
    except OverBudgetError as error:
        raise damaged(path, error) from error
    return content


def _read(path: Path, verify: bool) -> Content:
    if path.is_dir():
        return read_distributed(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        size = found.st_size
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise damaged(path, error) from error
    if not size:
        raise CheckpointError(f"{path}: an empty file, wanted weights. Copy, download or save it again.")
    header = int.from_bytes(start[:8], "little")
    if 2 <= header <= size - 8 and start[8:9] == b"{":
        return weights_in_tree(read_safetensors(path, verify=verify))
    if start.startswith(b"PK\x03\x04"):
        return _read_archive(path)
    if LEGACY in start[:16]:
        return read_legacy(path)
    raise _foreign(path, start)


def _read_archive(path: Path) -> Content:
    """The reader for what is in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        check_number(len(names), path.stat().st_size)  # each tensor is a member, unless it shares memory
    except Exception as error:
        raise damaged(path, error) from error
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return read_zip(path)
    if names and all(name.endswith(".npy") for name in names):
        return read_arrays(path)
    if "model.weights.h5" in names:
        raise _foreign(path, b"\x89HDF\r\n\x1a\n")
    raise CheckpointError(
        f"{path}: a zip archive without torch's data.pkl, wanted weights. Unpack it, and give what is inside."
    )


def _foreign(path: Path, start: bytes) -> CheckpointError:
    """The error for a file that is not read: what it is, by its first bytes or else its suffix, and what to do."""
    text = start.lstrip().lower()
    if text.startswith(_PAGES):
        return CheckpointError(f"{path}: a web page, not weights: the download failed. Download the file itself again.")
    suffix = path.suffix.lower()
    known = {end for ends, _ in FORMATS.values() for end in ends}
    matches = [row for row in FOREIGN if start[row[0][0] :].startswith(row[0][1])]
    matches += [row for row in FOREIGN if suffix in row[1]]
    if matches:
        return CheckpointError(f"{path}: {matches[0][2]}, which is not read. {matches[0][3]}")
    pickle = bare_pickle(path) if start[:1] == b"\x80" or suffix in (*PICKLES, *known) else None
    if pickle is not None:
        return pickle
    if text.startswith((b"{", b"[")):
        return CheckpointError(
            f"{path}: a JSON file without a weight_map, wanted weights. Give the file or the folder of the weights."
        )
    if suffix in known:
        return damaged(path, ValueError(_wanted(suffix)))
    readable = ", ".join(sorted({end for end in known if end.startswith(".")}))
    return CheckpointError(
        f"{path}: of unknown contents, wanted one of {readable}, or a folder of these. Save the weights as safetensors."
    )


def _wanted(suffix: str) -> str:
    what = "its header is not safetensors'" if suffix == ".safetensors" else "not a zip archive"
    return first_line(ValueError(what))
