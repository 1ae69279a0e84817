"""Saved files come back; damaged, missing or hostile ones are refused in one line and never executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gramian.checkpoint import Checkpoint, clean_name, load_tensors, open_checkpoint, save_tensors, writing
from gramian.checkpoint.formats import SAFETENSORS_DTYPES
from gramian.errors import CheckpointError, InputError
from zoo import ZOO

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.arange(3.0)}


def same(got: Tensor, wanted: Tensor) -> bool:
    """Bitwise: dtype, shape and every byte."""
    alike = got.dtype == wanted.dtype and got.shape == wanted.shape
    return alike and bytes(got.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
        wanted.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    )


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pickled(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)  # type: ignore[arg-type]
    return path


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    """A Hugging Face folder with an index."""
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    put(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---- every format gives the same tensors ---------------------------------------------------------------------------


def as_safetensors(folder: Path, state: dict[str, Tensor]) -> Path:
    save_tensors(folder / "x.safetensors", state)
    return folder / "x.safetensors"


def as_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    save_tensors(folder / "model.safetensors", state)
    return folder


def as_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    # a clone, since tied tensors in two shards share no memory
    return sharded(
        folder, {f"model-{i}.safetensors": {key: t.detach().clone()} for i, (key, t) in enumerate(state.items())}
    )


def as_bin_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    pickled(folder / "pytorch_model.bin", state)
    return folder


FORMATS = {
    "safetensors": as_safetensors,
    "folder": as_folder,
    "sharded folder": as_shards,
    "bin folder": as_bin_folder,
    "pt": lambda folder, state: pickled(folder / "x.pt", state),
    "pth": lambda folder, state: pickled(folder / "x.pth", OrderedDict(state)),
    "ckpt": lambda folder, state: pickled(folder / "x.ckpt", {"epoch": 3, "state_dict": state}),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["batchnorm_cnn", "gpt2", "mixture_of_experts"])
def test_every_format_gives_the_model_back(tmp_path: Path, format: str, model: str) -> None:
    state = dict(ZOO[model].make_model(0).state_dict())
    checkpoint = open_checkpoint(FORMATS[format](tmp_path, state))
    assert len(checkpoint) == len(state)
    assert checkpoint.entries.keys() == state.keys()
    for name, tensor in checkpoint:
        entry = checkpoint.entries[name]
        assert same(tensor, state[name])
        assert same(checkpoint.load(name), state[name])
        assert (entry.name, entry.shape, getattr(torch, entry.dtype)) == (name, tuple(tensor.shape), tensor.dtype)
    if model == "gpt2" and "sharded" not in format:
        tied = {name: entry.tied_to for name, entry in checkpoint.entries.items() if entry.tied_to}
        assert tied == {"lm_head.weight": "wte.weight"}


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_comes_without_loading(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FORMATS[format](tmp_path, STATE)
    monkeypatch.setattr("gramian.checkpoint.reading.get", lambda *_: pytest.fail("loaded a tensor"))
    assert {name: entry.shape for name, entry in open_checkpoint(path).entries.items()} == {
        "a.weight": (3, 4),
        "a.bias": (3,),
    }


def private_memory() -> int:
    """This process's own memory in bytes: pages mapped from files do not count, the system takes them back."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("format", ["safetensors", "pt", "sharded folder"])
