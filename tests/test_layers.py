"""One table says what layers are: a model and the file that it saves have the same matrices, part names and roles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.block import METADATA, Block
from gramian.checkpoint import open_checkpoint, save_tensors
from gramian.compression.budget.mixing import Form
from gramian.errors import GramianWarning, InputError
from gramian.inspection.weights.matrices import find_holdings
from gramian.inspection.weights.of_model import applied
from gramian.layers import LAYERS, NAMED, OPERATIONS, Layer, find_head, find_named, layer_of, operation_of
from gramian.layers.listed import look_up_listed
from gramian.layout import Layout
from gramian.operators import layer_gains
from gramian.optim.parts import in_parts
from zoo import ZOO, Conv1D, GPT2Attention
from zoo_modules import MODULES

CASES = ZOO | MODULES

Matrices = dict[str, tuple[Tensor, str]]  # each with its role


def of_model(model: nn.Module) -> Matrices:
    return {
        name: (matrix, block.role)
        for block in gm.blocks(model).blocks
        for name, matrix in zip(
            block.names, block.layout.pieces(weight(block), block.role == "elementwise"), strict=True
        )
    }


def weight(block: Block) -> Tensor:
    return applied(block)[0]


def of_file(path: Path) -> Matrices:
    checkpoint = open_checkpoint(path)
    return {
        name: (matrix, holding.role)
        for holding in find_holdings(checkpoint)[0]
        for name, matrix in zip(holding.names, holding.split(checkpoint.load(holding.entry.name)), strict=True)
    }


def check_equal(got: Matrices, wanted: Matrices) -> None:
    assert got.keys() == wanted.keys()
    for name, (matrix, role) in wanted.items():
        if "parametrizations" in name:  # computed in float64 from a file, by torch's own kernel in a model
            torch.testing.assert_close(got[name][0], matrix)
        else:
            assert torch.equal(got[name][0], matrix), name
        assert got[name][1] == role, name


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_the_models_metadata_has_the_models_matrices(name: str, tmp_path: Path) -> None:
    model = CASES[name].make_model(0)
    save_tensors(tmp_path / "m.safetensors", model.state_dict(), gm.blocks(model).metadata())
    check_equal(of_file(tmp_path / "m.safetensors"), of_model(model))


def needs_the_class(block: Block) -> bool:
    """Whether names and shapes cannot tell what the class tells: groups, transposition, bilinear forms, bags."""
    special = (nn.Bilinear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.EmbeddingBag)
    return isinstance(block.module, special) or getattr(block.module, "groups", 1) > 1


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("name", CASES)
def test_any_file_has_the_models_matrices_as_far_as_names_and_shapes_tell(
    name: str, suffix: str, tmp_path: Path
) -> None:
    model, path = CASES[name].make_model(0), tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save(model.state_dict(), path)
    else:
        save_tensors(path, model.state_dict())
    unknown = tuple(b.name for b in gm.blocks(model).blocks if needs_the_class(b))
    buffers = {n for n, _ in model.named_buffers()}
    got = {n: m for n, m in of_file(path).items() if not n.startswith(unknown or ("-",)) and n not in buffers}
    check_equal(got, {n: m for n, m in of_model(model).items() if not n.startswith(unknown or ("-",))})


@pytest.mark.parametrize("name", CASES)
def test_the_report_of_a_model_and_of_its_file_name_the_same_layers(name: str, tmp_path: Path) -> None:
    model, path = CASES[name].make_model(0), tmp_path / "m.safetensors"
    save_tensors(path, model.state_dict(), gm.blocks(model).metadata())
    ours, theirs = gm.inspect(model), gm.inspect(path)
    assert {(x.name, x.shape, x.role, x.kind) for x in theirs.layers} == {
        (x.name, x.shape, x.role, x.kind) for x in ours.layers
    }


def test_gpt2s_fused_projection_is_three_matrices_in_the_model_too() -> None:
    block = next(b for b in gm.blocks(ZOO["gpt2"].make_model(0)).blocks if b.name == "h.0.attn.c_attn.weight")
    assert block.names == tuple(f"h.0.attn.c_attn.weight[{part}]" for part in "qkv")
    assert torch.equal(block.split()[1], block.parameter[:, 32:64].T)


class Attention(nn.Module):
    """A fused projection under a config, as transformers has it."""

    def __init__(self, projection: str, shape: tuple[int, int], config: object) -> None:
        super().__init__()
        self.config = config
        self.self_attn = nn.ModuleDict({projection: nn.Linear(*reversed(shape), bias=False)})


PHI3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


@pytest.mark.parametrize(
    "config", [PHI3, SimpleNamespace(**PHI3), SimpleNamespace(text_config=SimpleNamespace(**PHI3))]
)
def test_unequal_parts_are_apart_where_a_config_tells_them(config: object) -> None:
    (block,) = gm.blocks(Attention("qkv_proj", (32, 16), config)).blocks
    assert [tuple(p.shape) for p in block.pieces()] == [(16, 16), (8, 16), (8, 16)]
    assert torch.equal(torch.cat(list(block.pieces())), block.parameter)
    assert block.shape == (4, 8, 16)  # a stack of equal parts, the queries being two of them
    assert torch.equal(block.join(block.split()), block.parameter)
    assert [name[-3:] for name in block.names] == ["[q]", "[k]", "[v]"]


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("(h three d) i -> three (h d) i", {"h": 4}),
        ("(four three d) i -> three (four d) i", {}),
        ("(kv n d) i -> n (kv d) i", {"kv": 4, "d": 4}),
        ("(three o) i -> three o i", {}),
    ],
)
def test_parts_are_cut_from_each_fused_matrix_and_mix_none(pattern: str, sizes: dict[str, int]) -> None:
    layout = Layout(pattern, (48, 24), sizes)
    cut = in_parts(layout, 4)
    w = torch.arange(48.0)[:, None].expand(48, 24)
    rows, parts = layout.split(w)[..., 0], cut.split(w)[..., 0]
    assert parts.shape[-1] == 4
    assert torch.equal(parts.flatten(), rows.flatten())


@pytest.mark.parametrize("part_size", [None, 4])
def test_keys_and_values_step_apart_from_the_queries_that_they_are_fused_with(part_size: int | None) -> None:
    fused = Attention("qkv_proj", (32, 16), PHI3)
    (block,) = gm.blocks(fused).blocks
    block.parameter.grad = torch.randn(block.parameter.shape)
    apart = {name: nn.Parameter(piece.clone()) for name, piece in zip("qkv", block.pieces(), strict=True)}
    for parameter, grad in zip(apart.values(), block.layout.pieces(block.parameter.grad), strict=True):
        parameter.grad = grad.clone()
    options = {"scale": "match_rms_adamw", "part_size": part_size}
    optimizer = gm.optim.Muon(fused, **options)
    assert optimizer.explain()[0]["matrices"] == "4 × 8 × 16"
    optimizer.step()
    gm.optim.Muon(list(apart.items()), **options).step()
    stepped = dict(zip("qkv", block.pieces(), strict=True))
    for name in "kv":
        torch.testing.assert_close(stepped[name], apart[name].detach(), atol=1e-5, rtol=0)


def test_unequal_parts_count_once_each_in_the_share_of_a_step() -> None:
    fused = Attention("qkv_proj", (32, 16), PHI3)
    whole = nn.ModuleDict({part: nn.Linear(16, rows, bias=False) for part, rows in zip("qkv", (16, 8, 8), strict=True)})
    weight = fused.self_attn["qkv_proj"].weight
    weight.grad = torch.randn(weight.shape)
    for part, piece, grad in zip("qkv", weight.split([16, 8, 8]), weight.grad.split([16, 8, 8]), strict=True):
        whole[part].weight.data, whole[part].weight.grad = piece.detach().clone(), grad.clone()
    gm.optim.Muon(fused).step()
    gm.optim.Muon(whole, routes={"v.weight": "matrix"}).step()
    torch.testing.assert_close(weight[16:24].detach(), whole["k"].weight.detach(), atol=1e-5, rtol=0)


def test_without_a_config_nothing_is_guessed() -> None:
    (block,) = gm.blocks(Attention("qkv_proj", (32, 16), None)).blocks
    assert block.names == ("self_attn.qkv_proj.weight",)


def test_interleaved_heads_need_the_config() -> None:
    config = SimpleNamespace(model_type="gpt_neox", num_attention_heads=2, hidden_size=8)
    (block,) = gm.blocks(Attention("query_key_value", (24, 8), config)).blocks
    w = block.parameter
    assert torch.equal(next(block.pieces()), torch.cat((w[0:4], w[12:16])))


def test_a_class_keeps_its_orientation_whatever_the_name() -> None:
    """nanoGPT calls a Linear (3 n, n) c_attn; GPT-2's is (n, 3 n)."""
    ours = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(8, 24)})})
    (block,) = gm.blocks(ours).blocks
    assert torch.equal(block.split()[1], block.parameter[8:16])
    theirs = nn.ModuleDict({"attn": GPT2Attention(8, 2)})
    assert torch.equal(gm.blocks(theirs).blocks[0].split()[1], theirs["attn"].c_attn.weight[:, 8:16].T)


