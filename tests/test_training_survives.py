"""A run survives what happens to it: bad numbers, other people's files, full disks, signals, and its own task."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gramian as gm
from cases import seeded
from gramian.checkpoint import load_tensors, load_tree, save_tensors, save_tree, writing
from gramian.cli import Ending, main
from gramian.errors import CheckpointError, GramianWarning, InputError, TaskError
from gramian.tasks import load
from gramian.training import checkpoint_memory, folder, interrupts, slow_steps, stream
from runs import Stop, stopping, weights

X = torch.randn(48, 6, generator=seeded(0))
Y = (X[:, 0] > 0).long()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def batches(epoch: int, generator: torch.Generator):
    for part in torch.randperm(len(X), generator=generator).split(16):
        yield X[part], Y[part]


def evaluate(model: nn.Module) -> dict[str, Any]:
    return {"accuracy": np.float64((model(X).argmax(-1) == Y).float().mean().item())}


def task(**changes: Any) -> gm.Task:
    parts = {"model": net, "objective": gm.Objective.classification(), "train_batches": batches, "evaluate": evaluate}
    return gm.Task(**(parts | changes))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(3), torch.tensor(0.5), True], ids=repr)
def test_numbers_of_any_make_are_taken(often, tmp_path, number: Any) -> None:
    run = gm.train(task(evaluate=lambda model: {"a": number}), steps=2, optimizer="adamw", out=tmp_path)
    assert run.metrics["a"] == float(number)
    assert type(run.metrics["a"]) in (int, float)


def poisoned(*bad: int):
    """The batches with these numbers (from 0) not finite."""
    seen = [0]

    def made(epoch: int, generator: torch.Generator):
        for x, y in batches(epoch, generator):
            yield (x * float("nan") if seen[0] in bad else x), y
            seen[0] += 1

    return made


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_costs_one_step(tmp_path, optimizer: str) -> None:
    """Weights, batch statistics and the averages of the loss are those of the other steps."""
    with pytest.warns(GramianWarning, match="1 of 60 steps were skipped"):
        run = gm.train(task(train_batches=poisoned(11)), steps=60, optimizer=optimizer, out=tmp_path)
    assert (run.skipped, run.diverged) == (1, False)
    assert all(torch.isfinite(t).all() for t in weights(run))
    assert all(np.isfinite(row["loss"]) for row in run.history)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "model.safetensors"]


def test_a_gradient_that_is_not_finite_costs_one_step() -> None:
    class Root(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
            Root.calls += 1
            return grad / 0 if Root.calls == 5 else grad

    objective = gm.Objective.classification(predict=lambda model, batch: Root.apply(model(batch[0])))
    with pytest.warns(GramianWarning, match="1 of 12 steps were skipped"):
        run = gm.train(task(objective=objective), steps=12, optimizer="adamw")
    assert all(torch.isfinite(t).all() for t in weights(run))


def test_ten_in_a_row_end_the_run_and_its_checkpoint_stays(often, tmp_path) -> None:
    with pytest.warns(GramianWarning, match="not finite in 10 steps in a row; stopped after 17 steps"):
        run = gm.train(task(train_batches=poisoned(*range(7, 60))), steps=60, optimizer="adamw", out=tmp_path)
    assert run.diverged
    kept = load_tree(tmp_path / "checkpoint.safetensors")
    assert kept["steps"] == 7
    assert all(torch.isfinite(t).all() for t in kept["model"].values())
    assert not (tmp_path / "model.safetensors").exists()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_batch_whose_labels_are_all_ignored_adds_nothing(tmp_path) -> None:
    def with_ignored(epoch: int, generator: torch.Generator):
        first, *others = batches(epoch, generator)
        return [first, (X[:16], torch.full((16,), -100)), *others]

    run = gm.train(task(train_batches=with_ignored), epochs=3, optimizer="adamw", out=tmp_path)
    assert (run.steps, run.skipped) == (12, 0)
    assert [row["step"] for row in run.history if not np.isfinite(row["loss"])] == [2, 6, 10]  # no loss at all


class Random(Dataset):
    """Samples changed by each of the three global generators."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return X[index] + noise, Y[index]


