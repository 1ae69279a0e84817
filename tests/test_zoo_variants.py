"""A zoo model computes the same however it is wrapped: the loss, and on two ranks the gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import run_on_ranks
from gramian import placement
from zoo import ZOO
from zoo_modules import MODULES
from zoo_variants import VARIANTS

CASES = ZOO | MODULES


def _loss_and_gradients(variant: str, name: str) -> tuple[float, list[Tensor | None]]:
    """In evaluation mode, of one batch, the same on all ranks."""
    case, how = CASES[name], VARIANTS[variant]
    model = how.wrap(case.make_model(0).eval())
    with how.context():
        loss = case.loss(model, case.make_batches(0)[0])
    loss.backward()
    gradients = [None if p.grad is None else placement.whole(p.grad) for p in model.parameters()]
    return loss.item(), gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", [name for name, how in VARIANTS.items() if how.num_ranks == 1 and name != "plain"])
def test_same_loss_on_one_rank(variant: str, name: str) -> None:
    loss, _ = _loss_and_gradients(variant, name)
    plain, _ = _loss_and_gradients("plain", name)
    assert loss == pytest.approx(plain, rel=VARIANTS[variant].rtol)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", [name for name, how in VARIANTS.items() if how.num_ranks == 2])
def test_same_loss_and_gradients_on_two_ranks(variant: str, name: str) -> None:
    plain, gradients = _loss_and_gradients("plain", name)
    for loss, found in run_on_ranks(_loss_and_gradients, 2, variant, name):
        assert loss == pytest.approx(plain, rel=VARIANTS[variant].rtol)
        for ours, wanted in zip(found, gradients, strict=True):
            assert (ours is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def _shard_sizes() -> set[tuple[int, int]]:
    sizes = set()
    for case in CASES.values():
        for parameter in VARIANTS["fsdp2"].wrap(case.make_model(0)).parameters():
            sizes.add((parameter.shape[0], placement.local(parameter).shape[0]))
    return sizes


def test_shards_are_even_uneven_and_empty() -> None:
    first, second = run_on_ranks(_shard_sizes, 2)
    halves = {(rows, a, b) for rows, a in first for total, b in second if rows == total and a + b == rows}
    assert any(a == b for _, a, b in halves)
    assert any(a > b > 0 for _, a, b in halves)
    assert any(b == 0 for _, a, b in halves)


def test_wrapped_models_are_what_they_are_called() -> None:
    kinds, *_ = run_on_ranks(_kinds, 2)
    assert kinds == {"plain": 0, "autocast": 0, "compiled": 0, "ddp": 0, "fsdp2": 3}
    assert not dist.is_initialized()


def _kinds() -> dict[str, int]:
    """How many sharded groups each variant has."""
    counts = {}
    for name, how in VARIANTS.items():
        model = how.wrap(ZOO["gpt2"].make_model(0))
        counts[name] = sum(type(m).__name__.startswith("FSDP") for m in model.modules())
    return counts
