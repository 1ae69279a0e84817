"""Small files that ask for much, containers of any form, and NaN in what is left out: one line, or found by name."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import budgets, open_checkpoint
from gramian.cli import main
from gramian.errors import CheckpointError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "m.pt")
    return folder / "m.pt"


def with_pickle(folder: Path, content: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    """An archive as `torch.save` writes it, around this pickle."""
    with zipfile.ZipFile(folder / "m.pt", "w", how) as archive:
        archive.writestr("m/data.pkl", content)
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/version", "3\n")
    return folder / "m.pt"


def bad(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


# ---- small files that ask for much ---------------------------------------------------------------------------------


def test_a_tensor_that_repeats_its_memory_without_bounds_is_left_out(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"w": torch.zeros(1).expand(200_000, 200_000), "v": normal(8, 8), "e": torch.ones(1, 8).expand(8, 8)}
    )
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.entries) == {"v", "e"}
    assert any(note.startswith("w: left out") for note in checkpoint.notes)
    assert len(gm.inspect(path).layers) == 2


def test_what_is_left_out_and_cannot_be_searched_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"v": normal(8, 8)}, "ema": {"w": torch.zeros(1).expand(200_000, 200_000)}})
    assert any(note.startswith("not searched") and "ema.w" in note for note in gm.inspect(path).notes)


def test_an_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path, pickle.dumps({"x": "a" * (100 << 20)}, 2), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed archive"):
        open_checkpoint(path)


@pytest.mark.timeout(300)  # 2⁴⁰ visits would take days
def test_dicts_that_hold_one_another_many_times_are_visited_once(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"w": normal(8, 8)}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    checkpoint = open_checkpoint(saved(tmp_path, tree))
    assert list(checkpoint.entries) == ["a." * 40 + "w"]
    assert "b (the same as " in checkpoint.notes[0]


def calls(function: str, times: int, argument: bytes) -> bytes:
    """A pickle that keeps what a function makes of one argument, so many times."""
    module, _, name = function.rpartition(".")
    start = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"q\x00" + argument + b"q\x01("
    return start + b"h\x00h\x01\x85R" * times + b"t."


MANY = b"](" + b"K\x01" * 10_000 + b"e"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (calls("builtins.list", 2_000, MANY), "copies more than 4,000,000 values"),
        (calls("builtins.set", 2_000, MANY), "copies more than 4,000,000 values"),
        (calls("torch.Size", 2_000, MANY), "copies more than 4,000,000 values"),
        (calls("builtins.bytearray", 1, b"\x8a\x06\0\x10\xa5\xd4\xe8\0"), "copies more than 4,000,000 values"),
        (b"\x80\x02" + b"N0" * 1_200_000 + b"}.", "a pickle of more than 2,"),
    ],
    ids=["list", "set", "shape", "bytes", "instructions"],
)
def test_a_pickle_has_a_budget(tmp_path: Path, content: bytes, message: str) -> None:
    """It would grow to the square of its length, or to what a number asks for."""
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(with_pickle(tmp_path, content))


def test_names_have_a_budget(tmp_path: Path) -> None:
    """Each name begins with that of its container: together they take the product of the two."""
    tree = {"n" * 100_000: dict.fromkeys(map(str, range(1_000)), normal(8, 8))}
    with pytest.raises(CheckpointError, match="names of more than 67,108,864 characters together"):
        open_checkpoint(saved(tmp_path, tree))


@pytest.mark.parametrize("kind", ["m.pt", "m.safetensors"])
def test_a_name_has_a_budget(tmp_path: Path, kind: str) -> None:
    """Names are taken apart at their dots: one of 450,000 parts took more than ten minutes."""
    tree = {"a." * 450_000 + "weight": normal(8, 8)}
    save = torch.save if kind == "m.pt" else safetensors.torch.save_file
    save(tree, tmp_path / kind)
    with pytest.raises(CheckpointError, match="a tensor's name of 900,006 characters, of 1,024 at most"):
        open_checkpoint(tmp_path / kind)


@pytest.mark.parametrize("kind", ["m.pt", "m.safetensors", "m.npz", "legacy.pt", "names.pt"])
def test_tensors_have_a_budget_that_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(budgets, "MOST_TENSORS", 100)
    path, memory = tmp_path / kind, torch.ones(8)
    several = {f"w{i}": torch.ones(2) for i in range(200)}
    if kind == "m.npz":
        np.savez(path, **{name: w.numpy() for name, w in several.items()})
    elif kind == "m.safetensors":
        safetensors.torch.save_file(several, path)
    elif kind == "names.pt":  # one tensor in many dicts
        torch.save({str(i): {"w": memory} for i in range(200)}, path)
    else:
        torch.save(several, path, _use_new_zipfile_serialization=kind == "m.pt")
    with pytest.raises(CheckpointError, match=rf"more than 1\d\d tensors in .*{budgets.SWITCH}=") as failure:
        open_checkpoint(path)
    assert "\n" not in str(failure.value)
    monkeypatch.setenv(budgets.SWITCH, "300")
    assert len(open_checkpoint(path)) == 200


def test_the_budget_of_tensors_grows_with_the_file() -> None:
    assert budgets.most_tensors(0) == 32_768
    assert budgets.most_tensors(4 << 30) == 32_768 + (1 << 20)


@pytest.mark.timeout(100)  # a search of each would take hours
@pytest.mark.parametrize("inside", [False, True])
def test_a_dict_without_tensors_is_searched_once(tmp_path: Path, inside: bool) -> None:
    empty: dict[str, Any] = {str(i): {} for i in range(20_000)}
    tree = {str(i): empty for i in range(20_000)} | ({"model": {"w": normal(8, 8)}} if inside else {"w": normal(8, 8)})
    assert list(open_checkpoint(saved(tmp_path, tree)).entries) == ["w"]


@pytest.mark.parametrize("depth", [1_000, 200_000])
def test_dicts_of_any_depth_are_one_line(tmp_path: Path, depth: int) -> None:
    nested = b"\x80\x02" + b"}X\x01\0\0\0a" * depth + b"}" + b"s" * depth + b"."
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(with_pickle(tmp_path, nested))
    assert "\n" not in str(failure.value)


def test_nested_tensors_are_left_out_by_name(tmp_path: Path) -> None:
    parts = [normal(3, 2), normal(2, 2)]
    for layout in (torch.strided, torch.jagged):
        checkpoint = open_checkpoint(
            saved(tmp_path, {"n": torch.nested.nested_tensor(parts, layout=layout), "v": parts[0]})
        )
        assert list(checkpoint.entries) == ["v"]
        assert any(note.startswith("n: left out") for note in checkpoint.notes)


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "\x1b[31mx.pt"
    assert main(["inspect", str(path)]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ---- containers, and numbers in what is left out ---------------------------------------------------------------------


def test_lists_of_state_dicts_are_descended(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": [{"w.weight": normal(8, 8)}, {"w.weight": bad(8, 8)}], "step": 3})
    assert set(open_checkpoint(path).entries) == {"model.0.w.weight", "model.1.w.weight"}
    assert found(path) == {"model.1.w.weight"}


def found(path: Path | nn.Module) -> set[str]:
    return {f.where for f in gm.inspect(path).findings if f.code == "non-finite-weights"}


BESIDE = {
    "average": ("ema", {"w": bad(8, 8)}, "ema.w"),
    "optimizer": ("optimizer", {"state": {0: {"exp_avg": bad(8, 8)}}, "param_groups": []}, "optimizer.state.0.exp_avg"),
    "second network": ("discriminator", {"w": bad(8, 8)}, "discriminator.w"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_nan_beside_the_model_is_found(tmp_path: Path, case: str) -> None:
    key, held, name = BESIDE[case]
    path = saved(tmp_path, {"model": {"w": normal(8, 8)}, key: held})
    assert list(open_checkpoint(path).entries) == ["w"]
    assert found(path) == {name}
    if case == "second network":
        assert "discriminator (1 tensor)" in open_checkpoint(path).notes[0]


@pytest.mark.filterwarnings("ignore")
def test_nan_beside_the_model_is_found_in_a_distributed_folder(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": normal(8, 8)}, "ema": {"w": bad(8, 8)}}, checkpoint_id=tmp_path / "d")
    assert found(tmp_path / "d") == {"ema.w"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_nan_in_sparse_tensors_is_found(tmp_path: Path, layout: str) -> None:
    path = saved(tmp_path, {"s": getattr(bad(4, 4), layout)(), "v": normal(8, 8)})
    assert found(path) == {"s"}


def test_nan_in_buffers_is_found_in_memory_as_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].running_var[2] = torch.nan  # type: ignore[index]
    assert found(model) == found(saved(tmp_path, model.state_dict())) == {"1.running_var"}


def test_an_archive_of_arrays_that_grows_without_bounds_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros((1 << 12, 1 << 12)))
    with pytest.raises(CheckpointError, match="that grows to 134,217,8") as raised:
        open_checkpoint(tmp_path / "bomb.npz")
    assert len(str(raised.value).splitlines()) == 1
    np.savez_compressed(tmp_path / "small.npz", w=np.zeros((100, 100)))
    assert open_checkpoint(tmp_path / "small.npz").entries["w"].shape == (100, 100)


def test_an_array_is_not_allocated_beyond_what_is_there(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(80))
    with pytest.raises(CheckpointError, match="promises more numbers"):
        open_checkpoint(tmp_path / "lie.npz")


def test_compressed_weights_are_read(tmp_path: Path) -> None:
    arrays = {"a.weight": np.zeros((64, 64), np.float32), "b.weight": np.eye(8), "none.weight": np.zeros((0, 3))}
    arrays["n"] = np.array(3)
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    assert all(np.array_equal(checkpoint.load(name).numpy(), array) for name, array in arrays.items())
