"""Ranks that divide every batch take the steps of one process, resume exactly, and refuse what cannot be divided."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from distributed import run_on_ranks
from gramian import placement
from gramian.checkpoint import load_tensors
from gramian.cli import main
from gramian.errors import GramianError, GramianWarning, UnsupportedError
from gramian.optim import OPTIMIZERS
from gramian.training import agreement, folder

X = torch.randn(70, 6, generator=seeded(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()


def net() -> nn.Module:
    """Drawn from the global generator, which the seed sets; float64, in which rounding stays small on any path."""
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


def dropping() -> nn.Module:
    return nn.Sequential(*net()[:3], nn.Dropout(0.3), nn.Linear(8, 2)).double()


def batches(epoch: int, generator: torch.Generator):
    """Of 16 rows and a last one of 6, and one that the ranks share unequally."""
    for part in torch.randperm(len(X), generator=generator)[:-1].split(16):
        yield X[part], Y[part]


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"size": float(model(X).square().mean())}


def task(**changes: Any) -> gm.Task:
    parts = {"model": net, "objective": gm.Objective.classification(), "train_batches": batches, "evaluate": evaluate}
    return gm.Task(**(parts | changes))


def weights(run: gm.Run) -> list[Tensor]:
    return [t.detach().clone() for t in run.model.state_dict().values()]


def trained(optimizer: str, steps: int) -> tuple[list[Tensor], list[dict[str, float]]]:
    run = gm.train(task(), optimizer=optimizer, init="auto", steps=steps)
    return weights(run), run.history


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_take_the_steps_of_one(optimizer: str) -> None:
    one, rows = trained(optimizer, 12)
    (first, first_rows), (second, second_rows) = run_on_ranks(trained, 2, optimizer, 12)
    for p, q, r in zip(one, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert [row["loss"] for row in first_rows] == [row["loss"] for row in second_rows]
    assert [row["loss"] for row in first_rows] == pytest.approx([row["loss"] for row in rows], rel=1e-6)


class Gated(nn.Module):
    """A layer that only some rows reach, so that a rank may have no gradient for it."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom, self.never = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.always(x)
        chosen = (x == X[0]).all(1).nonzero()[:, 0]
        return out.index_add(0, chosen, self.seldom(x[chosen])) if len(chosen) else out


def trained_gated() -> list[Tensor]:
    return weights(gm.train(task(model=Gated), optimizer="adamw", lr=0.1, epochs=2))


def test_a_layer_that_only_one_rank_uses() -> None:
    first, second = run_on_ranks(trained_gated, 2)
    for p, q, r in zip(trained_gated(), first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def resumed(path: str, stops: list[int], budget: dict[str, float]) -> tuple[list[Tensor], list[float], int]:
    folder.EVERY_SECONDS, folder.LARGEST_SHARE = 0.0, math.inf

    def stop(run: gm.Run, share: float) -> None:
        if stops and run.steps == stops[0]:
            raise KeyError("stop")

    while stops:
        with pytest.raises(KeyError):
            gm.train(task(model=dropping), out=path, resume=True, on_step=stop, **budget)
        stops = stops[1:]
    run = gm.train(task(model=dropping), out=path, resume=True, **budget)
    again = gm.train(task(model=dropping), out=path, resume=True, **budget)
    assert again.resumed == run.steps
    assert all(map(torch.equal, weights(run), weights(again)))
    return weights(run), [row["loss"] for row in run.history], run.resumed


def test_two_ranks_go_on_exactly(tmp_path) -> None:
    """With dropout of its own on each rank, in the middle of an epoch and of the loss's mean."""
    whole = run_on_ranks(resumed, 2, str(tmp_path / "whole"), [], {"steps": 23})
    broken = run_on_ranks(resumed, 2, str(tmp_path / "broken"), [3, 14], {"steps": 23})
    assert [entry[2] for entry in whole + broken] == [0, 0, 13, 13]
    for entry in whole + broken:
        assert all(map(torch.equal, entry[0], whole[0][0]))
        assert entry[1] == whole[0][1]
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1] == whole[0][1]
    assert sorted(os.listdir(tmp_path / "broken")) == ["metrics.jsonl", "model.safetensors"]


