"""A factored model is compressed again from its effective weights, whatever kind of layer was factored."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression import LowRank
from gramian.compression.budget import planning
from gramian.errors import InputError

DISTILL = gm.Objective.self_distillation()


class Recurrent(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0].mean(1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x, x, x)[0])


class Words(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


def transposed() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(conv1d(24, 16), nn.Tanh(), conv1d(8, 24))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8, bias=False)),
    "transposed": transposed,
    "conv1d": lambda: nn.Sequential(nn.Conv1d(5, 12, 3, padding=1), nn.Tanh(), nn.Conv1d(12, 9, 2, stride=2)),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 12, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(12, 9, 2)
    ),
    "conv3d": lambda: nn.Sequential(
        nn.Unflatten(2, (4, 4)), nn.Unflatten(1, (1, 5)), nn.Conv3d(1, 9, 2), nn.Tanh(), nn.Flatten(1)
    ),
    "table": lambda: Words(tied=False),
    "tied": lambda: Words(tied=True),
    "attention": Attending,
    "lstm": lambda: Recurrent(nn.LSTM(16, 24, 2, batch_first=True)),
    "gru": lambda: Recurrent(nn.GRU(16, 24, 1, batch_first=True, bidirectional=True)),
    "rnn": lambda: Recurrent(nn.RNN(16, 24, 1, batch_first=True)),
}


def made(name: str) -> tuple[Callable[[], nn.Module], list[Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "gru":
        model.head = nn.Linear(48, 3)
    x = torch.randint(0, 40, (64, 5)) if name in ("table", "tied") else torch.randn(64, 5, 16)
    return lambda: copy.deepcopy(model).eval(), list(x.split(8))


def effective(dense: nn.Module, small: nn.Module) -> nn.Module:
    """The dense model with the products, put in by the names of its parameters."""
    with torch.no_grad():
        for name, layer in small.named_modules():
            if isinstance(layer, LowRank):
                parent, _, local = name.rpartition(".")
                module = dense.get_submodule(parent)
                opened = isinstance(module, nn.RNNBase) or local == "in_proj"
                inner = "in_proj_weight" if local == "in_proj" else f"weight_{local}"
                weight = module.get_parameter(inner) if opened else dense.get_submodule(name).weight
                weight.copy_(layer.weight + 0)
                if layer.bias is not None:
                    bias = module.in_proj_bias if opened else dense.get_submodule(name).bias
                    bias.copy_(layer.bias)
    return dense


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", [None, "*out_proj", "*h_l0"])
def test_the_second_plan_is_that_of_the_effective_weights(name: str, which: str | None, tmp_path, monkeypatch) -> None:
    if which is not None and name not in {"*out_proj": ("attention",), "*h_l0": ("lstm", "gru", "rnn")}[which]:
        pytest.skip("the pattern is of other layers")
    model, batches = made(name)
    x = batches[0]
    include = None if which is None else [which]
    small = gm.compress(model(), batches, DISTILL, include=include).at(keep=0.6, of="factorable").apply()
    low = {n: layer.rank for n, layer in small.named_modules() if isinstance(layer, LowRank)}
    assert low
    # The factor that corrects a layer's estimate is fit over the ranks that the layer can have, which are fewer now.
    monkeypatch.setattr(planning, "corrected", lambda model, spectra, batches, objective: spectra)
    before, kinds = copy.deepcopy(small.state_dict()), [type(m) for m in small.modules()]

    again = gm.compress(small, batches, DISTILL)
    assert [type(m) for m in small.modules()] == kinds  # it is put back as it was
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)
    want = {s.name: s for s in gm.compress(effective(model(), small), batches, DISTILL).spectra}
    got = {s.name: s for s in again.spectra}
    assert got.keys() | {n for n, reason in again.reasons.items() if "rank 1" in reason} == want.keys()
    assert got.keys() & low.keys()
    for one, s in got.items():
        num = low.get(one, len(s.values))
        assert len(s.values) == num
        torch.testing.assert_close(s.values, want[one].values[:num], rtol=2e-3, atol=1e-4 * float(s.values[0]))

    torch.testing.assert_close(again.at(keep=1.0).apply()(x), small(x))
    smaller = again.at(keep=0.5 + again.smallest / 2).apply()
    num = sum(p.numel() for p in smaller.parameters())
    assert num == again.at(keep=0.5 + again.smallest / 2).parameters < sum(p.numel() for p in small.parameters())
    y = smaller(x)
    gm.save_compressed(smaller, tmp_path / "smaller.safetensors")
    assert torch.equal(gm.load_compressed(model(), tmp_path / "smaller.safetensors")(x), y)
    gm.save_plan(again, tmp_path / "plan.safetensors")
    loaded = gm.load_plan(small, tmp_path / "plan.safetensors")
    assert torch.equal(loaded.at(keep=0.5 + again.smallest / 2).apply()(x), y)


def test_an_error_while_calibrating_leaves_the_model_factored() -> None:
    model, batches = made("attention")
    small = gm.compress(model(), batches, DISTILL, keep=0.6).apply()
    kinds, y = [type(m) for m in small.modules()], small(batches[0])
    with pytest.raises(InputError):
        gm.compress(small, [*batches[:2], torch.full_like(batches[0], torch.nan)], DISTILL)
    assert [type(m) for m in small.modules()] == kinds
    assert torch.equal(small(batches[0]), y)


def test_statistics_of_the_factors_tell_what_they_lack() -> None:
    model, batches = made("gru")
    small = gm.compress(model(), batches, DISTILL, keep=0.6).apply()
    plan = gm.compress(small, gm.capture(small, batches, DISTILL))
    inner = [name for name, layer in small.named_modules() if isinstance(layer, LowRank) and name != "head"]
    assert inner
    assert all("give batches in place of statistics" in plan.reasons[name] for name in inner)