@pytest.mark.parametrize(
    ("model_type", "shape", "gate_of_expert_1"),
    [
        ("gpt_oss", (3, 4, 10), lambda w: w[1, :, 0::2].T),
        ("llama4_text", (3, 4, 10), lambda w: w[1, :, :5].T),
        ("qwen3_moe", (3, 10, 4), lambda w: w[1, :5]),
    ],
)
def test_stacked_experts(model_type: str, shape: tuple[int, ...], gate_of_expert_1) -> None:
    w = torch.arange(120.0).view(shape)
    found = find_named("l.experts.gate_up_proj", shape, {"model_type": model_type, "hidden_size": 4})
    assert found is not None
    assert found.layout is not None
    gate = dict(zip(found.layout.labels, found.layout.pieces(w), strict=True))["1,gate"]
    assert torch.equal(gate, gate_of_expert_1(w))


def test_depthwise_kernels_are_elementwise_and_grouped_ones_are_not() -> None:
    roles = {
        "depthwise": (nn.Conv2d(8, 8, 3, groups=8), "elementwise"),
        "with a multiplier": (nn.Conv1d(4, 8, 3, groups=4), "elementwise"),
        "transposed": (nn.ConvTranspose2d(8, 8, 3, groups=8), "elementwise"),
        "grouped": (nn.Conv2d(8, 8, 3, groups=4), "hidden"),
        "one channel": (nn.Conv2d(1, 8, 3), "hidden"),
    }
    for name, (module, role) in roles.items():
        assert gm.blocks(module).blocks[0].role == role, name