def test_ranks_agree_on_seconds(tmp_path) -> None:
    first, second = run_on_ranks(resumed, 2, str(tmp_path), [], {"seconds": 0.2})
    assert all(map(torch.equal, first[0], second[0]))
    assert first[1] == second[1]


def drawn_by_each(epoch: int, generator: torch.Generator):
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    return [(X[rank:][:16], Y[rank:][:16])]


def time_first(epoch: int, generator: torch.Generator):
    return [(X[:5].reshape(5, 6), Y[:3])]


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch[0])
    return -nn.functional.log_softmax(output @ output.T, 1).diagonal().mean()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch norm": ({"model": lambda: nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)).double()}, "1 is a BatchNorm1d"),
    "different batches": ({"train_batches": drawn_by_each}, "the ranks drew different batches"),
    "other rows": ({"train_batches": time_first}, r"its tensors have [3, 5] rows"),
    "no row": ({"train_batches": lambda e, g: [(X[:0], Y[:0])]}, r"its tensors have [0] rows"),
    "no sum": ({"objective": contrastive}, "is not the sum over its rows"),
    "another model": ({"model": lambda: nn.Linear(6, 2 + dist.get_rank())}, "model is Linear of 14 parameters ("),
    "other steps": ({}, "budget is 3 steps on rank 0, and 4 steps on rank 1. Give all the same"),
    "odd batch": ({"train_batches": lambda e, g: [(X[:4], {1, 2})]}, "this one has a set"),
}


def refusal(name: str) -> str:
    try:
        steps = 3 + (name == "other steps") * dist.get_rank()
        gm.train(task(**REFUSED[name][0]), optimizer="adamw", steps=steps)
    except GramianError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_divide_is_refused_on_all_ranks(name: str) -> None:
    for message in run_on_ranks(refusal, 2, name):
        assert REFUSED[name][1] in message
        assert "\n" not in message


def other_run(path: str) -> str:
    gm.train(task(), steps=3, out=path)
    try:
        gm.train(task(), steps=4, out=path, resume=True)
    except GramianError as error:
        return str(error)
    return "trained"


def test_another_run_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for message in run_on_ranks(other_run, 2, str(tmp_path)):
        assert "of budget 3 steps, not 4 steps" in message


# ---- divided over ranks, and on another number of ranks --------------------------------------------------------------


class Residual(nn.Module):
    """Blocks in a list, which are divided by themselves, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8)) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


OPTIONS: dict[str, Any] = {"ema": 0.8, "clip": 0.5, "accumulate": 2, "regularize": {"l1": 1e-4}, "best": "min:size"}


def divided(optimizer: str, path: str | None, stop: int | None, shard: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The whole weights of a run, or of the part before it stops, and what its checkpoint holds."""
    folder.EVERY_SECONDS, folder.LARGEST_SHARE = 0.0, math.inf

    def on_step(run: gm.Run, share: float) -> None:
        if run.steps == stop:
            raise KeyError("stop")

    options = {"steps": 12, "out": path, "resume": path is not None, "shard": shard, "on_step": on_step} | options
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GramianWarning)
        try:
            run = gm.train(task(model=Residual, train_batches=small_ones), optimizer=optimizer, **options)
        except KeyError:
            return {k: tuple(t.shape) for k, t in load_tensors(Path(str(path), folder.CHECKPOINT))[0].items()}
    return {
        "weights": {name: placement.whole(t).clone() for name, t in run.model.state_dict().items()},
        "sharded": any(map(placement.is_sharded, run.model.parameters())),
        "losses": [row["loss"] for row in run.history],
        "warnings": [str(w.message) for w in told],
    }


