"""The zoo is fit to test with: it learns, repeats itself, and is small and fast."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import Operations
from zoo import CONTEXT, VOCABULARY, ZOO, ZooCase, deep_tanh_mlp, tokens
from zoo_modules import IGNORED, MODULES, PADDING, padded_tokens

CASES = ZOO | MODULES


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> ZooCase:
    return request.param


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_lowers_the_loss(case: ZooCase, optimizer: str) -> None:
    model, batch = case.make_model(0).eval(), case.make_batches(0)[0]  # no dropout: the step is judged, not its noise
    stepper = OPTIMIZERS[optimizer](model.parameters())
    before = case.loss(model, batch)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    stepper.step()
    assert case.loss(model, batch) < before


# all but the one that is there because it does not train
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"deep_tanh_mlp"}))
def test_training_beats_guessing(name: str) -> None:
    case = CASES[name]
    model, batches = case.make_model(0), case.make_batches(0)
    torch.manual_seed(0)  # dropout
    first = sum(case.loss(model, batch).item() for batch in batches)
    stepper = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(10):
        for batch in batches:
            stepper.zero_grad()
            case.loss(model, batch).backward()
            stepper.step()
    assert sum(case.loss(model, batch).item() for batch in batches) < 0.8 * first


def test_a_seed_fixes_model_and_data(case: ZooCase) -> None:
    state = torch.get_rng_state()
    models, batches = [case.make_model(1).eval() for _ in range(2)], [case.make_batches(1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for (x, y), (x_again, y_again) in zip(*batches, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    x = batches[0][0][0]
    once, again, twin = models[0](x), models[0](x), models[1](x)
    assert torch.equal(once, again)
    assert torch.equal(once, twin)
    other = case.make_model(2)
    assert not all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))
    assert not torch.equal(x, case.make_batches(2)[0][0])


def test_small_and_cheap(case: ZooCase) -> None:
    model, batch = case.make_model(0), case.make_batches(0)[0]
    assert sum(p.numel() for p in model.parameters()) < 200_000
    case.loss(model, batch).backward()
    with Operations() as done:
        case.loss(model, batch).backward()
    assert done.count < 5_000
    assert done.entries < 2e7


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.objective == "next_token"])
def test_language_models_see_only_the_past(name: str) -> None:
    case = ZOO[name]
    model, (x, _) = case.make_model(0).eval(), case.make_batches(0)[0]
    changed = x.clone()
    changed[:, CONTEXT // 2 :] = (changed[:, CONTEXT // 2 :] + 1) % VOCABULARY
    torch.testing.assert_close(model(x)[:, : CONTEXT // 2], model(changed)[:, : CONTEXT // 2])
    assert not torch.allclose(model(x)[:, -1], model(changed)[:, -1])


def test_padding_carries_no_loss_and_no_signal() -> None:
    case = MODULES["padded"]
    model, (x, y) = case.make_model(0), padded_tokens(0)[0]
    assert torch.equal(y == IGNORED, x == PADDING)
    lengths = (x != PADDING).sum(1)
    assert lengths.unique().numel() > 3
    alone = [case.loss(model, (x[i : i + 1, :n], y[i : i + 1, :n])) * n for i, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(torch.stack(alone).sum() / lengths.sum(), case.loss(model, (x, y)))


def test_tokens_follow_one_language() -> None:
    followers: dict[int, set[int]] = {}
    for seed in range(3):
        for x, y in tokens(seed):
            for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
                followers.setdefault(a, set()).add(b)
    assert max(map(len, followers.values())) == 2


def test_gpt2_head_is_tied_and_depth_is_a_parameter() -> None:
    model = ZOO["gpt2"].make_model(0)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("wte.weight")
    assert sum(isinstance(layer, torch.nn.Tanh) for layer in deep_tanh_mlp(depth=50).modules()) == 50


def test_deep_tanh_vanishes() -> None:
    case = ZOO["deep_tanh_mlp"]
    model = case.make_model(0)
    case.loss(model, case.make_batches(0)[0]).backward()
    gradients = [p.grad.norm().item() for p in model.parameters() if p.grad is not None and p.ndim == 2]
    assert math.log10(gradients[-1] / gradients[0]) > 2