def test_a_depthwise_kernel_is_one_matrix_of_a_row_for_each_channel(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8))
    save_tensors(tmp_path / "m.safetensors", model.state_dict())
    check_equal(of_file(tmp_path / "m.safetensors"), of_model(model))
    assert {name: tuple(m.shape) for name, (m, _) in of_model(model).items()} == {
        "0.weight": (8, 3),
        "1.weight": (8, 9),
        "2.weight": (8, 9),
    }


def test_the_optimizer_leaves_elementwise_kernels_to_adamw() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1))
    rows = {row["name"]: row for row in gm.optim.Muon(model).explain()}
    assert rows["0.weight"]["direction"] == "adamw"
    assert "depthwise" in rows["0.weight"]["reason"]
    assert rows["1.weight"]["direction"] == "matrix"


def test_every_row_is_reached_and_well_formed() -> None:
    assert {row.operation for row in LAYERS} <= OPERATIONS.keys()
    classes = [row.cls for row in LAYERS if not isinstance(row.cls, str)]
    assert len(classes) == len(set(classes))
    for row in NAMED:
        assert row.layout or row.role == "elementwise", row
        if row.rows:
            assert len(row.rows) == len(row.parts), row
    assert operation_of(nn.LazyLinear(3)).factors == "linear"
    assert layer_of(nn.TransformerEncoderLayer(8, 2)).operation == "unknown"


