"""Wrong, odd or failing models, objectives and batches: a capture names the cause, and leaves nothing behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded, untyped
from gramian import objective as objectives
from gramian.errors import GramianWarning, InputError, ShapeError
from test_capture import assert_same, snapshot
from test_capture_live import same
from test_capture_modules import CASES, LAYOUTS, batches, capture, objective_of
from zoo_modules import PADDING

CLASSIFY = gm.Objective.classification()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def data() -> list:
    return batches("mlp", [2, 1, 3], torch.float32)


def one_pass(m: nn.Module, given: Any, objective: Any, **options: Any) -> gm.Statistics:
    return gm.capture(m, given, objective, **options)


def live(m: nn.Module, given: Any, objective: Any, **options: Any) -> gm.Statistics:
    with gm.capturing(m, objective, **options) as stats:
        for batch in given:
            total, units = stats.objective.loss(m, batch)
            (total / units).backward()
    m.zero_grad()
    return stats


CAPTURES: dict[str, Callable] = {"capture": one_pass, "capturing": live}


@pytest.fixture(params=CAPTURES)
def run(request: pytest.FixtureRequest) -> Callable:
    return CAPTURES[request.param]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No function mode, and no observed objective is left after a test."""
    yield
    assert torch.overrides._len_torch_function_stack() == 0
    assert not objectives._OBSERVERS
    assert torch.is_grad_enabled()


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_a_layout_that_does_not_fit_shows_both(run: Callable) -> None:
    with pytest.raises(ShapeError, match=re.escape("'0.weight': layout '(five o) i -> five o i'") + r".*\(12, 64\)"):
        run(model(), data(), CLASSIFY, layouts={"0.weight": "(five o) i -> five o i"})
    with pytest.raises(InputError, match=r"'\*\.attention' matches no parameter"):
        run(model(), data(), CLASSIFY, layouts={"*.attention": "o i -> o i"})


def test_a_model_without_parameters(run: Callable) -> None:
    with pytest.raises(InputError, match="ReLU has no parameters"):
        run(nn.ReLU(), data(), CLASSIFY)


BAD_CRITERIA: dict[str, tuple[Callable, str]] = {
    "vector": (lambda output, batch: (output.square().sum(1), len(output)), r"scalar tensor.*shape \(2,\). Sum over"),
    "no_units": (lambda output, batch: output.sum(), "number of units.*got the value"),
    "zero_units": (lambda output, batch: (output.sum(), 0), "at least one unit"),
    "nan_units": (lambda output, batch: (output.sum(), float("nan")), "at least one unit"),
    "number": (lambda output, batch: (1.0, 2), "scalar tensor.*the first is 1.0"),
    "nothing": (lambda output, batch: None, "must return.*got NoneType"),
}


@pytest.mark.parametrize("name", BAD_CRITERIA)
def test_a_criterion_that_returns_the_wrong_thing(run: Callable, name: str) -> None:
    criterion, message = BAD_CRITERIA[name]
    own = model()
    before = snapshot(own)
    with pytest.raises(InputError, match=message), untyped():
        run(own, data(), gm.Objective(lambda m, b: m(b[0]), criterion))
    assert_same(before, snapshot(own))


def test_a_plain_loss_that_is_a_vector(run: Callable) -> None:
    with pytest.raises(InputError, match=r"scalar mean, got a tensor of shape \(2,\)"):
        run(model(), data(), lambda m, b: m(b[0]).sum(1))
    with pytest.raises(InputError, match=r"expected gm\.Objective or a function"), untyped():
        run(model(), data(), "cross_entropy")


def test_a_loss_that_is_not_finite() -> None:
    own, bad = model(), data()
    bad[1] = (torch.full_like(bad[1][0], float("nan")), bad[1][1])
    before = snapshot(own)
    with pytest.raises(ValueError, match="loss of batch 1 is nan"):
        gm.capture(own, bad, CLASSIFY)
    assert_same(before, snapshot(own))
    kept = gm.capture(own, bad, CLASSIFY, non_finite="keep")
    assert not kept["0.weight"].A.matrix.isfinite().any()
    assert not kept["2.weight"].G.matrix.isfinite().any()


