"""`inspect` leaves everything as it was, whatever passes and losses change, and runs losses that differentiate."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gramian as gm
from gramian.recording.kept_state import Kept


def batches(num: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(16, 4, generator=generator) for _ in range(num)]
    return [(t, (t[:, 0] > 0).long()) for t in x]


class Restless(nn.Module):
    """A forward pass that writes wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.log, self.last, self.cache = 0, [[]], deque(maxlen=2), {"x": None}
        self.plain, self.array, self.generator = torch.zeros(4), np.zeros(2), torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.log[0].append(self.calls)
        self.last.append(x)
        self.cache["x"] = self.made_here = x
        self.plain.add_(1.0)
        self.array += 1.0
        torch.rand(1, generator=self.generator)
        self.layer.weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.teacher.weight.lerp_(self.layer.weight, 0.5)
        self.teacher.bias.data = self.teacher.bias.data + 1.0
        x.clamp_(-1.0, 1.0)
        return self.layer(x) * (1.0 + random.random() + np.random.rand()) + 0 * self.teacher(x)  # noqa: NPY002


@pytest.mark.parametrize("verify", [False, True])
def test_all_that_a_forward_pass_writes_is_put_back(verify: bool) -> None:
    torch.manual_seed(0)
    model, data = Restless(), batches()
    model.layer.weight.grad = torch.ones(2, 4)
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    state, given = copy.deepcopy(model.state_dict()), copy.deepcopy(data)
    tensors = [(t, t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
    states = torch.get_rng_state(), None, np.random.get_state()[1:3], model.generator.get_state()  # noqa: NPY002
    str(gm.inspect(model, data, gm.Objective.classification(), optimizer=optimizer, verify=verify))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    now = (*model.parameters(), *model.buffers())
    assert all(a is b and a.data_ptr() == at for a, (b, at) in zip(now, tensors, strict=True))
    assert (model.calls, model.log, len(model.last), model.cache) == (0, [[]], 0, {"x": None})
    assert not hasattr(model, "made_here")
    assert not model.plain.any()
    assert not model.array.any()
    assert torch.equal(model.layer.weight.grad, torch.ones(2, 4))
    assert model.layer.bias.grad is None
    assert all(torch.equal(a, b) for one, two in zip(data, given, strict=True) for a, b in zip(one, two, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())  # Python's is drawn from by the checks of types in tests
    position = np.random.get_state()[1:3]  # noqa: NPY002
    assert np.array_equal(states[2][0], position[0])
    assert states[2][1] == position[1]
    assert torch.equal(states[3], model.generator.get_state())


def test_values_come_back_bit_for_bit() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[-0.0, torch.nan]])
    bits = model.weight.detach().view(torch.int32).clone()
    kept = Kept(model)
    model.weight.data = torch.zeros(7, dtype=torch.float16)
    kept.put_back()
    assert torch.equal(model.weight.detach().view(torch.int32), bits)
    model.weight.data.zero_()
    kept.put_back()
    assert torch.equal(model.weight.detach().view(torch.int32), bits)


def test_what_was_empty_is_empty_again() -> None:
    model = nn.Linear(2, 1)
    model.seen, model.known, model.names = [], {}, set()
    held = model.seen, model.known, model.names
    kept = Kept(model)
    model.seen.append(1)
    model.known["a"] = 1
    model.names.add("a")
    model.register_forward_hook(lambda *_: None)
    kept.put_back()
    assert held == ([], {}, set())
    assert model.seen is held[0]
    assert not model._forward_hooks


def penalty(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    return F.cross_entropy(model(batch[0]), batch[1]) + (slope.norm(dim=1) - 1).square().mean()


def inner_step(model: nn.Module, batch: Any) -> Tensor:
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(torch.func.functional_call(model, parameters, (batch[0][:8],)), batch[1][:8])
    slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), slopes, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (batch[0][8:],)), batch[1][8:])


def steps_back(model: nn.Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def reentrant(model: nn.Module, batch: Any) -> Tensor:
    hidden = checkpoint(model[1], model[0](batch[0]), use_reentrant=True)
    return F.cross_entropy(model[2](hidden), batch[1])


def mapped(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(torch.vmap(model)(batch[0]), batch[1])


@pytest.mark.parametrize("loss", [penalty, inner_step, steps_back, reentrant, mapped])
def test_losses_that_differentiate_or_transform(loss: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = gm.inspect(model, batches(3), loss, optimizer=optimizer)
    assert not [f.code for f in report.findings if f.severity == "error"]
    assert "causes" not in report.not_looked_at
    assert "optimizer's steps" not in report.not_looked_at
    assert all(p.grad is None for p in model.parameters())


def test_nested_batches_and_empty_ones() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    nested = [{"in": {"x": x}, "out": {"y": y}} for x, y in batches()]
    report = gm.inspect(model, nested, lambda m, b: F.cross_entropy(m(b["in"]["x"]), b["out"]["y"]))
    assert "causes" not in report.not_looked_at
    ragged = [*batches(), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))]
    report = gm.inspect(model, ragged, gm.Objective.classification())
    assert not [f for f in report.findings if f.severity == "error"]
    assert any("1 of 3" in note for note in report.notes)
    with pytest.raises(gm.errors.InputError, match="no batch has a sample"):
        gm.inspect(model, ragged[2:], gm.Objective.classification())
