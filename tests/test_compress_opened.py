"""Attention and recurrence, whose weights are handed to one function, are factored like other layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression import LowRank
from gramian.errors import CheckpointError

DISTILL = gm.Objective.self_distillation()


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.core, self.head = cls(16, 24, 1, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x, x, x)[0]


MODELS = {"attention": Attending, "lstm": lambda: Recurrent(nn.LSTM), "gru": lambda: Recurrent(nn.GRU)}


@pytest.mark.parametrize("name", MODELS)
def test_they_compute_with_the_product_and_come_back(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batches = list(torch.randn(48, 5, 16).split(8))
    x = batches[0]
    plan = gm.compress(model, batches=batches, objective=DISTILL, keep=0.6)
    whole = plan.at(keep=1.0).apply()
    assert [type(m) for m in whole.modules()] == [type(m) for m in model.modules()]
    assert whole.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(whole(x), model(x))

    small = plan.apply()
    assert sum(p.numel() for p in small.parameters()) == plan.parameters
    naive = copy.deepcopy(model)  # the oracle: the products in the dense model
    inner = {child: layer for child, layer in small.core.named_children() if isinstance(layer, LowRank)}
    assert inner
    with torch.no_grad():
        for child, layer in inner.items():
            local = {"in_proj": "in_proj_weight", "out_proj": "out_proj.weight"}.get(child, f"weight_{child}")
            naive.get_parameter(f"core.{local}").copy_(layer.weight + 0)
            if name == "attention":
                bias = naive.core.in_proj_bias if child == "in_proj" else naive.core.out_proj.bias
                bias.copy_(layer.bias)
    torch.testing.assert_close(small(x), naive(x))
    with torch.no_grad():
        torch.testing.assert_close(small(x), naive(x))
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    y = small.eval()(x)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.deepcopy(small).double().float()):
        torch.testing.assert_close(other(x), y)
    if name != "gru":  # which has the same class above it as the LSTM
        torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), y)

    gm.save_compressed(small, tmp_path / "small.safetensors")
    assert torch.equal(gm.load_compressed(MODELS[name]().eval(), tmp_path / "small.safetensors")(x), y)
    other = nn.Sequential(MODELS[name]())
    keys = other.state_dict().keys()
    with pytest.raises(CheckpointError, match="does not fit"):
        gm.load_compressed(other, tmp_path / "small.safetensors")
    assert other.state_dict().keys() == keys
    gm.save_plan(plan, tmp_path / "plan.safetensors")
    assert torch.equal(gm.load_plan(model, tmp_path / "plan.safetensors").apply()(x), y)
    rounded = plan.at(bits=8).apply()
    torch.testing.assert_close(rounded(x), model(x), rtol=0.1, atol=0.02)


def test_what_cannot_be_opened_has_a_reason() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)
            self.enter = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x, self.enter(x), self.enter(x))[0]

    batches = list(torch.randn(64, 5, 16).split(16))
    plan = gm.compress(Other(), batches=batches, objective=DISTILL, keep=0.9)
    assert plan.reasons["core"] == "MultiheadAttention is not factored"
    assert "core.out_proj" in plan.ranks


class Crossing(nn.Module):
    """Queries from one stream, keys and values from another whose numbers lie along other directions."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        other = (x[..., 16:] * torch.logspace(0, -3, 16)).flip(1)
        return self.core(x[..., :16] * torch.logspace(-3, 0, 16), other, other)[0]


def test_projections_of_another_sequence_are_weighted_by_the_inputs_of_each_part(tmp_path) -> None:
    torch.manual_seed(0)
    model, batches = Crossing().eval(), list(torch.randn(128, 5, 32).split(16))
    plan = gm.compress(model, batches, DISTILL, include=["core.in_proj"], of="factorable", keep=0.6)
    small, rank, x = plan.apply(), plan.ranks["core.in_proj"], torch.randn(128, 5, 32)
    assert rank is not None
    gm.save_compressed(small, tmp_path / "small.safetensors")
    plain = copy.deepcopy(model)
    u, s, vt = torch.linalg.svd(plain.core.in_proj_weight.detach())
    with torch.no_grad():
        assert torch.equal(gm.load_compressed(Crossing().eval(), tmp_path / "small.safetensors")(x), small(x))
        plain.core.in_proj_weight.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
        off, off_plain = ((other(x) - model(x)).square().mean() for other in (small, plain))
    assert off < 0.1 * off_plain
