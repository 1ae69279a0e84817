"""Attention and recurrence, which apply several matrices inside one function of torch."""

import copy
import re
import time
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gramian.errors import GramianWarning, InputError
from gramian.init import isometric_

SAMPLE = torch.randn(16, 6, 24, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A linear layer, an encoder layer of torch's, and a head."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.up, self.unused = nn.Linear(24, 32), nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.up(x)).mean(1))


class Alone(nn.Module):
    """Attention with no skip around it, whose keys and values have widths of their own, before recurrences."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, kdim=10, vdim=7, batch_first=True)
        self.lstm = nn.LSTM(24, 12, 2, proj_size=5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 9, batch_first=True)
        self.cell, self.head = nn.RNNCell(9, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.attention(x, x[..., :10], x[..., :7])[0])[0]
        return self.head(self.cell(self.gru(y)[0][:, -1]))


def set_quietly(model: nn.Module, sample: Tensor | None, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return isometric_(model, sample, **options)


def is_isometry(w: Tensor) -> bool:
    sigma = torch.linalg.svdvals(w.detach())
    return torch.allclose(sigma, torch.ones_like(sigma), atol=1e-5)


def parts(name: str, w: Tensor) -> tuple[Tensor, ...]:
    """The matrices in a parameter of `Block` or `Alone`."""
    fused = {"in_proj": 3, "lstm.weight_ih": 4, "lstm.weight_hh": 4, "gru.weight": 3}
    return w.chunk(next((num for key, num in fused.items() if key in name), 1))


@pytest.mark.parametrize("sample", [SAMPLE, None], ids=["sample", "alone"])
def test_every_matrix_of_attention_and_recurrence_is_an_isometry(sample) -> None:
    model = set_quietly(Alone(), sample)
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith("head"):
            assert all(is_isometry(part) for part in parts(name, p)), name
    for name, bias in model.lstm.named_parameters():
        if name.startswith("bias_ih"):
            assert bias.chunk(4)[1].eq(1).all()
            assert bias.sum() == 12
        elif name.startswith("bias_hh"):
            assert not bias.any()
    assert not model.gru.bias_ih_l0.any()
    assert not model.attention.in_proj_bias.any()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_attention_of_a_wrong_size_inside_a_skip_is_set(scale: float, norm_first: bool) -> None:
    model = Block(norm_first)
    with torch.no_grad():
        for p in model.layer.self_attn.parameters():
            p.mul_(scale)
    set_quietly(model, SAMPLE)
    attention = model.layer.self_attn
    assert all(is_isometry(part) for part in attention.in_proj_weight.chunk(3))
    assert is_isometry(attention.out_proj.weight)


@pytest.mark.parametrize("norm_first", [True, False])
def test_healthy_attention_inside_a_skip_is_left_and_told(norm_first: bool) -> None:
    model = Block(norm_first)
    before = copy.deepcopy(model.layer.state_dict())
    with pytest.warns(GramianWarning) as caught:
        isometric_(model, SAMPLE)
    (text,) = [str(w.message) for w in caught]
    assert all(torch.equal(before[k], v) for k, v in model.layer.state_dict().items() if "self_attn" in k)
    assert re.search(r"does not reach them: unused\.weight(;|$)", text)
    assert "layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight" in text


def test_one_projection_of_a_wrong_size_counts() -> None:
    model = Block()
    with torch.no_grad():
        model.layer.self_attn.in_proj_weight[:32].mul_(100)  # the queries, so that the softmax is saturated
    set_quietly(model, SAMPLE)
    assert is_isometry(model.layer.self_attn.in_proj_weight[:32])


def test_trained_attention_and_what_is_zero_or_designed_stays() -> None:
    net = nn.Sequential(nn.LSTM(32, 32))
    net[0].bias_ih_l0.data[32:64] = 5.0  # a long memory by design
    isometric_(net)
    assert net[0].bias_ih_l0.data[32:64].eq(5).all()
    model = Alone()
    nn.init.zeros_(model.attention.out_proj.weight)
    with pytest.warns(GramianWarning, match=r"left zero.*attention\.out_proj\.weight"):
        isometric_(model, SAMPLE)
    assert not model.attention.out_proj.weight.any()
    learned = nn.Sequential(nn.GRU(64, 64))
    with torch.no_grad():
        for name, p in learned.named_parameters():
            if "weight" in name:
                p.add_(torch.outer(torch.randn(192), torch.randn(64)))
    with pytest.raises(InputError, match=r"look trained: 0\.weight_ih_l0"):
        isometric_(learned)


def test_frozen_and_parametrized_weights() -> None:
    model = Alone()
    model.lstm.requires_grad_(False)
    parametrizations.weight_norm(model.gru, "weight_hh_l0")
    frozen = model.lstm.weight_hh_l0.clone()
    with pytest.warns(GramianWarning, match=r"since frozen: .*lstm\.weight_hh_l0"):
        isometric_(model, SAMPLE)
    assert torch.equal(model.lstm.weight_hh_l0, frozen)
    assert all(is_isometry(part) for part in model.gru.weight_hh_l0.chunk(3))


def test_recurrences_in_a_row_take_no_time_that_grows_with_ways() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(24, 12, 2, proj_size=5, batch_first=True), "head": nn.Linear(5, 3)})
    begun = time.process_time()
    set_quietly(model, torch.cat([SAMPLE] * 4, 1), predict=lambda m, x: m["head"](m["rnn"](x)[0]))
    assert time.process_time() - begun < 30
