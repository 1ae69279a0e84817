"""Every kind of file that people have is read, or named in one line; nothing in it is run, nor any class built."""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

import gramian as gm
from gramian.checkpoint import load_into, open_checkpoint
from gramian.checkpoint.readers import FOREIGN, FORMATS
from gramian.checkpoint.unpickling import ACTING, BENIGN, Global, Record
from gramian.cli import main
from gramian.errors import CheckpointError

DOCS = Path(__file__).parent.parent / "docs" / "checkpoints.md"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
        model.add_module("head", nn.Linear(5, 5))
    return model


class Settings:
    """An object of a class that no reader knows."""

    def __init__(self, **fields: object) -> None:
        self.__dict__ |= fields


class Decoder(nn.Module):
    """A model with a part called as training loops call the whole, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.act, self.lm_head = network(), nn.ReLU(), nn.Linear(3, 2)


class Wrapper(nn.Module):
    """A model whose class is not importable where it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.table = nn.Parameter(torch.ones(3, 2))
        self.register_buffer("scale", torch.ones(2))


def saved(folder: Path, content: object, name: str = "m.pt", **options: bool) -> Path:
    torch.save(content, folder / name, **options)  # type: ignore[arg-type]
    return folder / name


def distributed(folder: Path, content: dict) -> Path:
    dcp.save(content, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def indexed(folder: Path, names: tuple[str, str], write: Callable[[dict[str, Tensor], Path], object]) -> Path:
    """A model in two shards, by its index."""
    state = dict(network().state_dict())
    keys, places = list(state), {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        file = names[0].format(number)
        write({key: state[key] for key in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / names[1]).write_text(json.dumps({"weight_map": places}))
    return folder / names[1]


def old(content: object) -> Callable[[Path], Path]:
    return lambda d: saved(d, content, "m.pth.tar", _use_new_zipfile_serialization=False)


STATE = dict(network().state_dict())
READ: dict[str, Callable[[Path], Path]] = {
    "pth.tar": lambda d: saved(d, {"epoch": 3, "state_dict": STATE, "best_acc1": torch.tensor(3.0)}, "m.pth.tar"),
    "no suffix": lambda d: saved(d, STATE, "0a1b2c"),
    "before 1.6": old(STATE),
    "before 1.6, tar": old({"state_dict": STATE, "optimizer": {"state": {}, "param_groups": []}}),
    "whole model": lambda d: saved(d, network()),
    "whole model, before 1.6": old(network()),
    "whole model, wrapped": lambda d: saved(d, {"model": network(), "epoch": 3}),
    "Lightning": lambda d: saved(
        d,
        {
            "epoch": 1,
            "state_dict": STATE,
            "hyper_parameters": Settings(lr=0.1, path=Path("x"), act=functools.partial(torch.relu)),
            "callbacks": {"EarlyStopping": {"best": np.float64(1.0)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        },
        "m.ckpt",
    ),
    "arguments": lambda d: saved(d, {"model": STATE, "args": argparse.Namespace(lr=1, device=torch.device("cpu"))}),
    "objects inside": lambda d: saved(d, {**STATE, "args": Settings(seen={1, 2}, sizes=[(1, 2)])}),
    "TorchScript": lambda d: (torch.jit.script(network()).save(str(d / "m.pt")), d / "m.pt")[1],
    "TorchScript, traced": lambda d: (
        torch.jit.trace(network().eval()[:4], torch.zeros(1, 3, 4, 4)).save(str(d / "m.pt")), d / "m.pt",
    )[1],
    "npz": lambda d: (np.savez(d / "m.npz", **{k: v.numpy() for k, v in STATE.items()}), d / "m.npz")[1],
    "distributed": lambda d: distributed(d, {"model": STATE, "optim": {"state": {}, "param_groups": []}, "step": 3}),
    "distributed, flat": lambda d: distributed(d, STATE),
    "safetensors by its index": lambda d: indexed(
        d, ("m-{}.safetensors", "model.safetensors.index.json"), safetensors.torch.save_file
    ),
    "bin by its index": lambda d: indexed(d, ("m-{}.bin", "pytorch_model.bin.index.json"), torch.save),
    "diffusers": lambda d: (
        safetensors.torch.save_file(STATE, d / "diffusion_pytorch_model.safetensors"), d,
    )[1],
    "diffusers, sharded": lambda d: indexed(
        d, ("m-{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"), safetensors.torch.save_file
    ).parent,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", READ)
def test_it_is_read(tmp_path: Path, case: str) -> None:
    checkpoint = open_checkpoint(READ[case](tmp_path))
    wanted = {k: v for k, v in STATE.items() if not (case.endswith("traced") and k.startswith("head"))}
    assert checkpoint.entries.keys() == wanted.keys()
    for name, tensor in checkpoint:
        assert torch.equal(tensor, wanted[name])
        assert torch.equal(checkpoint.load(name), wanted[name])
    if not case.endswith("traced"):
        model = load_into(network(), checkpoint.path)
        assert all(torch.equal(t, STATE[name]) for name, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_what_was_not_built_is_named(tmp_path: Path) -> None:
    notes = " ".join(open_checkpoint(READ["Lightning"](tmp_path)).notes)
    assert "hyper_parameters (test_files_formats.Settings)" in notes
    assert "a whole model (test_files_formats.Wrapper)" in " ".join(open_checkpoint(saved(tmp_path, Wrapper())).notes)
    assert "TorchScript" in " ".join(open_checkpoint(READ["TorchScript"](tmp_path)).notes)
    for model in (Wrapper(), Decoder()):
        checkpoint = open_checkpoint(saved(tmp_path, model))
        assert checkpoint.entries.keys() == model.state_dict().keys()
        assert len(checkpoint.notes) == 1
    for content in ({"epoch": 3, "net": Decoder()}, Decoder()):
        assert "lm_head.weight" in open_checkpoint(saved(tmp_path, content)).entries
    torch.jit.script(Decoder()).save(str(tmp_path / "script.pt"))
    assert open_checkpoint(tmp_path / "script.pt").entries.keys() == Decoder().state_dict().keys()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.embed.weight


def test_shared_tensors_stay_tied_in_every_format(tmp_path: Path) -> None:
    model = Tied()
    paths = [
        saved(tmp_path, model, "whole.pt"),
        saved(tmp_path, model.state_dict(), "old.pt", _use_new_zipfile_serialization=False),
        tmp_path / "m.safetensors",
    ]
    safetensors.torch.save_model(model, str(paths[2]))
    for path in paths:
        entries = open_checkpoint(path).entries
        tied = {name: entry.tied_to for name, entry in entries.items() if entry.tied_to}
        assert tied in ({"lm_head.weight": "embed.weight"}, {"embed.weight": "lm_head.weight"})
        assert load_into(Tied(), path).embed.weight.equal(model.embed.weight)
        report = gm.inspect(path)
        assert len(report.layers) == 1
        assert any("the same memory as" in note for note in report.notes)


def test_a_head_that_is_not_in_the_file_is_told_by_the_config(tmp_path: Path) -> None:
    safetensors.torch.save_file({"embed_tokens.weight": torch.randn(12, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert any("tie_word_embeddings" in note for note in gm.inspect(tmp_path).notes)


# ---- what is not read ------------------------------------------------------------------------------------------------


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return path


def pipeline(folder: Path) -> Path:
    for part in ("unet", "vae", "scheduler"):
        (folder / part).mkdir()
        if part != "scheduler":
            safetensors.torch.save_file(STATE, folder / part / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


LINES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "gguf": (lambda d: put(d / "m.gguf", b"GGUF\3\0\0\0"), ["GGUF", "safetensors"]),
    "gguf, renamed": (lambda d: put(d / "m.bin", b"GGUF\3\0\0\0"), ["GGUF"]),
    "onnx": (lambda d: put(d / "m.onnx", b"\x08\x07\x12\x07pytorch"), ["ONNX", "numpy.savez"]),
    "h5": (lambda d: put(d / "m.h5", b"\x89HDF\r\n\x1a\n"), ["Keras", "numpy.savez"]),
    "keras": (lambda d: zipped(d / "m.keras", "config.json", "model.weights.h5"), ["Keras"]),
    "tflite": (lambda d: put(d / "m.tflite", b"\x1c\0\0\0TFL3"), ["TensorFlow Lite"]),
    "frozen graph": (lambda d: put(d / "m.pb", b"\n\x05"), ["TensorFlow"]),
    "saved model": (lambda d: put(d / "saved_model.pb", b"\x08").parent, ["SavedModel", "numpy.savez"]),
    "flax": (lambda d: put(d / "flax_model.msgpack", b"\x81\xa6params"), ["Flax", "safetensors.flax"]),
    "pkl": (lambda d: put(d / "m.pkl", b"\x80\x04}\x94."), ["a bare pickle", "save_file"]),
    "joblib": (lambda d: put(d / "m.joblib", b"\x80\x04}\x94."), ["a bare pickle"]),
    "zip": (lambda d: zipped(d / "m.zip", "model.safetensors"), ["zip archive", "Unpack"]),
    "tar.gz": (lambda d: put(d / "m.tar.gz", b"\x1f\x8b\x08"), ["gzip", "Unpack"]),
    "tar": (lambda d: put(d / "m.tar", bytes(257) + b"ustar\x0000"), ["tar archive", "Unpack"]),
    "npy": (lambda d: (np.save(d / "m.npy", np.ones(3)), d / "m.npy")[1], ["one NumPy array", "savez"]),
    "lfs": (lambda d: put(d / "m.bin", b"version https://git-lfs.github.com/spec/v1\n"), ["Git LFS", "git lfs pull"]),
    "page": (lambda d: put(d / "m.safetensors", b"\n<!DOCTYPE html><html>"), ["web page", "again"]),
    "empty": (lambda d: put(d / "m.safetensors", b""), ["an empty file"]),
    "json": (lambda d: put(d / "config.json", b'{"model_type": "gpt2"}'), ["JSON", "weights"]),
    "pipeline": (pipeline, ["a pipeline of models", "unet", "vae"]),
    "empty model": (lambda d: saved(d, nn.ReLU()), ["holds no tensors"]),
    "optimizer": (
        lambda d: saved(d, torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()), ["an optimizer's"],
    ),
    "index of a missing shard": (
        lambda d: put(d / "pytorch_model.bin.index.json", b'{"weight_map": {"a": "m-1.bin"}}'), ["not there: m-1.bin"],
    ),
    "distributed without its files": (
        lambda d: [p.unlink() for p in distributed(d, STATE).glob("*.distcp")] and d / "dcp", ["not there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_it_is_named_in_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = LINES[case]
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(path))
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(".")
    assert main(["inspect", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_foreign_kind_has_its_line(tmp_path: Path) -> None:
    for (offset, magic), suffixes, what, advice in FOREIGN:
        names = [f"m{suffix}" for suffix in suffixes] or ["m"]
        for name in names:
            content = b"\1" * offset + magic if not magic.startswith(b"\0none") else b"\1\2\3"
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(put(tmp_path / name, content))
            assert what in str(caught.value) or "tar archive" in what
            assert advice in str(caught.value) or "Unpack" in advice


def test_the_docs_name_every_format() -> None:
    text = DOCS.read_text()
    for word, (suffixes, _) in FORMATS.items():
        assert word in text, word
        assert all(suffix in text for suffix in suffixes), word
    for _, suffixes, what, _ in FOREIGN:
        assert all(suffix in text for suffix in suffixes), what


# ---- nothing is run --------------------------------------------------------------------------------------------------

MARK = Path(sys.argv[0]).parent / "pwned"


class Calls:
    """An object whose pickle wants a function called."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


HOSTILE = {
    "mkdir": Calls(os.mkdir, str(MARK)),
    "system": Calls(os.system, f"touch {MARK}"),
    "eval": Calls(eval, f"open({str(MARK)!r}, 'w')"),
    "method": Calls("x".upper),
    "class": Calls(__import__("subprocess").Popen, ["touch", str(MARK)]),
    "inside": Calls(dict, [("a", Calls(os.mkdir, str(MARK)))]),
    "torch.load": Calls(torch.load, str(MARK)),
    "own function": Calls(saved, str(MARK), 3),
}


@pytest.mark.parametrize("where", ["beside", "deep", "old", "as hyperparameters"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_call_is_refused_and_not_made(tmp_path: Path, case: str, where: str) -> None:
    content = {
        "beside": {**STATE, "x": HOSTILE[case]},
        "deep": {"model": STATE, "x": [({"y": Settings(z=HOSTILE[case])},)]},
        "old": {**STATE, "x": HOSTILE[case]},
        "as hyperparameters": {"state_dict": STATE, "hyper_parameters": HOSTILE[case]},
    }[where]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=where != "old")
    with pytest.raises(CheckpointError, match="refused, since loading it would run"):
        open_checkpoint(path)
    assert not MARK.exists()


@pytest.mark.parametrize("case", ["mkdir", "system"])
def test_metadata_and_chunks_of_a_distributed_folder_run_nothing(tmp_path: Path, case: str) -> None:
    folder = distributed(tmp_path, {"w": torch.ones(3)})
    (chunk,) = folder.glob("*.distcp")
    chunk.write_bytes(saved(tmp_path, HOSTILE[case]).read_bytes())
    with pytest.raises(CheckpointError):
        list(open_checkpoint(folder))
    import pickle

    (folder / ".metadata").write_bytes(pickle.dumps(HOSTILE[case]))
    with pytest.raises(CheckpointError):
        list(open_checkpoint(folder))
    assert not MARK.exists()


def test_what_acts_is_told_from_what_makes_a_value() -> None:
    makes = ("collections.Counter", "pathlib.PosixPath", "torch.device", "numpy._core.multiarray.scalar", "my.Enum")
    acts = (
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "my.function",
        "sys.exit",
    )
    for name in (*makes, *acts):
        record = Record(Global(*name.rsplit(".", 1)), called=True)
        assert record.acts == (name in acts), name
    assert not any(BENIGN.fullmatch(f"{module}.f") for module in ACTING)


SAVED = {
    "new": lambda d: saved(d, {**STATE, "x": Settings()}),
    "old": lambda d: saved(d, {"w": torch.ones(3, 2), "v": torch.ones(2)}, _use_new_zipfile_serialization=False),
    "model": lambda d: saved(d, nn.Linear(2, 2)),
}


@pytest.mark.parametrize("case", SAVED)
def test_damage_anywhere_is_one_line_or_harmless(tmp_path: Path, case: str) -> None:
    whole, rng, lines = SAVED[case](tmp_path).read_bytes(), random.Random(0), []
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.choice((1, 2, 5))):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            list(open_checkpoint(put(tmp_path / "x.pt", bytes(damaged))))
        except CheckpointError as error:
            lines.append(str(error))
    assert all(line.isprintable() for line in lines)


def test_a_distributed_folder_is_damaged_anywhere(tmp_path: Path) -> None:
    folder, rng = distributed(tmp_path, {"w": torch.ones(3, 2), "v": torch.ones(2), "n": 3}), random.Random(0)
    lines = []
    for file in (folder / ".metadata", *folder.glob("*.distcp")):
        whole = file.read_bytes()
        for trial in range(100):
            damaged = bytearray(whole)
            if trial % 3 == 0:
                del damaged[rng.randrange(len(damaged)) :]
            elif damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            file.write_bytes(bytes(damaged))
            try:
                list(open_checkpoint(folder))
            except CheckpointError as error:
                lines.append(str(error))
        file.write_bytes(whole)
    assert all(line.isprintable() for line in lines)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """Sizes and strides come from the file: none may reach another storage."""
    path = saved(tmp_path, {"a": torch.arange(4.0), "s": Settings(), "b": torch.arange(8.0)})
    whole = path.read_bytes()
    assert b"K\x04\x85" in whole  # the shape (4,) of a
    path.write_bytes(whole.replace(b"K\x04\x85", b"K\x7f\x85"))
    with pytest.raises(CheckpointError):
        list(open_checkpoint(path))


@pytest.mark.filterwarnings("ignore")
def test_a_shard_of_a_distributed_tensor_is_left_out_and_a_whole_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w = torch.randn(4, 3)
        path = saved(tmp_path, {"w": distribute_tensor(w, mesh, [Shard(0)])})
        part = DTensor.from_local(w[:2], mesh, [Shard(0)], shape=torch.Size((4, 3)), stride=(3, 1), run_check=False)
        shard = saved(tmp_path, {"part": part, "b": torch.ones(2, 2)}, "shard.pt")
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(open_checkpoint(path).load("w"), w)
    checkpoint = open_checkpoint(shard)
    assert list(checkpoint.entries) == ["b"]
    assert any("part" in note and "DTensor" in note for note in checkpoint.notes)


def test_an_alias_in_foreign_metadata_must_name_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a.weight": torch.eye(2)}, path, {"format": "pt", "b.weight": "nothing"})
    assert list(open_checkpoint(path).entries) == ["a.weight"]


def test_an_archive_of_arrays_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", w=np.ones((2, 3)), x=np.array([HOSTILE["mkdir"]], dtype=object))
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    assert list(checkpoint.entries) == ["w"]
    assert any(note.startswith("x: left out") for note in checkpoint.notes)
    assert not MARK.exists()
