"""Law 7 of the optimizers: two ranks step as one does, skip together, and resume to the bit from what each saved."""

from __future__ import annotations

import io
import itertools
import math
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from cases import seeded
from directions import checks_of, entry_of, maker, variants
from distributed import run_on_ranks
from gramian import placement
from gramian.optim import SOAP, Muon, Proximal, refresh
from gramian.optim.registry import MATRIX_OPTIMIZERS
from gramian.prox import L1
from zoo import ZOO
from zoo_variants import VARIANTS

# To convergence: a method that stops early amplifies differences in rounding.
OPTIMIZERS = variants(2, exact=True, lr=0.02, weight_decay=0.1)
TWO_RANKS = [name for name, how in VARIANTS.items() if how.num_ranks == 2]
STEPS = 4


def small() -> nn.Sequential:
    """With matrices of one row and one column, which leave a rank without a shard, and two of one shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(),
            nn.Linear(5, 5), nn.Linear(5, 3)
        ).double()  # fmt: skip


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, generator=seeded(step), dtype=torch.float64)
    return x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].square()), 1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, broken: int | None = None) -> None:
    """Each rank takes its share of the batch; in step `broken`, rank 1 gets a NaN in the third layer's weight."""
    rank, size = placement.world()
    for step in steps:
        x, y = (t[rank::size] for t in data(step))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if step == broken and rank == 1:
            weight = dict(model.named_parameters())["5.weight"]
            placement.local(weight.grad)[0, 0] = math.nan
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): placement.whole(p).clone() for name, p in model.named_parameters()}


# ---- on each rank ----------------------------------------------------------------------------------------------------


def _train_small(variant: str, name: str, broken: int | None = None) -> tuple[dict[str, Tensor], dict[str, int]]:
    model = VARIANTS[variant].wrap(small())
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(STEPS), broken)
    return weights(model), {key: row["skipped"] for key, row in optimizer.health().items()}


def _train_zoo(variant: str, case_name: str, name: str, num_ranks: int) -> dict[str, Tensor]:
    case = ZOO[case_name]
    model = VARIANTS[variant].wrap(case.make_model(0).double().eval())  # dropout draws differ between ranks
    optimizer = OPTIMIZERS[name](model)
    rank, size = placement.world()
    for x, y in case.make_batches(0)[:2]:
        optimizer.zero_grad()
        batch = [(t.double() if t.is_floating_point() else t)[:8][rank::size] for t in (x, y)]
        case.loss(model, (batch[0], batch[1])).backward()
        optimizer.step()
    return weights(model)


def _resumes(how: str, name: str, folder: str) -> None:
    """Three steps, saved and restored into a fresh model and optimizer, and two more: the same bits."""
    first = VARIANTS["fsdp2"].wrap(small())
    optimizer = OPTIMIZERS[name](first)
    train(first, optimizer, range(3))
    second = VARIANTS["fsdp2"].wrap(small())
    again = OPTIMIZERS[name](second)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        placement.local(q).copy_(placement.local(p))
    SAVED[how](first, optimizer, second, again, folder)
    for p, q in zip(optimizer.param_groups, again.param_groups, strict=True):
        for key in p.keys() - {"params"}:  # torch.distributed.checkpoint makes lists of tuples
            assert p[key] == (type(p[key])(q[key]) if isinstance(q[key], list) else q[key]), key
    for model, opt in ((first, optimizer), (second, again)):
        train(model, opt, range(3, 5))
    for (key, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(placement.local(p), placement.local(q)), key


def _by_rank(first, optimizer, second, again, folder) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=False))