def test_batches_that_are_spent(run: Callable) -> None:
    spent = iter(data())
    list(spent)
    if run is one_pass:
        with pytest.raises(InputError, match=r"no batches.*spent generator"):
            run(model(), spent, CLASSIFY)
    else:
        with pytest.warns(GramianWarning, match="was differentiated inside"):
            stats = run(model(), spent, CLASSIFY)
        assert stats["0.weight"].A is stats["0.weight"].G is None
        assert "no batch reached it" in stats["0.weight"].reason


class Skips(nn.Module):
    """Three layers: one unused, one whose output is in no loss, and one in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused, self.no_loss = nn.Linear(64, 10), nn.Conv2d(3, 4, 3), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.no_loss(x)
        return self.head(x)


def test_a_layer_that_no_batch_reaches(run: Callable) -> None:
    stats = run(Skips(), data(), CLASSIFY)
    assert stats["unused.weight"].A is stats["unused.weight"].G is None
    assert stats["unused.weight"].reason == "no batch reached it"
    assert stats["unused.weight"].calls == 0
    assert stats["no_loss.weight"].A.count == 6
    assert stats["no_loss.weight"].G is None
    assert stats["no_loss.weight"].reason == "no gradient reached it"


def test_frozen_models_and_outer_no_grad() -> None:
    own = model()
    wanted = gm.capture(own, data(), CLASSIFY, fisher="empirical")
    with torch.no_grad():
        same(gm.capture(own, data(), CLASSIFY, fisher="empirical"), wanted, 1e-7)
    own.requires_grad_(False)
    same(gm.capture(own, data(), CLASSIFY, fisher="empirical"), wanted, 1e-7)


def test_padding_needs_the_whole_loss() -> None:
    """The rows of padding must be known before the forward pass: a criterion called alone gets them too late."""
    case = CASES["padded"]
    own, objective = case.make_model(0), objective_of(case, padding=PADDING)
    x, y = case.make_batches(0)[0]
    before = snapshot(own)
    message = r"rows out \(padding\).*call objective\.loss\(model, batch\)"
    with pytest.raises(InputError, match=message), gm.capturing(own, objective):
        objective.criterion(own(x), (x, y))
    assert_same(before, snapshot(own))
    full = (x[:, :4], y[:, :4])  # no sentence is shorter: nothing to leave out
    with gm.capturing(own, objective) as stats:
        total, _ = objective.criterion(own(full[0]), full)
        total.backward()
    assert stats["head.weight"].A.count == full[0].numel()
    with gm.capturing(own, objective) as stats:
        objective.loss(own, (x, y))[0].backward()
    assert stats["head.weight"].A.count == (x != PADDING).sum() < x.numel()


# --- failures half-way ------------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise Broken("half way back")


def break_forward(m: nn.Module, objective: gm.Objective) -> tuple[Any, Any]:
    last = [module for module in m.modules() if isinstance(module, nn.Linear)][-1]

    def fail(*_: Any) -> None:
        raise Broken("half way")

    return objective, last.register_forward_hook(fail)


def break_backward(m: nn.Module, objective: gm.Objective) -> tuple[Any, Any]:
    last = [module for module in m.modules() if isinstance(module, nn.Linear)][-1]
    return objective, last.register_forward_pre_hook(lambda _, args: (Breaks.apply(args[0]), *args[1:]))


def break_criterion(m: nn.Module, objective: gm.Objective) -> tuple[Any, None]:
    def criterion(output: Tensor, batch: Any) -> Any:
        raise Broken("at the loss")

    return gm.Objective(objective.predict, criterion), None


BREAKS = {"forward": break_forward, "backward": break_backward, "criterion": break_criterion}


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize(
    "name", ["batchnorm_cnn", "gpt2", "transformer_classifier", "lstm", "checkpointed", "weight_norm"]
)
def test_a_failure_half_way_leaves_nothing(run: Callable, name: str, where: str) -> None:
    case = CASES[name]
    own = case.make_model(0).eval()
    given, layouts = batches(name, [2, 1], torch.float32), LAYOUTS.get(name)
    objective, handle = BREAKS[where](own, objective_of(case))
    before = snapshot(own)
    with pytest.raises(Broken):
        run(own, given, objective, layouts=layouts)
    own.zero_grad()
    after = snapshot(own)
    assert_same(before, after)
    if handle is not None:
        handle.remove()
    # And the next capture is not disturbed.
    stats = gm.capture(
        own, batches(name, [2, 1, 3], torch.float32), objective_of(case), fisher="empirical", layouts=layouts
    )
    same(stats, capture(name, [2, 1, 3], torch.float32), 1e-6)


def test_batches_that_fail_half_way(run: Callable) -> None:
    def some() -> Iterator:
        yield data()[0]
        raise Broken("no more")

    own = model()
    before = snapshot(own)
    with pytest.raises(Broken):
        run(own, some(), CLASSIFY)
    own.zero_grad()
    assert_same(before, snapshot(own))


# --- odd loops --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_only_evaluated_has_no_units() -> None:
    own = model().eval()
    with gm.capturing(own, CLASSIFY) as stats:
        for batch in data():
            CLASSIFY.loss(own, batch)  # logged, with autograd on, and never differentiated
            total, units = CLASSIFY.loss(own, batch)
            (total / units).backward()
    wanted = gm.capture(own, data(), CLASSIFY, fisher="empirical")
    assert stats.units == wanted.units == 6
    assert stats.loss == pytest.approx(wanted.loss)
    for name in wanted:
        torch.testing.assert_close(stats[name].G.matrix, wanted[name].G.matrix, rtol=1e-5, atol=1e-8)


def test_a_gradient_penalty_is_not_part_of_G() -> None:
    own = model().double().eval()
    given = batches("mlp", [2, 1, 3], torch.float64)
    wanted = gm.capture(own, given, CLASSIFY, fisher="empirical")

    def step(x: Tensor, y: Tensor) -> None:
        x = x.clone().requires_grad_()
        total, units = CLASSIFY.loss(own, (x, y))
        mean = total / units
        (slope,) = torch.autograd.grad(mean, x, create_graph=True)
        (slope.square().sum() * 3).backward()

    outcomes = []
    for watch in (False, True):
        own.zero_grad()
        if watch:
            with gm.capturing(own, CLASSIFY) as stats:
                for batch in given:
                    step(*batch)
            for name in wanted:
                torch.testing.assert_close(stats[name].G.matrix, wanted[name].G.matrix, rtol=1e-10, atol=1e-14)
        else:
            for batch in given:
                step(*batch)
        outcomes.append([p.grad.clone() for p in own.parameters() if p.grad is not None])
    for plain, watched in zip(*outcomes, strict=True):
        torch.testing.assert_close(watched, plain, rtol=1e-12, atol=1e-15)


def test_two_captures_at_once() -> None:
    own = CASES["transformer_classifier"].make_model(0).double().eval()
    given = batches("transformer_classifier", [2, 1, 3], torch.float64)
    outer, inner = gm.Objective.classification(), gm.Objective.classification()
    with gm.capturing(own, outer) as first, gm.capturing(own, inner, fisher="sampled") as second:
        for batch in given:
            output = own(batch[0])
            inner.criterion(output, batch)
            outer.criterion(output, batch)[0].backward()
    wanted = capture("transformer_classifier", [2, 1, 3], torch.float64)
    same(first, wanted, 1e-10)
    sampled = gm.capture(own, given, inner, fisher="sampled")
    same(second, sampled, 1e-10)


def test_a_user_s_own_hooks_stay_and_see_what_they_saw() -> None:
    own, seen = model(), []
    own[0].register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    own[2].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
    before = snapshot(own)
    batch = data()[0]
    CLASSIFY.loss(own, batch)[0].backward()
    plain, seen[:] = list(seen), []
    own.zero_grad()
    live(own, [batch], gm.Objective(CLASSIFY.predict, lambda o, b: (F.cross_entropy(o, b[1], reduction="sum"), 1)))
    assert_same(before, snapshot(own))
    assert len(seen) == len(plain) == 2
    for x, y in zip(seen, plain, strict=True):
        assert torch.equal(x, y)


def test_a_users_hook_on_a_layers_output_runs_as_before() -> None:
    class Hooked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            y.register_hook(gradients.append)
            return self[1](y.relu())

    gradients: list[Tensor] = []
    model = Hooked(nn.Linear(64, 5), nn.Linear(5, 10))
    x, y = torch.randn(2, 3, 64, generator=seeded(0)), torch.zeros(2, 3, dtype=torch.long)
    objective = gm.Objective.classification()
    objective.loss(model, (x, y))[0].backward()
    with gm.capturing(model, objective) as stats:
        objective.loss(model, (x, y))[0].backward()
    gm.capture(model, [(x, y)], objective, fisher="empirical")
    assert len(gradients) == 3
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert stats["0.weight"].G is not None