def test_global_generators_are_the_runs_own(often, tmp_path) -> None:
    """Batches that draw from them between steps, beside dropout, come back exactly; afterwards nothing has changed."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    what = task(train_batches=lambda epoch, generator: DataLoader(Random(), batch_size=16, shuffle=True))
    whole = gm.train(what, steps=11, optimizer="adamw", out=tmp_path / "whole")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    for step in (5, 8):
        with pytest.raises(Stop):
            gm.train(what, steps=11, optimizer="adamw", out=tmp_path / "a", resume=True, on_step=stopping(step))
    broken = gm.train(what, steps=11, optimizer="adamw", out=tmp_path / "a", resume=True)
    assert broken.resumed == 7
    assert all(map(torch.equal, weights(whole), weights(broken)))


# ---- files -----------------------------------------------------------------------------------------------------------

FOREIGN = {
    "model.safetensors": lambda path: save_tensors(path, {"w": X}),
    "metrics.jsonl": lambda path: path.write_text("mine\n"),
    "checkpoint.safetensors": lambda path: save_tensors(path, {"w": X}),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_refused_by_name(tmp_path, name: str, resume: bool) -> None:
    FOREIGN[name](tmp_path / name)
    (tmp_path / ".tmpA1b2C3").write_text("mine")
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    with pytest.raises(InputError, match=r"is not from a run|are not from a run|holds an unfinished run") as caught:
        gm.train(task(), steps=2, out=tmp_path, resume=resume)
    assert "\n" not in str(caught.value)
    assert before == {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}


def test_what_is_not_the_runs_stays(tmp_path) -> None:
    for name in (".tmpA1b2C3", ".checkpoint.safetensors.mine.tmp", "notes"):
        (tmp_path / name).write_text("mine")
    gm.train(task(), steps=2, optimizer="adamw", out=tmp_path)
    assert {".tmpA1b2C3", ".checkpoint.safetensors.mine.tmp", "notes"} < set(os.listdir(tmp_path))


def test_a_task_that_fails_changes_nothing(tmp_path) -> None:
    gm.train(task(), steps=2, optimizer="adamw", out=tmp_path / "old")
    before = {file: (tmp_path / "old" / file).read_bytes() for file in os.listdir(tmp_path / "old")}

    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("no")

    for where in ("old", "new/er"):
        with pytest.raises(TaskError, match=r"the forward pass or the loss raised ValueError: no \(test_training_surv"):
            gm.train(task(objective=broken), steps=9, out=tmp_path / where)
    assert before == {file: (tmp_path / "old" / file).read_bytes() for file in os.listdir(tmp_path / "old")}
    assert os.listdir(tmp_path) == ["old"]


def test_the_checkpoint_before_is_used_where_the_last_is_damaged(often, tmp_path) -> None:
    options: dict[str, Any] = {"steps": 11, "optimizer": "muon"}
    whole = gm.train(task(), out=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        gm.train(task(), out=tmp_path / "a", on_step=stopping(7), **options)
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[: len(data) // 2]):
        path = tmp_path / "a" / "checkpoint.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(GramianWarning, match="Resumed from the checkpoint before, of step 5"), pytest.raises(Stop):
            gm.train(task(), out=tmp_path / "a", resume=True, on_step=stopping(6), **options)
    with pytest.warns(GramianWarning, match="of step 5"):
        broken = gm.train(task(), out=tmp_path / "a", resume=True, **options)
    assert broken.resumed == 5
    assert all(map(torch.equal, weights(whole), weights(broken)))


def test_where_both_checkpoints_are_damaged_both_are_named(often, tmp_path) -> None:
    with pytest.raises(Stop):
        gm.train(task(), steps=9, out=tmp_path, on_step=stopping(4))
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    both = r"checkpoint\.safetensors.* The one before is damaged too: .*checkpoint\.previous\.safetensors"
    with pytest.raises(CheckpointError, match=both):
        gm.train(task(), steps=9, out=tmp_path, resume=True)


def test_a_failed_evaluation_leaves_nothing_and_takes_nothing(tmp_path) -> None:
    def failing(model: nn.Module) -> dict[str, Any]:
        raise ValueError("no")

    gm.train(task(), steps=2, optimizer="adamw", out=tmp_path / "old")
    before = {file: (tmp_path / "old" / file).read_bytes() for file in os.listdir(tmp_path / "old")}
    for where in ("old", "new"):
        with pytest.raises(TaskError, match="evaluate"):
            gm.train(task(evaluate=failing), steps=9, optimizer="adamw", out=tmp_path / where)
    assert os.listdir(tmp_path) == ["old"]
    assert before == {file: (tmp_path / "old" / file).read_bytes() for file in os.listdir(tmp_path / "old")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_written_ends_after_it(tmp_path, monkeypatch, request, number: int) -> None:
    finish = folder.Folder.finish

    def interrupted(self: folder.Folder, *arguments: Any) -> None:
        signal.raise_signal(number)
        finish(self, *arguments)

    monkeypatch.setattr(folder.Folder, "finish", interrupted)
    if number == signal.SIGINT:  # a shell starts processes of its background with SIGINT ignored
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        gm.train(task(), steps=2, optimizer="adamw", out=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "model.safetensors"]


def test_workers_that_the_same_signal_killed_are_not_the_error() -> None:
    """A signal to the whole group kills a DataLoader's workers too: the run ends by it, and not by their error."""
    for text, expected in (
        ("DataLoader worker (pid 7) is killed by signal: Terminated.", SystemExit),
        ("x", TaskError),
    ):
        interrupted = interrupts.Interrupts()
        interrupted.__enter__()
        signal.raise_signal(signal.SIGTERM)
        with suppress(expected):
            interrupted.__exit__(TaskError, TaskError(text), None)
            assert expected is TaskError  # which goes on


