"""What torch asks of its own optimizers, asked of gramian's: inputs, errors, groups, schedulers, states and hooks.

The inputs and the errors are those of `torch.testing._internal.common_optimizers`, through an `OptimizerInfo` for each
optimizer; what is checked is what torch's `test_optim.py` and `test_lrscheduler.py` check, in our own words.
"""

from __future__ import annotations

import copy
import io
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cases import seeded
from gramian.errors import GramianWarning, InputError
from gramian.optim import Proximal
from gramian.optim.registry import MATRIX_OPTIMIZERS
from gramian.prox import L1

if "expecttest" not in sys.modules:  # torch's own test case is made of it, and nothing here is
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
from torch.testing._internal import common_optimizers as common

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*parameters without names"),
    pytest.mark.filterwarnings("ignore:.*is not loaded. a matrix has a state of its direction"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in"),
    pytest.mark.filterwarnings("ignore:Seems like `optimizer.step"),
]


def inputs(device: Any = None, dtype: Any = None) -> list[Any]:
    """Keyword arguments that all matrix optimizers take."""
    tensor = {"lr": torch.tensor(0.001)}
    given = ({}, {"lr": 0.01}, tensor, {"weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
             {"momentum": 0.8}, {"scale": "match_rms_adamw", "lr": 0.01}, {"refresh": 3})  # fmt: skip
    return [common.OptimizerInput(params=None, kwargs=dict(kwargs), desc=str(kwargs)) for kwargs in given]


FLAGS = ("foreach", "fused", "differentiable", "capturable")  # there is one way to compute a step


def errors(device: Any, dtype: Any) -> list[Any]:
    """Those that torch asks of all, and those of options out of their range."""
    wrong = [({"lr": -1.0}, "lr must be in"), ({"lr": float("inf")}, "lr must be in"),
             ({"weight_decay": -1.0}, "weight_decay must be"), ({"momentum": 1.5}, "momentum must be"),
             *(({flag: True}, f"no option '{flag}'") for flag in FLAGS)]  # fmt: skip
    return common.get_error_inputs_for_all_optims(device, dtype) + [
        common.ErrorOptimizerInput(
            common.OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=ValueError, error_regex=regex
        )
        for kwargs, regex in wrong
    ]


def info(make: Any) -> Any:
    return common.OptimizerInfo(
        make, optim_inputs_func=inputs, optim_error_inputs_func=errors, supported_impls=(), supports_complex=False
    )


def proximal(params: Any, **options: Any) -> Proximal:
    return Proximal(MATRIX_OPTIMIZERS["muon"].optimizer(params, **options), {"*": L1(1e-4)})


DB = {name: info(entry.optimizer) for name, entry in MATRIX_OPTIMIZERS.items()} | {"proximal": info(proximal)}
every = pytest.mark.parametrize("name", DB)


def each(name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The optimizer with each of its inputs."""
    for one in DB[name].optim_inputs_func():
        yield DB[name].optim_cls, one.kwargs


def pair(*, contiguous: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Parameter, Parameter, Tensor]:
    """A matrix, a vector and an input."""
    g = seeded(0)
    weight, bias, x = torch.randn(10, 5, 2, generator=g), torch.randn(10, 2, generator=g), torch.randn(5, generator=g)
    weight, bias = (t.to(dtype)[..., 0] for t in (weight, bias))
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return Parameter(weight), Parameter(bias), x.to(dtype)


def loss_of(optimizer: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).square().sum()
    loss.backward()
    return loss


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))


def train(optimizer: Any, model: nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.rand(2, 4, 8, 8, generator=seeded(step))).square().sum().backward()
        optimizer.step()


# ---- steps


@pytest.mark.parametrize(("contiguous", "scheduled"), [(True, False), (False, False), (True, True)])
@every
def test_the_loss_goes_in_the_right_direction(name: str, contiguous: bool, scheduled: bool) -> None:
    for make, kwargs in each(name):
        for makers in DB[name].scheduler_inputs if scheduled else [[]]:
            given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            weight, bias, x = pair(contiguous=contiguous)
            optimizer = make([weight, bias], **given)
            schedulers = [scheduler(optimizer) for scheduler in makers]
            closure = partial(loss_of, optimizer, weight, bias, x)
            first = closure().item()
            for _ in range(12):
                loss = optimizer.step(closure)
                for scheduler in schedulers:
                    scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            last = closure().item()
            assert last > first if kwargs.get("maximize") else last < first, kwargs


@pytest.mark.parametrize("dims", [0, 1, 2])
@every
def test_a_rate_may_be_a_tensor(name: str, dims: int) -> None:
    """It steps as a number does, is kept, and a change in place acts on the next step."""
    for make, kwargs in each(name):
        rest = {key: value for key, value in kwargs.items() if key != "lr"}
        (weight, bias, x), (weight_c, bias_c, _) = pair(), pair()
        rate = torch.full([1] * dims, 1e-3)
        plain, optimizer = make([weight, bias], lr=1e-3, **rest), make([weight_c, bias_c], lr=rate, **rest)
        for step in range(4):
            if step == 2:
                plain.param_groups[0]["lr"] = 1e-2
                rate.fill_(1e-2)
            plain.step(partial(loss_of, plain, weight, bias, x))
            optimizer.step(partial(loss_of, optimizer, weight_c, bias_c, x))
            torch.testing.assert_close(weight, weight_c)
            torch.testing.assert_close(bias, bias_c)
        assert optimizer.param_groups[0]["lr"] is rate


@every
def test_options_of_groups_are_their_own(name: str) -> None:
    for make, kwargs in each(name):
        weight, bias, x = pair()
        still = Parameter(torch.randn(2, 2, generator=seeded(1)))
        before = still.detach().clone()
        groups = [{"params": [weight, bias], "lr": 1e-3, **kwargs}, {"params": [still]}]
        optimizer = make(groups, lr=1e-28)
        closure = partial(loss_of, optimizer, weight, bias, x)
        first = closure().item()
        for _ in range(6):
            loss = closure()
            still.grad = torch.rand(2, 2, generator=seeded(2))
            optimizer.step()
        assert loss > first if kwargs.get("maximize") else loss < first
        torch.testing.assert_close(still, before, rtol=0, atol=0 if name != "proximal" else 1e-6)
        decayed = make([{"params": [weight], "weight_decay": 0.2}, {"params": [bias], "weight_decay": 0.0}])
        assert [g["weight_decay"] for g in decayed.param_groups] == [0.2, 0.0]


@every
def test_no_gradient_and_a_gradient_of_zeros_move_nothing(name: str) -> None:
    for make, kwargs in each(name):
        p, w = torch.ones(2, 3), Parameter(torch.ones(5, 1))
        make([p, p.clone()], **kwargs).step(lambda: torch.ones(1))
        if not kwargs.get("weight_decay") and name != "proximal":
            w.grad = torch.zeros_like(w)
            optimizer = make([w, Parameter(torch.ones(0, 3)), Parameter(torch.ones(0))], **kwargs)
            for q in optimizer.param_groups[0]["params"]:
                q.grad = torch.zeros_like(q)
            optimizer.step()
            assert torch.equal(w, torch.ones(5, 1))
        w.grad = torch.rand(5, 1, generator=seeded(0))
        version = w.grad._version
        optimizer = make([w], **kwargs)
        for _ in range(3):
            optimizer.step(lambda: torch.ones(1))
        assert w.grad._version == version
        assert type(optimizer).__name__ in repr(optimizer)
        optimizer.zero_grad(set_to_none=False)
        assert not w.grad.any()
        optimizer.zero_grad()
        assert w.grad is None


@every
def test_a_module_may_be_cast_between_steps(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = small()
        optimizer = DB[name].optim_cls(model.parameters(), lr=0.1, rest_lr=0.1)
        train(optimizer, model)
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if p.any())


@every
def test_what_torch_refuses_is_refused(name: str) -> None:
    for one in DB[name].optim_error_inputs_func("cpu", torch.float32):
        given, kind = one.optimizer_error_input, one.error_type
        params = given.params if given.params is not None else [Parameter(torch.ones(2, 2))]
        check = pytest.warns if issubclass(kind, Warning) else pytest.raises
        with check(kind, match=one.error_regex):
            DB[name].optim_cls(params, **given.kwargs)
    w = Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="ordered collections"):
        DB[name].optim_cls([{"params": {w}}])
    with pytest.raises(TypeError, match="ordered collections"):
        DB[name].optim_cls({w})
    with pytest.raises(ValueError, match="non-leaf"):
        DB[name].optim_cls([w * 2])
    with pytest.raises(InputError, match="complex64"):
        DB[name].optim_cls([Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    optimizer = DB[name].optim_cls([w])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [w]})
    with pytest.raises(ValueError, match="with names"):
        optimizer.add_param_group({"params": [("new", Parameter(torch.ones(2, 2)))]})
    optimizer.add_param_group({"params": Parameter(torch.ones(2)), "mine": 1})
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    with pytest.warns(GramianWarning, match="each is stepped once"):
        twice = DB[name].optim_cls([w, w])
    assert len(twice.param_groups[0]["params"]) == 1


# ---- groups and schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)]),
    "one lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda e: 0.9, lambda e: 0.8]),
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 3], gamma=0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "cyclic, by group": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "one cycle, by group": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=8),
    "swa": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}

BY_EPOCH = ("lambda", "one lambda", "step", "multi step", "constant", "linear", "exponential", "polynomial", "cosine")


def two_groups(make: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5, "mine": "kept"}]
    momentum = {"momentum": 0.9} if make is SGD else {}
    return model, make(groups, lr=0.05, **momentum)


def schedule(make: Any, scheduler: str, closed: bool) -> tuple[list[tuple[Any, ...]], Any]:
    """Rates and momenta of both groups over the steps, and the optimizer."""
    _, optimizer = two_groups(make)
    stepping = SCHEDULERS[scheduler](optimizer)
    rows = []
    for epoch in range(7):
        rows.append(tuple(float(g[key]) for g in optimizer.param_groups for key in ("lr", "momentum")))
        optimizer.step()
        stepping.step(*([epoch + 1] if closed else []))
    return rows, optimizer


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every
def test_schedulers_set_the_rates_that_they_set_for_sgd(name: str, scheduler: str, closed: bool) -> None:
    """By steps, and by the closed form where there is one; one function or rate for each group that was given."""
    if closed and scheduler not in BY_EPOCH:
        return
    make = DB[name].optim_cls
    if "momentum" not in two_groups(make)[1].param_groups[0]:
        pytest.skip("no momentum to cycle")
    found, optimizer = schedule(partial(make, momentum=0.9), scheduler, closed)
    wanted, _ = schedule(SGD, scheduler, closed)
    assert found == wanted
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]
    assert optimizer.param_groups[1]["mine"] == "kept"


@every
def test_a_scheduler_resumes_from_groups_that_carry_their_first_rate(name: str) -> None:
    make = DB[name].optim_cls
    _, whole = two_groups(make)
    scheduler = lr_scheduler.StepLR(whole, 3, gamma=0.1)
    for _ in range(5):
        whole.step()
        scheduler.step()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [
        {"params": layer.parameters(), "lr": g["lr"], "initial_lr": g["initial_lr"]}
        for layer, g in zip(model, whole.param_groups, strict=True)
    ]
    again = make(groups, lr=0.05)
    assert [g["initial_lr"] for g in again.param_groups] == [0.05, 0.5]
    after = lr_scheduler.StepLR(again, 3, gamma=0.1, last_epoch=4)
    for _ in range(4):
        assert [g["lr"] for g in again.param_groups] == pytest.approx([g["lr"] for g in whole.param_groups])
        for opt, s in ((whole, scheduler), (again, after)):
            opt.step()
            s.step()
    if name != "proximal":
        assert list(again.rates().values()) == pytest.approx(list(whole.rates().values()))


@every
def test_a_group_may_join_at_any_time(name: str) -> None:
    for steps in (0, 2):
        weight, bias, x = pair()
        optimizer = DB[name].optim_cls([weight], lr=0.01)
        for _ in range(steps):
            optimizer.step(partial(loss_of, optimizer, weight, bias, x))
        optimizer.add_param_group({"params": [bias], "lr": 0.02})
        before = bias.detach().clone()
        optimizer.step(partial(loss_of, optimizer, weight, bias, x))
        assert not torch.equal(bias, before)
        again = DB[name].optim_cls([{"params": [weight]}, {"params": [bias]}])
        again.load_state_dict(optimizer.state_dict())
        assert [g["lr"] for g in again.param_groups] == [0.01, 0.02]


# ---- states


def named(params: list[Parameter], given: bool) -> Any:
    return [(f"name{i}", p) for i, p in enumerate(params)] if given else params


@pytest.mark.parametrize("names", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@every
def test_a_state_is_the_same_after_loading(name: str, names: tuple[bool, bool]) -> None:
    """With names and without, and groups that stand twice in the list are saved alike."""
    for make, kwargs in each(name):
        (weight, bias, x), (weight_c, bias_c, _) = pair(), pair()
        optimizer = make(named([weight, bias], names[0]), **kwargs)
        for _ in range(3):
            optimizer.step(partial(loss_of, optimizer, weight, bias, x))
        with torch.no_grad():
            weight_c.copy_(weight), bias_c.copy_(bias)
        other = make(named([weight_c, bias_c], names[1]), **kwargs)
        state = optimizer.state_dict()
        kept = copy.deepcopy(state)
        other.load_state_dict(state)
        assert_equal_states(state, kept)  # loading changes nothing in it
        for _ in range(3):
            optimizer.step(partial(loss_of, optimizer, weight, bias, x))
            other.step(partial(loss_of, other, weight_c, bias_c, x))
            assert torch.equal(weight, weight_c)
            assert torch.equal(bias, bias_c)
        assert_equal_states(optimizer.state_dict(), other.state_dict())
        other.param_groups.extend(other.param_groups)
        first, last = other.state_dict()["param_groups"][0], other.state_dict()["param_groups"][-1]
        assert first == last


def assert_equal_states(one: Any, other: Any) -> None:
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    for a, b in zip(one["param_groups"], other["param_groups"], strict=True):
        assert {k: v for k, v in a.items() if k != "param_names"} == {k: v for k, v in b.items() if k != "param_names"}


@pytest.mark.parametrize("names", [(False, True), (True, False), (True, True)], ids=str)
@every
def test_names_are_kept_that_either_has(name: str, names: tuple[bool, bool]) -> None:
    """Also where names and shapes tell different roles, so that the state of a matrix cannot be loaded."""
    for make, kwargs in each(name):
        model = small()
        first, second = (make(model.named_parameters() if n else model.parameters(), **kwargs) for n in names)
        train(first, model)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(second, model, 1)
        found = second.state_dict()["param_groups"][0]["param_names"]
        assert found == [n for n, _ in model.named_parameters()]


def test_a_state_that_is_not_loaded_is_told() -> None:
    muon = MATRIX_OPTIMIZERS["muon"].optimizer
    w, v = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    first, second = muon([("lm_head.weight", w), ("fc1.weight", v)]), muon([w, v])
    for p in (w, v):
        p.grad = torch.eye(2)
    first.step()
    with pytest.warns(GramianWarning, match="the state of 0 is not loaded"):
        second.load_state_dict(first.state_dict())
    assert second.state.keys() == {v}
    second.step()


@every
def test_older_states_plain_numbers_and_files_load(name: str) -> None:
    for make, kwargs in each(name):
        model = small()
        optimizer = make(model.parameters(), **kwargs)
        train(optimizer, model)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for flag in DB[name].not_og_supported_flags:
                group.pop(flag, None)
        for entry in state["state"].values():
            if "step" in entry:
                entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        train(optimizer, model, 1)
        assert all(torch.is_tensor(e["step"]) for e in optimizer.state.values() if "step" in e)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert_equal_states(torch.load(file, weights_only=True), optimizer.state_dict())
        assert all(len(entry) > 0 for entry in optimizer.state.values())
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        assert public == {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")}


# ---- hooks


@every
def test_hooks_of_a_state_run_in_their_order(name: str) -> None:
    for make, kwargs in each(name):
        optimizer = make([torch.rand(2, 3, requires_grad=True)], **kwargs)
        handle = optimizer.register_state_dict_pre_hook(lambda opt: opt.state.update(test=1))
        assert optimizer.state_dict()["state"]["test"] == 1
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "seen": "test" in state["state"]})
        assert optimizer.state_dict()["seen"]
        handle.remove()
        optimizer.state.pop("test")
        assert not optimizer.state_dict()["seen"]

        def first(opt: Any, state: dict[str, Any]) -> None:
            state["param_groups"][0]["lr"] = 0.002

        def second(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
            state = copy.deepcopy(state)
            state["param_groups"][0]["lr"] = 0.003
            return state

        after: list[float] = []
        optimizer.register_load_state_dict_pre_hook(first)
        optimizer.register_load_state_dict_post_hook(lambda opt, after=after: after.append(opt.param_groups[0]["lr"]))
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.register_load_state_dict_pre_hook(second, prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.register_load_state_dict_pre_hook(second)
        optimizer.load_state_dict(optimizer.state_dict())
        assert after == [0.002, 0.002, 0.003]


def test_a_hook_after_loading_may_change_the_state() -> None:
    w = Parameter(torch.ones(2, 2))
    optimizer = MATRIX_OPTIMIZERS["muon"].optimizer([w])
    w.grad = torch.rand(2, 2)
    optimizer.step()
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.state[w]["momentum"].zero_())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[w]["momentum"].any()


@pytest.mark.parametrize("with_gradient", [False, True])
@every
def test_hooks_of_a_step_run_in_their_order(name: str, with_gradient: bool) -> None:
    for make, kwargs in each(name):
        p = torch.tensor([[1.0, 1.0]], requires_grad=True)
        p.grad = torch.ones_like(p) if with_gradient else None
        optimizer, other = make([p], **kwargs), SGD([p])
        data: list[int] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: data.append(0)),  # noqa: B023
            register_optimizer_step_post_hook(lambda *_: data.append(5)),  # noqa: B023
        ]
        for opt in (optimizer, other):
            handles.append(opt.register_step_pre_hook(lambda *_: data.append(1)))  # noqa: B023
            handles.append(opt.register_step_post_hook(lambda *_: data.append(2)))  # noqa: B023
        try:
            optimizer.step(), other.step(), optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        assert data == [0, 1, 2, 5] * 3
        optimizer.step(), other.step()
        assert data == [0, 1, 2, 5] * 3


@every
def test_a_hook_before_a_step_may_change_its_arguments(name: str) -> None:
    w = Parameter(torch.ones(2, 2))
    optimizer = DB[name].optim_cls([w])
    w.grad = torch.ones(2, 2)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 7.0), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step() == 7.0
