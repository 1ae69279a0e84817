"""Blocks partition the parameters, and a layout loses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.errors import InputError, ShapeError
from zoo import ZOO

# Every torch module that owns parameters itself, with the matrices of its weights.
MODULES = {
    "linear": (nn.Linear(3, 5), {"weight": (5, 3)}),
    "bilinear": (nn.Bilinear(3, 4, 5), {"weight": (5, 3, 4)}),
    "embedding": (nn.Embedding(7, 4), {"weight": (7, 4)}),
    "embedding_bag": (nn.EmbeddingBag(7, 4), {"weight": (7, 4)}),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), {"weight": (2, 3, 6)}),
    "conv2d": (nn.Conv2d(4, 6, (2, 3)), {"weight": (6, 24)}),
    "conv2d_depthwise": (nn.Conv2d(4, 8, 3, groups=4), {"weight": (4, 2, 9)}),
    "conv3d": (nn.Conv3d(4, 6, 3, groups=2), {"weight": (2, 3, 54)}),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3), {"weight": (18, 4)}),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), {"weight": (2, 18, 2)}),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), {"weight": (2, 24, 2)}),
    "attention": (
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {"in_proj_weight": (3, 8, 8), "out_proj.weight": (8, 8)},
    ),
    "cross_attention": (
        nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
        {"q_proj_weight": (8, 8), "k_proj_weight": (8, 6), "v_proj_weight": (8, 4), "out_proj.weight": (8, 8)},
    ),
    "rnn": (nn.RNN(3, 4), {"weight_ih_l0": (4, 3), "weight_hh_l0": (4, 4)}),
    "rnn_cell": (nn.RNNCell(3, 4), {"weight_ih": (4, 3), "weight_hh": (4, 4)}),
    "lstm": (
        nn.LSTM(3, 4, bidirectional=True),
        {"weight_ih_l0": (4, 4, 3), "weight_hh_l0": (4, 4, 4)}
        | {"weight_ih_l0_reverse": (4, 4, 3), "weight_hh_l0_reverse": (4, 4, 4)},
    ),
    "lstm_projected": (
        nn.LSTM(3, 4, proj_size=2),
        {"weight_ih_l0": (4, 4, 3), "weight_hh_l0": (4, 4, 2), "weight_hr_l0": (2, 4)},
    ),
    "lstm_cell": (nn.LSTMCell(3, 4), {"weight_ih": (4, 4, 3), "weight_hh": (4, 4, 4)}),
    "gru": (nn.GRU(3, 4), {"weight_ih_l0": (3, 4, 3), "weight_hh_l0": (3, 4, 4)}),
    "gru_cell": (nn.GRUCell(3, 4), {"weight_ih": (3, 4, 3), "weight_hh": (3, 4, 4)}),
    "layer_norm": (nn.LayerNorm([3, 4]), {}),
    "rms_norm": (nn.RMSNorm([3, 4]), {}),
    "batch_norm": (nn.BatchNorm2d(3), {}),
    "prelu": (nn.PReLU(4), {}),
}


class Holder(nn.Module):
    """Parameters that belong to no known module."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


def owned_parameters() -> set[str]:
    """torch's modules whose constructor makes parameters of their own."""
    owners = {name for name in vars(nn) if name.startswith(("Conv", "RNN", "LSTM", "GRU", "Embedding"))}
    return owners | {"Linear", "Bilinear", "MultiheadAttention", "LayerNorm", "RMSNorm", "PReLU"}


def check_partition(model: nn.Module, layouts: dict | None = None) -> None:
    found, rest = gm.blocks(model, layouts)
    held = [id(p.parameter) for p in (*found, *rest)]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    for block in found:
        t = torch.randn(block.parameter.shape)
        assert torch.equal(block.join(block.split(t)), t)
        assert block.split(t).shape == block.shape
        assert len(block.shape) >= 2
    assert all(b.reason for b in (*found, *rest))


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_partitioned_and_layouts_invert(name: str) -> None:
    check_partition(ZOO[name].make_model(0))


