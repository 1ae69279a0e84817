"""Every damaged byte in every kind of file that gramian writes is found before anything is used."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import gramian as gm
from cases import seeded
from gramian.checkpoint import load_into, load_tensors, load_tree, open_checkpoint, save_tensors, save_tree, verify_file
from gramian.checkpoint.checksums import CHECKSUMS, HEADER
from gramian.compression import LowRank, load_compressed, save_compressed
from gramian.errors import CheckpointError
from gramian.inspection.comparing.adapter import extract_lora
from gramian.statistics import Statistics

NUM = int(os.environ.get("GRAMIAN_DAMAGES", "60"))  # for each kind of file
X = torch.randn(32, 8, generator=seeded(0))
Y = (X[:, 0] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 2))


def task() -> gm.Task:
    return gm.Task(net, gm.Objective.classification(), lambda epoch, generator: [(X, Y)], lambda model: {"one": 1.0})


def checkpoint(folder: Path) -> Path:
    save_tree(folder / "checkpoint.safetensors", {"model": net().state_dict(), "steps": 3, "rates": [0.1]})
    return folder / "checkpoint.safetensors"


def finished(folder: Path) -> Path:
    gm.train(task(), steps=2, out=folder)
    return folder / "model.safetensors"


def statistics(folder: Path) -> Path:
    gm.capture(net(), [(X, Y)], gm.Objective.classification()).save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


def compressed(folder: Path) -> Path:
    model = net()
    model[0] = LowRank(model[0], 2)
    save_compressed(model, folder / "small.safetensors")
    return folder / "small.safetensors"


def adapter(folder: Path) -> Path:
    for name, change in (("a", 0.0), ("b", 1.0)):
        w = torch.eye(9) + change * torch.outer(torch.arange(9.0), torch.ones(9))
        save_tensors(folder / f"{name}.safetensors", {"layer.weight": w})
    extract_lora(folder / "a.safetensors", folder / "b.safetensors", 1, folder / "adapter")
    return folder / "adapter" / "adapter_model.safetensors"


def every(path: Path) -> list[Any]:
    return [tensor.clone() for _, tensor in open_checkpoint(path)]


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "checkpoint": (checkpoint, load_tree),
    "finished model": (finished, every),
    "finished model, into a network": (finished, lambda path: load_into(net(), path)),
    "statistics": (statistics, Statistics.load),
    "compressed": (compressed, lambda path: load_compressed(net(), path)),
    "adapter": (adapter, lambda path: every(path.parent)),
}


def damages(whole: bytes, rng: random.Random) -> Any:
    """A flipped bit (half of them in the header, which is small), another byte, a part of the file, a byte too many."""
    header = 8 + int.from_bytes(whole[:8], "little")
    for number in range(NUM):
        at = rng.randrange(header if number % 2 else len(whole))
        kind = rng.choice(["bit", "bit", "bit", "byte", "cut", "more", "lost"])
        changed = bytearray(whole)
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
        elif kind == "cut":
            del changed[at:]
        elif kind == "more":
            changed.insert(at, rng.randrange(256))
        else:
            del changed[at]
        yield f"{kind} at {at}", bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_found(tmp_path: Path, kind: str) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    whole = path.read_bytes()
    read(path)
    for what, damaged in damages(whole, random.Random(kind)):
        path.write_bytes(damaged)
        error = None
        try:
            read(path)
        except CheckpointError as caught:
            error = str(caught)
        assert error is not None, f"{what} was taken"
        assert error.isprintable()
    path.write_bytes(whole)
    read(path)


def test_every_byte_of_a_header_matters(tmp_path: Path) -> None:
    """Also those of the names under which the checksums are found."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.ones(2)})
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_tensors(path, verify=False)  # the header is compared all the same


def test_a_network_is_whole_when_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {name: t + 1 for name, t in net().state_dict().items()})
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    model = net()
    with pytest.raises(CheckpointError, match="differs from what was written: the checksum is another"):
        load_into(model, path)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), net().state_dict().values(), strict=True))
    with pytest.raises(CheckpointError):
        verify_file(path)
    assert len(load_tensors(path, verify=False)[0]) == 4
    assert len(list(open_checkpoint(path, verify=False))) == 4


def test_others_read_the_files(tmp_path: Path) -> None:
    """safetensors' own readers see plain tensors and text."""
    path = finished(tmp_path)
    verify_file(path)
    tensors = safetensors.torch.load_file(path)
    own, metadata = load_tensors(path)
    assert tensors.keys() == own.keys() == net().state_dict().keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    with safe_open(path, "np") as opened:
        assert opened.get_tensor("0.weight").shape == (9, 8)
        assert json.loads(opened.metadata()[CHECKSUMS]).keys() == tensors.keys()
    assert not {CHECKSUMS, HEADER} & metadata.keys()


DTYPES = [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.complex64, torch.int64]


def test_tensors_of_all_sizes_lie_where_they_can_be_read(tmp_path: Path) -> None:
    """Odd numbers of small elements before larger ones; empty ones and scalars."""
    shapes = [(3,), (), (0, 4), (5, 1)]
    state = {f"{d}{s}": torch.ones(s).to(d) for d in DTYPES for s in shapes}
    save_tensors(tmp_path / "x.safetensors", state)
    verify_file(tmp_path / "x.safetensors")
    for found in (load_tensors(tmp_path / "x.safetensors")[0], safetensors.torch.load_file(tmp_path / "x.safetensors")):
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert found[name].data_ptr() % tensor.element_size() == 0
            assert torch.equal(found[name].to(torch.complex64), tensor.to(torch.complex64))


def test_a_file_without_checksums_is_read_as_ever(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    assert load_tensors(tmp_path / "x.safetensors")[0]["w"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="has no checksums"):
        verify_file(tmp_path / "x.safetensors")


def test_the_old_file_is_kept_until_the_new_one_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, previous = tmp_path / "x.safetensors", tmp_path / "x.previous.safetensors"
    for number in range(3):
        save_tree(path, number, previous=previous)
    assert (load_tree(path), load_tree(previous)) == (2, 1)
    monkeypatch.setattr("os.fsync", lambda descriptor: os.truncate(f"/proc/self/fd/{descriptor}", 40))
    with pytest.raises(CheckpointError):
        save_tree(path, 3, previous=previous)
    assert (load_tree(path), load_tree(previous)) == (2, 1)
    assert sorted(os.listdir(tmp_path)) == ["x.previous.safetensors", "x.safetensors"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sites": 3}', '{"sites": [], "blocks": {"a": 2}}', "[" * 100_000])
def test_odd_statistics_are_one_line(tmp_path: Path, text: str) -> None:
    path = statistics(tmp_path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | {"gramian.statistics": text})
    with pytest.raises(CheckpointError) as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_tensors(path, {}, metadata)
        with pytest.raises(CheckpointError):
            Statistics.load(path)