def test_a_signal_whose_exception_was_lost_ends_the_run(request) -> None:
    """Python drops what is raised in `__del__` and in the callbacks of imports."""
    before = signal.signal(signal.SIGTERM, Ending())
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with suppress(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        gm.train(task(), steps=2, optimizer="adamw")


class Dropping:
    """Ctrl-C comes where Python drops its exception, as in the callbacks of an import."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def swallowing() -> nn.Module:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("a module that was imported halfway") from None
    return net()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("out", [None, "run"])
@pytest.mark.parametrize(("where", "steps"), [("model", 0), ("swallowed", 0), ("step", 3)])
def test_ctrl_c_whose_exception_was_lost_ends(tmp_path, request, where: str, out: str | None, steps: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    seen = []

    def on_step(run: gm.Run, share: float) -> None:
        seen.append(run.steps)
        if where == "step" and run.steps == steps - 1:
            Dropping()

    model = {"model": lambda: (Dropping(), net())[1], "swallowed": swallowing, "step": net}[where]
    with pytest.raises(KeyboardInterrupt):
        gm.train(task(model=model), steps=9, optimizer="adamw", on_step=on_step, out=out and tmp_path / out)
    assert max(seen, default=0) in (steps, steps - 1)  # with a folder, it is noted at once, and the run is kept
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() == (out is not None and where == "step")


def test_the_memory_of_a_checkpoint_is_made_before_it_is_needed(tmp_path, monkeypatch) -> None:
    sizes, left = [], []
    monkeypatch.setattr(checkpoint_memory, "LEAST", 0)
    monkeypatch.setattr(folder, "LARGEST_SHARE", float("inf"))
    monkeypatch.setattr(
        checkpoint_memory.Room, "_touch", lambda self, size: (sizes.append(size), self._enough.wait(60))
    )
    keep = checkpoint_memory.Room.leave
    monkeypatch.setattr(checkpoint_memory.Room, "leave", lambda self: (left.append(keep(self)), self)[1])
    with suppress(Stop):
        gm.train(task(), steps=9, optimizer="adamw", out=tmp_path, on_step=stopping(6), ema=0.9)
    tensors, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    parts = [name for name in tensors if name.startswith(("/model", "/optimizer", "/average"))]
    assert sizes == [sum(tensors[name].nbytes for name in parts)]  # once, after the first step
    assert left  # the checkpoint did not wait for the rest of it
    with ThreadPoolExecutor(1) as thread:
        begun = checkpoint_memory.Room(thread)
        begun._enough.set()
        begun.make(2**60)  # nobody has so much
        begun.leave()


def test_what_goes_on_for_long_is_told(monkeypatch) -> None:
    """An epoch that never ends, which epochs= would count first, and a step of many batches."""
    few = "accumulate is 4, more than the batches of an epoch, 3; the steps of the run: 2"
    with pytest.warns(GramianWarning, match=few):
        gm.train(task(), epochs=2, accumulate=4, optimizer="adamw")
    monkeypatch.setattr(slow_steps, "SILENCE", 0.0)
    monkeypatch.setattr(stream, "MOST_BATCHES", 5)
    endless = replace(task(), train_batches=lambda epoch, generator: itertools.repeat((X[:8], Y[:8])))
    with (
        pytest.warns(GramianWarning, match=r"gave \d batches so far, and epochs counts them all first"),
        pytest.raises(TaskError, match="gave more than 5 batches, and epochs counts them all first"),
    ):
        gm.train(endless, epochs=1, optimizer="adamw")
    with pytest.warns(GramianWarning, match=r"a step has taken \d of its 4 batches \(accumulate\)"):
        gm.train(endless, steps=1, accumulate=4, optimizer="adamw")


@pytest.mark.parametrize("name", ["out", "report"])
def test_a_path_that_is_not_utf_8_is_one_line(tmp_path, name: str) -> None:
    with pytest.raises(InputError, match="a path that is not UTF-8"):
        gm.train(task(), steps=1, optimizer="adamw", **{name: os.path.join(tmp_path, os.fsdecode(b"\xff.html"))})
    assert not os.listdir(tmp_path)


def test_a_checkpoint_of_another_format_is_named(often, tmp_path) -> None:
    with pytest.raises(Stop):
        gm.train(task(), steps=9, out=tmp_path, on_step=stopping(2))
    state = load_tree(tmp_path / "checkpoint.safetensors")
    save_tree(tmp_path / "checkpoint.safetensors", state | {"format": 99})
    with pytest.raises(CheckpointError, match="a run of format 99; this version of gramian reads 3"):
        gm.train(task(), steps=9, out=tmp_path, resume=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(often, tmp_path, monkeypatch) -> None:
    write, calls = writing._write, []

    def full(file: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        write(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            gm.train(task(), steps=9, optimizer="adamw", out=tmp_path)
    assert load_tree(tmp_path / "checkpoint.safetensors")["steps"] == 3
    assert load_tree(tmp_path / "checkpoint.previous.safetensors")["steps"] == 2
    assert gm.train(task(), steps=9, optimizer="adamw", out=tmp_path, resume=True).resumed == 3


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch) -> None:
    """Neither metrics nor checkpoint can be written: the error alone, and no warning before it."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write", full)
    monkeypatch.setattr(folder, "_line", full)
    warnings.simplefilter("error")  # pytest restores the filters
    with pytest.raises(CheckpointError, match="No space left on device"):
        gm.train(task(), steps=9, optimizer="adamw", out=tmp_path)