def _by_checkpoint(first, optimizer, second, again, folder) -> None:
    dcp.save({"optimizer": get_optimizer_state_dict(first, optimizer)}, checkpoint_id=folder)
    state = {"optimizer": get_optimizer_state_dict(second, again)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(second, again, state["optimizer"])


def _by_whole(first, optimizer, second, again, folder) -> None:
    whole = StateDictOptions(full_state_dict=True, cpu_offload=False)
    state = get_optimizer_state_dict(first, optimizer, options=whole)
    assert not any(isinstance(v, DTensor) for entry in state["state"].values() for v in entry.values())
    set_optimizer_state_dict(second, again, state, options=whole)


SAVED = {"by_rank": _by_rank, "by_checkpoint": _by_checkpoint, "by_whole": _by_whole}


def _replicas() -> list[Tensor]:
    """Replicas, as of tensor parallelism, whose gradient is a sum over the ranks; and a proximal map of a shard."""
    mesh = init_device_mesh("cpu", (2,))
    start, grads = torch.ones(4, 4), [torch.randn(4, 4, generator=seeded(i)) for i in range(2)]
    replica = nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()]))
    replica.grad = DTensor.from_local(grads[dist.get_rank()].clone(), mesh, [Partial()])
    optimizer = OPTIMIZERS["muon"]([replica])
    optimizer.step()
    plain = nn.Parameter(start.clone())
    plain.grad = grads[0] + grads[1]
    OPTIMIZERS["muon"]([plain]).step()
    torch.testing.assert_close(placement.local(replica), plain.detach())
    shard = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    proximal = Proximal(Muon([("w", shard)]), {"w": L1(100.0)})
    shard.grad = distribute_tensor(torch.full((4, 4), math.nan), mesh, [Shard(0)])
    proximal.step()
    before = placement.whole(shard)
    shard.grad = distribute_tensor(grads[0], mesh, [Shard(0)])
    proximal.step()
    return [before, placement.whole(shard)]


def _wild_rest() -> list[tuple[Tensor, Tensor, Tensor]]:
    """A head that AdamW steps, its second gradient 10⁶ times too large: sharded, and in replicas of one shard."""
    grads = [torch.randn(4, 4, generator=seeded(i)) for i in range(2)]
    spreads = [((2,), [Shard(0)]), ((2, 1), [Replicate(), Shard(0)])]
    found = []
    for sizes, placements in spreads:
        mesh = init_device_mesh("cpu", sizes)
        head = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, placements))
        optimizer = Muon([("head.weight", head)], routes={"head.weight": "adamw"})
        for g in (grads[0], 1e6 * grads[1]):
            head.grad = distribute_tensor(g, mesh, placements)
            optimizer.step()
        state = optimizer.state[head]
        found.append((placement.whole(head), placement.whole(state["exp_avg_sq"]), state["usual"]))
    return found


def _parts() -> list[dict[str, str]]:
    """What each rank's state holds of the last square matrix, and what a rank saves."""
    model = VARIANTS["fsdp2"].wrap(small())
    optimizer = SOAP(model, refresh=2)
    train(model, optimizer, range(1))
    own = {p: len(state) for p, state in optimizer.state.items()}
    assert sorted(own.values())[0] == 0  # somebody else's
    kinds = []
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    for index, state in optimizer.state_dict()["state"].items():
        kinds.append({"name": names[index]} | {key: type(value).__name__ for key, value in state.items()})
    return kinds


def _loads_elsewhere(folder: str, save: bool) -> dict[str, Tensor]:
    """Saved by two ranks, loaded by one: the matrices' whole states."""
    model = VARIANTS["fsdp2" if save else "plain"].wrap(small())
    optimizer = SOAP(model, refresh=2)
    if save:
        train(model, optimizer, range(3))
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    else:
        loaded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(loaded, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        state = get_optimizer_state_dict(model, optimizer)
    return {f"{p} {k}": v for p, entry in state["state"].items() for k, v in entry.items()}


def _takes_over(sharded: bool, name: str) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    model = VARIANTS["fsdp2" if sharded else "plain"].wrap(small())
    adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    train(model, adamw, range(2))
    optimizer = maker(name, exact=True)(model)
    rows = optimizer.load_adamw(adamw.state_dict())
    state = optimizer.state_dict()["state"]
    numbers = {f"{i} {k}": placement.whole(v).clone() for i, entry in state.items() for k, v in entry.items()}
    if name == "muon":
        train(model, optimizer, range(2, 4))
        numbers |= weights(model)
    return rows, numbers


def _schedules() -> int:
    """With rank 1 twice as slow: alone, rank 0 would choose 88/(200/9 − 2), rank 1 176/(200/9 − 4)."""
    clock = itertools.count()
    slow = 1 + dist.get_rank()
    now = [0.0]

    def tell(group: dict[str, Any]) -> float:
        begins = next(clock) % 2 == 0
        now[0] += 200.0 if begins else slow * (90.0 if group["refresh"] == 1 else 2.0)
        return now[0]

    before, refresh._now = refresh._now, tell
    try:
        model = VARIANTS["fsdp2"].wrap(small())
        optimizer = Muon(model, max_overhead=0.1)
        train(model, optimizer, range(12))
    finally:
        refresh._now = before
    return optimizer.param_groups[0]["refresh"]


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_step_as_one(variant: str, name: str) -> None:
    wanted, _ = _train_small("plain", name)
    for found, skipped in run_on_ranks(_train_small, 2, variant, name):
        assert set(skipped.values()) == {0}
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("case", ["mlp", "gpt2", "mixture_of_experts"])
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_step_as_one_on_the_zoo(variant: str, case: str) -> None:
    _compare_zoo(variant, case, "muon")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if "ranks on singular gradients" not in checks_of(name).exempt]
)
@pytest.mark.parametrize("case", ZOO)
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_step_as_one_on_all_the_zoo(variant: str, case: str, name: str) -> None:
    _compare_zoo(variant, case, name)


