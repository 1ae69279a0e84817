"""What can be factored, what a factored layer still answers, and plans that outlive training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression import LowRank, compress
from gramian.errors import InputError, UnsupportedError
from kernels import Operations
from test_compress_calibration import inputs, network

DISTILL = gm.Objective.self_distillation()
BATCHES = list(inputs(512, 1).split(64))


def planned(**options):
    model = network()
    return model, compress(model, batches=BATCHES, objective=DISTILL, **{"keep": 0.5} | options)


def test_reading_about_the_weight_costs_no_product() -> None:
    dense = nn.Linear(300, 200, dtype=torch.bfloat16)
    low = LowRank(dense, 10)
    with Operations() as done:
        weight = low.weight
        assert (weight.dtype, weight.device, weight.shape) == (dense.weight.dtype, dense.weight.device, (200, 300))
        assert (weight.size(0), weight.ndim, weight.numel(), weight.dim()) == (200, 2, 60000, 2)
        assert isinstance(weight, Tensor)
    assert done.entries < 300 * 10
    low = LowRank(nn.Linear(30, 20), 10)
    low.set_(torch.randn(20, 10), torch.randn(10, 30), torch.zeros(20))
    product = low[1].weight @ low[0].weight
    x = torch.randn(4, 30)
    torch.testing.assert_close(low.weight + 0, product)
    torch.testing.assert_close(nn.functional.linear(x, low.weight), x @ product.T)
    nn.functional.linear(x, low.weight).sum().backward()
    assert low[0].weight.grad is not None
    assert torch.equal(copy.deepcopy(low).weight.detach(), product.detach())


@pytest.mark.parametrize(
    "change",
    [lambda w: w.data.add_(1), lambda w: nn.init.zeros_(w), lambda w: w.__setitem__(0, 1.0), lambda w: w.copy_(w)],
)
def test_a_weight_that_nobody_keeps_is_not_changed_in_silence(change) -> None:
    low = LowRank(nn.Linear(9, 9), 2)
    with pytest.raises(UnsupportedError, match="Change the factors"), torch.no_grad():
        change(low.weight)


@pytest.mark.parametrize("layer", [nn.Linear(9, 6), nn.Conv2d(3, 8, 3, stride=2)])
def test_hooks_and_attributes_survive(layer: nn.Module) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.more = layer, nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.more(torch.ones(1, 12)).sum()

    model, seen = Whole(), []
    layer.note = {"by": "me"}
    layer.register_forward_hook(lambda module, args, output: seen.append(("after", type(module).__name__)))
    layer.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module).__name__)))
    layer.register_full_backward_hook(lambda module, into, out: seen.append(("back", type(module).__name__)))
    x = torch.randn(20, 9) if isinstance(layer, nn.Linear) else torch.randn(20, 3, 9, 9)
    batches = [one.unsqueeze(0) for one in x]
    plan = compress(model, batches=batches, objective=DISTILL, of="factorable", keep=0.6, include=["layer"])
    seen.clear()
    small = plan.apply()
    assert small.layer.note == {"by": "me"}
    small(x.requires_grad_()).backward()
    assert seen == [("before", "LowRank"), ("after", "LowRank"), ("back", "LowRank")]


def test_a_plan_does_not_change_when_the_model_trains_on() -> None:
    model, plan = planned()
    before = plan.apply()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    after = plan.apply()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_factored_model_is_cut_further_from_its_product() -> None:
    model, plan = planned(keep=0.6)
    small = plan.apply()
    names = {name for name, module in small.named_modules() if isinstance(module, LowRank)}
    again = compress(small, batches=BATCHES, objective=DISTILL, keep=1.0)
    assert names <= set(again.ranks)
    assert set(again.ranks.values()) == {None}
    assert torch.equal(again.apply()(BATCHES[0]), small(BATCHES[0]))
    smaller = again.at(keep=0.6).apply()
    assert sum(p.numel() for p in smaller.parameters()) == again.at(keep=0.6).parameters <= 0.6 * plan.parameters
    assert not any(isinstance(inner, LowRank) for low in smaller.modules() if isinstance(low, LowRank) for inner in low)
    # As good as to go to that size at once, but for what the first cut has taken.
    once = plan.at(keep=again.at(keep=0.6).parameters / plan.parameters_dense).apply()

    def far(other: nn.Module) -> float:
        return float((model(BATCHES[0]) - other(BATCHES[0])).square().mean().detach())

    assert far(smaller) < 2 * far(once)


def test_layers_are_chosen_by_pattern_and_the_share_by_denominator() -> None:
    _, plan = planned(exclude=["4"], keep=0.5, of="factorable")
    assert plan.reasons["4"] == "excluded by '4'"
    assert plan.parameters - (plan.parameters_dense - plan.parameters_factorable) <= 0.5 * plan.parameters_factorable
    _, only = planned(include=["0", "2"], keep=0.7)
    assert set(only.ranks) == {"0", "2"}
    assert only.reasons["4"] == "not included"
    with pytest.raises(InputError, match=r"'encoder\.\*' matches no layer; names are like 0"):
        planned(exclude=["encoder.*"])
    with pytest.raises(InputError, match="lists of patterns"):
        planned(exclude="4")


def test_a_share_that_was_never_asked_for_is_no_error() -> None:
    """Half of it is a table that changes its rows, and stays."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(400, 24, max_norm=100.0), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.body(self.table(x)))

    torch.manual_seed(0)
    model, batches = Tokens(), [torch.randint(400, (16, 8)) for _ in range(8)]
    stats = gm.capture(model, batches, DISTILL)
    assert compress(model, stats).at(keep=0.98).parameters <= 0.98 * 10200
    with pytest.raises(InputError, match=r"smallest possible keep is 0\.9"):
        compress(model, stats).at(keep=0.6)


