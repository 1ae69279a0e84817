"""What carries over from an AdamW: all of it for the rest, the momentum for matrices, and a report of what did not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cases import seeded
from gramian.errors import InputError
from gramian.optim import SOAP, Muon
from gramian.optim.registry import MATRIX_OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(7, 4), nn.MultiheadAttention(4, 1), nn.Conv2d(2, 3, 2), nn.Linear(4, 4), nn.Linear(4, 5)
        )  # fmt: skip


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = seeded(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in network().named_parameters()}


def trained(make: Callable[[nn.Module], Any], num_steps: int = 3, skip: str = "") -> tuple[nn.Module, Any]:
    model = network()
    adamw = make(model)
    for step in range(num_steps):
        for name, g in gradients(step).items():
            model.get_parameter(name).grad = g if name != skip else None
        adamw.step()
    return model, adamw


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), **options)


def by_hand(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's moments of three gradients."""
    mean = square = torch.zeros(())
    for step in range(3):
        g = gradients(step)[name]
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g.square()
    return mean, square


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_what_carries_over_is_what_adamw_had(name: str) -> None:
    """The state is AdamW's where the recipe says so, and nothing else is reported as carried over."""
    model, before = trained(adamw)
    optimizer: Any = MATRIX_OPTIMIZERS[name].optimizer(model)  # type: ignore[arg-type]
    declared = optimizer.recipe.adamw
    rows = {row["name"]: row for row in optimizer.load_adamw(before)}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    directions = {row["name"]: row["direction"] for row in optimizer.explain()}
    assert [n for n, d in directions.items() if d == "matrix"] == [
        "1.in_proj_weight", "1.out_proj.weight", "2.weight", "3.weight"
    ]  # fmt: skip
    for name, p in model.named_parameters():
        mean, square = by_hand(name)
        state, row = optimizer.state[p], rows[name]
        assert row["direction"] == directions[name]
        if row["direction"] == "adamw":
            assert (row["carried"], row["lost"]) == ("exp_avg, exp_avg_sq, step", "")
            assert float(state["step"]) == 3
            torch.testing.assert_close(state["exp_avg"], mean)
            torch.testing.assert_close(state["exp_avg_sq"], square)
            continue
        shape = {"1.in_proj_weight": (3, 4, 4), "2.weight": (3, 8)}.get(name, (4, 4))
        weight = torch.full((*shape[:-2], 1, 1), 1 - 0.9**3)
        parts = {"exp_avg": mean.reshape(shape), "exp_avg_sq": square.reshape(shape), "exp_avg_sq_weight": weight}
        assert state.keys() == declared.keys()
        for buffer, part in declared.items():
            torch.testing.assert_close(state[buffer], parts[part])
        carried = [
            key for key, part in zip(("exp_avg", "exp_avg_sq", "step"), parts, strict=True) if part in declared.values()
        ]
        assert row["carried"] == ", ".join(carried)
        assert row["lost"] == ", ".join(sorted({"exp_avg", "exp_avg_sq", "step"} - set(carried)))
        assert ("no second moments" in row["reason"]) == ("exp_avg_sq" not in carried)
        assert ("no running mean" in row["reason"]) == ("exp_avg" not in carried)


def test_soap_takes_all_and_muon_the_momentum() -> None:
    for make, wanted in ((SOAP, ("exp_avg, exp_avg_sq, step", "")), (Muon, ("exp_avg", "exp_avg_sq, step"))):
        model, before = trained(adamw)
        row = next(row for row in make(model).load_adamw(before) if row["name"] == "3.weight")
        assert (row["carried"], row["lost"]) == wanted


def test_the_rest_goes_on_as_adamw_would() -> None:
    model, before = trained(lambda m: adamw(m, fused=True, weight_decay=0.0))
    twin, other = trained(lambda m: adamw(m, fused=True, weight_decay=0.0))
    optimizer = Muon(model, rest_lr=1e-3, lr=1.0, rest_betas=(0.8, 0.9))
    optimizer.load_adamw(before.state_dict())
    for step in (3, 4):
        for m, opt in ((model, optimizer), (twin, other)):
            for name, g in gradients(step).items():
                m.get_parameter(name).grad = g
            opt.step()
    for row in optimizer.explain():
        same = torch.equal(model.get_parameter(row["name"]), twin.get_parameter(row["name"]))
        assert same == (row["direction"] == "adamw"), row["name"]