class Transposed(nn.Module):
    """A linear layer of nobody's library: its weight is (in, out)."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_inputs, num_outputs) / num_inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class BlockDiagonal(nn.Module):
    """Four linear layers, each on its quarter of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cores = nn.Parameter(torch.randn(4, width // 4, width // 4) / (width // 4) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (4, -1)), self.cores).flatten(-2)


def test_a_row_is_all_that_a_layer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Layer("Transposed", "linear", {"weight": "i o -> o i"}),
        Layer(BlockDiagonal, "bilinear", {"cores": "b o i -> b o i"}),
    )
    monkeypatch.setattr("gramian.layers.classes.LAYERS", (*LAYERS, *rows))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Transposed(64, 32), nn.Tanh(), BlockDiagonal(32), nn.Tanh(), Transposed(32, 10))
    batches, objective = ZOO["mlp"].make_batches(0), gm.Objective.classification()
    assert {b.name: (b.shape, b.role) for b in gm.blocks(model).blocks} == {
        "0.weight": ((32, 64), "hidden"),
        "2.cores": ((4, 8, 8), "hidden"),
        "4.weight": ((10, 32), "head"),
    }
    with pytest.warns(GramianWarning, match=r"left as they were: 2\.cores"):
        gm.init.isometric_(model, batches[0])
    w = model[0].weight.detach().T
    torch.testing.assert_close(w @ w.T / (w @ w.T)[0, 0], torch.eye(32), atol=1e-5, rtol=0)
    stats = gm.capture(model, batches, objective)
    assert [stats[n].A.dim for n in ("0.weight", "2.cores", "4.weight")] == [64, 8, 32]
    gains = layer_gains(model, batches[0], objective)
    assert gains["4.weight"] is not None
    routes = {row["name"]: row["direction"] for row in gm.optim.Muon(model).explain()}
    assert routes["0.weight"] == routes["2.cores"] == "matrix"
    before = sum(ZOO["mlp"].loss(model, b).item() for b in batches)
    small = gm.compress(model, stats, keep=0.9).apply()
    assert sum(ZOO["mlp"].loss(small, b).item() for b in batches) < 1.05 * before
    assert type(small[0]).__name__ == "LowRank"


# ---- what a stranger tried ------------------------------------------------------------------------------------------


def test_biases_of_experts_are_no_matrices() -> None:
    experts = nn.Module()
    experts.experts = nn.Module()
    experts.experts.gate_up_proj = nn.Parameter(torch.randn(3, 4, 10))
    experts.experts.gate_up_proj_bias = nn.Parameter(torch.randn(3, 10))
    experts.config = {"model_type": "gpt_oss", "hidden_size": 4}
    found, rest = gm.blocks(experts)
    assert [b.name for b in found] == ["experts.gate_up_proj"]
    assert [r.name for r in rest] == ["experts.gate_up_proj_bias"]


@pytest.mark.parametrize(
    ("name", "shape", "config", "q", "k"),
    [
        # four cores, each q, v, k; as the forward of transformers' CodeGenAttention views them
        ("l.qkv_proj.weight", (48, 16), {"model_type": "codegen"}, "(4 3 4)[0]", "(4 3 4)[2]"),
        # every head its q, k, v
        ("l.attn.c_attn.weight", (48, 16), {"model_type": "gpt_bigcode", "n_head": 4}, "(4 3 4)[0]", "(4 3 4)[1]"),
        ("l.attn.in_proj.weight", (48, 16), {"model_type": "deberta", "n_head": 4}, "(4 3 4)[0]", "(4 3 4)[1]"),
        (
            "l.query_key_value.weight",
            (48, 16),
            {"model_type": "falcon", "n_head": 4, "multi_query": False, "new_decoder_architecture": False},
            "(4 3 4)[0]",
            "(4 3 4)[1]",
        ),
    ],
)
def test_interleaved_orders(name: str, shape: tuple[int, int], config: dict, q: str, k: str) -> None:
    w = torch.arange(float(shape[0] * shape[1])).view(shape)
    found = find_named(name, shape, config)
    assert found is not None
    assert found.layout is not None
    got = dict(zip(found.layout.labels, found.layout.pieces(w), strict=True))
    heads = w.view(4, 3, 4, 16)
    for part, where in (("q", q), ("k", k)):
        assert torch.equal(got[part], heads[:, int(where[-2])].reshape(16, 16))


