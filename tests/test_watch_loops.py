"""`watch` in the loops people write: compiled, scaled, sharded, and at no more than a share of the time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from distributed import run_on_ranks
from gramian.errors import FindingError, InputError
from gramian.inspection.live import forward
from gramian.inspection.live import schedule as timing
from gramian.inspection.live.gradients import SAMPLE, all_finite, norms, sampled
from gramian.inspection.live.schedule import Schedule
from gramian.inspection.live.skipped_steps import MANY
from gramian.inspection.passes.moments import moments
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_pass import Watcher


class Root(nn.Module):
    """Makes a value that is not finite where its input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Body(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def dead() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(model[0].bias, -50.0)
    return model


def batch(i: int, size: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randn(size, 6, generator=g), torch.randint(3, (size,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        x, y = batch(i)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# ---- what it costs ----


def clocked(monkeypatch: pytest.MonkeyPatch, cost: float, *, every: int, share: float | None, steps: int) -> list[int]:
    """The steps that are looked at where a step takes 1 s, a look `cost` s more, and loading a batch 1 s."""
    now = [0.0]
    monkeypatch.setattr(timing, "thread_time", lambda: now[0])
    schedule, looked = Schedule(every, share), []
    for step in range(1, steps + 1):
        now[0] += 1.0
        is_due = schedule.is_due
        schedule.begin()
        now[0] += 1.0 + cost * is_due
        looked += [step] * is_due
        schedule.end(step, is_due)
    return looked


def test_looks_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clocked(monkeypatch, 0.1, every=10, share=0.02, steps=35) == [1, 10, 20, 30]
    looked = clocked(monkeypatch, 3.0, every=10, share=0.02, steps=400)
    assert looked == [1, 80, 160, 240, 320, 400]  # 3 s of 160 s, where 40 steps would be 3 s of 80 s
    assert all(3.0 / (2 * (after - before)) <= 0.02 for before, after in pairwise(looked))
    assert clocked(monkeypatch, 3.0, every=10, share=None, steps=35) == [1, 10, 20, 30]
    assert clocked(monkeypatch, 0.0, every=1, share=0.02, steps=3) == [1, 3]  # the second is there to compare with


def test_the_first_looks_are_a_budget_of_their_own_and_brief_ones_keep_to_every(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "thread_time", lambda: now[0])
    for cost, brief, full, count in ((0.1, 1e-5, [1, 10, 20], 9), (1.0, 1e-5, [1], 11), (0.1, 0.1, [1, 10, 20], 1)):
        schedule, briefs = Schedule(10, 0.02), 0
        for step in range(1, 101):
            looked = schedule.is_due
            briefs += schedule.is_brief
            schedule.begin()
            schedule.check(brief * schedule.is_brief)
            now[0] += 0.002 + cost * looked
            schedule.end(step, looked)
        assert schedule.looked == full
        assert briefs == count  # the third step, and each tenth that got no full look, if they are cheap
    schedule.ask()
    schedule.end(101, looked=False)
    assert schedule.is_due


def test_the_share_is_kept_with_what_every_step_is_checked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "thread_time", lambda: now[0])
    schedule = Schedule(1, 0.02)
    for step, cost in enumerate((1.0, 0.0, 0.0, 0.0), 1):
        schedule.begin()
        schedule.check(0.01)
        now[0] += 1.0 + cost
        schedule.end(step, step == 1)
    assert schedule.interval == 128  # 1 s of 100 s; without the checks 64 would do


def test_a_watch_of_a_tiny_model_looks_less_often() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer, every=2) as watching:
        assert watching.interval == 2
        train(model, optimizer, 12)
        assert watching.looks < 6
        assert watching.interval > 2
        assert watching.interval & (watching.interval - 1) == 0
    with gm.watch(model, optimizer, every=2, share=None) as watching:
        train(model, optimizer, 12)
        assert (watching.looks, watching.interval) == (7, 2)


def test_numbers_that_wait_are_those_that_are_read_at_once() -> None:
    seen: list[Observed] = []
    for kind in (Watcher, forward._Live):
        torch.manual_seed(0)
        model = nn.Sequential(
            network(), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 1), nn.Sigmoid(), nn.Hardtanh(), nn.ReLU()
        )
        model(batch(1)[0])
        watcher = kind(model, Observed(), live=True)
        with watcher.installed():
            model(batch(0)[0])
        if isinstance(watcher, forward._Live):
            assert not watcher.seen.calls
            watcher.settle()
        seen.append(watcher.seen)
    assert len(seen[0].calls) > 8
    assert seen[0].statistics
    assert [call.name for call in seen[0].calls] == [call.name for call in seen[1].calls]
    for one, other in zip(seen[0].calls, seen[1].calls, strict=True):
        assert one.output == other.output
    for name in ("activations", "additions", "reductions", "statistics"):
        assert getattr(seen[0], name) == getattr(seen[1], name)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e30])