def test_uses_of_one_weight_are_summed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.layer(x)) @ self.layer.weight.T)

    torch.manual_seed(0)
    model = Twice()
    stats = gm.capture(model, BATCHES, DISTILL)
    assert len(stats["layer.weight"]) == 2
    before = [float(site.A.count) for site in stats["layer.weight"]]
    plan = compress(model, stats, keep=0.7)
    assert plan.ranks["layer"]
    assert [float(site.A.count) for site in stats["layer.weight"]] == before
    assert plan.apply()(BATCHES[0]).shape == (64, 8)


def left_dense() -> dict[str, tuple[nn.Module, str]]:
    class Extra(nn.Linear):
        def reset_me(self) -> None: ...

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.lora_A, self.lora_B = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    buffered, stated = nn.Linear(32, 32), nn.Linear(32, 32)
    buffered.register_buffer("scale", torch.ones(1))
    stated.register_state_dict_post_hook(lambda *args: None)
    return {
        "methods": (Extra(32, 32), "reset_me of its own"),
        "adapter": (Adapter(), "merge the adapter into the weight first"),
        "buffer": (buffered, "holds buffers"),
        "state": (stated, "_state_dict_hooks"),
        "thin": (nn.Linear(32, 1), "no smaller than it"),
    }


@pytest.mark.parametrize("name", left_dense())
def test_what_would_be_lost_is_left_dense_by_name(name: str) -> None:
    layer, reason = left_dense()[name]
    model = nn.Sequential(nn.Linear(32, 32), layer)
    plan = compress(model, batches=BATCHES, objective=DISTILL, keep=0.9)
    assert any(reason in why for layer, why in plan.reasons.items() if layer.startswith("1"))
    assert not any(name.startswith("1") for name in plan.ranks)
    assert type(plan.apply()[1]) is type(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_frozen_models(dtype: torch.dtype) -> None:
    model = network().to(dtype).requires_grad_(False)
    plan = compress(model, batches=[x.to(dtype) for x in BATCHES], objective=DISTILL, keep=0.6)
    small = plan.apply()
    x = BATCHES[0].to(dtype)
    assert small(x).dtype == dtype
    gap, size = (small(x) - model(x)).float().square().mean(), model(x).float().square().mean()
    assert gap < 0.3 * size


@pytest.mark.parametrize("removed", [0.15, 0.35, 0.45, 0.6])
def test_the_prediction_is_near_what_is_measured_on_new_data(removed: float) -> None:
    model = network()
    plan = compress(model, batches=list(inputs(2048, 1).split(64)), objective=DISTILL)
    part = plan.at(keep=1 - removed, of="factorable")
    total, units = DISTILL.against(model).loss(part.apply(), inputs(4096, 7))
    rise, told = float(total.detach() / units), part.predicted
    assert told.measured
    assert told.rise == pytest.approx(rise, rel=0.2)
    assert told.low <= rise <= told.high
