"""A run that is stopped at any moment resumes to bitwise the same weights and metrics, and never as another run."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gramian as gm
from cases import seeded
from gramian.checkpoint import load_tensors, load_tree, open_checkpoint, save_tensors, save_tree
from gramian.checkpoint.trees import UNFINISHED, PackedTree
from gramian.cli.common import with_task
from gramian.errors import CheckpointError, GramianError, GramianWarning, InputError, TaskError, UnsupportedError
from gramian.optim import OPTIMIZERS
from gramian.training import folder, running
from gramian.training.stream import checksum
from runs import Stop, stopping

X = torch.randn(112, 6, generator=seeded(0))
Y = (X[:, 0] > 0).long()


class Drifting(nn.Module):
    """A buffer that is not in the state dict, and matters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shift += 0.01
        return x + self.shift


def net() -> nn.Module:
    """Dropout, batch statistics and a fleeting buffer: everything that a step can depend on."""
    first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), Drifting())
    return nn.Sequential(*first, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def conv_net() -> nn.Module:
    """Weights that do not lie row by row."""
    body = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, 2, 1))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 2)).to(memory_format=torch.channels_last)


def batches(epoch: int, generator: torch.Generator):
    for part in torch.randperm(len(X), generator=generator).split(16):
        yield X[part], Y[part]


def evaluate(model: nn.Module) -> dict[str, float]:
    output = model(X)
    return {
        "accuracy": float((output.argmax(-1) == Y).float().mean()),
        "size": float(output.square().mean()),
    }


def task(**changes: Any) -> gm.Task:
    parts = {"model": net, "objective": gm.Objective.classification(), "train_batches": batches, "evaluate": evaluate}
    return gm.Task(**(parts | changes))


def left_by(path: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights and the metrics without their seconds, after a look at what lies there."""
    assert sorted(os.listdir(path)) == ["metrics.jsonl", "model.safetensors"]
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "a line is missing or there twice"
    return load_tensors(path / "model.safetensors")[0], [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def assert_same(path: Path, other: Path) -> None:
    (weights, rows), (weights_2, rows_2) = left_by(path), left_by(other)
    assert rows == rows_2
    assert list(weights) == list(weights_2)
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights_2[name]), name


def stop_and_go_on(tmp_path: Path, stops: list[int], **options: Any) -> None:
    """Trains once through and once with stops, and compares."""
    what = options.pop("task", task)
    whole = gm.train(what(), out=tmp_path / "whole", **options)
    for step in stops:
        with pytest.raises(Stop):
            gm.train(what(), out=tmp_path / "broken", resume=True, on_step=stopping(step), **options)
    state = torch.get_rng_state()
    run = gm.train(what(), out=tmp_path / "broken", resume=True, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert run.resumed == stops[-1] - 1
    assert [row["step"] for row in run.history] == [row["step"] for row in whole.history]
    for tensor, other in zip(run.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    assert_same(tmp_path / "whole", tmp_path / "broken")


FUNCTIONS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "proximal": lambda m: gm.optim.Proximal(gm.optim.Muon(m, lr=0.05), {"5.weight": gm.prox.L1(1e-3)}),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
}


@pytest.mark.parametrize("optimizer", ["auto", *OPTIMIZERS, *FUNCTIONS])
def test_a_stopped_run_goes_on_exactly(often, tmp_path, optimizer: str) -> None:
    """In the middle of an epoch and of the loss's mean, twice, with every optimizer."""
    stop_and_go_on(tmp_path, [6, 13], optimizer=FUNCTIONS.get(optimizer, optimizer), steps=23)


@pytest.mark.filterwarnings("ignore:isometric_. left as they were")  # the norm of the task
@pytest.mark.parametrize("stops", [[1], [7], [8], [14, 15], [20, 21]], ids=str)
@pytest.mark.parametrize("budget", [{"steps": 21}, {"epochs": 3}], ids=str)
def test_it_goes_on_from_any_step(often, tmp_path, budget: dict, stops: list[int]) -> None:
    """The first and the last, the ends of epochs (7 batches each)."""
    stop_and_go_on(tmp_path, stops, optimizer="adamw", init="isometric", **budget)


@pytest.mark.parametrize("optimizer", ["auto", "adamw"])
def test_memory_formats_survive(often, tmp_path, optimizer: str) -> None:
    stop_and_go_on(tmp_path, [9], task=lambda: task(model=conv_net), optimizer=optimizer, steps=20)


def shuffled_by_the_generator(epoch: int, generator: torch.Generator):
    return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=generator)