FALCON = {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 16}


def test_falcons_queries_keys_and_values_are_those_of_its_forward() -> None:
    """As FalconAttention._split_heads views them."""
    w = torch.arange(32 * 16.0).view(32, 16)
    grouped = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True}
    heads = w.view(2, 4, 4, 16)  # for each of two heads of keys: two of queries, one key, one value
    wanted = (heads[:, :2], heads[:, 2], heads[:, 3])
    got = _pieces("h.query_key_value.weight", w, grouped)
    assert sorted(map(tuple, got["q"].tolist())) == sorted(map(tuple, wanted[0].reshape(16, 16).tolist()))
    assert torch.equal(got["k"], wanted[1].reshape(8, 16))
    assert torch.equal(got["v"], wanted[2].reshape(8, 16))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("h.query_key_value.weight", FALCON | {"new_decoder_architecture": False, "multi_query": True}),
        ("h.attn.c_attn.weight", {"model_type": "gpt_bigcode", "n_head": 4, "n_embd": 16, "multi_query": True}),
    ],
)
def test_multi_query_projections_have_one_key_and_one_value(name: str, config: dict) -> None:
    w = torch.arange(24 * 16.0).view(24, 16)
    got = _pieces(name, w, config)
    for part, wanted in zip("qkv", w.split([16, 4, 4]), strict=True):
        assert torch.equal(got[part], wanted)


def _pieces(name: str, w: Tensor, config: dict) -> dict[str, Tensor]:
    found = find_named(name, tuple(w.shape), config)
    assert found is not None
    assert found.layout is not None
    assert torch.equal(found.layout.join(found.layout.split(w)), w)
    return dict(zip(found.layout.labels, found.layout.pieces(w), strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_experts_that_declare_their_orientation_need_no_config(transposed: bool, concatenated: bool) -> None:
    experts = nn.Module()
    experts.is_transposed, experts.is_concatenated = transposed, concatenated
    w = torch.randn(3, 4, 8) if transposed else torch.randn(3, 8, 4)
    experts.gate_up_proj = nn.Parameter(w)
    experts.down_proj = nn.Parameter(torch.randn(3, 4, 4))  # square: no shape tells
    found = {b.name: b for b in gm.blocks(nn.ModuleDict({"experts": experts})).blocks}
    names = zip(found["experts.gate_up_proj"].names, found["experts.gate_up_proj"].pieces(), strict=True)
    gate = dict(names)["experts.gate_up_proj[1,gate]"]
    rows = w[1].T if transposed else w[1]
    assert torch.equal(gate, rows[:4] if concatenated else rows[0::2])
    down = found["experts.down_proj"]
    assert torch.equal(down.split()[1], experts.down_proj[1].T if transposed else experts.down_proj[1])


def test_vectors_tokens_and_biases_are_told_by_name_and_shape(tmp_path: Path) -> None:
    model = nn.Module()
    wanted = {
        "cls_token": ((1, 1, 8), ""),
        "gamma": ((8, 1, 1), ""),
        "pos_bias_u": ((4, 8), ""),
        "final_logits_bias": ((1, 12), ""),
        "position_embeddings": ((1, 7, 8), "embedding"),
        "rel_pos_h": ((7, 8), "embedding"),
        "query_tokens": ((1, 7, 8), "embedding"),
        "relative_attention_bias": ((7, 4), "embedding"),
        "w": ((8, 6), "hidden"),
        "u": ((6, 8), "hidden"),
    }
    for name, (shape, _) in wanted.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    model.register_parameter("score", nn.Parameter(torch.randn(5, 6)))
    found, rest = gm.blocks(model)
    assert {b.name: b.role for b in found} == {n: r for n, (_, r) in wanted.items() if r} | {"score": "head"}
    assert not [r.name for r in rest if "unknown" in r.reason]
    save_tensors(tmp_path / "m.safetensors", model.state_dict())
    check_equal(of_file(tmp_path / "m.safetensors"), of_model(model))


def test_a_weight_under_an_adapter_is_what_it_was() -> None:
    """As PEFT wraps GPT-2: the names of modules change, the layers do not."""
    layer = nn.ModuleDict({
        "base_layer": Conv1D(24, 8),
        "lora_A": nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}),
        "lora_B": nn.ModuleDict({"default": nn.Linear(2, 24, bias=False)}),
    })  # fmt: skip
    head = nn.ModuleDict({"modules_to_save": nn.ModuleDict({"default": nn.Linear(8, 5)})})
    model = nn.ModuleDict({"score": head, "attn": nn.ModuleDict({"c_attn": layer})})
    whole = nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})
    found = {b.name.removeprefix("base_model.model."): b for b in gm.blocks(whole).blocks}
    assert found["attn.c_attn.base_layer.weight"].layout.labels == ("q", "k", "v")
    assert {b.role for name, b in found.items() if "c_attn" in name} == {"hidden"}
    assert found["score.modules_to_save.default.weight"].role == "head"


