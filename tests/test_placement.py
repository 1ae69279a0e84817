"""Ranks and shards: gathering to owners and writing back is bitwise, costs are divided evenly, and no rank hangs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from distributed import RankError, run_on_ranks
from gramian import errors, placement
from gramian.errors import DtypeError, GramianError, InputError, ShapeError, UnsupportedError
from gramian.placement import ranks
from gramian.placement.shards import Cut, Spread, spread_of

# name -> mesh, placements, shapes
PLACED: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], list[tuple[int, ...]]]] = {
    "rows": ((2,), (Shard(0),), [(4, 3), (5, 3), (1, 3), (2,), (1,), (0, 3), (3, 0), (5, 2, 3)]),
    "columns": ((2,), (Shard(1),), [(3, 4), (3, 5), (3, 1), (2, 0), (2, 3, 5)]),
    "last_dim": ((2,), (Shard(2),), [(2, 3, 5), (2, 3, 1)]),
    "replicated": ((2,), (Replicate(),), [(3, 4), (), (0,)]),
    "strided": ((2,), (_StridedShard(0, split_factor=2),), [(8, 3), (7, 3), (3, 2), (1, 2)]),
    "strided_columns": ((2,), (_StridedShard(1, split_factor=3),), [(2, 12), (2, 7)]),
    "hsdp_replicas": ((2, 1), (Replicate(), Shard(0)), [(4, 3), (5, 3), (1,)]),
    "hsdp_shards": ((1, 2), (Replicate(), Shard(0)), [(4, 3), (5, 3), (1,)]),
    "shards_of_replicas": ((2, 1), (Shard(0), Replicate()), [(5, 3), (1, 3)]),
    "rows_and_columns": ((1, 2), (Shard(0), Shard(1)), [(3, 5), (3, 1)]),
    "fsdp_over_tp": ((1, 2), (_StridedShard(0, split_factor=2), Shard(0)), [(6, 3), (5, 3)]),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64)


def _mesh(shape: tuple[int, ...]) -> DeviceMesh:
    key = str(shape)
    if key not in _meshes:
        _meshes[key] = init_device_mesh("cpu", shape)
    return _meshes[key]


_meshes: dict[str, DeviceMesh] = {}


def _bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaNs with payloads and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (num_bytes,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _placed(names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Whole tensors, the same on all ranks, and the same spread over the ranks."""
    wholes, tensors = [], []
    for name in names:
        mesh_shape, placements, shapes = PLACED[name]
        for shape in shapes:
            wholes.append(_bits(shape, DTYPES[len(wholes) % len(DTYPES)], len(wholes)))
            tensors.append(distribute_tensor(wholes[-1].clone(), _mesh(mesh_shape), placements, src_data_rank=None))
    return wholes, tensors


# ---- on each rank --------------------------------------------------------------------------------------------------


def _round_trip(names: list[str], owner: int | None, bucket_bytes: int) -> None:
    rank, size = placement.world()
    wholes, tensors = _placed(names)
    wholes.append(torch.arange(6.0))
    tensors.append(wholes[-1].clone() if rank == 0 else torch.zeros(6))  # plain: only the owner's counts
    owners = [i % size if owner is None else owner for i in range(len(tensors))]
    owners[-1] = 0
    for value, whole, own in zip(
        placement.gather(tensors, owners, bucket_bytes=bucket_bytes), wholes, owners, strict=True
    ):
        assert (value is not None) == (own == rank)
        assert value is None or _same_bits(value, whole)
    values = [whole if own == rank else None for whole, own in zip(wholes, owners, strict=True)]
    erased = [placement.write_whole_(t, torch.zeros(t.shape, dtype=t.dtype)) for t in tensors]
    assert not any(placement.local(t).any() for t in erased)
    placement.scatter_(tensors, owners, values, bucket_bytes=bucket_bytes)
    for tensor, whole in zip(tensors, wholes, strict=True):
        assert _same_bits(placement.whole(tensor), whole)
        if isinstance(tensor, DTensor):
            fresh = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            assert _same_bits(placement.local(tensor), fresh.to_local())
            assert _same_bits(placement.local(placement.write_whole_(tensor, whole)), fresh.to_local())


