"""How the polar factor of a step is computed: accurate by every approach, chosen once, and replayed on resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from gramian import random
from gramian.errors import InputError
from gramian.linalg.polar_factor.few_passes import few_passes
from gramian.linalg.polar_factor.newton_schulz import composed
from gramian.optim import SOAP, Muon
from gramian.optim import polar as module
from gramian.optim.polar import approaches, polar

CPU = torch.device("cpu")


def names(shape: str, rtol: float = 0.125) -> list[str]:
    short, long = map(int, shape.split("x"))
    return module._names(short, long, rtol)


def deviation(x: Tensor) -> float:
    return float((torch.linalg.svdvals(x.double()) - 1).square().mean().sqrt())


@pytest.mark.parametrize("rtol", [0.125, 0.03, 1e-4])
@pytest.mark.parametrize("shape", [(96, 96), (40, 100), (400, 100), (100, 400)])
def test_every_approach_reaches_rtol(shape: tuple[int, int], rtol: float) -> None:
    """Where σ/σ₁ falls evenly to 1/300, and on any scale."""
    short, long = min(shape), max(shape)
    spectrum = torch.logspace(0, -math.log10(300), short, dtype=torch.float64)
    x = random.with_spectrum(3, *shape, spectrum=spectrum, generator=seeded(0), dtype=torch.float32)
    x = x * torch.tensor([1.0, 1e-30, 1e30])[:, None, None]
    for name in names(f"{short}x{long}", rtol):
        y = polar(x, {"rtol": rtol, "approaches": f"{short}x{long} {name}"})
        assert deviation(y) <= 1.2 * rtol, name
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        assert float((y.double() - u @ vh).square().mean().sqrt()) <= 1.3 * rtol * (short / math.prod(shape)) ** 0.5, (
            name
        )


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_few_passes_are_the_composed_quintics(shape: tuple[int, int], steps: int) -> None:
    x = random.normal(2, *shape, generator=seeded(1), dtype=torch.float32)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.pow(4).sum(-1, keepdim=True).pow(0.25) / 1.01
    for i, (a, b, c) in enumerate(composed(1 / 200, steps).coefficients):
        s = s / (1.0 if i == steps - 1 else 1.01)
        s = s * (a + s**2 * (b + s**2 * c))
    torch.testing.assert_close(few_passes(x, low=1 / 200, steps=steps).double(), u * s[:, None] @ vh, rtol=0, atol=1e-4)


def test_zeros_stay_and_nan_does_not_spread() -> None:
    x = random.normal(3, 6, 20, generator=seeded(2), dtype=torch.float32)
    x[1], x[2, 0, 0] = 0.0, math.nan
    y = few_passes(x, low=1 / 200, steps=5)
    assert not y[1].any()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[:1], few_passes(x[:1], low=1 / 200, steps=5), rtol=0, atol=1e-5)
    assert few_passes(x[:, :0], low=0.1, steps=2).shape == (3, 0, 20)


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 2))


def step(model: nn.Module, optimizer: Muon, seed: int) -> None:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=seeded(seed))
    optimizer.step()


def test_what_was_measured_stands_in_the_state_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", {})
    one, two = net(), net()
    measured = Muon(one, approach="measured")
    found = module._read(measured.param_groups[0]["approaches"], "cpu")
    assert found.keys() == {"100x100", "100x200"}
    assert all(found[key] in names(key) for key in found)
    replaced = {key: next(n for n in names(key) if n != name) for key, name in found.items()}
    measured.param_groups[0]["approaches"] = other = f"measured on cpu: {', '.join(map(' '.join, replaced.items()))}"
    step(one, measured, 0)
    resumed = Muon(two, approach="measured")
    two.load_state_dict(one.state_dict())
    resumed.load_state_dict(copy.deepcopy(measured.state_dict()))
    assert resumed.param_groups[0]["approaches"] == other
    for model, optimizer in ((one, measured), (two, resumed)):
        step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_was_predicted_is_replayed_where_another_processor_would_choose_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = net(), net()
    optimizer = Muon(one)
    step(one, optimizer, 0)
    before = optimizer.param_groups[0]["approaches"]
    slow = module.defaults("cpu").factors["bfloat16"][0] > 1
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": slow})
    module._approach.cache_clear()
    try:
        resumed = Muon(two)
        assert resumed.param_groups[0]["approaches"] != before
        two.load_state_dict(one.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, each in ((one, optimizer), (two, resumed)):
            step(model, each, 1)
        assert resumed.param_groups[0]["approaches"] == before
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    finally:
        module._approach.cache_clear()


def test_what_was_chosen_for_another_device_does_not_count() -> None:
    text = "predicted on cuda: 100x200 quintics 5 bfloat16"
    assert module._read(text, "cpu") == {}
    assert module._read(text, "cuda") == {"100x200": "quintics 5 bfloat16"}


def test_nothing_is_measured_unless_asked_nor_beyond_the_time() -> None:
    assert Muon(net()).param_groups[0]["approaches"].startswith("predicted on cpu: ")
    huge = approaches([(20_000, 50_000)] * 8, CPU, {"approach": "measured", "rtol": 0.125})
    assert huge == f"measured on cpu: 20000x50000 {module._approach(20_000, 50_000, 0.125, 'cpu', None)}"
    with pytest.raises(InputError, match="approach='measured' is for Muon"):
        SOAP(net(), approach="measured")
    optimizer = Muon(model := net())
    for approach in ("measured", "predicted"):  # later too
        optimizer.param_groups[0]["approach"] = approach
        step(model, optimizer, 0)
        text = optimizer.param_groups[0]["approaches"]
        assert text.startswith(approach)
        assert module._read(text, "cpu").keys() == {"100x100", "100x200"}
    optimizer.param_groups[0]["approach"] = "guessed"
    with pytest.raises(InputError, match="approach must be 'predicted' or 'measured'"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_passes_do_not_depend_on_the_scale(dtype: torch.dtype) -> None:
    """Where the squares of a Gram matrix's entries leave float32's range, too."""
    a = torch.randn(2, 20, 33, generator=torch.Generator().manual_seed(0))
    wanted = few_passes(a, low=0.02, steps=5, dtype=dtype)
    for exponent in range(-120, 121, 4):
        found = few_passes(a * 2.0**exponent, low=0.02, steps=5, dtype=dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