def test_an_adapters_file_has_no_head(tmp_path: Path) -> None:
    tensors = {f"base_model.model.l.{i}.q_proj.lora_{ab}.weight": torch.randn(4, 4) for i in (0, 1) for ab in "AB"}
    save_tensors(tmp_path / "m.safetensors", tensors)
    assert {role for _, role in of_file(tmp_path / "m.safetensors").values()} == {"hidden"}


@pytest.mark.parametrize(
    ("names", "head"),
    [
        (["embed.weight", "classifier.dense.weight", "classifier.out_proj.weight"], 2),  # RoBERTa
        (["decoder.weight", "embed.weight", "rnn.weight"], 0),  # torch's own language models
        (["embed.weight", "visual_projection.weight", "text_projection.weight"], None),  # CLIP
        (["decoder.conv_out.weight", "encoder.conv_out.weight", "quant_conv.weight"], 0),  # an AutoencoderKL
    ],
)
def test_heads_by_name(names: list[str], head: int | None) -> None:
    assert find_head([[name] for name in names], ["hidden"] * 3, last=True) == head


def test_parts_that_cannot_be_three_equal_squares_are_not_guessed() -> None:
    assert find_named("b.attn.qkv.weight", (12, 6), {}) is None
    assert find_named("b.Wqkv.weight", (24, 16), {}) is None


@pytest.mark.parametrize("in_out", [False, True])
def test_bare_experts_are_told_by_the_pair_of_shapes(in_out: bool, tmp_path: Path) -> None:
    up, down = ((3, 12, 40), (3, 20, 12)) if in_out else ((3, 40, 12), (3, 12, 20))
    tensors = {"l.experts.gate_up_proj": torch.randn(up), "l.experts.down_proj": torch.randn(down)}
    save_tensors(tmp_path / "m.safetensors", tensors)
    found = of_file(tmp_path / "m.safetensors")
    assert tuple(found["l.experts.gate_up_proj[0,up]"][0].shape) == (20, 12)
    assert tuple(found["l.experts.down_proj[0]"][0].shape) == (12, 20)


def test_experts_that_no_shape_tells_are_left_out(tmp_path: Path) -> None:
    save_tensors(tmp_path / "m.safetensors", {"l.experts.down_proj": torch.randn(3, 12, 20), "w": torch.eye(2)})
    assert of_file(tmp_path / "m.safetensors").keys() == {"w"}


def test_a_tied_weight_is_found_under_the_name_that_a_file_kept(tmp_path: Path) -> None:
    model = ZOO["gpt2"].make_model(0)
    tensors = {k: v for k, v in model.state_dict().items() if k != "wte.weight"}
    save_tensors(tmp_path / "m.safetensors", tensors, gm.blocks(model).metadata())
    assert of_file(tmp_path / "m.safetensors")["lm_head.weight"][1] == "embedding"


