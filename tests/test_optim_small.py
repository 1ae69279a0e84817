"""Steps of small networks: few calls of torch's, and the state that they share memory with is the one that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import seeded
from gramian.bench.learning_networks import mlp
from gramian.optim import Muon


class Calls(TorchDispatchMode):
    """Counts the calls that reach a kernel or make a view."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = seeded(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(("depth", "most"), [(3, 120), (9, 190)])
def test_a_step_of_a_small_network_takes_few_calls(depth: int, most: int) -> None:
    """Whose time they are. More layers of one shape take few more: for views and norms, not for products."""
    model = mlp(width=32, depth=depth)
    optimizer = Muon(model)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert calls.number <= most


def replaced(optimizer: Muon, p: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg"] = torch.ones_like(p)


def counted_again(optimizer: Muon, p: nn.Parameter) -> None:
    optimizer.state[p]["step"] = torch.tensor(0.0)


def in_place(optimizer: Muon, p: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg_sq"].fill_(4.0)


def forgotten(optimizer: Muon, p: nn.Parameter) -> None:
    del optimizer.state[p]


def wider(optimizer: Muon, p: nn.Parameter) -> None:
    p.data = p.data.double()
    p.grad = torch.ones_like(p)


def strided(optimizer: Muon, p: nn.Parameter) -> None:
    p.data = p.data.mT.contiguous().mT


@pytest.mark.parametrize("change", [replaced, counted_again, in_place, forgotten, wider, strided])
def test_what_a_user_does_to_adamws_part_between_steps_counts(change) -> None:
    """As in torch's AdamW, to the bit, on a head; its neighbors step on."""
    last = nn.Linear(8, 3)
    model, head = nn.Sequential(nn.Linear(6, 8), last), last.weight
    optimizer = Muon(model, rest_lr=1e-2)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    give_gradients(model, 3)
    change(optimizer, head)
    oracle = nn.Parameter(head.detach().clone(memory_format=torch.contiguous_format))
    (group,) = optimizer.param_groups
    adamw = torch.optim.AdamW([oracle], lr=1e-2, betas=group["rest_betas"], weight_decay=0.0, fused=True)
    known = optimizer.state.get(head, {})
    adamw.state[oracle] = {key: _as(oracle, known[key]) for key in ("step", "exp_avg", "exp_avg_sq") if known}
    oracle.grad = head.grad
    before = last.bias.detach().clone()
    optimizer.step()
    adamw.step()
    assert torch.equal(head, oracle)
    assert not torch.equal(last.bias, before)
    assert float(optimizer.state[head]["step"]) == float(adamw.state[oracle]["step"])


def _as(p: Tensor, value: Tensor) -> Tensor:
    return value.clone() if not value.ndim else value.to(p.dtype).clone()