def _ranges_are_what_torch_holds() -> None:
    for mesh_shape, placements, shapes in PLACED.values():
        for shape in shapes:
            numbers = torch.arange(torch.Size(shape).numel()).view(shape)
            tensor = distribute_tensor(numbers, _mesh(mesh_shape), placements, src_data_rank=None)
            for dim in range(len(shape)):
                index = [i for r in placement.local_ranges(tensor, dim) for i in r]
                assert len(index) == placement.local(tensor).shape[dim]
                numbers = numbers.index_select(dim, torch.tensor(index, dtype=torch.long))
            assert torch.equal(placement.local(tensor), numbers)
            assert placement.is_sharded(tensor) == any(not p.is_replicate() for p in placements)


def _partial() -> list[list[Tensor | None]]:
    rank = dist.get_rank()
    mine = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) * (1 + rank)
    mesh = _mesh((2,))
    summed = DTensor.from_local(mine, mesh, [Partial()])
    averaged = DTensor.from_local(mine, mesh, [Partial("avg")])
    both = DTensor.from_local(mine, _mesh((2, 1)), [Partial(), Shard(0)])
    found = placement.gather([summed, averaged, both], [0, 1, 1])
    for tensor in (summed, DTensor.from_local(mine, mesh, [Partial("max")])):
        with pytest.raises(UnsupportedError, match=r"Partial|placed as"):
            placement.scatter_([tensor], [0], [torch.zeros(3, 2)])
    return found


def _idle() -> None:
    """Ranks with nothing to give, nothing to get, or nothing at all."""
    assert placement.gather([], []) == []
    placement.scatter_([], [], [])
    placement.all_reduce_sum([])
    mesh = _mesh((2,))
    empty = distribute_tensor(torch.zeros(0, 3), mesh, [Shard(0)])
    row = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])
    for owner in (0, 1):
        found = placement.gather([empty, row], [owner, owner])
        assert [None if f is None else tuple(f.shape) for f in found] == (
            [(0, 3), (1, 3)] if owner == dist.get_rank() else [None, None]
        )
        placement.scatter_([row], [owner], [torch.full((1, 3), 2.0 + owner)])
        assert torch.equal(placement.whole(row), torch.full((1, 3), 2.0 + owner))


def _sums(seed: int, bucket_bytes: int) -> list[Tensor]:
    rank = dist.get_rank()
    before, ranks.BUCKET_BYTES = ranks.BUCKET_BYTES, bucket_bytes
    try:
        tensors = _parts(seed)[rank]
        placement.all_reduce_sum(tensors)
    finally:
        ranks.BUCKET_BYTES = before
    return tensors