def test_parameters_called_like_a_weight_norms_are_not_taken_for_one() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("w_q", "w_k", "w_v", "w_g"):
                self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))

    assert len(gm.blocks(Gated()).blocks) == 4


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None, 10**400])
def test_a_bad_size_is_one_line_and_poisons_nothing(size: object) -> None:
    with pytest.raises(InputError) as caught:
        gm.blocks(nn.Linear(4, 6), {"weight": ("(h o) i -> h o i", {"h": size})})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert gm.blocks(nn.Linear(4, 6), {"weight": ("(h o) i -> h o i", {"h": 2})}).blocks[0].shape == (2, 3, 4)


@pytest.mark.parametrize("pattern", ["- - -> - -", "o o -> o o", "% % -> % %", "tensor i -> tensor i", 5, None, ("o",)])
def test_a_bad_layout_is_one_line(pattern: object) -> None:
    with pytest.raises(InputError):
        gm.blocks(nn.Linear(4, 6), {"weight": pattern})


def test_configs_that_misbehave_are_no_configs() -> None:
    class Raises:
        @property
        def model_type(self) -> str:
            raise RuntimeError("no")

    loop: dict = {}
    loop["text_config"] = loop
    for config in (Raises(), loop, 3, "gpt2", {"model_type": "gpt_neox", "num_attention_heads": 0}):
        model = Attention("query_key_value", (24, 8), config)
        assert gm.blocks(model).blocks[0].names == ("self_attn.query_key_value.weight",)


HOSTILE = {
    "rows": {"rows": [-2, 8]},
    "infinite": {"rows": [float("inf")]},
    "sizes": {"sizes": {"o": 0}},
    "role": {"role": "king"},
    "layout": {"layout": "% % -> % %"},
    "huge": {"sizes": {"o": 10**30}},
    "parts": {"rows": [2, 2], "parts": ["a", "b", "c"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    row = {"layout": "o i -> o i", "sizes": {}, "parts": [], "rows": [], "role": "hidden", "kind": "x"} | HOSTILE[name]
    save_tensors(tmp_path / "m.safetensors", {"w": torch.randn(4, 3)}, {METADATA: json.dumps({"w": row})})
    with pytest.raises(InputError, match="its metadata does not fit") as caught:
        gm.inspect(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_a_layer_with_more_than_a_weight_and_a_bias_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 32)
            self.scale = nn.Parameter(torch.ones(32))

    model = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(32, 10))
    before = model[0].weight.clone()
    with pytest.warns(GramianWarning, match=r"left as they were: 0\.weight.*; set: "):
        gm.init.isometric_(model)
    assert torch.equal(model[0].weight, before)
    batches = ZOO["mlp"].make_batches(0)
    plan = gm.compress(model, batches=batches, objective=gm.Objective.classification(), keep=0.95)
    assert "other parameters" in plan.reasons["0"]


@pytest.mark.parametrize("how", ["hook", "pre-hook", "instance", "call"])
def test_compression_leaves_layers_that_do_more_than_their_class(how: str) -> None:
    layer = nn.Linear(64, 32)
    if how == "hook":
        layer.register_forward_hook(lambda m, i, o: 3 * o)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda m, i: (3 * i[0],))
    elif how == "instance":
        layer.forward = lambda x: 3 * nn.functional.linear(x, layer.weight, layer.bias)
    else:
        layer.__class__ = type("Called", (nn.Linear,), {"__call__": lambda self, x: 3 * nn.Linear.__call__(self, x)})
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(32, 10))
    batches = ZOO["mlp"].make_batches(0)
    plan = gm.compress(model, batches=batches, objective=gm.Objective.classification(), keep=0.95)
    if how in ("instance", "call"):
        assert "0" in plan.reasons
        return
    # A hook stays on the factored layer: nothing is cut here, so the outputs are the same.
    low = replace(plan, forms={**plan.forms, "0": Form(32)}).apply()
    assert type(low[0]).__name__ == "LowRank"
    x = batches[0][0]
    torch.testing.assert_close(low(x), model(x), rtol=1e-3, atol=1e-3)


def test_what_a_report_of_a_model_leaves_out_is_said() -> None:
    model = nn.Sequential(BlockDiagonal(32), nn.Linear(32, 10))
    notes = " ".join(gm.inspect(model).notes)
    assert "0.cores" in notes
    assert "layouts" in notes