def small_ones(epoch: int, generator: torch.Generator):
    """Of 16 rows, and a last one with a single row, so that a rank has none."""
    for part in torch.randperm(len(X), generator=generator)[:33].split(16):
        yield X[part], Y[part]


@pytest.mark.parametrize(("optimizer", "options"), [("adamw", {}), ("muon", OPTIONS), ("shampoo", {})])
def test_two_ranks_with_parts_of_the_model_take_the_steps_of_one(optimizer: str, options: dict[str, Any]) -> None:
    one = divided(optimizer, None, None, False, options)
    for two in run_on_ranks(divided, 2, optimizer, None, None, True, options):
        assert two["sharded"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-8)
        torch.testing.assert_close(one["weights"], two["weights"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("before", "after", "shard"), [(2, 1, True), (1, 2, True), (2, 1, False), (2, 2, True)])
def test_a_run_goes_on_on_other_ranks(tmp_path: Path, before: int, after: int, shard: bool) -> None:
    """Also where the model was whole before and is divided after; the checkpoint is the same file."""

    def on(ranks: int, *arguments: Any) -> dict[str, Any]:
        arguments = "muon", *arguments, OPTIONS
        return divided(*arguments) if ranks == 1 else run_on_ranks(divided, 2, *arguments)[0]

    whole = on(1, None, None, False)
    left = on(before, str(tmp_path), 5, shard)
    assert left == on(1, str(tmp_path / "other"), 5, False)
    sharded = shard if before == 1 else not shard
    resumed = on(after, str(tmp_path), None, sharded)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-8)
    torch.testing.assert_close(whole["weights"], resumed["weights"], rtol=1e-6, atol=1e-8)
    told = ["train: shard divides the model over processes, and there is one"] * (sharded and after == 1)
    told += [f"train: the run was on {before} rank(s) and goes on with {after}, from step 4: within"] * (
        before != after
    )
    assert all(map(str.startswith, resumed["warnings"], told))
    assert len(resumed["warnings"]) == len(told)
    torch.testing.assert_close(load_tensors(tmp_path / folder.MODEL)[0], resumed["weights"], rtol=0, atol=0)


# ---- ranks that fail -------------------------------------------------------------------------------------------------


def small_batches(epoch: int, generator: torch.Generator):
    """The last batch has one row, fewer than the ranks; another has no label that counts."""
    return [(X[:16], Y[:16]), (X[16:17], Y[16:17]), (X[17:33], torch.full((16,), -100))]


def trained_on_small() -> tuple[list[Tensor], int]:
    run = gm.train(task(train_batches=small_batches), optimizer="adamw", epochs=3)
    return weights(run), run.skipped


