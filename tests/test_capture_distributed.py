"""Capture on two ranks under DDP and FSDP2 gives the statistics of one process, and the model trains on unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import gramian as gm
from distributed import run_on_ranks
from gramian import placement
from gramian.errors import GramianError, InputError, UnsupportedError
from gramian.statistics import Statistics
from zoo import ZOO, Batch, ZooCase
from zoo_modules import IGNORED, MODULES
from zoo_variants import VARIANTS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as the ranks have: with two, an orthogonal parametrization starts from another rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = ZOO | MODULES
TWO_RANKS = [name for name, how in VARIANTS.items() if how.num_ranks == 2]
SIZES = (11, 5, 1, 16, 7)  # batches of one process; rank r of n takes every n-th, so the first has one more


def _batches(case: ZooCase) -> list[Batch]:
    x, y = (torch.cat(parts) for parts in zip(*case.make_batches(0), strict=True))
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    return list(zip(x[: sum(SIZES)].split(SIZES), y[: sum(SIZES)].split(SIZES), strict=True))


def _model(case: ZooCase) -> nn.Module:
    return case.make_model(0).double()


def _numbers(stats: Statistics) -> dict[str, Any]:
    """All of the statistics, as numbers that can be sent and compared."""
    found: dict[str, Any] = {"units": float(stats.units), "loss": float(stats.loss)}
    for block, sites in stats.items():
        for i, site in enumerate(sites):
            key = f"{block}[{i}] {site.op} as {site.name}{' transposed' if site.transposed else ''}"
            found[f"{key}: reason"] = site.reason
            for side, moment in (("A", site.A), ("G", site.G)):
                parts = [] if moment is None else [t.clone() for t in moment.tensors()]
                found |= {f"{key}: {side}{j}": t for j, t in enumerate(parts)}
    return found


def _one_process(case: ZooCase) -> dict[str, Any]:
    objective = getattr(gm.Objective, case.objective)(fisher="empirical")
    return _numbers(gm.capture(_model(case), _batches(case), objective))


def _each_rank(variant: str, name: str) -> dict[str, Any]:
    case, how = CASES[name], VARIANTS[variant]
    model = how.wrap(_model(case))
    rank, size = placement.world()
    objective = getattr(gm.Objective, case.objective)(fisher="empirical")
    hooks, state = _hooks(model), torch.get_rng_state()
    before = [placement.local(t).clone() for t in (*model.parameters(), *model.buffers())]
    stats = gm.capture(model, _batches(case)[rank::size], objective)
    assert _hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    after = [placement.local(t) for t in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fresh = how.wrap(_model(case))
    for trained in (model, fresh):
        _train(case, trained)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(placement.local(a), placement.local(b))
    return _numbers(stats)


def _train(case: ZooCase, model: nn.Module) -> None:
    rank, _ = placement.world()
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)  # dropout
    case.loss(model, _batches(case)[rank]).backward()
    stepper.step()


def _hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = [sum(len(getattr(m, kind)) for kind in kinds) for m in model.modules()]
    return modules + [len(p._backward_hooks or ()) for p in model.parameters()]


def _compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            scale = float(value.abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
        elif isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-9), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_equal_one_on_the_zoo(variant: str, name: str) -> None:
    wanted = _one_process(CASES[name])
    assert any(isinstance(value, Tensor) for value in wanted.values())
    for found in run_on_ranks(_each_rank, 2, variant, name):
        _compare(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_equal_one_on_single_modules(variant: str, name: str) -> None:
    wanted = _one_process(CASES[name])
    for found in run_on_ranks(_each_rank, 2, variant, name):
        _compare(found, wanted)


# ---- ranks that differ ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """One of two layers, chosen by the batch: a rank may never reach the other."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.small(x) if len(x) < 8 else self.large(x)))


def _branches(sizes: tuple[int, ...]) -> tuple[nn.Module, list[Batch]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branches().double()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in sizes]
    return model, [(x, x[:, :2].square()) for x in inputs]


