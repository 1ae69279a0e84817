"""Steps of small networks: few calls of torch's, matrices of several shapes in one, and the state that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import seeded
from gramian.bench.learning_networks import mlp
from gramian.optim import BalancedMuon, Muon, stacks
from gramian.optim.norms import ROWS, Norms


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


@pytest.mark.parametrize(("cls", "depth", "most"), [(Muon, 3, 50), (Muon, 9, 85), (BalancedMuon, 3, 76)])
def test_a_step_of_a_small_network_takes_few_calls(cls: type[Muon], depth: int, most: int) -> None:
    """Whose time they are. More layers of one shape take few more: for views and norms, not for products."""
    model = mlp(width=32, depth=depth)
    optimizer = cls(model)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert calls.number <= most


def several() -> nn.ModuleDict:
    """Small matrices of many shapes: wide, tall, kernels, and four gates in a tensor."""
    return nn.ModuleDict(
        {
            "tall": nn.Linear(12, 40),
            "wide": nn.Linear(40, 24),
            "kernel": nn.Conv1d(3, 20, 5),
            "tall kernel": nn.Conv2d(1, 30, 3),
            "gates": nn.LSTM(9, 24),
            "strided": nn.Linear(24, 24),
            "head": nn.Linear(24, 5),
        }
    )


def weight(model: nn.ModuleDict, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[f"{name}.weight"]


def num_stacks(optimizer: Muon) -> int:
    return len(optimizer._plans[0].stacks or ())


def trained(pads: bool, steps: int, monkeypatch, cls: type = Muon, **options) -> tuple[nn.ModuleDict, Muon]:
    torch.manual_seed(0)
    model = several()
    turned = weight(model, "strided")
    turned.data = turned.data.mT.contiguous().mT
    with monkeypatch.context() as patch:
        if not pads:
            patch.setattr(stacks, "STACK", 0)
        optimizer = cls(model, weight_decay=0.1, **options)
        for seed in range(steps):
            give_gradients(model, seed)
            optimizer.step()
    return model, optimizer


def assert_near(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


WAYS = [
    (Muon, {}),
    (Muon, {"nesterov": False}),
    (Muon, {"refresh": 2}),
    (BalancedMuon, {"refresh": 2, "damping": 0.3}),
    (BalancedMuon, {"longest": 1}),  # no roots
]


@pytest.mark.parametrize(("cls", "options"), WAYS, ids=str)
def test_matrices_of_several_shapes_step_as_one_stack_and_each_as_by_itself(cls, options, monkeypatch) -> None:
    together, optimizer = trained(True, 4, monkeypatch, cls, **options)
    apart, other = trained(False, 4, monkeypatch, cls, **options)
    assert num_stacks(optimizer) == 1 < num_stacks(other)
    assert_near(together, apart)
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        held, alone = optimizer.state[p], other.state[q]
        assert {key: value.shape for key, value in held.items()} == {key: value.shape for key, value in alone.items()}
        for key in held:
            torch.testing.assert_close(held[key], alone[key], atol=2e-5, rtol=1e-4, msg=f"{tuple(p.shape)}: {key}")


def test_roots_on_the_shorter_side_follow_a_transposition(monkeypatch) -> None:
    """Where that of the rows and that of the columns are one buffer; a matrix with other roots stays by itself."""
    ends = []
    for stack in (stacks.STACK, 0):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(a, b) for a, b in ((30, 6), (5, 40), (40, 7), (12, 14), (14, 3))])
        monkeypatch.setattr(stacks, "STACK", stack)
        optimizer = BalancedMuon(model, longest=5, refresh=2)  # four times as long, since these are small
        for seed in range(4):
            give_gradients(model, seed)
            optimizer.step()
        ends.append((model, optimizer))
    (together, optimizer), (apart, other) = ends
    assert (num_stacks(optimizer), num_stacks(other)) == (2, 4)
    assert_near(together, apart)
    turned = optimizer.state[together[1].weight]
    assert "left_moment" not in turned
    assert turned["right_moment"].shape == (5, 5)


def test_a_run_that_is_to_be_the_same_on_all_numbers_of_ranks_is_not_padded(monkeypatch) -> None:
    for cls in (Muon, BalancedMuon):
        model, optimizer = trained(True, 0, monkeypatch, cls)
        optimizer.param_groups[0]["fused"] = False
        give_gradients(model, 0)
        optimizer.step()
        assert num_stacks(optimizer) > 1


@pytest.mark.parametrize(("cls", "options"), [(Muon, {}), (BalancedMuon, {"refresh": 2})], ids=str)
def test_a_state_goes_from_one_stack_to_several_and_back(cls, options, monkeypatch) -> None:
    """As states of before hold each matrix by itself; and from the same, the next step is the same to the bit."""
    whole, _ = trained(True, 4, monkeypatch, cls, **options)
    for pads in (True, False):
        model, other = trained(pads, 3, monkeypatch, cls, **options)
        resumed, again = trained(True, 0, monkeypatch, cls, **options)
        resumed.load_state_dict(model.state_dict())
        again.load_state_dict(other.state_dict())
        give_gradients(resumed, 3)
        again.step()
        assert_near(resumed, whole)
        if pads:
            assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


@pytest.mark.parametrize("cls", [Muon, BalancedMuon])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_beside_padding_is_skipped_alone(bad: float | None, cls, monkeypatch) -> None:
    model, optimizer = trained(True, 2, monkeypatch, cls, refresh=2)
    apart, other = trained(False, 2, monkeypatch, cls, refresh=2)
    before = weight(model, "tall").detach().clone()
    for seed in (2, 3):
        for network, steps in ((model, optimizer), (apart, other)):
            give_gradients(network, seed)
            tall = weight(network, "tall")
            if bad is None:
                tall.grad = None
            elif tall.grad is not None:
                tall.grad[7] = bad
            with monkeypatch.context() as patch:
                patch.setattr(stacks, "STACK", stacks.STACK if network is model else 0)
                steps.step()
    assert torch.equal(weight(model, "tall"), before)
    assert_near(model, apart)


def test_what_shares_a_stack_follows_the_approach(monkeypatch) -> None:
    """Where matrices of several shapes are computed in several ways, or no longer."""
    model, optimizer = trained(True, 2, monkeypatch)
    (group,) = optimizer.param_groups
    shapes = group["approaches"].rpartition(": ")[2].split(", ")
    ways = [entry.replace("nonic 4", "quintics 5") if i % 2 else entry for i, entry in enumerate(shapes)]
    group["approaches"] = f"predicted on cpu: {', '.join(ways)}"
    group["rtol"] = 0.1250001
    give_gradients(model, 5)
    optimizer.step()
    assert num_stacks(optimizer) == 2


@pytest.mark.parametrize("large", [1, ROWS])
@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf"), 1e30])
def test_norms_are_known_unless_something_overflows(large: int, bad: float | None) -> None:
    params = [torch.zeros(7), torch.zeros(3, 4), torch.zeros(large)]
    norms = Norms(params)
    for seed in (0, 1):
        grads = [torch.randn(p.shape, generator=seeded(seed)) for p in params]
        if bad is not None:
            grads[1][1, 2] = bad
        found = norms.finite(grads)
        if bad is not None:
            assert found is None
        else:
            torch.testing.assert_close(found, torch.stack([g.norm() for g in grads]))
    halves = [torch.full(p.shape, 1e3, dtype=torch.float16) for p in params]
    assert norms.finite(halves) is None  # their squares overflow


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