def test_a_batch_may_be_smaller_than_the_ranks() -> None:
    (first, skipped), (second, _) = run_on_ranks(trained_on_small, 2)
    assert skipped == 0
    for p, q, r in zip(trained_on_small()[0], first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def failing(where: str) -> tuple[str, int | None, float]:
    """What a rank says when rank 1 fails in its fifth step, and how long it took since then."""
    seen = [0, 0.0]

    def fail(now: bool) -> None:
        if now:
            seen[1] = time.monotonic()
            if rank() == 1:
                raise SystemExit(0) if where == "exit" else KeyError(where)

    def made(epoch: int, generator: torch.Generator):
        for number, batch in enumerate(batches(epoch, generator)):
            if where == "early end" and rank() == 1 and (epoch, number) == (0, 3):
                return
            fail(where in ("batches", "exit") and (epoch, number) == (0, 3))
            yield batch

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            fail(where == "model")
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            seen[0] += self.training
            fail(where == "forward" and seen[0] == 5)
            out = self.body(x)
            if where == "backward" and seen[0] == 5:
                out.register_hook(lambda grad: fail(True))
            return out

    def measured(model: nn.Module) -> dict[str, float]:
        fail(where == "evaluate")
        return evaluate(model)

    class Stepping(torch.optim.SGD):
        def step(self, closure=None):
            fail(where == "step" and seen[0] == 5)
            return super().step(closure)

    what = task(model=Failing, train_batches=made, evaluate=measured)
    try:
        gm.train(what, optimizer=lambda m: Stepping(m.parameters(), lr=0.1), steps=20)
    except GramianError as error:
        return str(error), error.rank, time.monotonic() - seen[1]
    return "trained", None, 0.0


@pytest.mark.parametrize("where", ["model", "batches", "exit", "forward", "backward", "step", "evaluate", "early end"])
def test_an_error_on_one_rank_ends_all_with_its_line(where: str) -> None:
    for message, failed, seconds in run_on_ranks(failing, 2, where, seconds=90):
        if where == "early end":
            assert message.startswith("train: the batches of an epoch ended on one rank earlier than on another")
            continue
        assert message.startswith("train: rank 1 of 2 failed: the task: ")
        raised = "SystemExit: 0" if where == "exit" else f"KeyError: '{where}'"
        assert f"raised {raised} (test_training_ranks.py, line " in message
        assert failed == 1
        assert "\n" not in message
        assert seconds < 5


def counting_apart() -> list[str]:
    """What a rank says whose epochs all have a batch more than the other's."""

    def made(epoch: int, generator: torch.Generator):
        return [(X[:16], Y[:16])] * (2 + rank())

    found = []
    for budget in ({"epochs": 1}, {"epochs": 3}, {"steps": 9}):
        with pytest.raises(GramianError) as caught:
            gm.train(task(train_batches=made), optimizer="adamw", **budget)
        found.append(str(caught.value))
    return found


def test_epochs_that_are_longer_on_one_rank_are_an_error_on_all() -> None:
    for told in run_on_ranks(counting_apart, 2):
        for message in told:
            assert message.startswith("train: the batches of an epoch ended on one rank earlier than on another")


def poisoned_on_one_rank(row: int) -> tuple[list[Tensor], int]:
    """A loss that is not finite on rank 1 alone: its rows of one batch."""
    bad = X.clone()
    bad[row] = math.nan

    def made(epoch: int, generator: torch.Generator):
        return [(bad[:16], Y[:16]), (bad[16:32], Y[16:32]), (X[32:48], Y[32:48])]

    with pytest.warns(GramianWarning, match="3 of 9 steps were skipped"):
        run = gm.train(task(train_batches=made), optimizer="adamw", epochs=3)
    return weights(run), run.skipped


@pytest.mark.parametrize("row", [1, 17])  # of an epoch's first batch, and of its second
def test_ranks_agree_to_skip_a_step(row: int) -> None:
    (first, skipped), (second, also) = run_on_ranks(poisoned_on_one_rank, 2, row)
    assert skipped == also == 3
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
        assert torch.isfinite(p).all()


FAULTY = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch._dynamo, torch.distributed as dist, torch.distributed.fsdp
from torch import nn
import gramian as gm
gm.train, gm.Task, gm.Objective  # with fsdp, what a run imports: once, for three forks
folder, how = Path(sys.argv[1]), sys.argv[2]
ranks = []
for rank in range(3):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        break
else:
    for number in (0, 2):
        os.waitpid(ranks[number], 0)
    os.kill(ranks[1], signal.SIGKILL)
    os._exit(0)
for stream in (1, 2):
    os.dup2(os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=3)
dist.barrier()
x, y = torch.ones(12, 4), torch.zeros(12, dtype=torch.long)
class Net(nn.Linear):
    steps = 0
    def forward(self, x):
        self.steps += self.training
        if self.steps == 4 and how == "hangs":  # no sooner, since on a busy machine a rank may be late
            dist.group.WORLD.set_timeout(timedelta(seconds=2))
        if self.steps == 4 and rank == 1:
            if how == "hangs":
                time.sleep(600)
            if how == "is gone":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("broken")
        return super().forward(x)
def net():
    if how == "is gone, and a signal comes":  # torchrun's, while the others do something else
        note = folder / "gone"
        if rank == 1:
            note.with_suffix(".new").write_text(str(os.getpid()))
            note.with_suffix(".new").rename(note)
            os.kill(os.getpid(), signal.SIGKILL)
        while not note.exists() or Path(f"/proc/{note.read_text()}/stat").read_text().rpartition(")")[2][1] != "Z":
            time.sleep(0.05)
        raise SystemExit(143)
    return Net(4, 2)
task = gm.Task(net, gm.Objective.classification(), lambda e, g: [(x, y)] * 9, lambda model: {"one": 1.0})
try:
    gm.train(task, optimizer="adamw", steps=9, shard=how == "failed")
except gm.errors.GramianError as error:
    print(error, "of rank", error.rank, flush=True)
    os._exit(2)
"""

TOLD = {
    "hangs": "train: rank 1 of 3 hangs; the others waited in vain and end. See its last output",
    "is gone": "train: rank 1 of 3 is gone; the others waited in vain and end. See its last output",
    "is gone, and a signal comes": "train: rank 1 of 3 is gone; the others waited in vain and end. See its last output",
    "failed": "train: rank 1 of 3 failed. See its own error of rank 1",
}


@pytest.mark.parametrize("how", [pytest.param("hangs", marks=pytest.mark.slow), *list(TOLD)[1:]])
def test_all_others_name_the_rank_at_fault(tmp_path: Path, how: str) -> None:
    """It hangs, is killed, or fails where the others wait for its part of the model: one line, the same on all."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    command = [sys.executable, str(tmp_path / "faulty.py"), str(tmp_path), how]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=300, check=True)
    first, own, last = ((tmp_path / f"{rank}.txt").read_text() for rank in range(3))
    told = [text.splitlines()[-1] for text in (first, last)]  # gloo may have said before that it connects once more
    assert all(line.startswith(TOLD[how]) for line in told), told
    # One of those who wait speaks for all on the command line, unless the rank speaks for itself.
    assert sum(line.endswith("of rank None") for line in told) == (how != "failed")
    if how == "failed":
        assert "train: rank 1 of 3 failed: the task: the forward pass or the loss raised KeyError: 'broken'" in own


RESTARTED = """
import os, signal
import torch
from torch import nn
import gramian as gm
x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
y = (x[:, 0] > 0).long()
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
def batches(epoch, generator):
    for number, part in enumerate(torch.randperm(48, generator=generator).split(16)):
        if (epoch, number, os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == (2, 1, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield x[part], y[part]
def task():
    return gm.Task(net, gm.Objective.classification(), batches, lambda model: {"size": float(model(x).square().mean())})
"""


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """On one machine it keeps the store, and with it the addresses of the processes that are gone."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    task = f"{tmp_path / 'restarted.py'}:task"
    common = [task, "--optimizer", "muon", "--init", "default", "--epochs", "5", "--resume", "--out"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "-m", "gramian"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*run, "train", *common, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("gramian: train: rank 1 of 2 is gone") == 1
    assert main(["train", *common, str(tmp_path / "one"), "--quiet"]) == 0
    one, two = (load_tensors(tmp_path / name / folder.MODEL)[0] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_sparse_and_nested_batches_are_refused_by_ranks(monkeypatch) -> None:
    """Of which torch slices no rows; one process takes them."""
    monkeypatch.setattr(placement, "is_distributed", lambda: True)
    jagged = torch.nested.nested_tensor([row[: 6 - i % 3] for i, row in enumerate(X)], layout=torch.jagged)
    for x in (X.to_sparse(), jagged):
        with pytest.raises(UnsupportedError, match="sparse or nested"):
            agreement.check_rows(net(), (x, Y), 2)
    agreement.check_rows(net(), (X, Y), 2)
