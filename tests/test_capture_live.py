"""A live capture gives the statistics of `gm.capture`, and does not change the training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from test_capture import assert_same, snapshot
from test_capture_modules import CASES, LAYOUTS, batches, capture, objective_of

SIZES = [2, 1, 3]
# Modules that run unfused inside are equal to rounding, all others bitwise.
WRITTEN_OUT = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def same(got: gm.Statistics, expected: gm.Statistics, rtol: float) -> None:
    assert list(got) == list(expected)
    assert (got.units, got.aliases) == (expected.units, expected.aliases)
    assert got.loss == pytest.approx(expected.loss, rel=max(rtol, 1e-9))
    for name in expected:
        for ours, theirs in zip(got[name], expected[name], strict=True):
            assert (ours.name, ours.op, ours.transposed, ours.calls) == (
                theirs.name, theirs.op, theirs.transposed, theirs.calls,
            )  # fmt: skip
            for label in "AG":
                x, y = getattr(ours, label), getattr(theirs, label)
                if y is None:
                    assert x is None, (name, label)
                    continue
                assert x is not None, (name, label, ours.reason)
                same_gram(x, y, rtol, f"{label} of {name}")


def same_gram(x: Any, y: Any, rtol: float, what: str) -> None:
    assert type(x) is type(y)
    torch.testing.assert_close(x.count, y.count)
    scale = float(y.diagonal.abs().max())
    view = (lambda gram: gram.matrix) if isinstance(y, gm.Gram) else (lambda gram: gram.diagonal)
    assert (view(x) - view(y)).abs().max() <= rtol * scale, what
    # The rows of each unit, `count` of them, may cancel in a mean.
    assert (x.mean - y.mean).abs().max() <= 10 * rtol * scale**0.5, f"mean of {what}"


def live(
    name: str,
    dtype: torch.dtype,
    *,
    sizes: list[int] = SIZES,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    context: Callable[[], Any] = nullcontext,
    backward: Callable[[Tensor, Tensor], None] = lambda total, units: (total / units).backward(),
    between: Callable[[nn.Module, gm.Objective, Any], None] = lambda *_: None,
    **options: Any,
) -> gm.Statistics:
    """A loop over the batches of a case in evaluation mode, captured."""
    case = CASES[name]
    model = wrap(case.make_model(0).to(dtype).eval())
    objective = objective_of(case)
    with gm.capturing(model, objective, layouts=LAYOUTS.get(name), **options) as stats:
        for batch in batches(name, sizes, dtype):
            with context():
                total, units = objective.loss(model, batch)
            backward(total, units)
            between(model, objective, batch)
    return stats


@pytest.mark.parametrize("name", CASES)
def test_live_equals_capture(name: str) -> None:
    same(live(name, torch.float64), capture(name, SIZES, torch.float64), 1e-10)


def evaluate(model: nn.Module, objective: gm.Objective, batch: Any) -> None:
    with torch.no_grad():
        objective.loss(model, batch)
        model(batch[0])


LOOPS: dict[str, dict] = {
    "sum": {"backward": lambda total, units: total.backward()},
    "accumulation": {"backward": lambda total, units: (total / units / 4).backward()},
    "negative": {"backward": lambda total, units: (-3 * total).backward()},
    "evaluation_between": {"between": evaluate},
    "compiled": {"wrap": lambda model: torch.compile(model, backend="eager")},
    "data_parallel": {"wrap": nn.DataParallel},
    "kept_graph": {"backward": lambda total, units: total.backward(retain_graph=True)},
}  # fmt: skip
KINDS = ["mlp", "batchnorm_cnn", "gpt2", "mixture_of_experts", "packed_lstm", "encoder_decoder", "checkpointed"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", KINDS)
def test_any_use_of_the_loss(name: str, loop: str) -> None:
    same(live(name, torch.float64, **LOOPS[loop]), capture(name, SIZES, torch.float64), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_one_backward_pass_for_several_batches(name: str) -> None:
    case = CASES[name]
    model, objective = case.make_model(0).double().eval(), objective_of(case)
    with gm.capturing(model, objective, layouts=LAYOUTS.get(name)) as stats:
        parts = [objective.loss(model, batch) for batch in batches(name, SIZES, torch.float64)]
        sum(total / units / (3 + i) for i, (total, units) in enumerate(parts)).backward()
    same(stats, capture(name, SIZES, torch.float64), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str) -> None:
    case = CASES[name]
    plain = objective_of(case)

    def predict(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain.predict(model, batch)

    stats = live(name, torch.float32, context=lambda: torch.autocast("cpu", torch.bfloat16))
    objective = gm.Objective(predict, plain.criterion)
    data = batches(name, SIZES, torch.float32)
    # The loop's gradients are 1/units times as large, and round to eight bits differently.
    same(stats, gm.capture(case.make_model(0), data, objective, layouts=LAYOUTS.get(name)), 0.03)


@pytest.mark.parametrize("fisher", ["sampled", "gauss_newton"])
@pytest.mark.parametrize("name", KINDS)
def test_other_fishers(name: str, fisher: Any) -> None:
    case = CASES[name]
    model, data = case.make_model(0).double().eval(), batches(name, SIZES, torch.float64)
    objective, layouts = objective_of(case), LAYOUTS.get(name)
    wanted = gm.capture(model, data, objective, fisher=fisher, layouts=layouts, generator=seeded(3))
    before = snapshot(model)
    with gm.capturing(model, objective, fisher=fisher, layouts=layouts, generator=seeded(3)) as stats:
        for batch in data:
            total, units = objective.loss(model, batch)
            (7 * total / units).backward()
    same(stats, wanted, 1e-10)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in data:
        total, units = objective.loss(model, batch)
        (7 * total / units).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-9, atol=1e-12)
    after = snapshot(model)
    assert_same(before | {"grads": {}}, after)


# --- a gradient scaler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_scale", [2.0**16, 2.0**125, 2.0**127, float("inf")])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_overflows_adds_nothing(name: str, first_scale: float) -> None:
    case = CASES[name]
    model, objective, layouts = case.make_model(0).eval(), objective_of(case), LAYOUTS.get(name)
    data = batches(name, SIZES, torch.float32)
    whole = gm.capture(model, data, objective, fisher="empirical", layouts=layouts)
    without = gm.capture(model, data[1:], objective, fisher="empirical", layouts=layouts)
    stepper = torch.optim.SGD(model.parameters(), lr=0.0)
    with gm.capturing(model, objective, layouts=layouts) as stats:
        for batch, scale in zip(data, (first_scale, 2.0**10, 2.0**10), strict=True):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            total, units = objective.loss(model, batch)
            scaler.scale(total / units).backward()
            scaler.step(stepper)
            scaler.update()
            stepper.zero_grad()
    skipped = []
    for key in stats:
        for site, all_of, rest in zip(stats[key], whole[key], without[key], strict=True):
            if all_of.A is None:
                continue
            same_gram(site.A, all_of.A, 2e-5, key)
            skipped.append(bool((site.G.count < stats.units).any()))
            same_gram(site.G, rest.G if skipped[-1] else all_of.G, 1e-4, f"G of {key}")
    assert all(skipped) if first_scale == float("inf") else first_scale > 2**100 or not any(skipped)


# --- the loop itself --------------------------------------------------------------------------------------------------


@contextmanager
def watched(model: nn.Module, objective: gm.Objective, on: bool, **options: Any) -> Iterator[None]:
    if not on:
        yield
        return
    with gm.capturing(model, objective, **options):
        yield


@pytest.mark.parametrize("name", CASES)
def test_training_is_not_changed(name: str) -> None:
    """Training mode, dropout and batch statistics: gradients, a step, buffers and random state, bitwise."""
    case = CASES[name]
    objective, data, outcomes = objective_of(case), batches(name, [2, 4], torch.float32), []
    for on in (False, True):
        model = case.make_model(0).train()
        next(iter(model.children()), nn.Identity()).eval()  # a mode that differs from the others'
        next(model.parameters()).requires_grad_(False)
        stepper = torch.optim.Adam(model.parameters(), lr=1e-3)
        before = snapshot(model)
        torch.manual_seed(5)
        with watched(model, objective, on, layouts=LAYOUTS.get(name)):
            for batch in data:
                total, units = objective.loss(model, batch)
                (total / units).backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            stepper.step()
        after = snapshot(model)
        for key in ("modes", "hooks", "frozen"):
            assert before[key] == after[key], key
        outcomes.append((grads, after))
    (wanted, plain), (got, seen) = outcomes
    assert torch.equal(plain["random"], seen["random"])
    assert wanted.keys() == got.keys()
    exact = not any(isinstance(module, WRITTEN_OUT) for module in model.modules())
    for n in wanted:
        if exact:
            assert torch.equal(wanted[n], got[n]), n
        else:
            assert (wanted[n] - got[n]).abs().max() <= 1e-4 * wanted[n].abs().max() + 1e-9, n
    for n, tensor in plain["tensors"].items():
        if exact:
            assert torch.equal(tensor, seen["tensors"][n]), n


def test_a_copy_is_observed_and_others_are_not() -> None:
    case = CASES["mlp"]
    model, objective = case.make_model(0).eval(), objective_of(case)
    batch = batches("mlp", [6], torch.float32)[0]
    other = copy.deepcopy(model)
    with gm.capturing(model, objective) as stats:
        objective.loss(model, batch)[0].backward()
        model(batch[0])
        other(batch[0])
    assert stats["0.weight"].A.count in (6, 12)
    assert stats["0.weight"].G.count == 6
