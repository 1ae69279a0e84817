"""`watch` finds what goes wrong in a training loop, and leaves the run as it is to the last bit."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gramian as gm
from distributed import run_on_ranks
from gramian.errors import FindingError, InputError


def mixed() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(len(x), 1, 6).expand(-1, 4, -1)
        x = F.pad(x, (0, 10))
        x = x + self.inner(x, x, x)[0]
        return self.head(self.recurrent(x)[0][:, -1])


class Saved:
    """What a graph keeps of a tensor, for as long as it lives."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    def get(self) -> torch.Tensor:
        return self.t


class Root(nn.Module):
    """Makes a value that is not finite where its input is negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 16), mixed_block(), nn.Linear(16, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, self.stem(x), use_reentrant=self.use_reentrant))


def mixed_block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2))


def batch(i: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randn(size, 6, generator=g), torch.randint(3, (size,), generator=g)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 6, parts: int = 1, autocast: bool = False
):
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(parts):
            x, y = batch(step * parts + part)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y) / parts
            loss.backward()
        optimizer.step()


def state(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mixed, {}),
        (mixed, {"parts": 2}),
        (mixed, {"autocast": True}),
        (Attention, {}),
        (lambda: Checkpointed(use_reentrant=False), {}),
        (lambda: Checkpointed(use_reentrant=True), {}),
    ],
    ids=["plain", "accumulation", "autocast", "attention", "checkpoint", "reentrant"],
)
def test_a_watched_run_is_the_same_to_the_last_bit(make, options) -> None:
    results = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        watching = gm.watch(model, optimizer, every=2, share=None) if is_watched else None
        train(model, optimizer, **options)
        if watching is not None:
            watching.close()
            assert watching.step == 6
            assert not [f for f in watching.findings if f.severity == "error"]
            assert set(watching.not_looked_at) == {
                "data, loss and labels", "attention and gates inside torch's fused functions", "spectra",
                "frozen and rank-one parameters",
            }  # fmt: skip
        results.append((*state(model), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_due_steps_are_watched_and_nothing_is_left_behind() -> None:
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    watching = gm.watch(model, optimizer, every=3, share=None)
    looked = []
    model[0].register_forward_hook(lambda *_: looked.append(torch.overrides._len_torch_function_stack()))
    kept = []
    for i in range(4):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(weakref.ref(one := Saved(t))) or one, Saved.get
        ):
            output = model(batch(i)[0])
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        del output
        gc.collect()
    assert looked == [1, 0, 1, 0]
    assert len(kept) > 20
    assert all(saved() is None for saved in kept)
    model[0]._forward_hooks.popitem()
    watching.close()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_error_of_the_model_leaves_no_mode_and_no_hook() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 3))
    with gm.watch(model, torch.optim.SGD(model.parameters())), pytest.raises(RuntimeError, match="shapes"):
        model(batch(0)[0])
    assert torch.overrides._len_torch_function_stack() == 0
    assert not model[0]._forward_hooks
    assert not model._forward_hooks


def test_a_copy_is_not_watched() -> None:
    model = mixed()
    with gm.watch(model, torch.optim.SGD(model.parameters())) as watching:
        twin = copy.deepcopy(model)
        twin(batch(0)[0])
        pickle.loads(pickle.dumps(model))
        torch.save(model.state_dict(), io.BytesIO())
        assert watching._forward.passes == 0


@pytest.mark.parametrize("optimized", [True, False])
def test_the_operation_that_makes_the_first_nan_is_named_before_the_step(optimized: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = []
    watching = gm.watch(
        model,
        optimizer if optimized else None,
        raise_on="error",
        on_finding=lambda f, step: told.append((f.code, step)),
    )
    before = state(model)
    with pytest.raises(FindingError, match="sqrt") as caught:
        train(model, optimizer)
    assert (caught.value.finding.code, caught.value.finding.where) == ("loss-non-finite", "1")
    assert caught.value.step == 1
    assert told == [("loss-non-finite", 1)]
    assert watching.findings == [caught.value.finding]
    assert all(torch.equal(a, b) for a, b in zip(before, state(model), strict=True))


def test_where_the_forward_pass_is_finite_the_gradient_is_named() -> None:
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer, raise_on=["gradient-overflow"]) as watching:
        loss = (model(batch(0)[0]) * 0).sqrt().sum()  # the root's derivative at zero
        loss.backward()
        with pytest.raises(FindingError):
            optimizer.step()
    assert [(f.code, f.where) for f in watching.findings] == [("gradient-overflow", "loss")]


def test_weights_that_are_not_finite_are_named_and_not_their_consequences() -> None:
    model = mixed()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.watch(model, optimizer) as watching:
        train(model, optimizer, steps=2)
    assert watching.findings[0].code == "non-finite-weights"
    assert watching.findings[0].where == "4.weight"


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer skips the step and divides by the scale itself
def test_a_skipped_step_of_a_scaler_is_no_finding(fused: bool) -> None:
    torch.manual_seed(0)
    model = mixed()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100, backoff_factor=2.0**-60)
    with gm.watch(model, optimizer) as watching:
        for i in range(3):
            optimizer.zero_grad()
            x, y = batch(i)
            scaler.scale(1e3 * F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**67
        assert not [f for f in watching.findings if "finite" in f.code or "overflow" in f.code]
        assert 1 < watching.numbers["gradient"] < 1e5  # and not times the scale


def dead() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(model[0].bias, -50.0)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def forgotten() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mixed()
    return model, torch.optim.SGD(model[4:].parameters(), lr=0.1)


def fast() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mixed()
    return model, torch.optim.SGD(model.parameters(), lr=300.0)


def cut() -> tuple[nn.Module, torch.optim.Optimizer]:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).tanh().detach())

    model = Cut()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "code", "where"),
    [
        (dead, "dead-units", "0"),
        (forgotten, "parameter-not-stepped", "0, 1"),
        (fast, "rate-too-high", "optimizer"),
        (cut, "graph-cut", "Cut"),
    ],
)
def test_a_planted_fault_is_found_with_the_code_of_inspect(make, code: str, where: str) -> None:
    torch.manual_seed(0)
    model, optimizer = make()
    with gm.watch(model, optimizer, every=1, share=None) as watching:
        train(model, optimizer, steps=1)
    found = {f.code: f.where for f in watching.findings if f.severity == "error"}
    assert code in found
    assert code == "graph-cut" or found[code] == where


def test_the_numbers_are_those_of_the_step(tmp_path) -> None:
    class Metrics:
        def log(self, metrics, step) -> None:
            logged.append((step, dict(metrics)))

    logged: list = []
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    path = tmp_path / "watch.jsonl"
    with gm.watch(model, optimizer, log=path) as watching, gm.watch(model, optimizer, log=Metrics()):
        train(model, optimizer, steps=1)
    grad = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    change = (model.weight.detach() - before).double().norm() / before.double().norm()
    assert watching.numbers["gradient"] == pytest.approx(float(grad), rel=1e-6)
    assert watching.numbers["change"] == pytest.approx(float(change), rel=1e-5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"step": 1, **watching.numbers}
    assert logged[0] == (
        1,
        {"watch/" + k: v for k, v in watching.numbers.items()} | {"watch/errors": 0, "watch/warnings": 0},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "at least 1"),
        ({"share": 0.0}, "share is 0.0"),
        ({"raise_on": "fatal"}, "raise_on"),
        ({"raise_on": ["rate-to-high"]}, "did you mean 'rate-too-high'"),
        ({"raise_on": ["labels-sorted"]}, "no code of a watch"),
        ({"log": 3}, "log is a int"),
    ],
)
def test_wrong_arguments_are_named(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gm.watch(nn.Linear(2, 2), **options)


def on_two_ranks() -> tuple[list[tuple[str, str]], bool]:
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), Root(), nn.Linear(4, 3)))
    with torch.no_grad():
        nn.init.constant_(model.module[0].bias, 100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = batch(rank)
    is_raised = False
    with gm.watch(model, optimizer, raise_on="error") as watching:
        F.cross_entropy(model(x - 1e4 * rank), y).backward()
        try:
            optimizer.step()
        except FindingError:
            is_raised = True
    return [(f.code, f.where) for f in watching.findings], is_raised


def test_all_ranks_raise_what_one_found() -> None:
    for found, is_raised in run_on_ranks(on_two_ranks, 2):
        assert is_raised
        assert found == [("loss-non-finite", "1")]