def _captured_branches(variant: str, sizes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Each rank takes as many batches, in turn, as its sizes say."""
    rank, _ = placement.world()
    model, batches = _branches(sum(sizes, ()))
    start = sum(map(len, sizes[:rank]))
    mine = batches[start : start + len(sizes[rank])]
    objective = gm.Objective.regression(fisher="empirical")
    stats = gm.capture(VARIANTS[variant].wrap(model), mine, objective)
    return _numbers(stats if variant != "plain" else stats.all_reduce())


@pytest.mark.parametrize("sizes", [[(3, 20), (5,)], [(9, 9), (2, 3, 4)], [(12,), (2,)]], ids=str)
@pytest.mark.parametrize("variant", ["plain", *TWO_RANKS])
def test_ranks_reach_different_layers(variant: str, sizes: list[tuple[int, ...]]) -> None:
    model, batches = _branches(sum(sizes, ()))
    wanted = _numbers(gm.capture(model, batches, gm.Objective.regression(fisher="empirical")))
    for found in run_on_ranks(_captured_branches, 2, variant, sizes):
        assert sorted(found) == sorted(wanted)  # in the order of the first rank's passes
        _compare({key: found[key] for key in wanted}, wanted)


def test_under_ddp_a_rank_may_have_no_batches() -> None:
    sizes = [(), (3, 20)]
    model, batches = _branches((3, 20))
    wanted = _numbers(gm.capture(model, batches, gm.Objective.regression(fisher="empirical")))
    for found in run_on_ranks(_captured_branches, 2, "ddp", sizes):
        _compare({key: found[key] for key in wanted}, wanted)


def _gauss_newton(variant: str) -> dict[str, Any]:
    case = ZOO["mlp_regression"]
    rank, size = placement.world()
    objective = gm.Objective.regression(fisher="gauss_newton")
    return _numbers(gm.capture(VARIANTS[variant].wrap(_model(case)), _batches(case)[rank::size], objective))


@pytest.mark.parametrize("variant", TWO_RANKS)
def test_several_backward_passes(variant: str) -> None:
    wanted = _gauss_newton("plain")
    for found in run_on_ranks(_gauss_newton, 2, variant):
        assert list(found) == list(wanted)
        # All but the mean of the gradients, whose signs are drawn at random.
        sure = [key for key in wanted if not key.endswith("G1")]
        _compare({key: found[key] for key in sure}, {key: wanted[key] for key in sure})


def _live(variant: str, name: str) -> dict[str, Any]:
    """A training loop's own passes, without the optimizer's steps: of four batches each rank takes its share."""
    case = CASES[name]
    rank, size = placement.world()
    model = VARIANTS[variant].wrap(_model(case)).eval()
    objective = getattr(gm.Objective, case.objective)(fisher="empirical")
    with gm.capturing(model, objective) as stats:
        for batch in _batches(case)[:4][rank::size]:
            total, units = objective.loss(model, batch)
            (total / units).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return _numbers(stats.all_reduce())


@pytest.mark.parametrize("name", ["mlp", "gpt2", "lstm"])
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_live_capture_is_merged_by_all_reduce(variant: str, name: str) -> None:
    wanted = _live("plain", name)
    for found in run_on_ranks(_live, 2, variant, name):
        _compare(found, wanted)


# ---- other ways of sharding ------------------------------------------------------------------------------------------


def _sharded_otherwise(how: str, name: str) -> dict[str, Any]:
    case = ZOO[name]
    model = _model(case)
    rank, size = placement.world()
    if how == "hsdp":  # each rank a replica of one shard
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif how == "kept whole":
        fully_shard(model, reshard_after_forward=False)
    elif how == "compiled":
        model = torch.compile(fully_shard(model), backend="eager")
    elif how == "bfloat16":
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    objective = getattr(gm.Objective, case.objective)(fisher="empirical")
    return _numbers(gm.capture(model, _batches(case)[rank::size], objective))


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize("how", ["hsdp", "kept whole", "compiled"])
def test_other_ways_of_sharding(how: str, name: str) -> None:
    wanted = _one_process(ZOO[name])
    for found in run_on_ranks(_sharded_otherwise, 2, how, name):
        _compare(found, wanted)


def test_sharded_in_mixed_precision() -> None:
    wanted = _one_process(ZOO["mlp"])
    for found in run_on_ranks(_sharded_otherwise, 2, "bfloat16", "mlp"):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                error = (found[key] - value).norm() / value.norm()
                assert error < 0.05, key  # eight bits, through three layers and the softmax


# ---- ranks that fail -----------------------------------------------------------------------------------------------


def _fails(variant: str, kind: str) -> tuple[str, str]:
    """The error on each rank where only rank 1 has a cause; the model trains on."""
    rank, _ = placement.world()
    case = CASES["padded" if kind == "no units" else "mlp"]
    model = VARIANTS[variant].wrap(case.make_model(0))
    hooks = _hooks(model)
    objective, batches = getattr(gm.Objective, case.objective)(fisher="empirical"), case.make_batches(0)
    try:
        FAILURES[kind](rank, model, batches, objective)
        raise AssertionError("nothing was raised")
    except GramianError as error:
        raised = type(error).__name__, str(error)
    assert _hooks(model) == hooks
    assert variant != "fsdp2" or all(placement.is_sharded(p) for p in model.parameters())
    case.loss(model, batches[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    return raised


def _no_units(rank: int, model: nn.Module, batches: list[Batch], objective: gm.Objective) -> None:
    if rank == 1:
        batches[1] = (batches[1][0], torch.full_like(batches[1][1], IGNORED))
    gm.capture(model, batches, objective)


def _not_finite(rank: int, model: nn.Module, batches: list[Batch], objective: gm.Objective) -> None:
    if rank == 1:
        batches[0] = (batches[0][0] * float("inf"), batches[0][1])
    gm.capture(model, batches, objective)


def _wrong_labels(rank: int, model: nn.Module, batches: list[Batch], objective: gm.Objective) -> None:
    if rank == 1:
        batches[2] = (batches[2][0], F.one_hot(batches[2][1]))
    gm.capture(model, batches, objective)


def _no_batches(rank: int, model: nn.Module, batches: list[Batch], objective: gm.Objective) -> None:
    gm.capture(model, [], objective)


FAILURES: dict[str, Callable[[int, nn.Module, list[Batch], gm.Objective], None]] = {
    "no units": _no_units,
    "not finite": _not_finite,
    "wrong labels": _wrong_labels,
    "no batches": _no_batches,
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("variant", TWO_RANKS)
def test_what_one_rank_raises_all_raise(variant: str, kind: str) -> None:
    first, second = run_on_ranks(_fails, 2, variant, kind)
    assert first == second
    wanted = {
        "no units": ("InputError", "rank 1 of 2 failed: objective: units: the value 0"),
        "not finite": ("DtypeError", "rank 1 of 2 failed: capture: the loss of batch 0 is nan"),
        "wrong labels": ("InputError", "rank 1 of 2 failed: objective: classification wants"),
        "no batches": ("InputError", "capture: there were no batches"),
    }[kind]
    assert first[0] == wanted[0]
    assert wanted[1] in first[1]


def _tensor_parallel() -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(UnsupportedError, match=r"'0\.weight' is placed as .*fully_shard"):
        gm.capture(model, [(torch.zeros(2, 4), torch.zeros(2, 4))], gm.Objective.regression())


def test_tensor_parallel_models_are_refused_by_name() -> None:
    run_on_ranks(_tensor_parallel, 2)


def _two_kinds_of_fisher() -> None:
    case = ZOO["mlp"]
    objective = gm.Objective.classification(fisher=("empirical", "sampled")[dist.get_rank()])
    stats = gm.capture(case.make_model(0), case.make_batches(0)[:1], objective)
    with pytest.raises(InputError, match="G is 'empirical' here and 'sampled' there"):
        stats.all_reduce()


def test_statistics_that_do_not_match_are_refused_on_all_ranks() -> None:
    run_on_ranks(_two_kinds_of_fisher, 2)