def test_memory_stays_within_a_few_tensors(tmp_path: Path, format: str) -> None:
    size = 4 << 20
    path = FORMATS[format](tmp_path, {f"w{i}": torch.full((size // 4,), float(i)) for i in range(24)})
    before = most = private_memory()
    for name, tensor in open_checkpoint(path):
        assert tensor.max() == int(name[1:])
        most = max(most, private_memory())
    assert most - before < 24 * size / 3


def test_pickles_are_loaded_as_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: calls.append(options) or load(*args, **options))
    list(open_checkpoint(pickled(tmp_path / "x.pt", STATE)))
    assert calls
    assert all(call == {"weights_only": True, "mmap": True, "map_location": "cpu"} for call in calls)


# ---- names and containers ------------------------------------------------------------------------------------------

NAMES = {
    "a.weight": "a.weight",
    "module.a.weight": "a.weight",
    "module.module.a": "a",
    "_orig_mod.module.a": "a",
    "module._orig_mod.a": "a",
    "layers.0._orig_mod.a": "layers.0.a",
    "layers.0._checkpoint_wrapped_module._orig_mod._checkpoint_wrapped_module.a": "layers.0.a",
    "_fsdp_wrapped_module.h.0._fsdp_wrapped_module.a": "h.0.a",
    "_orig_mod._orig_mod.a": "a",
    "encoder.module.a": "encoder.module.a",
    "my_orig_mod.a": "my_orig_mod.a",
    "submodule.a": "submodule.a",
    "module": "module",
    "module.": "module.",
}


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_leave_no_trace_in_names(name: str) -> None:
    assert clean_name(name) == NAMES[name]


@given(st.lists(st.sampled_from(["module", "_orig_mod", "_checkpoint_wrapped_module", "a", "layers", "0"]), min_size=1))
def test_a_clean_name_stays(parts: list[str]) -> None:
    name = clean_name(".".join(parts))
    assert clean_name(name) == name


def test_real_wrappers(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 2))
    wrapped = nn.DataParallel(torch.compile(model))  # type: ignore[arg-type]
    keys = {"0.weight", "0.bias", "1.weight", "1.bias"}
    named = dict(wrapped.named_parameters())
    assert named.keys().isdisjoint(keys)
    save_tensors(tmp_path / "x.safetensors", named)
    assert open_checkpoint(tmp_path / "x.safetensors").entries.keys() == keys


CONTAINERS = {
    "flat": (STATE, ()),
    "model": ({"model": STATE}, ("weights found under 'model'",)),
    "loop": (
        {"epoch": 3, "model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        ("weights found under 'model'; left out: epoch, optimizer",),
    ),
    "twice": (
        {"state_dict": {"model": STATE}},
        ("weights found under 'state_dict'", "weights found under 'state_dict.model'"),
    ),
    "others": ({**STATE, "step": 3, "name": "x"}, ("not tensors, left out: step, name",)),
    "a layer called model": ({"model.a": torch.ones(2), "a": torch.ones(2)}, ()),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_are_unwrapped_and_noted(tmp_path: Path, case: str) -> None:
    content, notes = CONTAINERS[case]
    checkpoint = open_checkpoint(pickled(tmp_path / "x.pt", content))
    assert checkpoint.notes == notes
    if case != "a layer called model":
        assert {name: tensor.tolist() for name, tensor in checkpoint} == {n: t.tolist() for n, t in STATE.items()}


def test_parts_keep_their_names(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    checkpoint = open_checkpoint(
        pickled(tmp_path / "x.pt", {"G": STATE, "D": {"w": torch.ones(2)}, "optimizer_G": moments})
    )
    assert set(checkpoint.entries) == {"G.a.weight", "G.a.bias", "D.w"}
    assert checkpoint.notes == ("not tensors, left out: optimizer_G (an optimizer's state)",)


KINDS = {
    "float": ("float64", "float32", "float16", "bfloat16"),
    "quantized": ("int8", "uint8", "float8_e4m3fn", "float8_e5m2"),
    "integer": ("int16", "int32", "int64", "bool"),
    "complex": ("complex64",),
}


@pytest.mark.parametrize("format", ["safetensors", "pt"])
@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes])
def test_what_has_no_spectrum_is_classified(tmp_path: Path, format: str, kind: str, dtype: str) -> None:
    w = torch.ones(2, 3).to(getattr(torch, dtype))
    checkpoint = open_checkpoint(FORMATS[format](tmp_path, {"w": w, "none": w[:0]}))
    assert {name: entry.kind for name, entry in checkpoint.entries.items()} == {"w": kind, "none": "empty"}
    assert all(same(tensor, {"w": w, "none": w[:0]}[name]) for name, tensor in checkpoint)


def test_what_is_not_plain_numbers_is_left_out_with_a_note(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2, device="meta")}
    checkpoint = open_checkpoint(pickled(tmp_path / "x.pt", state))
    assert list(checkpoint.entries) == ["w"]
    assert [note.split(":")[0] for note in checkpoint.notes] == ["sparse", "meta"]


def test_dtype_names_are_torchs_and_safetensors_own() -> None:
    for code, name in SAFETENSORS_DTYPES.items():
        w = torch.zeros(2, dtype=torch.uint8).to(getattr(torch, name)) if "8_e8m0" not in name else None
        if w is not None:
            header = safetensors.torch.save({"w": w})
            assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["w"]["dtype"] == code


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tensor 'b'"):
        open_checkpoint(pickled(tmp_path / "x.pt", STATE)).load("b")


# ---- failures are one clear line -----------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(Path(sys.argv[0]).parent / "pwned"),)


SAFE = safetensors.torch.save(STATE)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"

# name: (how to make it, what the line must say)
FAILURES = {
    "missing": (lambda d: d / "x.pt", ["no such file"]),
    "unknown": (lambda d: put(d / "x.foo", "foo"), ["of unknown contents", ".safetensors"]),
    "empty safetensors": (lambda d: put(d / "x.safetensors", ""), ["an empty file"]),
    "empty pt": (lambda d: put(d / "x.pt", ""), ["an empty file"]),
    "short header": (lambda d: put(d / "x.safetensors", SAFE[:40]), ["damaged or truncated", "again"]),
    "short data": (lambda d: put(d / "x.safetensors", SAFE[:-1]), ["damaged or truncated"]),
    "long data": (lambda d: put(d / "x.safetensors", SAFE + b"\0"), ["damaged or truncated"]),
    "short pt": (lambda d: put(d / "x.pt", pickled(d / "y.pt", STATE).read_bytes()[:-40]), ["damaged or truncated"]),
    "text": (lambda d: put(d / "x.bin", "Not found"), ["damaged", "not a zip archive"]),
    "lfs": (lambda d: put(d / "x.safetensors", LFS), ["Git LFS pointer", "git lfs pull"]),
    "no tensors": (lambda d: put(d / "x.safetensors", safetensors.torch.save({})), ["holds no tensors"]),
    "empty dict": (lambda d: pickled(d / "x.pt", {}), ["holds no tensors"]),
    "one tensor": (lambda d: pickled(d / "x.pt", torch.ones(2)), ["holds a Tensor", "state dict"]),
    "list": (lambda d: pickled(d / "x.pt", [torch.ones(2)]), ["holds a list"]),
    "optimizer": (lambda d: pickled(d / "x.pt", {"state": {0: {"m": torch.ones(2)}}}), ["holds no tensors"]),
    "collision": (lambda d: pickled(d / "x.pt", {"module.w": STATE["a.bias"], "w": STATE["a.bias"]}), ["both 'w'"]),
    "hostile zip": (lambda d: pickled(d / "x.pt", {**STATE, "a": Hostile()}), ["refused", "mkdir", "safetensors"]),
    "hostile pickle": (lambda d: put(d / "x.pt", pickle.dumps(Hostile())), ["refused", "mkdir"]),
    "hostile old pickle": (lambda d: put(d / "x.pt", pickle.dumps(Hostile(), protocol=1)), ["refused", "mkdir"]),
    "hostile old format": (
        lambda d: pickled(d / "x.pt", {**STATE, "a": Hostile()}, _use_new_zipfile_serialization=False),
        ["refused", "mkdir"],
    ),
    "bare pickle": (lambda d: put(d / "x.pt", pickle.dumps({"a": 1})), ["a bare pickle", "save_file"]),
    "empty folder": (lambda d: d, ["folder without weights", "model.safetensors.index.json", "holds nothing"]),
    "other folder": (lambda d: put(d / "adapter.safetensors", SAFE).parent, ["Give one of its files: adapter"]),
    "distributed folder": (lambda d: put(d / ".metadata", "").parent, ["an empty file"]),
    "index damaged": (lambda d: put(d / "model.safetensors.index.json", '{"weight_map": {').parent, ["damaged"]),
    "index without map": (lambda d: put(d / "model.safetensors.index.json", "{}").parent, ["damaged", "weight_map"]),
    "index of numbers": (
        lambda d: put(d / "model.safetensors.index.json", '{"weight_map": {"a": 1}}').parent,
        ["weight_map is not a map"],
    ),
    "shard missing": (lambda d: sharded(d, {}, {"a": "model-1.safetensors"}), ["not there: model-1.safetensors"]),
    "tensor missing": (
        lambda d: sharded(d, {"m.safetensors": STATE}, {"a.bias": "m.safetensors", "b": "m.safetensors"}),
        ["not in it: b"],
    ),
    "shard elsewhere": (lambda d: sharded(d, {}, {"a": "../x.safetensors"}), ["outside its folder", "../x"]),
    "tied to nothing": (
        lambda d: put(d / "x.safetensors", safetensors.torch.save(STATE, {"gramian.tied": '{"b": "c"}'})),
        ["'b' is tied to 'c'"],
    ),
    "tied to nonsense": (
        lambda d: put(d / "x.safetensors", safetensors.torch.save(STATE, {"gramian.tied": "[1]"})),
        ["gramian.tied"],
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_clear_line(tmp_path: Path, case: str) -> None:
    make, said = FAILURES[case]
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(path))
    line = str(caught.value)
    assert line.startswith(str(tmp_path))
    assert line.isprintable()
    assert len(line) < len(str(tmp_path)) + 420
    assert all(part in line for part in said), line
    assert not (Path(sys.argv[0]).parent / "pwned").exists()


@pytest.mark.parametrize("length", [900, 5000])
def test_what_comes_from_a_file_cannot_break_the_line(tmp_path: Path, length: int) -> None:
    name = "\x1b[31m\n" + "x" * length
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(pickled(tmp_path / "x.pt", {name: STATE["a.bias"], f"module.{name}": STATE["a.bias"]}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200
    if length < 1000:  # longer names are refused
        (note,) = open_checkpoint(pickled(tmp_path / "x.pt", {**STATE, name: 3})).notes
        assert note.isprintable()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, suffix: str) -> None:
    whole = SAFE if suffix == ".safetensors" else pickled(tmp_path / "y.pt", STATE).read_bytes()
    rng, refused = random.Random(0), 0
    for trial in range(500):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.choice((0, 1, 3)) if trial % 2 else 2):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            list(open_checkpoint(put(tmp_path / f"x{suffix}", bytes(damaged))))
        except CheckpointError as error:
            refused += str(error).isprintable()
    assert refused > 250


def test_extra_tensors_of_a_shard_are_noted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path, {"m.safetensors": STATE}, {"a.bias": "m.safetensors"}))
    assert list(checkpoint.entries) == ["a.bias"]
    assert checkpoint.notes == ("m.safetensors: 1 tensor that the index does not name, left out",)


def test_other_weights_in_a_folder_are_named(tmp_path: Path) -> None:
    for file in ("model.safetensors", "adapter_model.safetensors"):
        save_tensors(tmp_path / file, STATE)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    (note,) = open_checkpoint(tmp_path).notes
    assert note == "model.safetensors is read, and not what is beside it: pytorch_model.bin, adapter_model.safetensors"


def test_a_dtype_that_torch_lacks_is_left_out_with_a_note(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    body = safetensors.torch.save(STATE)
    parts = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    end = max(part["data_offsets"][1] for part in parts.values())
    parts["w"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [end, end + 3]}
    header = json.dumps(parts).encode()
    data = body[8 + int.from_bytes(body[:8], "little") :] + b"\0\0\0"
    path = put(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + data)
    checkpoint = open_checkpoint(path)
    assert checkpoint.entries.keys() == STATE.keys()
    assert checkpoint.notes == ("w: left out, torch has no dtype F6_E2M3",)


def test_links_are_followed_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    blob = put(tmp_path / "blob", SAFE)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert len(open_checkpoint(tmp_path / "snapshot")) == 2


# ---- saving --------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DTYPES = st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.int8]
)


@given(
    st.dictionaries(TEXT, st.tuples(DTYPES, st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=5),
    st.dictionaries(TEXT, TEXT, max_size=3),
)
@example({"": (torch.float64, [], False)}, {".": ""})
@settings(max_examples=60, deadline=None)
def test_what_is_saved_comes_back_bitwise(
    tmp_path_factory: pytest.TempPathFactory,
    spec: dict[str, tuple[torch.dtype, list[int], bool]],
    metadata: dict[str, str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    tensors = {}
    for seed, (name, (dtype, shape, transposed)) in enumerate(spec.items()):
        w = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
        tensors[name] = w.mT if transposed and w.ndim > 1 else w
    save_tensors(path, tensors, metadata)
    back, text = load_tensors(path)
    assert text == metadata
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)


def test_shared_memory_is_saved_once_and_shared_again(tmp_path: Path) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tensors = {
        "w": w,
        "tied": w,
        "parameter": nn.Parameter(w),
        "transposed": w.mT,
        "top": w[:32],
        "bottom": w[32:],
        "strided": w[:, ::2],
        "expanded": w[:1].expand(64, 64),
        "conjugate": torch.view_as_complex(w.reshape(64, 32, 2)).conj(),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    back, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {}
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert back["tied"] is back["w"]
    assert back["parameter"] is back["w"]
    assert back["transposed"] is not back["w"]
    # w, its transpose, two halves, one half of the columns, the expansion and the conjugate
    assert (tmp_path / "x.safetensors").stat().st_size < w.nbytes * (1 + 1 + 1 + 0.5 + 1 + 1) + 2000
    save_tensors(tmp_path / "y.safetensors", {"b": w, "a": w})
    assert (tmp_path / "y.safetensors").stat().st_size < w.nbytes + 300
    checkpoint = open_checkpoint(tmp_path / "y.safetensors")
    assert {name: entry.tied_to for name, entry in checkpoint.entries.items()} == {"b": "", "a": "b"}


def test_saving_changes_nothing_and_needs_no_gradient(tmp_path: Path) -> None:
    w = nn.Parameter(torch.ones(3, 4).mT.contiguous().mT)
    before = (w.data_ptr(), w.stride(), w._version)
    save_tensors(tmp_path / "x.safetensors", {"w": w})
    assert (w.data_ptr(), w.stride(), w._version) == before
    assert not load_tensors(tmp_path / "x.safetensors")[0]["w"].requires_grad


REFUSED = {
    "folder missing": (lambda d: (d / "none" / "x.safetensors", STATE, None), "does not exist"),
    "folder is a file": (lambda d: (put(d / "f", "") / "x.safetensors", STATE, None), "does not exist"),
    "path is a folder": (lambda d: (d, STATE, None), "is a folder"),
    "sparse": (lambda d: (d / "x", {"w": torch.eye(2).to_sparse()}, None), "to_dense"),
    "meta": (lambda d: (d / "x", {"w": torch.ones(2, device="meta")}, None), "on meta"),
    "not a tensor": (lambda d: (d / "x", {"w": 3.0}, None), "got a float"),
    "dtype": (lambda d: (d / "x", {"w": torch.ones(2, dtype=torch.complex128)}, None), "complex128"),
    "reserved name": (lambda d: (d / "x", {"__metadata__": torch.ones(2)}, None), "__metadata__"),
    "reserved metadata": (lambda d: (d / "x", STATE, {"gramian.tied": "{}"}), "gramian.tied"),
    "metadata of numbers": (lambda d: (d / "x", STATE, {"step": 3}), "str to str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    make, said = REFUSED[case]
    path, tensors, metadata = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((InputError, TypeError) if case == "not a tensor" else InputError, match=said):
        save_tensors(path, tensors, metadata)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, STATE)
    before = path.read_bytes()

    def full(file: BinaryIO, *_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\)"):
        save_tensors(path, {"other": torch.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SAVE_FOREVER = """
import sys, torch
from gramian.checkpoint import save_tensors
state = [{f"w{j}": torch.full((64, 64), float(i)) for j in range(50)} for i in range(2)]
i = 0
while True:
    save_tensors(sys.argv[1], state[i % 2], {"i": str(i % 2)})
    i += 1
    print(i, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()  # it saves
        for _ in range(20):  # while it runs, each look sees one whole state
            tensors, metadata = load_tensors(path)
            assert {float(t[0, 0]) for t in tensors.values()} == {float(metadata["i"])}
        time.sleep(rng.random() / 20)
        child.send_signal(signal.SIGKILL)
        child.wait()
        tensors, metadata = load_tensors(path)
        assert all((t == float(metadata["i"])).all() for t in tensors.values())


def test_a_checkpoint_is_data() -> None:
    assert len(Checkpoint(Path("x"), {})) == 0
    assert list(Checkpoint(Path("x"), {})) == []


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "model.safetensors", {"w": torch.eye(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