def shuffled_by_the_global_one(epoch: int, generator: torch.Generator):
    return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)


def drawn_all_at_once(epoch: int, generator: torch.Generator):
    return list(batches(epoch, generator))


@pytest.mark.parametrize("loader", [shuffled_by_the_generator, shuffled_by_the_global_one, drawn_all_at_once])
@pytest.mark.parametrize("budget", [{"steps": 20}, {"epochs": 3}], ids=str)
def test_every_way_to_shuffle_goes_on_exactly(often, tmp_path, loader, budget: dict) -> None:
    stop_and_go_on(tmp_path, [4, 10], task=lambda: task(train_batches=loader), optimizer="adamw", **budget)


class Opened(nn.Module):
    """Sparse rows as they are; others as plain ones, with zeros where they are short."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to_padded_tensor(0.0) if x.is_nested else x.to_dense() if x.is_mkldnn else x


FORMS = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([row[: 6 - i % 3] for i, row in enumerate(x)]),
    "jagged": lambda x: torch.nested.nested_tensor([row[: 6 - i % 3] for i, row in enumerate(x)], layout=torch.jagged),
    "mkldnn": Tensor.to_mkldnn,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_go_on_exactly(often, tmp_path, form: str) -> None:
    """Also where the last batch of a checkpoint is such a one, whose checksum is kept."""

    def of_this_form(epoch: int, generator: torch.Generator):
        return ((FORMS[form](x.relu()), y) for x, y in batches(epoch, generator))

    one, same, other = (checksum(FORMS[form](x)) for x in (X, X.clone(), X + (torch.arange(112) == 111)[:, None]))
    assert one == same != other
    made = task(
        model=lambda: nn.Sequential(Opened(), nn.Linear(6, 2)), train_batches=of_this_form, evaluate=lambda model: {}
    )
    stop_and_go_on(tmp_path, [3], task=lambda: made, optimizer="adamw", steps=8)


def test_batches_that_cannot_be_drawn_again_are_reported(often, tmp_path) -> None:
    calls: list[int] = []

    def other_each_time(epoch: int, generator: torch.Generator):
        calls.append(epoch)
        return [(X[:16] + len(calls), Y[:16])] * 7

    def fewer(epoch: int, generator: torch.Generator):
        return list(batches(epoch, generator))[:2]

    with pytest.raises(Stop):
        gm.train(task(train_batches=other_each_time), steps=20, out=tmp_path / "a", on_step=stopping(5))
    with pytest.warns(GramianWarning, match="gave other batches than before"):
        gm.train(task(train_batches=other_each_time), steps=20, out=tmp_path / "a", resume=True)
    with pytest.raises(Stop):
        gm.train(task(), steps=20, out=tmp_path / "b", on_step=stopping(5))
    with pytest.raises(TaskError, match="gave 2 batches, but 4 were taken before"):
        gm.train(task(train_batches=fewer), steps=20, out=tmp_path / "b", resume=True)


def test_seconds_go_on_with_the_time_that_is_left(often, tmp_path, monkeypatch) -> None:
    # Each look at the clock takes 0.01 s, however long it takes on this machine.
    ticks = itertools.count()
    monkeypatch.setattr(running, "time", SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks)))

    def stop(run: gm.Run, share: float) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        gm.train(task(), seconds=0.3, out=tmp_path, on_step=stop)
    kept = load_tree(tmp_path / "checkpoint.safetensors")
    shares: list[float] = []
    run = gm.train(task(), seconds=0.3, out=tmp_path, resume=True, on_step=lambda run, share: shares.append(share))
    assert shares[0] == kept["seconds"] / 0.3
    assert shares[0] > 0.1
    assert shares == sorted(shares), "the time that was spent is forgotten"
    assert len(shares) == 1 + run.steps - kept["steps"]
    assert run.seconds >= 0.3
    seconds = [row["seconds"] for row in run.history]
    assert seconds == sorted(seconds)


# ---- killed ----------------------------------------------------------------------------------------------------------

KILLED = {"steps": 4, "optimizer": "muon"}
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")


def train_and_die(path: str, steps: int, before_operation: int, after_steps: float) -> None:
    """Trains, and is killed before its n-th operation on a file of its folder, or after n steps and a part of one."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and path in str(arguments[0]):
            seen += 1
            if seen == before_operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if before_operation:
        sys.addaudithook(hook)
    if after_steps:
        folder.EVERY_SECONDS = 0.0
    folder.LARGEST_SHARE = math.inf

    def on_step(run: gm.Run, share: float) -> None:
        if after_steps:
            if run.steps == run.resumed + int(after_steps):
                threading.Timer(after_steps % 1 * 0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
            time.sleep(0.01)

    gm.train(task(), out=path, resume=True, on_step=on_step, **(KILLED | {"steps": steps}))


def serve(pipe: Connection) -> None:
    """Forks a process for each message: one that has loaded all that a training loads, so that none waits for it."""
    torch.set_num_threads(1)
    gm.train(task(), **KILLED)
    while True:
        arguments = pipe.recv()
        number = os.fork()
        if number == 0:
            try:
                train_and_die(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))


