"""A tensor's matrices come from names, shapes and the config; what cannot be known is one plain matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import open_checkpoint, save_tensors
from gramian.errors import InputError
from gramian.inspection.weights.matrices import find_holdings, read_layouts


def checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict | None = None):
    save_tensors(folder / "model.safetensors", tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def split(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, layouts: dict | None = None):
    found = checkpoint(folder, tensors, config)
    holdings, _ = find_holdings(found, layouts)
    return {
        name: matrix
        for holding in holdings
        for name, matrix in zip(holding.names, holding.split(found.load(holding.entry.name)), strict=True)
    }


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_gpt2_keeps_its_matrices_transposed_and_fused_by_columns(tmp_path):
    w = numbered(8, 24)
    got = split(tmp_path, {"h.0.attn.c_attn.weight": w}, {"model_type": "gpt2"})
    for k, part in enumerate("qkv"):
        assert torch.equal(got[f"h.0.attn.c_attn.weight[{part}]"], w[:, 8 * k : 8 * k + 8].mT)


def test_gpt_neox_interleaves_heads(tmp_path):
    w = numbered(24, 8)  # two heads of four
    got = split(
        tmp_path, {"l.attention.query_key_value.weight": w}, {"model_type": "gpt_neox", "num_attention_heads": 2}
    )
    expected = torch.cat((w[0:4], w[12:16]))
    assert torch.equal(got["l.attention.query_key_value.weight[q]"], expected)


def test_grouped_queries_are_cut_by_the_config(tmp_path):
    w = numbered(32, 16)
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    got = split(tmp_path, {"layers.0.self_attn.qkv_proj.weight": w}, config)
    assert {name[-3:]: len(m) for name, m in got.items()} == {"[q]": 16, "[k]": 8, "[v]": 8}
    assert torch.equal(torch.cat(list(got.values())), w)


@pytest.mark.parametrize("config", [None, {"model_type": "phi3"}, {"num_attention_heads": 5, "hidden_size": 16}])
def test_without_the_numbers_a_fused_tensor_is_one_matrix(tmp_path, config):
    got = split(tmp_path, {"layers.0.self_attn.qkv_proj.weight": numbered(32, 16)}, config)
    assert list(got) == ["layers.0.self_attn.qkv_proj.weight"]


def test_gates_and_experts(tmp_path):
    lstm, gru = nn.LSTM(3, 5), nn.GRU(3, 5)
    tensors = {f"lstm.{k}": v for k, v in lstm.state_dict().items()} | {
        f"gru.{k}": v for k, v in gru.state_dict().items()
    }
    tensors |= {"mlp.gate_up_proj.weight": numbered(12, 4), "moe.experts.gate_up_proj": numbered(3, 4, 10)}
    tensors["moe.experts.down_proj"] = numbered(3, 5, 4)
    got = split(tmp_path, tensors)
    assert torch.equal(got["lstm.weight_ih_l0[f]"], lstm.weight_ih_l0[5:10])
    assert torch.equal(got["gru.weight_hh_l0[n]"], gru.weight_hh_l0[10:])
    assert torch.equal(got["mlp.gate_up_proj.weight[up]"], tensors["mlp.gate_up_proj.weight"][6:])
    assert sum(name.startswith("moe") for name in got) == 9
    assert torch.equal(got["moe.experts.gate_up_proj[1,up]"], tensors["moe.experts.gate_up_proj"][1, :, 5:].mT)


def test_an_override_wins_and_is_checked(tmp_path):
    w = numbered(12, 4)
    got = split(
        tmp_path, {"a.weight": w, "b.weight": w.clone()}, layouts={"a.*": ["(h o) i -> h o i", {"h": 3}], "b.*": "skip"}
    )
    assert list(got) == ["a.weight[0]", "a.weight[1]", "a.weight[2]"]
    found = open_checkpoint(tmp_path)
    for layouts, message in (
        ({"c.*": "o i -> o i"}, "matches no matrix"),
        ({"a.*": "(five o) i -> five o i"}, "does not fit"),
        ({"a.*": 3}, "must map to a layout"),
    ):
        with pytest.raises(InputError, match=message):
            find_holdings(found, layouts)
    (tmp_path / "layouts.json").write_text("[1]")
    with pytest.raises(InputError, match="expected"):
        read_layouts(tmp_path / "layouts.json")
    (tmp_path / "layouts.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_layouts(tmp_path / "layouts.json")


def test_the_order_is_that_of_the_network(tmp_path):
    names = ["lm_head.weight", "layers.10.w.weight", "layers.2.w.weight", "embed_tokens.weight"]
    got = split(tmp_path, {name: torch.eye(4) * (i + 1) for i, name in enumerate(names)})
    assert list(got) == ["embed_tokens.weight", "layers.2.w.weight", "layers.10.w.weight", "lm_head.weight"]


def test_what_is_not_a_weight_is_left_out_and_said_so(tmp_path):
    tensors = {
        "w": torch.eye(4),
        "ids": torch.ones(4, 4, dtype=torch.long),
        "quantized": torch.ones(4, 4, dtype=torch.int8),
        "empty": torch.zeros(0, 5),
        "h.attn.bias": torch.ones(1, 1, 4, 4),
    }
    save_tensors(tmp_path / "m.safetensors", tensors)
    report = gm.inspect(tmp_path / "m.safetensors")
    assert [layer.name for layer in report.layers] == ["w"]
    said = " ".join(report.notes)
    for name in tensors:
        assert name == "w" or name in said


def test_a_conv_kernel_has_its_operator_norm(tmp_path):
    kernel = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    save_tensors(tmp_path / "m.safetensors", {"conv.weight": kernel})
    layer = gm.inspect(tmp_path / "m.safetensors", input_size=(6, 6)).layers[0]
    images = torch.eye(4 * 36).view(-1, 4, 6, 6)
    exact = torch.linalg.matrix_norm(nn.functional.conv2d(images, kernel, padding="same").flatten(1), 2)
    assert layer.operator_norm == pytest.approx(float(exact), rel=1e-2)
    assert "6×6" in layer.note
    assert layer.spectral_norm is not None
    assert layer.spectral_norm < 0.8 * layer.operator_norm
