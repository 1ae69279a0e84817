"""Every matrix optimizer is one torch optimizer: resumed to the bit, scheduled, scaled, hooked, clipped, grouped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cases import seeded
from directions import variants
from gramian.errors import InputError
from gramian.optim import SOAP, Muon, Proximal
from gramian.prox import L1

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")

OPTIMIZERS = variants(3)


def mixed() -> nn.Sequential:
    """An embedding, two matrices of one shape, one of another, a norm, a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(5, 6)
        )  # fmt: skip


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = seeded(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def steps(model: nn.Module, optimizer: Any, numbers: range, absent: str | None = None) -> None:
    for number in numbers:
        set_gradients(model, number)
        if absent is not None and number % 2:
            model.get_parameter(absent).grad = None
        optimizer.step()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (key, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), key


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


HOW: dict[str, Callable[[nn.Module, Any, Callable[..., Any]], tuple[nn.Module, Any]]] = {}


def restored(carry: Callable[[Any], Any]) -> Callable[[nn.Module, Any, Callable[..., Any]], tuple[nn.Module, Any]]:
    def restore(model: nn.Module, optimizer: Any, make: Callable[..., Any]) -> tuple[nn.Module, Any]:
        other = mixed().to(next(model.parameters()).dtype)
        other.load_state_dict(model.state_dict())
        again = make(other, lr=7.0)
        again.load_state_dict(carry(optimizer.state_dict()))
        return other, again

    return restore


HOW["file"] = restored(through_file)
HOW["in_memory"] = restored(lambda state: state)
HOW["deepcopy"] = lambda model, optimizer, make: copy.deepcopy((model, optimizer))
HOW["pickle"] = lambda model, optimizer, make: pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_restored_steps_on_to_the_bit(name: str, how: str, dtype: torch.dtype) -> None:
    """In the middle of a cycle, with a parameter that misses every other gradient; and the two share no memory."""
    model = mixed().to(dtype)
    optimizer = OPTIMIZERS[name](model, weight_decay=0.1)
    steps(model, optimizer, range(4), absent="3.weight")
    other, again = HOW[how](model, optimizer, OPTIMIZERS[name])
    steps(model, optimizer, range(4, 9), absent="3.weight")
    steps(other, again, range(4, 9), absent="3.weight")
    assert_same(model, other)
    assert optimizer.state_dict()["param_groups"] == again.state_dict()["param_groups"]


def test_a_copy_takes_groups_and_counts_along() -> None:
    model = mixed()
    optimizer = Muon(model)
    set_gradients(model, 0)
    model[1].weight.grad.fill_(torch.nan)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.health()["1.weight"]["skipped"] == 1
    twin.add_param_group({"params": [("new", nn.Parameter(torch.ones(3, 3)))]})
    assert twin.explain()[-1]["name"] == "new"
    assert len(optimizer.explain()) == len(twin.explain()) - 1


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(
        o, [g["lr"] for g in o.param_groups], total_steps=8, cycle_momentum="momentum" in o.recipe.options
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers_drive_every_group_and_resume(name: str, scheduler: str) -> None:
    def advance(model: nn.Module, optimizer: Any, schedule: Any, numbers: range) -> list[list[float]]:
        rates = []
        for number in numbers:
            steps(model, optimizer, range(number, number + 1))
            schedule.step(*([1.0] if scheduler == "plateau" else []))
            rates.append(list(optimizer.rates().values()))
        return rates

    model = mixed()
    optimizer = OPTIMIZERS[name](model)
    start = list(optimizer.rates().values())
    assert len(set(start)) > 1
    schedule = SCHEDULERS[scheduler](optimizer)
    for rates in advance(model, optimizer, schedule, range(3)):
        assert [rate / first for rate, first in zip(rates, start, strict=True)] == pytest.approx(
            [rates[0] / start[0]] * len(start)
        )
    other = mixed()
    other.load_state_dict(model.state_dict())
    again = OPTIMIZERS[name](other)
    after = SCHEDULERS[scheduler](again)
    again.load_state_dict(through_file(optimizer.state_dict()))
    after.load_state_dict(schedule.state_dict())
    assert advance(model, optimizer, schedule, range(3, 6)) == advance(other, again, after, range(3, 6))
    assert_same(model, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_have_options_of_their_own(name: str) -> None:
    """A group with rate zero stays, decay is per group, and one that is added later joins."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    bias = nn.Parameter(torch.ones(4))
    optimizer = OPTIMIZERS[name](
        [
            {"params": [params[0]], "lr": 0.0},
            {"params": [params[1], bias], "weight_decay": 0.5, "lr_scale": 0.1},
            {"params": params[2]},
        ],
        lr=0.1,
    )
    optimizer.add_param_group({"params": [params[3]], "lr": 0.2})
    assert [row["name"] for row in optimizer.explain()] == ["0", "1", "2", "3", "4"]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 2, 1, 1]  # as they were given
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.5, 0.0, 0.0]
    assert optimizer.param_groups[1]["lr_scale"] == 0.1
    for p in (*params, bias):
        p.grad = torch.eye(4) if p.ndim == 2 else torch.ones(4)
    optimizer.step()
    one = torch.ones(4, 4)
    assert torch.equal(params[0], one)
    step = one - params[2]
    torch.testing.assert_close(one - params[3], 2 * step)
    torch.testing.assert_close((1 - 0.1 * 0.5) * one - params[1], step)
    torch.testing.assert_close(bias.detach(), torch.full((4,), 1 - optimizer.rates()["2"]))  # vectors do not decay
    with pytest.raises(InputError, match="is in the optimizer already"):
        optimizer.add_param_group({"params": [params[0]]})
    with pytest.raises(InputError, match="max_overhead is of the whole optimizer"):
        OPTIMIZERS[name]([{"params": [params[0]], "max_overhead": 0.1}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_backbone_does_not_shorten_steps(name: str) -> None:
    model, alone = mixed(), mixed()
    model[1].requires_grad_(False), model[4].requires_grad_(False)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.ndim == 2 and p.shape == (8, 8)], lr=0.1)
    single = OPTIMIZERS[name]([alone[3].weight], lr=0.1)
    for m in (model, alone):
        m[3].weight.grad = torch.randn(8, 8, generator=seeded(0))
    optimizer.step(), single.step()
    torch.testing.assert_close(model[3].weight, alone[3].weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_and_clipped_gradients_step_as_plain_ones(name: str) -> None:
    model, twin = mixed(), mixed()
    optimizer, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    tokens = torch.arange(11)
    for number in range(4):
        for m in (model, twin):
            m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=number > 1):
            loss, own = (m(tokens).float().square().mean() for m in (model, twin))
        scaler.scale(loss).backward()
        own.backward()
        if number == 3:  # the scaler sees this itself and skips the whole step
            model[1].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        norms = [float(nn.utils.clip_grad_norm_(m.parameters(), 1e-2)) for m in (model, twin)]
        scaler.step(optimizer)
        scaler.update()
        if number < 3:
            assert norms[0] == norms[1] > 1e-2
            plain.step()
    assert_same(model, twin)
    assert scaler.get_scale() == 2.0**9
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_run_once_and_see_the_step(name: str) -> None:
    model = mixed()
    optimizer = OPTIMIZERS[name](model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    steps(model, optimizer, range(2))
    assert calls == ["pre", "post"] * 2
    state = optimizer.state_dict()
    assert state["extra"] == 1
    other = mixed()
    other.load_state_dict(model.state_dict())
    again = OPTIMIZERS[name](other)
    again.load_state_dict(state)
    steps(model, optimizer, range(2, 4)), steps(other, again, range(2, 4))
    assert_same(model, other)


def test_closures_maximize_and_accumulation() -> None:
    model, twin = mixed(), mixed()
    up, down = SOAP(model, refresh=2, maximize=True), SOAP(twin, refresh=2)
    for number in range(3):
        set_gradients(model, number), set_gradients(twin, number)
        for p in twin.parameters():
            p.grad.neg_()
        assert up.step(lambda: 3.0) == 3.0
        down.step()
    assert_same(model, twin)


def test_wrappers_prefixes_are_no_part_of_names() -> None:
    """Those of torch.compile and DataParallel, of a model and of named parameters."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    wrapped = Wrapper(mixed())
    for given in (wrapped, wrapped.named_parameters()):
        optimizer = Muon(given, routes={"1.weight": "adamw"})
        assert {row["name"] for row in optimizer.explain()} == {n for n, _ in mixed().named_parameters()}
    compiled = torch.compile(mixed(), backend="eager")
    assert [r["name"] for r in Muon(compiled).explain()] == [r["name"] for r in Muon(mixed()).explain()]


def test_an_older_state_without_newer_options_loads() -> None:
    model = mixed()
    optimizer = Muon(model)
    steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("max_overhead", None), group.pop("nesterov", None)
    optimizer.load_state_dict(state)
    steps(model, optimizer, range(1, 2))


def test_a_proximal_map_leaves_skipped_parameters_alone() -> None:
    model = mixed()
    optimizer = Proximal(Muon(model), {"*": L1(1.0)})
    set_gradients(model, 0)
    for name in ("1.weight", "2.bias"):
        model.get_parameter(name).grad.view(-1)[0] = torch.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    stayed = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert {"1.weight", "2.bias"} <= stayed  # the map of L1 would have moved the first
    assert not torch.equal(model[3].weight, before["3.weight"])
    set_gradients(model, 1)
    optimizer.step()
    assert not torch.equal(model[1].weight, before["1.weight"])


def momentum_of(optimizer: Any, w: Tensor) -> Tensor:
    return optimizer.state[w]["momentum"]


def test_unfreezing_and_missing_gradients_keep_the_state_of_others() -> None:
    """A parameter that joins later has its costly parts made at once, and nobody else's are made again."""
    a, b = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([a, b], refresh=4)
    a.grad = torch.randn(4, 4, generator=seeded(0))
    optimizer.step()
    kept = optimizer.state[a]["direction"].clone()
    a.grad, b.grad = (torch.randn(4, 4, generator=seeded(i)) for i in (1, 2))
    optimizer.step()
    assert optimizer.state[b]["direction"].any()
    assert momentum_of(optimizer, a).any()
    due = optimizer._plans[0].stacks[0].phases
    assert due == [0, 1]
    assert torch.equal(optimizer.state[a]["direction"], kept)