def test_metrics_that_cannot_be_written_are_written_later(tmp_path, monkeypatch) -> None:
    calls: list[int] = []

    def away(run: gm.Run, share: float) -> None:
        calls.append(run.steps)
        path = tmp_path / "metrics.jsonl"
        if run.steps == 3:
            path.unlink()
            path.mkdir()
        if run.steps == 6:
            path.rmdir()

    with pytest.warns(GramianWarning, match=r"metrics.jsonl could not be written \(Is a directory\)"):
        run = gm.train(task(), steps=9, optimizer="adamw", out=tmp_path, on_step=away)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == run.history


def test_a_folder_that_is_gone_is_one_line(tmp_path) -> None:
    def away(run: gm.Run, share: float) -> None:
        if run.steps == 2:
            os.rename(tmp_path / "a", tmp_path / "b")

    with pytest.raises(InputError, match=r"a is no longer the folder"):
        gm.train(task(), steps=40, optimizer="adamw", out=tmp_path / "a", on_step=away)


def test_a_task_may_change_folders(tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moves() -> nn.Module:
        os.chdir(tmp_path / "elsewhere")
        return net()

    gm.train(task(model=moves), steps=2, optimizer="adamw", out="run")
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "model.safetensors"]
    assert os.listdir(tmp_path / "elsewhere") == []