def _parts(seed: int) -> list[list[Tensor]]:
    """For each of two ranks, tensors of many kinds; some not contiguous, one that float32 would lose."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (), (0, 2), (17,), (2, 2, 2)]
    parts = []
    for rank in range(2):
        floats = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        narrow = [torch.randn(5, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
        counts = [torch.tensor([2**53 + rank, -3]), torch.tensor(7, dtype=torch.int32)]
        parts.append([*floats, *narrow, *counts, torch.randn(4, 6, generator=generator).T, torch.full((64,), 1e-30)])
    return parts


def _fails(kind: str) -> tuple[str, str]:
    """What each rank raises when only rank 1 has a reason to."""
    rank = dist.get_rank()
    try:
        FAILURES[kind](rank)
    except GramianError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _fail_inside(error: Exception) -> Callable[[int], None]:
    def fail(rank: int) -> None:
        with placement.agreed("load weights"):
            if rank == 1:
                raise error

    return fail


def _fail_scatter(value: Tensor | None) -> Callable[[int], None]:
    def fail(rank: int) -> None:
        targets = [distribute_tensor(torch.ones(3, 2), _mesh((2,)), [Shard(0)]) for _ in range(2)]
        try:
            placement.scatter_(targets, [0, 1], [torch.zeros(3, 2), value], bucket_bytes=8)
        finally:
            assert all(torch.equal(placement.whole(t), torch.ones(3, 2)) for t in targets), "written before it failed"

    return fail


def _fail_gather(rank: int) -> None:
    part = torch.zeros(3 if rank == 1 else 2, 2)
    wrong = DTensor.from_local(part, _mesh((2,)), [Shard(0)], run_check=False, shape=torch.Size((4, 2)), stride=(2, 1))
    placement.gather([wrong], [0])


FAILURES: dict[str, Callable[[int], None]] = {
    "own error": _fail_inside(ShapeError("W has 3 rows, wanted 4")),
    "foreign error": _fail_inside(RuntimeError("no space on the disk")),
    "no value": _fail_scatter(None),
    "wrong shape": _fail_scatter(torch.zeros(2, 3)),
    "shard that is not as placed": _fail_gather,
    "different sums": lambda rank: placement.all_reduce_sum([torch.zeros(2 + rank)]),
    "batches that break": lambda rank: list(placement.in_step(_broken() if rank == 1 else range(5))) and None,
    "no batches": lambda rank: list(placement.in_step(range(1 - rank))) and None,
    "one sum less": lambda rank: placement.all_reduce_sum([torch.zeros(2)] * (2 - rank)),
}


def _agreements() -> None:
    rank, size = placement.world()
    assert size == 2
    assert placement.is_distributed()
    assert [placement.any_rank(flag) for flag in (False, rank == 1, torch.tensor(rank == 0), True)] == [
        False,
        True,
        True,
        True,
    ]
    texts = ["", "Größe Σ 矩阵\n\x00", "x" * 5000]
    for a, b in itertools.product(texts, repeat=2):
        assert placement.exchange(a if rank == 0 else b) == [a, b]
    values = [{"x": [5e-324, 0.1, -0.0, float("inf"), None, "é"]}, []]
    assert repr(placement.exchange_json(values[rank])) == repr(values)
    costs = [3.0, 1.0, 2.0, 2.0, 6.0]
    assert placement.exchange_json(placement.share_out(costs)) == [[1, 4], [0, 2, 3]]
    with placement.agreed("nothing fails"):
        pass


def _part_of_the_world() -> None:
    alone = [dist.new_group([r]) for r in range(2)]
    rank = dist.get_rank()
    assert placement.world(alone[rank]) == (0, 1)
    with pytest.raises(InputError, match="not in the process group"):
        placement.world(alone[1 - rank])
    target = torch.zeros(2)
    placement.scatter_([target], [0], [torch.full((2,), float(rank))], group=alone[rank])
    assert torch.equal(target, torch.full((2,), float(rank)))
    placement.all_reduce_sum([target], alone[rank])
    assert torch.equal(target, torch.full((2,), float(rank)))


def _steps(numbers: list[int]) -> list[list[tuple[int, bool]]]:
    rank = dist.get_rank()
    return [list(placement.in_step(range(numbers[rank]))), list(placement.in_step(range(10, 10 + numbers[1 - rank])))]


def _broken() -> Iterator[int]:
    yield 0
    raise OSError("a shard of the data is gone")


def _four_ranks() -> None:
    rank = dist.get_rank()
    mesh = _mesh((2, 2))
    both = [Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=2)]
    wholes, tensors = [], []
    for first, second in itertools.product(both, repeat=2):
        for shape in ((8, 4), (5, 3), (1, 2)):
            wholes.append(_bits(shape, torch.float32, len(wholes)))
            try:
                tensors.append(distribute_tensor(wholes[-1].clone(), mesh, (first, second), src_data_rank=None))
            except (RuntimeError, ValueError, NotImplementedError):  # torch does not spread every shape so
                wholes.pop()
    assert len(tensors) > 30
    owners = [i % 4 for i in range(len(tensors))]
    found = placement.gather(tensors, owners, bucket_bytes=200)
    for value, whole, owner in zip(found, wholes, owners, strict=True):
        assert value is None if owner != rank else _same_bits(value, whole)
    found = [None if value is None else value.clone() for value in found]  # a replica on its owner is the tensor itself
    parts = [placement.local(t).clone() for t in tensors]
    for tensor in tensors:
        placement.local(tensor).zero_()
    placement.scatter_(tensors, owners, found)
    assert all(_same_bits(placement.local(t), part) for t, part in zip(tensors, parts, strict=True))
    # A mesh of two dimensions that is a part of the world, as the stages of a pipeline have.
    stage = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "copy", "shard"))["copy", "shard"]
    mine = torch.arange(5.0) + rank // 2
    tensor = distribute_tensor(mine.clone(), stage, [Replicate(), Shard(0)])
    for _ in range(2):
        value = placement.gather([tensor], [1])[0]
        assert (value is not None) == (rank in (1, 3))
        assert value is None or torch.equal(value, mine)


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("owner", [None, 0, 1])
def test_gather_and_scatter_are_bitwise(owner: int | None, bucket_bytes: int) -> None:
    run_on_ranks(_round_trip, 2, list(PLACED), owner, bucket_bytes)


@pytest.mark.parametrize("name", PLACED)
def test_each_placement_alone(name: str) -> None:
    run_on_ranks(_round_trip, 2, [name], None, 1 << 20)


def test_local_ranges() -> None:
    run_on_ranks(_ranges_are_what_torch_holds, 2)


def test_partial_tensors_are_summed_on_their_owner() -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    first, second = run_on_ranks(_partial, 2)
    torch.testing.assert_close(first[0], 3 * base)
    torch.testing.assert_close(second[1], 1.5 * base)
    torch.testing.assert_close(second[2], 3 * base)
    assert first[1] is first[2] is second[0] is None


def test_idle_ranks_do_not_hang() -> None:
    run_on_ranks(_idle, 2)


def test_agreements() -> None:
    run_on_ranks(_agreements, 2)


def test_part_of_the_world() -> None:
    run_on_ranks(_part_of_the_world, 2)


def test_steps_are_taken_together() -> None:
    long = [(0, True), (1, True), (2, True)]
    short = [(0, True), (0, False), (0, False)]
    late_long, late_short = ([(10 + i, mine) for i, mine in steps] for steps in (long, short))
    assert run_on_ranks(_steps, 2, [3, 1]) == [[long, late_short], [short, late_long]]
    assert run_on_ranks(_steps, 2, [2, 2]) == [[long[:2], late_long[:2]]] * 2
    assert run_on_ranks(_steps, 2, [0, 0]) == [[[], []]] * 2


@pytest.mark.slow
def test_four_ranks() -> None:
    run_on_ranks(_four_ranks, 4)


@pytest.mark.parametrize("bucket_bytes", [8, 64 << 20])
def test_sums_equal_those_of_one_rank(bucket_bytes: int) -> None:
    one, two = run_on_ranks(_sums, 2, 0, bucket_bytes)
    for a, b, *parts in zip(one, two, *_parts(0), strict=True):
        wide = torch.float64 if a.is_floating_point() else torch.int64
        assert torch.equal(a, (parts[0].to(wide) + parts[1].to(wide)).to(a.dtype))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", FAILURES)
def test_what_one_rank_raises_all_raise(kind: str) -> None:
    (name, message), (again, message_again) = run_on_ranks(_fails, 2, kind)
    assert name == again != "nothing"
    assert message == message_again
    raised = {
        "own error": ("ShapeError", "load weights: rank 1 of 2 failed: W has 3 rows, wanted 4"),
        "foreign error": ("GramianError", "load weights: rank 1 of 2 failed: RuntimeError: no space on the disk"),
        "no value": ("InputError", "tensor 1, (3, 2), has no value on its owner, rank 1"),
        "wrong shape": ("ShapeError", "tensor 1 is (3, 2), but its value is (2, 3)"),
        "shard that is not as placed": ("ShapeError", "this rank holds (3, 2), but its placement says (2, 2)"),
        "different sums": ("InputError", "rank 0 has 1 tensors, ((2,), 'torch.float32'); rank 1 has 1 tensors, ((3,)"),
        "batches that break": ("GramianError", "batches: rank 1 of 2 failed: OSError: a shard of the data is gone"),
        "no batches": ("InputError", "batches: rank 1 of 2 failed: this rank has no batches"),
        "one sum less": ("InputError", "rank 0 has 2 tensors"),
    }[kind]
    assert name == raised[0]
    assert raised[1] in message


def test_the_harness_reports_an_error_and_continues() -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_on_ranks(_one_rank_divides_by_zero, 2)
    run_on_ranks(_agreements, 2)


def _one_rank_divides_by_zero() -> None:
    if dist.get_rank() == 1:
        _ = 1 / 0
    dist.barrier()


@pytest.mark.parametrize("seed", range(20))
def test_assignment_is_within_its_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_ranks = int(torch.randint(1, 4, (), generator=generator))
    costs = torch.randint(0, 10, (7,), generator=generator).tolist()
    owners = placement.assign(costs, num_ranks)
    best = min(
        max(_loads(costs, owners, num_ranks)) for owners in itertools.product(range(num_ranks), repeat=len(costs))
    )
    assert max(_loads(costs, owners, num_ranks)) <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def _loads(costs: list[int], owners: tuple[int, ...] | list[int], num_ranks: int) -> list[int]:
    return [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(num_ranks)]


def test_assignment_of_ties_and_edges() -> None:
    assert placement.assign([], 3) == []
    assert placement.assign([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert placement.assign([0, 0, 0], 2) == [0, 0, 0]
    assert placement.assign([2.0] * 5, 8) == [0, 1, 2, 3, 4]
    # Graham's worst case for two ranks: 7/6 of the best.
    assert max(_loads([3, 3, 2, 2, 2], placement.assign([3, 3, 2, 2, 2], 2), 2)) == 7
    for costs, num_ranks in (([1], 0), ([-1], 2), ([float("nan")], 2), ([float("inf")], 2)):
        with pytest.raises(InputError, match="assign"):
            placement.assign(costs, num_ranks)


MESHES = [(2, 2), (3, 2), (2, 4), (1, 3)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranges_of_meshes_follow_torch_from_left_to_right(mesh: tuple[int, ...]) -> None:
    """Against torch's own cutting of the rows, one mesh dimension after another."""
    cuts = [Shard(0), *(_StridedShard(0, split_factor=k) for k in (2, 3))]
    for rows, first, second in itertools.product((0, 1, 2, 5, 8, 13, 24), cuts, cuts):
        for place in itertools.product(*map(range, mesh)):
            index = torch.arange(rows)
            for cut, size, which in zip((first, second), mesh, place, strict=True):
                index = cut._split_tensor(index, size, with_padding=False, contiguous=False)[0][which]
            described = tuple(Cut("shard", 0, getattr(cut, "split_factor", 1)) for cut in (first, second))
            spread = Spread((rows,), described, mesh, (place,), None)
            assert [i for r in spread.ranges(0, 0) for i in r] == index.tolist()