def test_moments_are_those_of_float64(scale: float) -> None:
    t = (torch.randn(32, 5, 7, generator=torch.Generator().manual_seed(0)) + 3) * scale
    found, exact = moments(t), t.double()
    assert found.rms == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-6)
    assert found.between == pytest.approx(float(exact.var(0, correction=0).mean().sqrt()), rel=1e-6)
    assert found.is_finite
    assert not moments(torch.tensor([[1.0], [float("inf")]])).is_finite
    assert moments(torch.zeros(1, 0)).rms == 0.0


# ---- gradients ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_whose_gradient_alone_is_not_finite_is_seen_at_its_step(value: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer, raise_on="error") as watching:
        train(model, optimizer, 3)
        optimizer.zero_grad()
        F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
        model[4].weight.grad[3, 5] = value
        before = model[0].weight.detach().clone()
        with pytest.raises(FindingError):
            optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert [(f.code, f.where) for f in watching.findings if f.severity == "error"] == [
        ("gradient-overflow", "4.weight")
    ]
    assert watching.findings[-1].evidence.startswith("step 4")


def test_norms_of_many_tensors_are_those_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    found = {str(i): torch.randn(9, 7, generator=g).to(kind) for i, kind in enumerate(kinds)}
    found |= {"tiny": torch.full((3,), 1e-30), "huge": torch.full((3,), 1e30), "zero": torch.zeros(3)}
    found["sparse"] = torch.eye(3).to_sparse()
    found["large"] = torch.full((300,), 6e4, dtype=torch.float16)
    read = norms(found)
    for name, t in found.items():
        assert read[name] == pytest.approx(float(t.to_dense().double().norm()), rel=1e-6)
    assert all_finite(list(found.values()))
    assert all_finite([torch.full((4,), 3e38)])  # whose sum overflows
    assert not all_finite([*found.values(), torch.tensor([1.0, float("nan")], dtype=torch.float16)])
    assert all_finite([])


def test_small_tensors_of_ones_own_are_looked_at_in_one_call() -> None:
    g = torch.Generator().manual_seed(0)
    small = [
        torch.randn(3, 2, generator=g),
        torch.randn(4, generator=g).double(),
        torch.randn(2, 6, generator=g)[:, ::2],
    ]
    kept = [t.clone() for t in small]
    assert all_finite(small, flag=torch.zeros(()))
    assert all(torch.equal(t, k) for t, k in zip(small, kept, strict=True))
    for t, k in zip(small, kept, strict=True):
        for value in (float("nan"), float("inf"), -float("inf")):
            t[(-1,) * t.ndim] = value
            assert not all_finite(small, flag=torch.zeros(()))
        t.copy_(k)
    assert all_finite([torch.full((4,), 3e38)], flag=torch.zeros(()))
    for other in (torch.eye(3).to_sparse(), torch.ones(()).expand(4), torch.ones(2, dtype=torch.complex64)):
        assert all_finite([*small, other], flag=torch.zeros(()))  # which that call refuses
        assert not all_finite([*small, other * float("inf")], flag=torch.zeros(()))
    large = torch.zeros(2**14)
    assert all_finite([large, *small], flag=torch.zeros(()))
    for t, at in ((large, 5), (small[1], 3)):
        t[at] = float("nan")
        assert not all_finite([large, *small], flag=torch.zeros(()))
        t[at] = 0.0


def test_of_large_matrices_some_rows_are_compared() -> None:
    matrices = {"small": torch.ones(8, 8), "large": torch.ones(1024, 640), "row": torch.ones(1, 10 * SAMPLE)}
    found = sampled(matrices.items())
    assert [found["small"].numel(), found["row"].numel()] == [64, 10 * SAMPLE]
    assert SAMPLE / 2 < found["large"].numel() < 2 * SAMPLE
    assert found["large"].shape[1] == 640