def _compare_zoo(variant: str, case: str, name: str) -> None:
    wanted = _train_zoo("plain", case, name, 1)
    for found in run_on_ranks(_train_zoo, 2, variant, case, name, 2):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_on_one_rank_skips_the_parameter_on_all(name: str) -> None:
    first, second = run_on_ranks(_train_small, 2, "fsdp2", name, 1)
    assert first[1] == second[1] == {key: int(key == "5.weight") for key in first[1]}
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert all(value.isfinite().all() for value in first[0].values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", SAVED)
def test_a_sharded_state_resumes_to_the_bit(how: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(_resumes, 2, how, name, folder)


def test_replicas_sum_their_gradients_and_shards_take_proximal_maps() -> None:
    for skipped, mapped in run_on_ranks(_replicas, 2):
        assert torch.equal(skipped, torch.ones(4, 4))
        assert not mapped.any()


def test_a_wild_gradient_of_a_sharded_head_counts_as_that_of_a_whole_one() -> None:
    head = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("head.weight", head)], routes={"head.weight": "adamw"})
    for spike, seed in ((1.0, 0), (1e6, 1)):
        head.grad = spike * torch.randn(4, 4, generator=seeded(seed))
        optimizer.step()
    wanted = head.detach(), optimizer.state[head]["exp_avg_sq"], optimizer.state[head]["usual"]
    assert wanted[1].max() < 100 * optimizer.state[head]["usual"] ** 2
    for by_rank in run_on_ranks(_wild_rest, 2):
        for found in by_rank:
            torch.testing.assert_close(found, wanted)


def test_ranks_agree_on_the_schedule_of_the_slowest() -> None:
    assert run_on_ranks(_schedules, 2) == [math.ceil(176 / (200 / 9 - 4))] * 2


def test_every_rank_saves_its_part() -> None:
    first, second = run_on_ranks(_parts, 2)
    assert first == second
    rows = {row["name"]: row for row in first}
    assert rows["5.weight"]["left_basis"] == rows["5.weight"]["momentum"] == "DTensor"
    assert rows["5.weight"]["unit"] == "Tensor"
    assert rows["5.bias"]["exp_avg"] == "DTensor"


def test_what_two_ranks_saved_one_process_loads() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted, _ = run_on_ranks(_loads_elsewhere, 2, folder, True)
        found = _loads_elsewhere(folder, False)
    assert wanted.keys() == found.keys()
    assert any("left_basis" in key for key in wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_an_adamw_state_is_taken_over_by_two_ranks_as_by_one(name: str) -> None:
    wanted_rows, wanted = _takes_over(False, name)
    both = [row["carried"] == "exp_avg, exp_avg_sq, step" for row in wanted_rows if row["direction"] == "matrix"]
    assert both == [len(set(entry_of(name).optimizer.recipe.adamw.values())) == 3] * len(both)
    for rows, found in run_on_ranks(_takes_over, 2, True, name):
        assert rows == wanted_rows
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    assert not dist.is_initialized()
