"""A Gram of parts is that of the whole, and no scale of the vectors underflows or overflows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import gramian as gm
from cases import DEVICES, seeded
from gramian import DiagonalGram, Gram, Statistics
from gramian.checkpoint import save_tensors
from gramian.errors import CheckpointError, InputError, ShapeError
from gramian.site import Site
from zoo import ZOO

SPLITS = {"one": [40], "ones": [1] * 40, "uneven": [3, 0, 30, 7]}


def rows(n: int, d: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_streaming_is_the_second_moment(split: str, dtype: torch.dtype, device: str) -> None:
    x = rows(40, 5, dtype).to(device)
    gram = Gram(5, device=device)
    for part in x.split(SPLITS[split]):
        gram.update(part)
    wide = x.double()
    # Products are of float32 or wider, for every input dtype.
    tolerance = 40 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(gram.matrix, wide.T @ wide / 40, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gram.mean, wide.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gram.covariance, wide.T.cov(correction=0), rtol=tolerance, atol=tolerance)
    assert gram.count == 40
    assert gram.rms == pytest.approx(float(wide.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=list(SPLITS))
def test_merged_parts_are_the_whole(sizes: list[int]) -> None:
    x = rows(40, 5, torch.float32)
    merged, whole = Gram(5), Gram(5).update(x)
    for part in x.split(sizes):
        merged.merge(Gram(5).update(part))
    torch.testing.assert_close(merged.matrix, whole.matrix, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.mean, whole.mean)
    assert merged.count == whole.count


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e37])
def test_no_scale_underflows_or_overflows(scale: float) -> None:
    x = rows(20, 4, torch.float32, scale)
    gram = Gram(4).update(x)
    wide = x.double()
    exact = wide.T @ wide / 20
    assert exact.diagonal().min() > 0
    torch.testing.assert_close(gram.matrix / scale**2, exact / scale**2, rtol=1e-5, atol=1e-5)
    assert gram.rms > 0
    # Batches of different scale add up.
    mixed = Gram(4).update(x).update(rows(20, 4, torch.float32))
    assert mixed.matrix.isfinite().all()


def test_shapes_of_any_number_of_dimensions() -> None:
    x = rows(24, 3, torch.float32)
    for shaped in (x.view(2, 3, 4, 3), x.view(24, 1, 3), x.view(4, 6, 3)):
        torch.testing.assert_close(Gram(3).update(shaped).matrix, Gram(3).update(x).matrix)
    assert Gram(3).update(x[0]).count == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = rows(6, 3, torch.float32)
    x[2, 1] = bad
    gram = Gram(3).update(x)
    assert not gram.matrix[1, 1].isfinite()
    assert gram.matrix[0, 0].isfinite()
    assert not gram.update(rows(6, 3, torch.float32)).matrix[1, 1].isfinite()


def test_empty_and_weighted_counts() -> None:
    assert torch.equal(Gram(3).matrix, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(Gram(3).update(torch.ones(0, 3)).mean, torch.zeros(3, dtype=torch.float64))
    assert Gram(0).update(torch.ones(4, 0)).rms == 0
    assert Gram(1).update(torch.ones(4, 1), count=0.5).matrix.item() == 8


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10])
@pytest.mark.parametrize("centered", [False, True])
def test_roots_are_of_the_damped_second_moment(centered: bool, scale: float) -> None:
    x = torch.stack([rows(3, 5, torch.float64), rows(40, 5, torch.float64, seed=1)[:3]]) * scale  # of rank 3
    x = torch.cat([x, torch.zeros(1, 3, 5)])  # and a zero one in the same batch
    gram = Gram(5, (3,)).update(x)
    root, inverse = gram.roots(0.1, centered=centered)
    m = gram.covariance if centered else gram.matrix
    eye = torch.eye(5, dtype=torch.float64)
    damped = m + 0.1 * m.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    torch.testing.assert_close((root @ root / scale**2)[:2], (damped / scale**2)[:2])
    torch.testing.assert_close((root @ inverse)[:2], eye.expand(2, 5, 5))
    assert torch.equal(root[2], eye)
    assert torch.equal(inverse[2], eye)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="damping must be finite"):
            gram.roots(bad)


def test_decay_makes_a_moving_average() -> None:
    x = rows(2, 3, torch.float64)
    gram = Gram(3).update(x[:1]).decay(0.25).update(x[1:])
    expected = (0.25 * torch.outer(x[0], x[0]) + torch.outer(x[1], x[1])) / 1.25
    torch.testing.assert_close(gram.matrix, expected)


def test_updates_leave_their_input_and_its_graph_alone() -> None:
    x = rows(5, 3, torch.float32).requires_grad_()
    before = x.detach().clone()
    assert not Gram(3).update(x).matrix.requires_grad
    assert torch.equal(x.detach(), before)


def test_diagonal_gram_is_the_gram_of_one_hot_rows() -> None:
    index = torch.randint(7, (3, 11), generator=seeded(0))
    one_hot = torch.nn.functional.one_hot(index, 9).double().reshape(-1, 9)
    diagonal = DiagonalGram(9).update(index[:1]).merge(DiagonalGram(9).update(index[1:]))
    torch.testing.assert_close(torch.diag(diagonal.diagonal), one_hot.T @ one_hot / 33)
    assert diagonal.diagonal.sum() == pytest.approx(1)
    assert torch.equal(DiagonalGram(2).diagonal, torch.zeros(2, dtype=torch.float64))


def test_errors_show_the_shapes() -> None:
    with pytest.raises(ShapeError, match=r"expected \(\.\.\., 3\), got \(5, 4\)"):
        Gram(3).update(torch.ones(5, 4))
    with pytest.raises(ShapeError, match=r"3,\) and \(4"):
        Gram(3).merge(Gram(4))
    with pytest.raises(ShapeError, match=r"3,\) and \(4"):
        DiagonalGram(3).merge(DiagonalGram(4))


def test_statistics_are_a_mapping_of_sites() -> None:
    stats = Statistics({"a.weight": [Site(calls=3)]})
    assert list(stats) == ["a.weight"]
    assert stats["a.weight"].calls == 3
    assert stats.get("b.weight") is None
    assert "b.weight" not in stats
    with pytest.raises(InputError, match=r"no block is named 'b\.weight'; the first are a\.weight"):
        stats["b.weight"]
    assert gm.Gram is Gram


@pytest.mark.parametrize("name", ["gpt2", "lstm", "batchnorm_cnn"])
def test_merged_files_equal_one_pass(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    objective, batches = getattr(gm.Objective, case.objective)(), case.make_batches(0)[:3]
    parts = [gm.capture(case.make_model(0), part, objective, fisher="empirical") for part in (batches[:1], batches[1:])]
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.safetensors")
    first, second = (Statistics.load(tmp_path / f"{i}.safetensors") for i in range(2))
    for name, sites in parts[0].items():
        for mine, read in zip(sites, first[name], strict=True):
            assert (mine.key, mine.calls, mine.reason) == (read.key, read.calls, read.reason)
            for side in "AG":
                a, b = getattr(mine, side), getattr(read, side)
                assert a is b is None or all(map(torch.equal, a.tensors(), b.tensors()))
    whole = gm.capture(case.make_model(0), batches, objective, fisher="empirical")
    merged = first.merge(second)
    assert (merged.units, merged.loss) == (whole.units, pytest.approx(whole.loss))
    for mine, wanted in zip(merged.sites(), whole.sites(), strict=True):
        assert (mine.key, mine.calls) == (wanted.key, wanted.calls)
        for side in "AG":
            a, b = getattr(mine, side), getattr(wanted, side)
            for x, y in () if a is None else zip(a.tensors(), b.tensors(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * float(y.abs().max()))


def test_merging_refuses_other_shapes_and_kinds(tmp_path: Path) -> None:
    one = Statistics({"w": [Site(A=Gram(2).update(torch.eye(2)), name="w", op="linear")]}, units=1.0)
    with pytest.raises(ShapeError, match="dimensions differ"):
        one.merge(Statistics({"w": [Site(A=Gram(3).update(torch.eye(3)), name="w", op="linear")]}, units=1.0))
    with pytest.raises(InputError, match="'empirical' here and 'sampled' there"):
        one.merge(Statistics(units=1.0, fisher="sampled"))
    save_tensors(tmp_path / "model.safetensors", {"w": torch.eye(2)})
    with pytest.raises(CheckpointError, match="not statistics of gramian"):
        Statistics.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("n", [100, 700])
def test_bfloat16_products_are_within_their_bound(n: int, scale: float) -> None:
    x = rows(n, 300, torch.float32, scale)
    exact = x.double().T @ x.double()
    got = gm.linalg.syrk(x / scale, precision="bfloat16").double() * scale**2
    root = exact.diagonal().sqrt()
    assert not torch.equal(got, exact)
    assert ((got - exact).abs() <= 2.0**-7 * torch.outer(root, root)).all()
    assert torch.equal(got, got.T)
    with pytest.raises(InputError, match="precision"):
        gm.linalg.syrk(x, precision="int8")