@pytest.mark.parametrize("name", MODULES)
def test_torch_modules_hold_the_matrices_they_hold(name: str) -> None:
    module, shapes = MODULES[name]
    check_partition(module)
    assert {b.name: b.shape for b in gm.blocks(module).blocks} == shapes
    assert not any("unknown" in row["reason"] for row in gm.blocks(module).explain())


def test_every_torch_module_is_in_the_table() -> None:
    covered = {cls.__name__ for module, _ in MODULES.values() for cls in type(module).__mro__}
    assert owned_parameters() <= covered


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d", "attention", "lstm"])
def test_split_is_the_matrix_that_the_module_multiplies_by(name: str) -> None:
    module, _ = MODULES[name]
    found = {b.name: b for b in gm.blocks(module).blocks}
    if isinstance(module, nn.Conv2d):
        x = torch.randn(1, 4, 2, 3)
        got, wanted = found["weight"].split() @ x.flatten(), module(x).flatten() - module.bias
    elif isinstance(module, nn.ConvTranspose2d):
        x = torch.randn(1, 4, 1, 1)
        got = (found["weight"].split() @ x.view(2, 2, 1)).reshape(6, 2, 3)
        wanted = module(x)[0] - module.bias[:, None, None]
    elif isinstance(module, nn.MultiheadAttention):
        got, wanted = found["in_proj_weight"].split()[1], module.in_proj_weight[8:16]
    elif isinstance(module, nn.LSTM):
        got, wanted = found["weight_ih_l0"].split()[2], module.weight_ih_l0[8:12]
    else:
        got, wanted = found["weight"].split(), module.weight
    torch.testing.assert_close(got, wanted)


