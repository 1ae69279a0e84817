"""A, G and their means of every use of every matrix in the zoo are those of a naive float64 loop over samples."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import gramian as gm
from naive_capture import Index, Key, Moments, moments, samples
from zoo import ZOO, Batch, ZooCase
from zoo_modules import MODULES, PADDING

CASES = ZOO | MODULES
SIZES = {"whole": [6], "ones": [1] * 6, "uneven": [2, 1, 3]}

LAYOUTS = {
    "gpt2": {"*.c_attn.weight": "i (three o) -> three o i"},
    "mixture_of_experts": {"*.up": "e o i -> e o i", "*.down": "e o i -> e o i"},
    "functional": {"kernel": "o i h w -> o (i h w)"},
}

# Where all samples share a row (an embedding of positions), its gradient is the sum of the samples' gradients.
SHARED = {"gpt2": {"wpe.weight"}}

# Matrices that no vector is multiplied by.
NOT_PRODUCTS = {
    "transformer_classifier": {"position"},
    "transformer_lm": {"position.weight"},
    "cross_attention": {"query"},
    "encoder_decoder": {"query"},
}


@cache
def data(name: str) -> tuple[Tensor, Tensor]:
    x, y = CASES[name].make_batches(0)[0]
    return x[:6], y[:6]


@cache
def oracle(name: str, padding: int | None = None):
    return samples(CASES[name], CASES[name].make_model(0), *data(name), padding)


def batches(name: str, sizes: list[int], dtype: torch.dtype) -> list[Batch]:
    parts = zip(*(t[: sum(sizes)].split(sizes) for t in data(name)), strict=True)
    return [tuple(t.to(dtype) if t.is_floating_point() else t for t in part) for part in parts]


def wanted(name: str, sizes: list[int], padding: int | None = None) -> dict[Key, tuple[Moments, Moments]]:
    """The second and first moments, and counts, of inputs and of output gradients, by use and by matrix."""
    return moments_of(name, tuple(sizes) if name in SHARED else (), padding)


@cache
def moments_of(name: str, sizes: tuple[int, ...], padding: int | None) -> dict[Key, tuple[Moments, Moments]]:
    """As `wanted`; the sizes of batches, which most models do not depend on, where they count."""
    found, _, units = oracle(name, padding)
    result = {}
    for key in {key: None for sample in found for key in sample}:
        sides = []
        for side in (0, 1):
            rows: dict[Index, list[Tensor]] = {}
            for sample in found:
                for index, part in sample[key][side].items():
                    rows.setdefault(index, []).append(part)
            if key[0] in SHARED.get(name, ()):
                batched = {index: torch.stack(many).split(sizes) for index, many in rows.items()}
                rows = {i: [b[0] if side == 0 else b.sum(0) for b in many] for i, many in batched.items()}
            sides.append({index: moments(many) for index, many in rows.items()})
        sides[1] = {index: (second, first, float(sum(units))) for index, (second, first, _) in sides[1].items()}
        result[key] = tuple(sides)
    return result


def base_name(name: str) -> str:
    """`layer.weight` for what a parametrization calls `layer.parametrizations.weight.original1`."""
    before, _, after = name.partition("parametrizations.")
    return before + after.partition(".")[0] if after else name


def uses(stats: gm.Statistics) -> dict[Key, gm.statistics.Site]:
    """The sites of `stats` that have inputs."""
    found = {}
    for name, sites in stats.items():
        for site in sites:
            if site.A is not None:
                key = (base_name(name), site.transposed)
                assert key not in found, f"{key} twice"
                found[key] = site
    return found


def close(got: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    assert got.shape == expected.shape, what
    worst = (got - expected).abs().max()
    assert worst <= rtol * expected.abs().max(), f"{what}: off by {worst / expected.abs().max():.1e}"


def same_moments(gram: gm.Gram | gm.DiagonalGram, expected: Moments, rtol: float, what: str) -> None:
    assert (gram.batch == ()) == (set(expected) == {None}), what
    if gram.batch:
        assert set(expected) == set(range(gram.batch[0])), what
        assert len(gram.batch) == 1
    for index, (second, first, count) in expected.items():
        pick = (lambda t: t) if index is None else (lambda t: t[index])  # noqa: B023
        assert pick(gram.count) == pytest.approx(count), what
        matrix = second.diagonal() if isinstance(gram, gm.DiagonalGram) else second
        close(pick(gram.diagonal if isinstance(gram, gm.DiagonalGram) else gram.matrix), matrix / count, rtol, what)
        # A mean may cancel: its error is relative to the size of the terms.
        error = (pick(gram.mean) - first / count).abs().max()
        assert error <= rtol * (second.diagonal().max() / count).sqrt() * max(1, count) ** 0.5, f"mean of {what}"


def check(stats: gm.Statistics, expected: dict[Key, tuple[Moments, Moments]], rtol: float, name: str = "") -> None:
    alias = {key: (stats.aliases.get(key[0], key[0]), key[1]) for key in expected}
    found = uses(stats)
    assert set(found) == set(alias.values())
    for key, (a, g) in expected.items():
        site = found[alias[key]]
        assert site.G is not None, (key, site.reason)
        same_moments(site.A, a, rtol, f"A of {key}")
        same_moments(site.G, g, rtol, f"G of {key}")
    silent = {name for name, sites in stats.items() if all(site.A is None for site in sites)}
    assert silent == NOT_PRODUCTS.get(name, set())
    assert all(site.reason for name in silent for site in stats[name])


def objective_of(case: ZooCase, **options) -> gm.Objective:
    return getattr(gm.Objective, case.objective)(**options)


def capture(name: str, sizes: list[int], dtype: torch.dtype, **options) -> gm.Statistics:
    case = CASES[name]
    model = case.make_model(0).to(dtype)
    objective = objective_of(case, **options)
    layouts = LAYOUTS.get(name)
    return gm.capture(model, batches(name, sizes, dtype), objective, fisher="empirical", layouts=layouts)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_use_agrees_with_the_naive_loop(name: str, sizes: str) -> None:
    stats = capture(name, SIZES[sizes], torch.float64)
    check(stats, wanted(name, SIZES[sizes]), 1e-10, name)
    _, totals, units = oracle(name)
    assert stats.units == sum(units)
    assert stats.loss == pytest.approx(sum(totals) / sum(units), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_in_float32(name: str) -> None:
    check(capture(name, [2, 1, 3], torch.float32), wanted(name, [2, 1, 3]), 2e-5, name)


@pytest.mark.parametrize("sizes", SIZES)
def test_padding_does_not_count(sizes: str) -> None:
    stats = capture("padded", SIZES[sizes], torch.float64, padding=PADDING)
    expected = wanted("padded", SIZES[sizes], PADDING)
    lengths = (data("padded")[0] != PADDING).sum()
    assert stats["head.weight"].A.count == lengths < data("padded")[0].numel()
    check(stats, expected, 1e-10, "padded")