# ---- task files ------------------------------------------------------------------------------------------------------

TASK = """
from __future__ import annotations
import torch, gramian as gm
from torch import nn
from torch.utils.data import DataLoader

class Data(torch.utils.data.Dataset):
    def __len__(self): return 32
    def __getitem__(self, i): return torch.randn(6, generator=torch.Generator().manual_seed(i)), i % 2

def first(batch):
    return torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])

def task():
    loader = lambda epoch, generator: DataLoader(Data(), 8, num_workers=1, collate_fn=first,
                                                 multiprocessing_context="spawn")
    return gm.Task(lambda: nn.Linear(6, 2), gm.Objective.classification(), loader, lambda model: {"one": 1.0})
"""


WITHOUT_WORKERS = TASK.replace("num_workers=1", "num_workers=0").replace('"spawn"', "None")


@pytest.mark.slow
def test_spawned_workers_import_a_task_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_loader_task.py").write_text(TASK)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = gm.train(load(f"{tmp_path}/my_loader_task.py:task"), steps=5, optimizer="adamw")
    assert run.steps == 5


def test_a_task_is_known_by_its_path_and_function(often, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.py").write_text(WITHOUT_WORKERS)
    one, two = (load(f"{tmp_path / name}/task.py:task") for name in ("one", "two"))
    assert one.name == two.name == "task.py:task"
    with pytest.raises(Stop):
        gm.train(one, steps=5, out=tmp_path / "run", on_step=stopping(3))
    with pytest.raises(InputError, match=r"one/task.py:task, not .*two/task.py:task"):
        gm.train(two, steps=5, out=tmp_path / "run", resume=True)
    assert not list(tmp_path.glob("*/__pycache__"))


# ---- processes -------------------------------------------------------------------------------------------------------

SLOW = (
    WITHOUT_WORKERS
    + """
def slow():
    import dataclasses, time
    def evaluate(model):
        time.sleep(0.02)
        return {"one": 1.0}
    return dataclasses.replace(task(), evaluate=evaluate)

def workers():
    import dataclasses, time
    class Waiting(Data):
        def __getitem__(self, i):
            if i == 20: time.sleep(100)
            return super().__getitem__(i)
    loader = lambda epoch, generator: DataLoader(Waiting(), 8, num_workers=1, collate_fn=first)
    return dataclasses.replace(task(), train_batches=loader)
"""
)


def started(tmp_path: Path, function: str, *options: str) -> subprocess.Popen:
    (tmp_path / "task.py").write_text(SLOW)
    command = [
        sys.executable,
        "-m",
        "gramian",
        "train",
        f"task.py:{function}",
        "--optimizer",
        "adamw",
        "--init",
        "default",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_before_the_run_and_after_it(tmp_path) -> None:
    """143 while the task is made; the run's own code while the process ends."""
    (tmp_path / "task.py").write_text(
        WITHOUT_WORKERS
        + "import atexit, os, signal\n"
        + "def early():\n    os.kill(os.getpid(), signal.SIGTERM)\n    return task()\n"
        + "def late():\n    atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n    return task()\n"
    )
    for function, code in (("early", 143), ("late", 0)):
        command = [sys.executable, "-m", "gramian", "train", f"task.py:{function}", "--steps", "2", "--out", function]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "task.py"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_run(tmp_path, number: int, code: int) -> None:
    process = started(tmp_path, "slow", "--steps", "20000", "--out", "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    wait_for(tmp_path / "run" / "checkpoint.safetensors", process)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines()[-1].endswith("continue with the same command and --resume")
    assert "Traceback" not in err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert load_tree(tmp_path / "run" / "checkpoint.safetensors")["steps"] >= json.loads(lines[-1])["step"]


@pytest.mark.slow
def test_workers_of_a_killed_run_do_not_hold_the_lock(tmp_path) -> None:
    process = started(tmp_path, "workers", "--steps", "20", "--out", "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.kill()
    process.wait()  # its workers live on for a while, and hold its pipes
    sys_path = list(sys.path)
    gm.train(task(), steps=1, optimizer="adamw", out=tmp_path / "run")
    sys.path[:] = sys_path


# ---- what others do in the folder while the run goes on --------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("how", ["removed", "moved"])
@pytest.mark.parametrize("another", ["a finished run", "nothing"])
def test_a_folder_that_is_no_longer_the_runs_is_left_alone(often, tmp_path, how: str, another: str) -> None:
    place = tmp_path / "run"
    left: dict[str, bytes] = {}

    def taken(run: gm.Run, share: float) -> None:
        if run.steps == 4:
            time.sleep(0.2)  # a checkpoint may be under way
            shutil.rmtree(place) if how == "removed" else place.rename(tmp_path / "old")
            if another == "nothing":
                place.mkdir()
            else:
                gm.train(task(), steps=3, seed=7, optimizer="adamw", out=place)
            left.update(contents(place))

    with pytest.raises(InputError, match="no longer the folder that this run began in") as caught:
        gm.train(task(), steps=9, optimizer="adamw", out=place, on_step=taken)
    assert "\n" not in str(caught.value)
    assert contents(place) == left
    if how == "moved":
        assert gm.train(task(), steps=9, optimizer="adamw", out=tmp_path / "old", resume=True).resumed >= 2


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("at", [4, 9])
def test_a_file_of_others_that_appears_is_left_alone(often, tmp_path, name: str, at: int) -> None:
    def appears(run: gm.Run, share: float) -> None:
        if run.steps == at:
            time.sleep(0.2)  # a checkpoint may be under way
            (tmp_path / name).unlink(missing_ok=True)
            FOREIGN[name](tmp_path / name)
            kept.append((tmp_path / name).read_bytes())

    kept: list[bytes] = []
    with pytest.raises(InputError, match=f"{name} appeared while the run went on and is not the run's own"):
        gm.train(task(), steps=9, optimizer="adamw", out=tmp_path, on_step=appears)
    assert (tmp_path / name).read_bytes() == kept[0]
    if not name.startswith("checkpoint"):
        (tmp_path / name).rename(tmp_path / "mine")
        assert gm.train(task(), steps=9, optimizer="adamw", out=tmp_path, resume=True).resumed >= 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize(("out", "err", "code"), [("full", "", 2), ("", "full", 0), ("closed", "closed", 0)])
def test_output_that_is_full_or_closed_ends_nothing(tmp_path, out: str, err: str, code: int) -> None:
    reading, closed = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    streams = {"full": full, "closed": closed, "": subprocess.PIPE}
    (tmp_path / "task.py").write_text(WITHOUT_WORKERS)
    command = [sys.executable, "-m", "gramian", "train", "task.py:task", "--steps", "4", "--optimizer", "adamw"]
    command += ["--init", "default", "--out", "run"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=streams[out], stderr=streams[err], text=True, timeout=300)
    os.close(closed)
    os.close(full)
    assert ended.returncode == code
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "model.safetensors"]
    if code:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("gramian: ")]
        assert len(lines) == 1
        assert "No space left on device" in lines[0]


# ---- what is told of a task ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["auto", "default"])
def test_first_batches_without_a_unit_are_no_fault(init: str) -> None:
    def ignored(epoch: int, generator: torch.Generator):
        for number, part in enumerate(torch.arange(48).split(8)):
            yield X[part], Y[part] if number > 4 else Y[part] * 0 - 100

    assert gm.train(task(train_batches=ignored), steps=6, optimizer="adamw", init=init).steps == 6


@pytest.mark.parametrize("init", ["auto", "default"])
def test_an_error_in_forward_is_told_alike_under_any_init(init: str) -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("boom")

    told = r"the forward pass or the loss raised ValueError: boom \(test_training_survives.py, line \d+\)"
    with pytest.raises(TaskError, match=told):
        gm.train(task(model=lambda: Broken(6, 2)), steps=2, optimizer="adamw", init=init)


def test_a_loss_of_no_parameter_is_refused() -> None:
    with pytest.raises(TaskError, match="the loss depends on no parameter"):
        gm.train(task(objective=lambda model, batch: torch.zeros((), requires_grad=True)), steps=2, optimizer="adamw")


def test_where_no_step_was_finite_no_rate_is_blamed() -> None:
    def poisoned() -> nn.Module:
        model = net()
        for p in model.parameters():
            nn.init.constant_(p, float("nan"))
        return model

    with pytest.warns(GramianWarning, match=r"No step was ever finite.*inputs"):
        assert gm.train(task(model=poisoned), steps=12, optimizer="adamw").diverged


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = nn.Linear(6, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x) * (1 + 0.01 * (self.count % 7))


class Saving(Counting):
    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_a_number_of_the_model_that_no_checkpoint_has_is_named(tmp_path) -> None:
    with pytest.warns(GramianWarning, match="training changes count of the model.*register_buffer"):
        gm.train(task(model=Counting), steps=2, optimizer="adamw", out=tmp_path / "a")
    gm.train(task(model=Saving), steps=2, optimizer="adamw", out=tmp_path / "b")


def test_an_evaluation_that_hangs_ends_on_sigterm(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(interrupts, "PATIENCE", 0.3)

    def hangs(model: nn.Module) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
        return {}

    with pytest.raises(SystemExit) as ended:
        gm.train(task(evaluate=hangs), steps=2, optimizer="adamw", out=tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "wrong",
    [
        "--regularize=",
        "--regularize=,",
        "--augment=",
        "--compare=,",
        "--lr=1e-400",
        "--steps=" + "9" * 30,
        "--out=\udcff",
    ],
    ids=ascii,
)
def test_values_that_mean_nothing_are_refused(tmp_path, monkeypatch, capsys, wrong: str) -> None:
    monkeypatch.chdir(tmp_path)
    budget = [] if wrong.startswith("--steps") else ["--steps", "2"]
    assert main(["train", "diabetes", "-q", *budget, wrong]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("gramian: ")
    assert os.listdir(tmp_path) == []


class Odd(nn.Module):
    """A model with state that a run has to keep, or to refuse, by what is asked of it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.body, self.what = net(), what
        if what == "float8":
            self.table = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def get_extra_state(self) -> Any:
        held: list[Any] = []
        if self.what == "endless":
            held.append(held)
        return held

    def set_extra_state(self, state: Any) -> None:
        assert state == []


def test_frozen_values_of_a_byte_are_kept(often, tmp_path) -> None:
    run = gm.train(task(model=lambda: Odd("float8")), steps=4, optimizer="adamw", out=tmp_path / "run")
    assert run.steps == 4


def test_state_that_contains_itself_is_refused(often, tmp_path) -> None:
    with pytest.raises(gm.errors.UnsupportedError, match="contains itself"):
        gm.train(task(model=lambda: Odd("endless")), steps=4, optimizer="adamw", out=tmp_path / "run")


def test_a_task_that_closes_the_output_trains_on(tmp_path) -> None:
    closes = """
def closes():
    import dataclasses, sys
    def evaluate(model):
        sys.stdout.close()
        return {"one": 1.0}
    return dataclasses.replace(task(), evaluate=evaluate)
"""
    (tmp_path / "task.py").write_text(WITHOUT_WORKERS + closes)
    command = [sys.executable, "-m", "gramian", "train", "task.py:closes", "--steps", "3", "--optimizer", "adamw"]
    done = subprocess.run([*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    assert (tmp_path / "run" / "model.safetensors").exists()