def test_keyword_calls_of_products_are_captured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(64, 16)), nn.Parameter(torch.randn(10, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.mm(x, mat2=self.a)
            empty = torch.zeros(1, len(x), 10)
            both = empty.baddbmm(batch1=x[None], batch2=torch.zeros(1, 16, 10), beta=1.0)[0]
            return both + torch.einsum("bi,oi->bo", x, self.b)

    stats = gm.capture(Keyword(), ZOO["mlp"].make_batches(0), gm.Objective.classification())
    assert stats["a"].A.dim == 64
    assert stats["b"].A.dim == 16


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("first", "width", "channels"), [("conv1", 16, 16), ("zero.conv", 16, 16), ("a.b.stem", 6, 5)])
def test_a_list_a_file_and_a_model_agree_on_depthwise_kernels_in_any_order(
    tmp_path: Path, first: str, width: int, channels: int, reverse: bool
) -> None:
    shapes = {
        f"{first}.weight": (width, 1, 3, 3),
        f"{first}.bias": (width,),
        "block.0.dw.weight": (channels, 1, 3, 3),
        "block.0.pw.weight": (channels, width, 1, 1),
        "fc.weight": (10, channels),
    }
    names = sorted(shapes, reverse=reverse)
    told = {name: answer.role for name, answer in look_up_listed({name: shapes[name] for name in names}).items()}
    save_tensors(tmp_path / "m.safetensors", {name: torch.randn(shapes[name]) for name in names})
    held = {h.entry.name: h.role for h in find_holdings(open_checkpoint(tmp_path / "m.safetensors"))[0]}
    assert held == {name: told[name] for name in held}
    assert [name for name, role in told.items() if role == "elementwise"] == ["block.0.dw.weight"]


def test_a_transposed_kernel_to_one_channel_is_no_depthwise_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 1, 3))
    save_tensors(tmp_path / "m.safetensors", model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert look_up_listed(shapes)["1.weight"].layout == gm.blocks(model).blocks[1].layout
    (_, last), wanted = of_file(tmp_path / "m.safetensors").values(), of_model(model)["1.weight"]
    assert torch.equal(last[0], wanted[0])
    assert last[1] == wanted[1] == "head"


CHANNELS = {
    "mu": (3, 64), "time_mix_key": (2, 64), "scale_shift_table": (6, 64), "layer_scale_parameters": (2, 64),
    "alpha": (4, 64), "per_channel_scale1": (16, 16), "A_imag": (64, 32), "states": (3, 64), "log_decay": (32, 64),
    "video_a2v_scale_shift_table": (5, 64),
}  # fmt: skip
PRODUCTS = {
    "w1": (3, 64), "W": (64, 64), "fn": (4, 64), "out_proj": (2, 64), "text_projection": (8, 64), "mix_kernel": (4, 64),
    "inner": (16, 64),
}  # fmt: skip


def test_what_acts_channel_by_channel_is_no_matrix(tmp_path: Path) -> None:
    """As RWKV's coefficients and the tables of diffusers' modulations; in a model, a list of names and a file alike."""
    model = nn.Module()
    for name, shape in (CHANNELS | PRODUCTS | {"A": (64, 8)}).items():  # the last is few columns: nothing tells
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    model.mus = nn.ParameterList([nn.Parameter(torch.randn(3, 64))])
    model.head = nn.Linear(64, 64)
    found, rest = gm.blocks(model)
    assert {b.name for b in found} == PRODUCTS.keys() | {"head.weight"}
    assert all(r.elementwise for r in rest if r.name != "head.bias")
    for optimizer in (gm.optim.Muon(model), gm.optim.Muon(model.named_parameters())):
        rows = {row["name"]: row["direction"] for row in optimizer.explain()}
        assert {name for name, direction in rows.items() if direction == "matrix"} == PRODUCTS.keys()
    save_tensors(tmp_path / "m.safetensors", model.state_dict())
    check_equal(of_file(tmp_path / "m.safetensors"), of_model(model))