def test_muon_steps_with_the_momentum_that_it_took() -> None:
    """Against a hand calculation: B = 0.2 exp_avg + 0.8 g, and the polar factor of it; the steps go on from AdamW's."""
    model, before = trained(adamw)
    optimizer = Muon(model, lr=1.0, momentum=0.2, nesterov=False, rtol=1e-5, scale="match_rms_adamw")
    optimizer.load_adamw(before)
    assert {group["step"] for group in optimizer.param_groups} == {int(before.state[model[3].weight]["step"])}
    w = model[3].weight
    start, g = w.detach().clone(), torch.randn(4, 4, generator=seeded(9))
    optimizer.zero_grad()
    w.grad = g.clone()
    optimizer.step()
    u, _, vt = torch.linalg.svd((0.2 * by_hand("3.weight")[0] + 0.8 * g).double())
    torch.testing.assert_close((start - w.detach()).double(), 0.2 * 2.0 * u @ vt, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_soap_starts_from_adams_moments(scale: float) -> None:
    """Its first basis is made of one gradient, and the moments turn into it; the total of the variance stays."""
    model, before = trained(adamw)
    for state in before.state.values():
        state["exp_avg"].mul_(scale), state["exp_avg_sq"].mul_(scale**2)
    optimizer = SOAP(model, momentum=0.8, variance_beta=0.9, sides="both")
    optimizer.load_adamw(before)
    w = model[3].weight
    optimizer.zero_grad()
    g = scale * torch.randn(4, 4, generator=seeded(9))
    w.grad = g.clone()
    optimizer.step()
    state = optimizer.state[w]
    unit = torch.exp2(state["unit"])
    mean, square = (x * scale**power for x, power in zip(by_hand("3.weight"), (1, 2), strict=True))
    found = state["left_basis"] @ state["momentum"] @ state["right_basis"].T * unit
    torch.testing.assert_close(found, 0.8 * mean + 0.2 * g, rtol=1e-4, atol=1e-5 * scale)
    total = float((0.9 * square + 0.1 * g.square()).sum())
    assert float(state["variance"].sum() * unit**2) == pytest.approx(total, rel=1e-5)
    assert float(state["weight"]) == pytest.approx(1 - 0.9**4)


def grouped(model: nn.Module, *, named: bool) -> torch.optim.AdamW:
    """As people do: weights decay, biases do not, so the order is not the model's."""
    pairs = list(model.named_parameters())
    weights, biases = [x for x in pairs if x[1].ndim > 1], [x for x in pairs if x[1].ndim < 2]
    groups = [weights, biases] if named else [[p for _, p in part] for part in (weights, biases)]
    return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.8, 0.9))


def grouped_names(model: nn.Module) -> list[str]:
    pairs = list(model.named_parameters())
    return [n for n, p in pairs if p.ndim > 1] + [n for n, p in pairs if p.ndim < 2]


SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "the optimizer": lambda: (trained(lambda m: grouped(m, named=False))[1], None),
    "names": lambda: (trained(lambda m: grouped(m, named=True))[1].state_dict(), None),
    "names given": lambda: (trained(lambda m: grouped(m, named=False))[1].state_dict(), grouped_names(network())),
    "order": lambda: (trained(adamw)[1].state_dict(), None),
    "amsgrad": lambda: (trained(lambda m: adamw(m, amsgrad=True))[1].state_dict(), None),
    "adam": lambda: (trained(lambda m: torch.optim.Adam(m.parameters(), betas=(0.8, 0.9)))[1], None),
}


@pytest.mark.parametrize("how", SOURCES)
def test_parameters_are_found(how: str) -> None:
    """By name or by order: identity is of no help, since the model is another."""
    source, names = SOURCES[how]()
    if isinstance(source, dict):
        file = io.BytesIO()
        torch.save(source, file)
        file.seek(0)
        source = torch.load(file, weights_only=True)
    model = network()
    optimizer = Muon(model)
    if how == "the optimizer":  # of the same model after all
        model, source = trained(lambda m: grouped(m, named=False))
        optimizer = Muon(model)
    rows = optimizer.load_adamw(source, names)
    for row in rows:
        state = optimizer.state[model.get_parameter(row["name"])]
        mean = by_hand(row["name"])[0]
        found = state["momentum"] if row["direction"] == "matrix" else state["exp_avg"]
        torch.testing.assert_close(found.reshape(mean.shape), mean)
        if how == "amsgrad":
            assert "max_exp_avg_sq" in row["lost"]
            assert row["direction"] == "matrix" or row["reason"] == "amsgrad is not supported"


def test_what_is_missing_or_broken_is_told_and_left_fresh() -> None:
    model, before = trained(adamw, skip="2.bias")
    before.state[model[3].weight]["exp_avg"][0, 0] = torch.nan
    before.state[model[4].bias]["exp_avg_sq"][0] = torch.inf
    optimizer = Muon([*model.named_parameters(), ("new", nn.Parameter(torch.ones(2, 2)))])
    rows = {row["name"]: row for row in optimizer.load_adamw(before)}
    assert rows["new"]["reason"] == "not in the state"
    assert rows["2.bias"]["reason"] == "AdamW had not stepped it"
    for name in ("3.weight", "4.bias"):
        assert rows[name]["reason"] == "it holds NaN or infinity"
        assert rows[name]["carried"] == ""
        assert rows[name]["lost"] == "exp_avg, exp_avg_sq, step"
        assert not optimizer.state.get(model.get_parameter(name))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_maximize_is_minded_and_what_is_loaded_is_a_copy() -> None:
    model, before = trained(adamw)
    kept = copy.deepcopy(before.state_dict()["state"])
    up, down = Muon(model, maximize=True), Muon(model)
    for optimizer in (up, down):
        optimizer.load_adamw(before)
    w = model[3].weight
    assert torch.equal(up.state[w]["momentum"], -down.state[w]["momentum"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    down.step()
    for index, state in before.state_dict()["state"].items():
        assert all(torch.equal(value, kept[index][key]) for key, value in state.items())


def test_refusals_say_why() -> None:
    model, before = trained(adamw)
    _, other = trained(lambda m: grouped(m, named=False))
    optimizer = Muon(model)
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    sgd.step()
    few = Muon([model[3].weight])
    for source, names, wanted in (
        (other.state_dict(), None, "has shape"),
        (before.state_dict(), ["a"], "1 names for 11 parameters"),
        (before.state_dict(), [f"x{i}" for i in range(11)], "none is in both"),
        ({"weight": torch.ones(2)}, None, r"expected an optimizer or its state_dict\(\)"),
        (sgd, None, "expected Adam's"),
    ):
        with pytest.raises(InputError, match=wanted):
            optimizer.load_adamw(source, names)
    with pytest.raises(InputError, match="11 parameters without names, the optimizer 1"):
        few.load_adamw(before.state_dict())
    assert not optimizer.state
