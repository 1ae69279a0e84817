"""Fewer heads of torch's attention: the same numbers as with those heads at zero, in every call that torch's takes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression import NarrowAttention
from gramian.compression.units.attention_heads import find_heads
from gramian.compression.units.cutting import cut_
from gramian.errors import InputError

DISTILL = gm.Objective.self_distillation()
STAY = torch.tensor([0, 2, 3])
HEADS, SIZE = 5, 2
WIDTH = HEADS * SIZE


def pair(**options: object) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Attention in float64 whose output does not see two heads, and attention without them."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
        gone = torch.tensor([h for h in range(HEADS) if h not in STAY])
        whole.out_proj.weight.view(WIDTH, HEADS, SIZE)[:, gone] = 0
    less = copy.deepcopy(whole)
    (units,), reasons = find_heads(less, ["out_proj"], ())
    assert not reasons
    cut_(less, units, STAY, {})
    assert type(less) is NarrowAttention
    return whole.eval(), less.eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


CAUSAL = torch.ones(6, 6).triu(1).bool()
PADDED = torch.arange(6) >= torch.tensor([[4], [6], [5]])
FLOATS = drawn(6, 6)
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "padded": {"key_padding_mask": PADDED},
    "padded and causal": {"key_padding_mask": PADDED, "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "numbers as masks": {"attn_mask": FLOATS, "key_padding_mask": drawn(3, 6)},
}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_is_that_with_the_heads_at_zero(options: dict, batch_first: bool) -> None:
    whole, less = pair(batch_first=batch_first, **options)
    x = drawn(3, 6, WIDTH) if batch_first else drawn(6, 3, WIDTH)
    for call in CALLS.values():
        out, weights = less(x, x, x, **call)
        wanted, each = whole(x, x, x, **{**call, "average_attn_weights": False})
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        if call.get("need_weights", True):
            each = each[:, STAY] if "average_attn_weights" in call else each[:, STAY].mean(1)
            torch.testing.assert_close(weights, each, rtol=1e-12, atol=1e-12)
        else:
            assert weights is None
    mask = drawn(3, HEADS, 6, 6)  # one for each head
    found = less(x, x, x, attn_mask=mask[:, STAY].flatten(0, 1))[0]
    torch.testing.assert_close(found, whole(x, x, x, attn_mask=mask.flatten(0, 1))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kdim": 7}, {"kdim": 7, "vdim": 4, "add_bias_kv": True}], ids=str)
def test_cross_attention_is_that_with_the_heads_at_zero(options: dict) -> None:
    whole, less = pair(batch_first=True, **options)
    q, k, v = drawn(3, 5, WIDTH), drawn(3, 6, options.get("kdim", WIDTH)), drawn(3, 6, options.get("vdim", WIDTH))
    for call in ({}, {"key_padding_mask": PADDED, "need_weights": False}):
        torch.testing.assert_close(less(q, k, v, **call)[0], whole(q, k, v, **call)[0], rtol=1e-12, atol=1e-12)
    found = less(q[0], k[0], v[0], key_padding_mask=PADDED[0])[0]  # one sample
    torch.testing.assert_close(found, whole(q[0], k[0], v[0], key_padding_mask=PADDED[0])[0], rtol=1e-12, atol=1e-12)


def test_masks_that_do_not_fit_are_refused() -> None:
    _, less = pair(batch_first=True)
    x = drawn(3, 6, WIDTH)
    for call, wanted in (
        ({"attn_mask": torch.zeros(3 * HEADS, 6, 6)}, r"attn_mask is \(15, 6, 6\), wanted \(6, 6\) or \(9, 6, 6\)"),
        ({"attn_mask": torch.zeros(1, 6)}, r"attn_mask is \(1, 6\)"),
        ({"key_padding_mask": torch.zeros(6)}, r"key_padding_mask is \(6,\), wanted \(3, 6\)"),
        ({"key_padding_mask": torch.zeros(3, 6, dtype=torch.int64)}, "wanted a boolean or floating-point mask"),
        ({"is_causal": True}, "give that too"),
    ):
        with pytest.raises(InputError, match=wanted):
            less(x, x, x, **call)


class Translates(nn.Module):
    """An encoder, whose padding torch takes out at inference, and a decoder with attention to it."""

    def __init__(self) -> None:
        super().__init__()
        options = {"nhead": 4, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, **options), 2)
        self.decoder = nn.TransformerDecoderLayer(8, **options)

    def forward(self, x: Tensor) -> Tensor:
        padding = x[..., 0] > 50
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        seen = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(x.clamp(-3, 3), seen, causal, memory_key_padding_mask=padding, tgt_is_causal=True)


def sentences(num: int) -> Tensor:
    x = torch.randn(num, 6, 8, generator=torch.Generator().manual_seed(3))
    x[::2, 4:, 0] = 99
    return x


def test_a_transformer_with_fewer_heads_runs_and_comes_back(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Translates().eval(), sentences(32)
    with torch.no_grad():  # two heads alike: one of them can go, and the other makes up for it
        for part in model.decoder.self_attn.in_proj_weight.view(3, 4, 2, 8):
            part[1] = part[3]
    plan = gm.narrow(model, list(x.split(4)), DISTILL, exclude=["encoder.layers.1.*"])
    kept = {name: layer.units.num for name, layer in zip(plan.kept, plan.layers, strict=True) if "attn" in name}
    attentions = ("encoder.layers.0.self_attn", "decoder.self_attn", "decoder.multihead_attn")
    assert kept == {f"{name}.out_proj": 4 for name in attentions}
    torch.testing.assert_close(plan.apply()(x), model(x))
    alike = plan.layers[[layer.units.name for layer in plan.layers].index("decoder.self_attn.out_proj")]
    assert alike.order[0] in (1, 3)
    assert alike.losses[3] < 0.01 * alike.losses[2]
    part = plan.at(keep=0.6)
    small = part.apply().eval()
    assert sum(p.numel() for p in small.parameters()) == part.parameters
    for name in attentions:
        attention = small.get_submodule(name)
        assert attention.num_heads == part.kept[f"{name}.out_proj"] < 4
        assert attention.in_proj_weight.shape == (3 * 2 * attention.num_heads, 8)
    wanted = small(x)
    with torch.no_grad():  # where torch would take its kernels, and samples without their padding
        torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.train()(x), wanted)
    small.eval()
    gm.save_plan(part, tmp_path / "plan.safetensors")
    assert torch.equal(gm.load_plan(model, tmp_path / "plan.safetensors").at(keep=0.6).apply().eval()(x), wanted)
    gm.save_compressed(small, tmp_path / "small.safetensors")
    with torch.device("meta"):
        skeleton = Translates().eval()
    for other in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        gm.load_compressed(Translates().eval(), tmp_path / "small.safetensors"),
        gm.load_compressed(skeleton, tmp_path / "small.safetensors"),
    ):
        assert torch.equal(other(x), wanted)
    layer = small.encoder.layers[0]
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_fewer_heads_are_factored_and_come_back(tmp_path) -> None:
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    model, batches = Attends(), list(torch.randn(32, 4, 16).split(4))
    small = gm.narrow(model, batches, DISTILL, keep=0.8).apply()
    assert small.attention.num_heads == 3
    again = gm.narrow(small, batches, DISTILL).at(keep=0.7).apply()
    assert again.attention.num_heads == 2
    both = gm.compress(small, batches, DISTILL).at(keep=0.6).apply().eval()
    assert isinstance(both.attention, NarrowAttention)
    gm.save_compressed(both, tmp_path / "both.safetensors")
    loaded = gm.load_compressed(Attends(), tmp_path / "both.safetensors").eval()
    assert torch.equal(loaded(batches[0]), both(batches[0]))
    with pytest.raises(InputError, match=r"attention\.out_proj.*: its attention is factored: remove its heads first"):
        gm.narrow(both, batches, DISTILL)


class Shows(nn.Module):
    """Attention of which the output or the weights are used, with a mask for each head or without."""

    def __init__(self, attention: nn.MultiheadAttention, *, weights: bool = False, masks: int = 0) -> None:
        super().__init__()
        self.attention, self.weights, self.masks = attention, weights, masks

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(self.masks * len(x), 4, 4) if self.masks else None
        out, weights = self.attention(x, x, x, attn_mask=mask)
        return x + out + weights.sum(-1, keepdim=True) * weights[..., :1] if self.weights else x + out


class Own(nn.MultiheadAttention):
    pass


REFUSED = {
    "weights": (lambda: Shows(nn.MultiheadAttention(8, 4, batch_first=True), weights=True), "computes something else"),
    "one head": (lambda: Shows(nn.MultiheadAttention(8, 1, batch_first=True)), "its attention has one head"),
    "subclass": (lambda: Shows(Own(8, 4, batch_first=True)), "the heads of Own, a subclass of nn.MultiheadAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_have_to_stay_are_named(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        gm.narrow(make(), list(torch.randn(16, 4, 8).split(4)), DISTILL)


def test_a_shared_or_excluded_projection_keeps_its_heads() -> None:
    one, other = nn.MultiheadAttention(8, 4), nn.MultiheadAttention(8, 4)
    other.in_proj_bias = one.in_proj_bias
    both = nn.ModuleList([one, other, nn.MultiheadAttention(8, 4, kdim=6)])
    found, reasons = find_heads(both, ["0.out_proj", "1.out_proj", "2.out_proj"], ["2.k_proj"])
    assert not found
    assert list(reasons.values()) == ["a parameter of its attention is shared with another module"] * 2 + [
        "excluded by '2.k_proj'"
    ]


def test_the_number_of_masks_follows_the_heads() -> None:
    torch.manual_seed(0)
    model = Shows(nn.MultiheadAttention(8, 4, batch_first=True), masks=4)
    holder = nn.Sequential(model)
    small = gm.narrow(holder, list(torch.randn(32, 4, 8).split(4)), DISTILL, keep=0.6).apply()
    assert small[0].masks == small[0].attention.num_heads == 2


class Padded(nn.Module):
    """An encoder of two layers over tokens with padding, whose own kernel takes dense weights alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0)[:, 0])


@pytest.mark.parametrize("factored", ["encoder.layers.1.self_attn.out_proj", "encoder.layers.1.self_attn.in_proj*"])
def test_a_layer_that_is_factored_in_a_later_layer_only_takes_padding(factored: str) -> None:
    x = torch.randint(1, 20, (48, 8), generator=torch.Generator().manual_seed(0))
    x[1:, 6:] = 0
    batches = [(part, part[:, 0] % 3) for part in x.split(16)]
    plan = gm.compress(Padded().eval(), batches, gm.Objective.classification(), include=[factored])
    small = plan.at(keep=0.6, of="factorable").apply().eval()
    with torch.no_grad():
        without_gradients = small(x)
    torch.testing.assert_close(without_gradients, small(x).detach())
