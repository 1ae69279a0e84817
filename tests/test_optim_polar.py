"""How the polar factor of a step is computed: accurate by every approach, chosen once, and replayed on resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from gramian import random
from gramian.errors import InputError
from gramian.linalg.polar_factor.few_operations import few_operations
from gramian.linalg.polar_factor.few_passes import few_passes
from gramian.linalg.polar_factor.newton_schulz import composed
from gramian.optim import SOAP, Muon
from gramian.optim import polar as module
from gramian.optim.polar import approaches, polar

CPU = torch.device("cpu")
Method = Callable[..., Tensor]


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


@pytest.mark.parametrize("method", [few_passes, few_operations])
@pytest.mark.parametrize("first", [5, 9])
@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12), (25, 20)])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_both_ways_are_the_composed_polynomials(shape: tuple[int, int], steps: int, first: int, method: Method) -> None:
    x = random.normal(2, *shape, generator=seeded(1), dtype=torch.float32)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.pow(4).sum(-1, keepdim=True).pow(0.25) / 1.01
    for i, coefficients in enumerate(composed(1 / 200, steps, first).coefficients):
        s = s / (1.0 if i == steps - 1 else 1.01)
        s = sum(c * s ** (2 * k + 1) for k, c in enumerate(coefficients))
    found = method(x, low=1 / 200, steps=steps, first=first)
    torch.testing.assert_close(found.double(), u * s[:, None] @ vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("low", [1 / 20, 1 / 200, 1 / 2000])
def test_the_first_of_degree_nine_is_minimax(low: float) -> None:
    """It equioscillates at six points, which no other odd polynomial of degree nine can better."""
    (coefficients,), error = composed(low, 1, first=9)
    x = torch.linspace(low, 1, 100001, dtype=torch.float64)
    off = sum(c * x ** (2 * k + 1) for k, c in enumerate(coefficients)) - 1
    assert float(off.abs().max()) == pytest.approx(error, rel=1e-6)
    signs = off[off.abs() > error * (1 - 1e-6)].sign()
    assert int((signs[1:] != signs[:-1]).sum()) == 5
    assert error < composed(low, 1).error


@pytest.mark.parametrize("method", [few_passes, few_operations])
def test_results_do_not_share_memory(method: Method) -> None:
    x = random.normal(2, 20, 40, generator=seeded(3), dtype=torch.float32)
    for same in (x, x.mT, x[..., :20]):
        first = method(same, low=1 / 200, steps=4)
        before = first.clone()
        method(2 * same.flip(-1), low=1 / 200, steps=4)
        assert torch.equal(first, before)
        into = same.contiguous().clone()
        assert method(into, low=1 / 200, steps=4, out=into) is into
        torch.testing.assert_close(into, before, rtol=0, atol=1e-5)


def test_a_small_matrix_is_the_same_beside_any_neighbor() -> None:
    """To the bit, also where a neighbor is zero or of another size, and has to be scaled."""
    x = random.normal(3, 6, 9, generator=seeded(5), dtype=torch.float32)
    alone = few_operations(x, low=1 / 200, steps=4)
    for factor in (0.0, 1e-30, 1e30):
        beside = few_operations(x * torch.tensor([1.0, factor, 1.0])[:, None, None], low=1 / 200, steps=4)
        assert torch.equal(beside[0], alone[0])
        torch.testing.assert_close(beside[1], alone[1] * (factor > 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (100, 400), (300, 110)])
@pytest.mark.parametrize("decades", [0, 2, 3, 4])
def test_the_steps_are_as_orthogonal_as_those_of_torch(shape: tuple[int, int], decades: int) -> None:
    """On normal entries, and where singular values fall evenly by decades; by what the cost model chooses."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = random.normal(12, *shape, generator=seeded(4), dtype=torch.float32)
    if decades:
        spectrum = torch.logspace(0, -decades, min(shape), dtype=torch.float64)
        x = random.with_spectrum(12, *shape, spectrum=spectrum, generator=seeded(4), dtype=torch.float32)
    torchs = torch.stack([_zeropower_via_newtonschulz(a, (3.4445, -4.775, 2.0315), 5, 1e-7) for a in x])
    for name in names(f"{min(shape)}x{max(shape)}", 0.125):
        found = polar(x, {"rtol": 0.125, "approaches": f"{min(shape)}x{max(shape)} {name}"})
        assert deviation(found) < deviation(torchs), name
        if "fractions" not in name:  # none is thrown out of the interval of a step
            assert float(torch.linalg.svdvals(found).amax()) < 1.35, name


@pytest.mark.parametrize("rtol", [0.05, 0.125, 0.25])
@pytest.mark.parametrize("shape", [(96, 96), (240, 96)])
def test_no_singular_value_of_low_rank_is_thrown_out_in_bfloat16(shape: tuple[int, int], rtol: float) -> None:
    """As momenta have where units are dead: σ₁ is then at the end of the interval of the first step, which rounds."""
    generator = seeded(6)
    for rank in (2, 4, 6):
        x = random.normal(60, shape[0], rank, generator=generator, dtype=torch.float32)
        x = x @ random.normal(60, rank, shape[1], generator=generator, dtype=torch.float32)
        for method, first in module.FIRST.items():
            steps, low = module._fewest(method, rtol)
            found = few_passes(x, low=low, steps=steps, first=first, dtype=torch.bfloat16)
            most = float(torch.linalg.matrix_norm(found, 2).amax())
            assert most < 1 + composed(low, steps, first).error + 0.06, (method, rank)


@pytest.mark.parametrize("method", [few_passes, few_operations])
def test_zeros_stay_and_nan_does_not_spread(method: Method) -> None:
    x = random.normal(3, 6, 20, generator=seeded(2), dtype=torch.float32)
    x[1], x[2, 0, 0] = 0.0, math.nan
    y = method(x, low=1 / 200, steps=5)
    assert not y[1].any()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[:1], method(x[:1], low=1 / 200, steps=5), rtol=0, atol=1e-5)
    assert method(x[:, :0], low=0.1, steps=2).shape == (3, 0, 20)


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
    unit = "bfloat16" not in before
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": unit})
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


@pytest.mark.parametrize(("unit", "few"), [("avx512_bf16", "float32"), ("amx_bf16", "bfloat16")])
def test_a_few_small_matrices_are_multiplied_in_bfloat16_only_by_a_matrix_unit(
    unit: str, few: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an EPYC with instructions for bfloat16, one of 100 × 100 takes 0.6 of the time in float32, and four 1.2."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    module._approach.cache_clear()
    try:
        options = {"approach": "predicted", "rtol": 0.125}
        found = [approaches([(100, 100)] * num, CPU, options) for num in (1, 4)]
        assert [text.rpartition(" ")[2] for text in found] == [few, "bfloat16"]
        assert approaches([(100, 100)], CPU, {**options, "approaches": found[1]}) == found[1]
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
