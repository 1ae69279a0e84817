"""Two checkpoints: the difference that was planted is the difference that is reported, and the adapter restores it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gramian.checkpoint import load_tensors, save_tensors
from gramian.errors import CheckpointError, GramianError
from gramian.inspection import compare_checkpoints, extract_lora
from gramian.inspection.comparison import subspace_angle
from gramian.inspection.quadrature import leading_vectors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tmp_path):
    """A base and a fine-tune: rank 5 added to the projections, a norm and an embedding changed, the rest equal."""
    base = {f"layers.{i}.proj.weight": normal(48, 64, seed=i) for i in range(4)}
    base |= {f"layers.{i}.mlp.weight": normal(32, 32, seed=9 + i) for i in range(4)}
    base |= {"norm.weight": torch.ones(64), "embed_tokens.weight": normal(50, 64)}
    tuned = dict(base)
    for i in range(4):
        tuned[f"layers.{i}.proj.weight"] = base[f"layers.{i}.proj.weight"] + 0.01 * normal(48, 5) @ normal(5, 64)
    tuned["norm.weight"] = base["norm.weight"] * 2
    tuned["embed_tokens.weight"] = base["embed_tokens.weight"].index_fill(0, torch.tensor([3]), 1.0)
    save_tensors(tmp_path / "base.safetensors", base)
    save_tensors(tmp_path / "tuned.safetensors", tuned)
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"


@pytest.mark.parametrize("quick", [False, True])
def test_the_planted_rank_is_reported(pair, quick):
    report = compare_checkpoints(*pair, quick=quick)
    assert [layer.name for layer in report.layers] == [
        "embed_tokens.weight", *(f"layers.{i}.proj.weight" for i in range(4))
    ]  # fmt: skip
    for layer in report.layers[1:]:
        assert layer.numerical_rank == 5
        assert layer.rank_99[0] <= 5
    finding = next(f for f in report.findings if f.code == "low-rank-update")
    assert "rank-5" in finding.title
    new, old = load_tensors(pair[0])[0], load_tensors(pair[1])[0]
    name = "layers.1.proj.weight"
    expected = float((new[name] - old[name]).norm() / old[name].norm())
    assert report.layers[2].relative_change == pytest.approx(expected, rel=1e-5)
    assert "Equal in both" in " ".join(report.notes)


def test_equal_checkpoints_are_said_to_be(pair):
    report = compare_checkpoints(pair[1], pair[1])
    assert [f.code for f in report.findings] == ["no-difference"]
    assert report.status == "good"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_restores_the_difference(pair, tmp_path, dtype):
    for path in pair:
        tensors, _ = load_tensors(path)
        save_tensors(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    adapter = extract_lora(*pair, 5, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    factors, _ = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    new, old = load_tensors(pair[0])[0], load_tensors(pair[1])[0]
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 5
    assert set(config["target_modules"]) == {f"layers.{i}.proj" for i in range(4)}
    assert set(adapter.left_out) == {"norm.weight", "embed_tokens.weight"}
    for module in config["target_modules"]:
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        delta = new[f"{module}.weight"].double() - old[f"{module}.weight"].double()
        assert a.shape == (5, 64)
        assert b.shape == (48, 5)
        reported = adapter.errors[module]
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[5:].norm() / sigma.norm())
        assert reported == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-6, abs=1e-9)
        assert reported <= best * (1 + 1e-6) + 1e-6


def test_a_rank_beyond_the_matrix_is_cut_and_said_so(pair, tmp_path):
    extract_lora(*pair, 60, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {48}
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_checkpoints_that_do_not_match_are_refused(pair, tmp_path):
    other = tmp_path / "other.safetensors"
    for tensors, message in (
        ({"w": torch.eye(3)}, "share no tensor"),
        ({"layers.0.proj.weight": torch.eye(3)}, "do not match"),
    ):
        save_tensors(other, tensors)
        for function in (compare_checkpoints, lambda a, b: extract_lora(a, b, 2, tmp_path / "x")):
            with pytest.raises(CheckpointError, match=message):
                function(pair[0], other)
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract_lora(pair[0], pair[0], 2, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_difference_that_is_not_finite_is_an_error(pair, tmp_path):
    tensors, _ = load_tensors(pair[0])
    tensors["layers.0.proj.weight"][0, 0] = math.nan
    save_tensors(pair[0], tensors)
    assert compare_checkpoints(*pair).findings[0].code == "non-finite-difference"
    with pytest.raises(GramianError, match="not finite"):
        extract_lora(*pair, 2, tmp_path / "x")


def test_a_rotation_is_the_angle_that_is_reported():
    u, v = torch.linalg.qr(normal(40, 3)).Q, torch.linalg.qr(normal(30, 6)).Q
    angle = math.radians(25.0)
    turned = torch.cat((v[:, :2], math.cos(angle) * v[:, 2:3] + math.sin(angle) * v[:, 3:4]), 1)
    strengths = torch.tensor([9.0, 8.5, 8.0])
    old, new = (u * strengths) @ v[:, :3].mT, (u * strengths) @ turned.mT
    reported, dim = subspace_angle(new, old)
    assert dim == 3
    assert reported == pytest.approx(25.0, abs=0.01)
    assert subspace_angle(torch.eye(9), torch.eye(9)) == (None, None)


def test_iteration_finds_the_vectors_that_lapack_does():
    u, v = torch.linalg.qr(normal(200, 20)).Q, torch.linalg.qr(normal(1100, 20)).Q
    w = (u * torch.logspace(1, -1, 20)) @ v.mT
    got, values = leading_vectors(w, 4)
    torch.testing.assert_close(values, torch.logspace(1, -1, 20)[:4].double(), rtol=1e-4, atol=0)
    assert float(torch.linalg.svdvals(got.mT @ v[:, :4].double()).min()) > 1 - 1e-5