# ---- steps that are skipped ----


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("none", [False, True])
def test_a_scaler_that_skips_every_step_is_told_with_the_operation(fused: bool, none: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with gm.watch(model, optimizer) as watching:
        for i in range(2 * MANY + 3):
            optimizer.zero_grad(set_to_none=none)
            x, y = batch(i)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert not watching.findings or i >= MANY - 1
        assert watching.step == 0
    (finding,) = watching.findings
    assert (finding.code, finding.severity, finding.where) == ("steps-skipped", "error", "optimizer")
    assert "sqrt" in finding.cause
    assert "not finite" in finding.evidence


def test_a_loop_that_drops_its_gradients_is_told_and_accumulation_is_not() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gm.watch(model, optimizer, share=None) as watching:
        for i in range(2 * MANY):
            F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for i in range(2 * MANY):
            model(batch(i)[0])  # without a backward pass
        assert not watching.findings
        for i in range(2 * MANY):
            F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
            optimizer.zero_grad()
    (finding,) = watching.findings
    assert finding.code == "steps-skipped"
    assert "The gradients are finite" in finding.cause


# ---- compiled ----


def counted() -> tuple[list[int], object]:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(len(inputs))
        return graph.forward

    return compiled, backend


@pytest.mark.parametrize("form", ["whole", "part", "in place"])
def test_a_compiled_model_is_seen_and_runs_as_it_is(form: str) -> None:
    results, compilations = [], []
    for is_watched in (False, True):
        torch._dynamo.reset()
        compiled, backend = counted()
        model: nn.Module = network()
        if form == "whole":
            model = torch.compile(model, backend=backend)
        elif form == "part":
            model[4] = torch.compile(model[4], backend=backend)
        else:
            model[5] = Body()
            model[5].compile(backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        watching = gm.watch(model, optimizer, every=2, share=None) if is_watched else None
        train(model, optimizer, 5)
        if watching is not None:
            watching.close()
            assert "modules" not in watching.not_looked_at
            assert watching.looks == 3
        results.append([*model.state_dict().values(), torch.get_rng_state()])
        compilations.append(len(compiled))
    assert compilations[0] == compilations[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_goes_wrong_in_a_compiled_model_is_named() -> None:
    torch._dynamo.reset()
    model = torch.compile(dead(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer) as watching:
        train(model, optimizer, 1)
        model(batch(0)[0] * float("nan")).sum().backward()
        optimizer.step()
    assert [f.code for f in watching.findings] == ["dead-units", "input-non-finite"]
    with pytest.raises(InputError, match="optimizer"):
        gm.watch(model)


def test_what_of_a_compiled_model_cannot_be_seen_is_said() -> None:
    torch._dynamo.reset()
    model = network()
    model.compile(backend="eager")
    assert "in place" in gm.watch(model, torch.optim.SGD(model.parameters())).not_looked_at["modules"]
    other = network()
    called = torch.compile(other, backend="eager")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with gm.watch(other, optimizer) as watching:
        train(called, optimizer, 1)
    assert "another object" in watching.not_looked_at["modules"]


# ---- sharded ----


def sharded() -> list[object]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results, told = [], []
    for is_watched in (False, True):
        model = network()
        model[1] = nn.Identity()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[4], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=300.0)
        watching = gm.watch(model, optimizer, every=2, share=None) if is_watched else None
        train(model, optimizer, 3)
        results.append([p.to_local().clone() for p in model.parameters()])
        if watching is not None:
            told = [watching.not_looked_at["modules"], sorted(f.code for f in watching.findings), watching.looks]
            model[4].weight.grad = None
            optimizer.zero_grad()
            (model(batch(0)[0]).sum() * float("nan")).backward()
            optimizer.step()
            told.append(watching.findings[-1].code)
            watching.close()
    told.append(all(torch.equal(a, b) for a, b in zip(*results, strict=True)))
    return told


def test_a_sharded_model_keeps_the_checks_of_gradients_and_steps() -> None:
    for reason, codes, looks, last, is_same in run_on_ranks(sharded, 2):
        assert "FSDP2" in reason
        assert "rate-too-high" in codes
        assert looks == 2
        assert last == "gradient-overflow"
        assert is_same


def compiled_ranks() -> tuple[list[str], int]:
    model = nn.parallel.DistributedDataParallel(dead())
    called = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(called, optimizer) as watching:
        train(called, optimizer, 2)
    return [f.code for f in watching.findings], watching.looks


def test_ranks_of_a_compiled_model_look_together() -> None:
    assert run_on_ranks(compiled_ranks, 2) == [(["dead-units"], 1)] * 2