@pytest.fixture(scope="module")
def train_in_a_process():
    """`f(path, steps, before_operation, after_steps)`, the exit code of a process that trains there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()

    def run(path: Path, steps: int = KILLED["steps"], before_operation: int = 0, after_steps: float = 0.0) -> int:
        ours.send((str(path), steps, before_operation, after_steps))
        assert ours.poll(600), "a process hangs"
        return ours.recv()

    yield run
    server.kill()
    server.join()


def test_killed_before_any_operation_on_a_file(tmp_path, train_in_a_process) -> None:
    """Between the write and the rename, the rename and the next line of metrics, the model and the end: everywhere."""
    gm.train(task(), out=tmp_path / "whole", **KILLED)
    left, safe = set(), []
    for number in itertools.count(1):
        path = tmp_path / f"{number}"
        code = train_in_a_process(path, before_operation=number)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if path.exists():
            left.add(tuple(sorted(name.partition(".safetensors.")[0] for name in os.listdir(path))))
        if (path / "checkpoint.safetensors").exists():
            load_tree(path / "checkpoint.safetensors")
        safe.append((path / "checkpoint.safetensors").exists() or (path / "model.safetensors").exists())
        assert train_in_a_process(path) == 0
        assert_same(tmp_path / "whole", path)
    assert number > 20
    assert safe == sorted(safe), "what was kept is lost"
    assert len(left) >= 5, "killed in too few different states"


def test_killed_again_and_again(tmp_path, train_in_a_process) -> None:
    moments = random.Random(0)
    gm.train(task(), out=tmp_path / "whole", **(KILLED | {"steps": 40}))
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(train_in_a_process(tmp_path / "broken", 40, after_steps=moments.uniform(2, 12)))
        assert codes[-1] in (0, -signal.SIGKILL)
        assert len(codes) < 100
    assert len(codes) > 1
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("error", [Stop, OSError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("number", [2, 3, 5])
def test_an_error_between_write_and_rename(often, tmp_path, monkeypatch, error, number: int) -> None:
    gm.train(task(), out=tmp_path / "whole", **KILLED)
    replace, calls = os.replace, []

    def broken(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == number:
            raise error(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(GramianError if error is OSError else error):
            gm.train(task(), out=tmp_path / "broken", **KILLED)
    assert not [name for name in os.listdir(tmp_path / "broken") if name.endswith(".tmp")]
    gm.train(task(), out=tmp_path / "broken", resume=True, **KILLED)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_torn_line_and_half_a_file_are_put_right(often, tmp_path) -> None:
    gm.train(task(), out=tmp_path / "whole", **KILLED)
    with pytest.raises(Stop):
        gm.train(task(), out=tmp_path / "broken", on_step=stopping(4), **KILLED)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    for name in (".checkpoint.safetensors.1-0123abcd.tmp", f".metrics.jsonl.{'0a' * 6}.tmp"):
        (tmp_path / "broken" / name).write_bytes(b"half")
    gm.train(task(), out=tmp_path / "broken", resume=True, **KILLED)
    assert_same(tmp_path / "whole", tmp_path / "broken")


# ---- other runs, and none --------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))


OTHERS = {
    "task": ({"name": "other"}, {}, "of task task, not other"),
    "model": ({"model": wide}, {}, r"of model Sequential of 162 parameters \(\w+\), not Sequential of 83"),
    "optimizer": ({}, {"optimizer": "soap", "lr": 0.1}, "of optimizer muon, not soap"),
    "rate": ({}, {"lr": 0.2}, r"of learning rate the usual one \(0.173\), not 0.2"),
    "seed": ({}, {"seed": 4}, "of seed 0, not 4"),
    "init": ({}, {"init": "isometric"}, "of init default, not isometric"),
    "amount": ({}, {"steps": 43}, "of budget 42 steps, not 43 steps"),
    "kind": ({}, {"steps": None, "seconds": 42.0}, "of budget 42 steps, not 42 seconds"),
    "two": ({}, {"seed": 1, "lr": 3}, r"of learning rate the usual one \(0.173\), not 3; seed 0, not 1"),
}


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_by_name(often, tmp_path, finished: bool) -> None:
    options: dict[str, Any] = {"steps": 42, "out": tmp_path}
    if finished:
        gm.train(task(), **options)
    else:
        with pytest.raises(Stop):
            gm.train(task(), on_step=stopping(9), **options)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for changes, other, message in OTHERS.values():
        with pytest.raises(InputError, match=message) as caught:
            gm.train(task(**changes), **(options | {"resume": True} | other))
        assert "\n" not in str(caught.value)
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_the_optimizer_of_a_function_is_recognized_by_its_rates(often, tmp_path) -> None:
    def made(rate: float):
        return lambda m: torch.optim.SGD(m.parameters(), lr=rate)

    with pytest.raises(Stop):
        gm.train(task(), optimizer=made(0.1), steps=9, out=tmp_path, on_step=stopping(4))
    with pytest.raises(InputError, match=r"of learning rates \[0.1\], not \[0.2\]"):
        gm.train(task(), optimizer=made(0.2), steps=9, out=tmp_path, resume=True)


def test_an_unfinished_run_is_not_overwritten(often, tmp_path) -> None:
    with pytest.raises(Stop):
        gm.train(task(), steps=9, out=tmp_path, on_step=stopping(4))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds an unfinished run\. Resume it"):
        gm.train(task(), steps=9, out=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_an_unfinished_run_is_read_as_its_model(often, tmp_path, capsys) -> None:
    task_file = tmp_path / "unfinished_task.py"
    task_file.write_text("from test_resume import task\n")
    kept: dict[str, Tensor] = {}

    def stop(run: gm.Run, share: float) -> None:
        kept.update({name: t.clone() for name, t in run.model.state_dict().items()})
        stopping(4)(run, share)

    with pytest.raises(Stop):
        gm.train(task(), steps=9, optimizer="muon", out=tmp_path / "run", on_step=stop)
    read = open_checkpoint(tmp_path / "run")
    assert {name: tuple(t.shape) for name, t in read} == {name: tuple(t.shape) for name, t in kept.items()}
    assert UNFINISHED in read.notes
    assert any("optimizer" in note for note in read.notes)
    assert any(name.startswith("optimizer.") for name in read.beside)  # searched for NaN, and no layer
    assert {layer.name for layer in gm.inspect(read).layers} == {"0.weight", "5.weight", "7.weight"}
    network, _ = with_task(str(tmp_path / "run"), f"{task_file}:task")
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in read)
    assert "with --resume ends it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:isometric_. left as they were")  # the norm of the task
def test_a_finished_run_is_returned_and_a_new_one_may_take_its_place(tmp_path) -> None:
    first = gm.train(task(), steps=9, init="isometric", out=tmp_path)
    steps: list[int] = []
    again = gm.train(
        task(), steps=9, init="isometric", out=tmp_path, resume=True, on_step=lambda run, share: steps.append(run.steps)
    )
    assert not steps
    assert again.resumed == again.steps == 9
    assert again.history == first.history
    assert again.init == "isometric"
    for tensor, other in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    with pytest.raises(Stop):
        gm.train(task(), steps=5, out=tmp_path, on_step=stopping(0))
    assert gm.train(task(), steps=9, init="isometric", out=tmp_path, resume=True).resumed == 9, "nothing was done yet"
    with pytest.raises(Stop):
        gm.train(task(), steps=5, out=tmp_path, on_step=stopping(1))
    assert gm.train(task(), steps=9, init="isometric", out=tmp_path, resume=True).resumed == 9, "nothing was kept yet"
    with pytest.raises(Stop):
        gm.train(task(), steps=5, out=tmp_path, on_step=stopping(2))
    kept = ["checkpoint.safetensors", "metrics.jsonl"]
    assert sorted(os.listdir(tmp_path)) == kept, "the old model is not taken for the new run's"
    assert gm.train(task(), steps=5, out=tmp_path, resume=True).steps == 5


def test_a_diverged_run_stays_diverged(often, tmp_path) -> None:
    def explode(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr=math.inf)

    for resume in (False, True):
        with pytest.warns(GramianWarning, match="not finite"):
            run = gm.train(task(), optimizer=explode, steps=40, out=tmp_path, resume=resume)
        assert run.diverged
        assert run.steps < 40


def test_without_a_run_resuming_begins(tmp_path) -> None:
    gm.train(task(), out=tmp_path / "whole", **KILLED)
    run = gm.train(task(), out=tmp_path / "new", resume=True, **KILLED)
    assert run.resumed == 0
    assert_same(tmp_path / "whole", tmp_path / "new")
    with pytest.raises(InputError, match="resume needs out="):
        gm.train(task(), steps=3, resume=True)


def test_two_processes_in_one_folder_are_refused(tmp_path) -> None:
    def second(run: gm.Run, share: float) -> None:
        if run.steps == 2:
            with pytest.raises(InputError, match="another process is training in"):
                gm.train(task(), steps=3, out=tmp_path, resume=True)
            raise Stop

    with pytest.raises(Stop):
        gm.train(task(), steps=3, out=tmp_path, on_step=second)
    gm.train(task(), steps=3, out=tmp_path, resume=True)


def test_keeping_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch) -> None:
    kept: list[int] = []

    def slow(tree: PackedTree, path: str, previous: Any = None) -> None:
        kept.append(1)
        time.sleep(0.03)

    monkeypatch.setattr(PackedTree, "save", slow)
    begin = time.perf_counter()
    run = gm.train(task(), out=tmp_path, steps=200, on_step=lambda run, share: time.sleep(0.002))
    assert 1 <= len(kept) <= 2 + (time.perf_counter() - begin) / 0.3
    assert run.seconds < time.perf_counter() - begin


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch) -> None:
    """The step does not wait for the writer, whose failure ends the run; what was written is the state at its time."""
    begun, go_on = threading.Event(), threading.Event()
    save = PackedTree.save

    def slow(tree: PackedTree, path: str, previous: Any = None) -> None:
        begun.set()
        assert go_on.wait(60)
        save(tree, path, previous)
        if previous_steps:
            raise OSError("the disk is gone")
        previous_steps.append(load_tree(path)["steps"])

    previous_steps: list[int] = []
    monkeypatch.setattr(PackedTree, "save", slow)
    monkeypatch.setattr(folder, "EVERY_SECONDS", 0.0)
    steps: list[int] = []

    def on_step(run: gm.Run, share: float) -> None:
        steps.append(run.steps)
        if run.steps == 5:
            assert begun.is_set()
            assert not previous_steps
            monkeypatch.setattr(folder, "LARGEST_SHARE", math.inf)
            go_on.set()

    with pytest.raises(OSError, match="the disk is gone"):
        gm.train(task(), out=tmp_path, steps=200, on_step=on_step)
    assert previous_steps == [1]
    assert 5 < len(steps) < 50


# ---- hostile and odd files -------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def damages(path: Path) -> dict[str, Any]:
    state = load_tree(path)
    known = {"identity": state["identity"]}
    return {
        "pickle": pickle.dumps(Malicious()),
        "empty": b"",
        "cut": path.read_bytes()[:-100],
        "no tree": lambda: save_tensors(path, {"w": X}),
        "not JSON": lambda: save_tensors(path, {}, {"gramian.tree": "{"}),
        "deep": lambda: save_tensors(path, {}, {"gramian.tree": "[" * 100_000}),
        "a list": lambda: save_tree(path, [1]),
        "no identity": lambda: save_tree(path, {"steps": 3}),
        "identity alone": lambda: save_tree(path, known),
        "another model": lambda: save_tree(path, state | {"model": {"w": X}}),
        "no optimizer": lambda: save_tree(path, state | {"optimizer": {"state": {}, "param_groups": []}}),
        "words for rows": lambda: save_tree(path, state | {"history": [{"step": "\x1b[31mred"}]}),
    }


def test_what_is_not_a_checkpoint_is_one_clear_line(often, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop):
        gm.train(task(), steps=9, out="run", on_step=stopping(4))
    path = Path("run/checkpoint.safetensors")
    for damage in damages(path).values():
        if callable(damage):
            damage()
        else:
            path.write_bytes(damage)
        before = path.read_bytes()
        Path("run/checkpoint.previous.safetensors").unlink(missing_ok=True)
        with pytest.raises(GramianError) as caught:
            gm.train(task(), steps=9, out="run", resume=True)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert path.read_bytes() == before
    assert os.listdir(".") == ["run"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"steps": 3}', "[" * 100_000, "identity alone"])
def test_a_finished_model_with_odd_metadata_is_one_clear_line(tmp_path, text: str) -> None:
    gm.train(task(), steps=3, out=tmp_path)
    tensors, metadata = load_tensors(tmp_path / "model.safetensors")
    if text == "identity alone":
        text = json.dumps({"identity": json.loads(metadata["gramian.run"])["identity"]})
    save_tensors(tmp_path / "model.safetensors", tensors, metadata | {"gramian.run": text})
    with pytest.raises(CheckpointError) as caught:
        gm.train(task(), steps=3, out=tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_state_that_needs_a_pickle_is_refused_by_name(often, tmp_path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["schedule"] = math.sin
            return super().step(closure)

    with pytest.raises(UnsupportedError, match=r"optimizer/param_groups/0/schedule is a builtins.builtin_function"):
        gm.train(task(), optimizer=lambda m: Odd(m.parameters(), lr=0.1), steps=9, out=tmp_path)


TREES = {
    "nothing": {},
    "nested": {"a": [1, (2.5, None, True), {"b": "ü\n"}], 3: {"": X}, 4.5: -math.inf},
    "tensors": [torch.arange(3), torch.tensor(2.0), torch.zeros(0, 3), torch.tensor([True]), X.bfloat16(), X.cfloat()],
    "strides": [X.T, torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), X[:, ::2], X[:1].expand(3, 6)],
    "shared": [X, X, X[3:]],
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(tmp_path, name: str) -> None:
    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
            dense = torch.empty_like(a)  # as torch itself would keep its strides
            assert b.stride() == (dense.stride() if a.is_contiguous() or 0 not in a.stride() else b.stride())
        elif isinstance(a, dict):
            assert list(a) == list(b)
            compare(list(a.values()), list(b.values()))
        elif isinstance(a, (list, tuple)):
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    save_tree(tmp_path / "t.safetensors", TREES[name])
    compare(TREES[name], load_tree(tmp_path / "t.safetensors"))


def test_no_two_tensors_of_a_tree_share_memory(tmp_path) -> None:
    save_tree(tmp_path / "t.safetensors", {"a": X, "b": X})
    found = load_tree(tmp_path / "t.safetensors")
    found["a"].zero_()
    assert torch.equal(found["b"], X)


@pytest.mark.parametrize("value", [{"w": {1, 2}}, {"w": math.sin}, {("a", 1): 2}, {"w": X.to_sparse()}], ids=str)
def test_what_is_no_tree_is_refused(tmp_path, value: Any) -> None:
    with pytest.raises(InputError):
        save_tree(tmp_path / "t.safetensors", value)
    assert not list(tmp_path.iterdir())