def test_without_a_process_group_everything_passes_through() -> None:
    assert placement.world() == (0, 1)
    assert not placement.is_distributed()
    weight = torch.nn.Parameter(torch.randn(3, 2))
    assert placement.group_of(weight) is None
    assert spread_of(weight).local_shape(0) == (3, 2)
    (found,) = placement.gather([weight], [0])
    assert found is not None
    assert found.data_ptr() == weight.data_ptr()
    assert not found.requires_grad
    placement.scatter_([weight], [0], [torch.ones(3, 2, dtype=torch.float64)])
    assert torch.equal(weight, torch.ones(3, 2))
    assert weight.is_leaf
    total = torch.tensor([1.0])
    placement.all_reduce_sum([total])
    assert total.item() == 1.0
    assert placement.exchange_json((1, math.nan))[0][0] == 1
    assert placement.share_out([2.0, 0.0, 5.0]) == [0, 1, 2]
    assert placement.local_ranges(weight, -1) == (range(2),)
    assert placement.local_ranges(torch.zeros(0, 2)) == ()


def test_bad_input_is_named() -> None:
    t = torch.zeros(3, 2)
    with pytest.raises(InputError, match="gather: 1 tensors but 0 owners"):
        placement.gather([t], [])
    with pytest.raises(InputError, match="owner 1, but its group has 1 ranks"):
        placement.gather([t], [1])
    with pytest.raises(InputError, match="scatter_: 1 targets but 2 values"):
        placement.scatter_([t], [0], [t, t])
    with pytest.raises(InputError, match="no value on its owner"):
        placement.scatter_([t], [0], [None])
    with pytest.raises(ShapeError, match=r"\(3, 2\), but its value is \(2,\)"):
        placement.scatter_([t], [0], [torch.zeros(2)])
    with pytest.raises(ShapeError, match="write_whole_"):
        placement.write_whole_(t, torch.zeros(2))
    with pytest.raises(DtypeError, match="bool"):
        placement.all_reduce_sum([torch.zeros(2, dtype=torch.bool)])


def test_one_rank_raises_what_was_raised() -> None:
    error = ZeroDivisionError("its own")
    with pytest.raises(ZeroDivisionError) as caught, placement.agreed("nothing to agree on"):
        raise error
    assert caught.value is error
    assert all(issubclass(getattr(errors, name), (GramianError, Warning)) for name in errors.__all__)