OVERRIDES = {
    "fused_qkv": ((8, 24), "i (three o) -> three o i", (3, 8, 8)),
    "experts": ((4, 6, 5), "e o i -> e o i", (4, 6, 5)),
    "transposed": ((6, 5), "i o -> o i", (5, 6)),
    "heads": ((12, 5), ("(h o) i -> h o i", {"h": 4}), (4, 3, 5)),
    "merged": ((2, 3, 4), "a b c -> (a b) c", (6, 4)),
    "merged_out_of_order": ((2, 3, 4), "a b c -> b (c a)", (3, 8)),
    "unit_axis": ((1, 3, 4), "1 o i -> o i", (3, 4)),
    "empty": ((0, 4), "o i -> i o", (4, 0)),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_invert(name: str) -> None:
    shape, layout, matrices = OVERRIDES[name]
    check_partition(Holder(w=shape), {"*": layout})
    assert gm.blocks(Holder(w=shape), {"*": layout}).blocks[0].shape == matrices


def test_fused_qkv_of_gpt2_is_three_matrices() -> None:
    model = ZOO["gpt2"].make_model(0)
    found = {b.name: b for b in gm.blocks(model, {"*.c_attn.weight": "i (three o) -> three o i"}).blocks}
    block = found["h.0.attn.c_attn.weight"]
    assert torch.equal(block.split()[1], model.get_parameter(block.name)[:, 32:64].T)


def test_tied_weight_is_one_block_with_aliases() -> None:
    found = gm.blocks(ZOO["gpt2"].make_model(0)).blocks
    tied = [b for b in found if b.aliases]
    assert [(b.name, b.aliases, b.role, b.kind) for b in tied] == [
        ("wte.weight", ("lm_head.weight",), "embedding", "Embedding")
    ]
    head_first = nn.ModuleDict(
        {"head": nn.Linear(4, 7, bias=False), "embed": nn.Embedding(7, 4), "mid": nn.Linear(4, 4)}
    )
    head_first["embed"].weight = head_first["head"].weight
    assert {b.name: b.role for b in gm.blocks(head_first).blocks} == {
        "head.weight": "embedding",
        "mid.weight": "hidden",
    }


def test_two_embeddings_that_share_leave_the_head_a_head() -> None:
    model = nn.ModuleList([nn.Embedding(7, 4), nn.Embedding(7, 4), nn.Linear(4, 7)])
    model[1].weight = model[0].weight
    assert [b.role for b in gm.blocks(model).blocks] == ["embedding", "head"]


HEADS = {
    "mlp": "4.weight",
    "mlp_regression": "4.weight",
    "deep_tanh_mlp": "40.weight",
    "batchnorm_cnn": "11.weight",
    "residual_cnn": "6.weight",
    "lstm": "head.weight",
    "gru": "head.weight",
    "transformer_classifier": "head.weight",
    "transformer_lm": "head.weight",
    "gpt2": None,
    "grouped_query": "lm_head.weight",
    "mixture_of_experts": "lm_head.weight",
}


@pytest.mark.parametrize("name", ZOO)
def test_roles(name: str) -> None:
    found = gm.blocks(ZOO[name].make_model(0)).blocks
    assert [b.name for b in found if b.role == "head"] == ([HEADS[name]] if HEADS[name] else [])
    embeddings = {b.name for b in found if b.role == "embedding"}
    tables = {b.name for b in found if isinstance(b.module, nn.Embedding)}
    assert embeddings == tables | ({"position"} if name == "transformer_classifier" else set())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_wrappers_leave_no_trace_in_names(wrap) -> None:
    model = ZOO["mlp"].make_model(0)
    plain = [row["name"] for row in gm.blocks(model).explain()]
    assert [row["name"] for row in gm.blocks(wrap(model)).explain()] == plain


ERRORS = {
    "does_not_divide": ((7, 4), "(three o) i -> three o i", ShapeError),
    "wrong_dimensions": ((7, 4, 2), "o i -> o i", ShapeError),
    "drops_an_axis": ((7, 4), "o i -> o", ShapeError),
    "one_axis": ((7, 4), "o i -> (o i)", ShapeError),
    "not_a_pattern": ((7, 4), "transpose", ShapeError),
    "ellipsis": ((7, 4), "... i -> i ...", ShapeError),
    "size_unknown": ((7, 4), "(g o) i -> g o i", ShapeError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_layout_that_does_not_fit_is_shown_with_the_shape(name: str) -> None:
    shape, layout, error = ERRORS[name]
    with pytest.raises(error) as caught:
        gm.blocks(Holder(w=shape), {"w": layout})
    message = str(caught.value)
    assert layout in message
    assert "'w'" in message
    assert "\n" not in message


def test_other_errors_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"'nothing\.\*' matches no parameter; names are like '0\."):
        gm.blocks(nn.Sequential(nn.Linear(2, 2)), {"nothing.*": "o i -> o i"})
    with pytest.raises(InputError, match="no parameters"):
        gm.blocks(nn.ReLU())


def test_what_is_not_known_is_not_guessed() -> None:
    found, rest = gm.blocks(Holder(experts=(4, 6, 5), matrix=(3, 2), scale=()))
    assert [b.name for b in found] == ["matrix"]
    assert {r.name: r.reason for r in rest} == {
        "experts": "unknown class Holder with 3 dimensions: give layouts={'experts': …}",
        "scale": "scale: a scalar",
    }


def test_lazy_parameters_wait() -> None:
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyLinear(3))
    assert {"not initialized yet" in r.reason for r in gm.blocks(model).rest} == {True}
    model(torch.ones(2, 4, 5, 5))
    check_partition(model)
    assert not gm.blocks(model).rest[0].reason.startswith("not")


PARAMETRIZED = {
    "weight_norm": (torch.nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1", 1),
    "spectral_norm": (torch.nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original", 0),
    "orthogonal": (torch.nn.utils.parametrizations.orthogonal, "parametrizations.weight.original", 0),
    "old_spectral_norm": (torch.nn.utils.spectral_norm, "weight_orig", 0),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_weight_has_its_modules_layout(name: str) -> None:
    wrap, parameter, num_scales = PARAMETRIZED[name]
    found, rest = gm.blocks(nn.Sequential(wrap(nn.Conv2d(4, 6, 3, groups=2, bias=False))))
    assert [(b.name, b.shape) for b in found] == [(f"0.{parameter}", (2, 3, 18))]
    assert [r.reason.endswith("a scale of the parametrized weight") for r in rest] == [True] * num_scales


def test_gpt2s_linear_layer_is_known_by_name() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 3, nn.Parameter(torch.ones(5, 3))

    assert gm.blocks(Conv1D()).blocks[0].shape == (3, 5)
