"""The command line: what it writes, its exit codes, and one clear line for every bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import gramian as gm
from gramian import tasks
from gramian.checkpoint import load_tensors, save_tensors
from gramian.cli import main
from gramian.cli.common import with_task
from gramian.errors import GramianWarning

TASK = """
import torch
import gramian as gm
from torch import nn

def task(depth=3):
    def batches(epoch, generator):
        for _ in range(3):
            x = torch.randn(16, 8, generator=generator)
            yield x, (x.sum(1) > 0).long()
    def model():
        layers = [m for _ in range(depth - 1) for m in (nn.Linear(8, 8), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(8, 2))
    return gm.Task(model, gm.Objective.classification(), batches, lambda model: {"accuracy": 1.0})

def deep():
    return task(60)

def raises():
    raise RuntimeError("no\\ndata")

def leaves():
    raise SystemExit(0)

def wrong():
    return 3

def network():
    return nn.Linear(8, 2)

def but(**changes):
    import dataclasses
    return dataclasses.replace(task(), **changes)

def empty():
    return but(train_batches=lambda epoch, generator: [])

def fails(*args):
    raise ValueError("broken\\ndisk")

def breaks_off(epoch, generator):
    yield from [next(task().train_batches(epoch, generator))]
    fails()

def no_model():
    return but(model=fails)

def no_batch():
    return but(train_batches=breaks_off)

def no_score():
    return but(evaluate=fails)

def own_loss():
    return but(evaluate=lambda model: {"loss": 1.0})

def frozen():
    return but(model=lambda: nn.Linear(8, 2).requires_grad_(False))

def wrong_rows():
    return but(model=lambda: nn.Linear(9, 2))

def neighbor():
    import beside
    return but(name=beside.NAME)

def ends():
    import atexit, sys
    class Finalized:
        def __del__(self):
            print("finalized", file=sys.stderr)
    sys.modules["kept"] = Finalized()
    atexit.register(print, "handler", file=sys.stderr)
    return task()
"""


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with good and bad files, as the working directory."""
    monkeypatch.chdir(tmp_path)
    weights = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()
    save_tensors("good.safetensors", weights)
    save_tensors("other.safetensors", {"w": torch.eye(3)})
    save_tensors("nan.safetensors", {"w": torch.full((4, 4), float("nan")), "v": torch.eye(3)})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:200])
    torch.save({"w": Malicious()}, "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save(weights, "good.pt")
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "beside.py").write_text("NAME = 'from beside'\n")
    (tmp_path / "syntax.py").write_text("def task(:\n")
    (tmp_path / "one.py").write_text("import absent\ndef my_task(): ...\ndef helper(x): ...\n")
    (tmp_path / "two.py").write_text(
        "import absent\ndef a() -> 'gm.Task': ...\nasync def b(): ...\ndef c(*, k=1) -> Task: ...\n"
    )
    (tmp_path / "family.py").write_text(
        "def data(n=1): ...\ndef made(net=None, **kw): return gm.Task(net)\ndef _own(): return made()\n"
        "def speech(): return made()\ndef spoken(): return _own()\nclass Task: ...\n"
    )
    (tmp_path / "none.py").write_text("import absent\ndef f(x): ...\ndef g(*, k): ...\ndef _h(): ...\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main([*args])
    out, err = capsys.readouterr()
    return code, out, err


BAD = [
    (["inspect", "missing.safetensors"], "no such file"),
    (["inspect", "cut.safetensors"], "damaged or truncated"),
    (["inspect", "evil.pt"], "refused"),
    (["inspect", "pickle.pt"], "refused"),
    (["inspect", "empty"], "model.safetensors"),
    (["inspect", "task.py:raises"], "RuntimeError: no data"),
    (["inspect", "task.py:leaves"], "SystemExit"),
    (["inspect", "task.py:wrong"], "returned int; wanted a gm.Task"),
    (["inspect", "task.py:empty"], "no batches"),
    (["inspect", "task.py:absent"], "it defines task, deep"),
    (["inspect", "nowhere.py:task"], "does not exist"),
    (["inspect", "syntax.py:task"], "SyntaxError"),
    (["inspect", "nowhere.py"], "task file nowhere.py does not exist"),
    (["inspect", "syntax.py"], "syntax.py is not Python: SyntaxError"),
    (["inspect", "task.py"], "name its function that returns the task: one of task, "),
    (["inspect", "one.py"], "name its function that returns the task: gramian inspect one.py:my_task"),
    (["inspect", "two.py"], "one of a, c, as in gramian inspect two.py:a"),
    (["inspect", "family.py"], "the task: one of speech, spoken, made, as in gramian inspect family.py:speech"),
    (["inspect", "none.py"], "name its function that returns the task: but it has none"),
    (["inspect", "good.pt", "--task", "one.py"], "gramian inspect good.pt --task one.py:my_task"),
    (["inspect", "task.py:network"], "returned Linear; wanted a gm.Task. Put the model into one: gm.Task(lambda"),
    (["train", "one.py", "--steps", "3"], "gramian train one.py:my_task"),
    (["inspect", "good.safetensors", "--task", "nothing"], "no task is named"),
    (["inspect", "other.safetensors", "--task", "task.py:task"], "does not fit"),
    (["inspect", "good.safetensors", "--html", "absent/x.html"], "does not exist"),
    (["inspect", "good.safetensors", "--html", "/proc/x.html"], "cannot write /proc/x.html: "),
    (["inspect", "good.safetensors", "--html", "x.pdf"], "ends in .html or .json"),
    (["inspect", "good.safetensors", "--fail-on", "sometimes"], "--fail-on"),
    (["inspect"], "model"),
    (["inspect", "good.safetensors", "--frobnicate"], "--frobnicate"),
    (["demo", "--depth", "two"], "--depth"),
    (["demo", "--depth", "2"], "--depth"),
    (["demo", "--classes", "3"], "classes must be 2"),
    (["demo", "--seconds", "0"], "--seconds"),
    (["demo", "--out", "task.py"], "cannot write"),
    (["train"], "task"),
    (["train", "nothing", "--steps", "3"], "no task is named 'nothing'; built in: digits"),
    (["train", "task.py:raises", "--steps", "3"], "RuntimeError: no data"),
    (["train", "task.py:empty", "--steps", "3"], "no batches"),
    (["train", "task.py:no_model", "--steps", "3"], "model() raised ValueError: broken disk (task.py, line 39)"),
    (["train", "task.py:no_batch", "--steps", "3"], "train_batches(0, generator) raised ValueError: broken disk"),
    (["train", "task.py:no_score", "--steps", "3"], "evaluate(model) raised ValueError: broken disk"),
    (["train", "task.py:own_loss", "--steps", "3"], "returned 'loss', which is the run's own"),
    (["train", "task.py:frozen", "--steps", "3"], "task.py:frozen': no parameter of the model requires a gradient"),
    (["train", "task.py:task", "--steps", "3", "--seed", "9223372036854775808"], "--seed"),
    (["train", "task.py:task"], "give one of --steps, --epochs, --seconds, as in --seconds 60; got none"),
    (["train", "task.py:task", "--steps", "3", "--epochs", "1"], "got --steps and --epochs"),
    (["train", "task.py:task", "--steps", "0"], "--steps"),
    (["train", "task.py:task", "--seconds", "nan"], "--seconds"),
    (
        ["train", "task.py:task", "--steps", "3", "--optimizer", "adagrad"],
        "unknown optimizer 'adagrad'; wanted auto, muon",
    ),
    (["train", "task.py:task", "--steps", "3", "--lr", "nan"], "lr must be"),
    (["train", "task.py:task", "--steps", "3", "--init", "zeros"], "init must be one of default, isometric, auto"),
    (["train", "task.py:task", "--steps", "3", "--resume"], "--resume needs --out"),
    (["train", "task.py:task", "--steps", "3", "--out", "task.py"], "cannot write to task.py"),
    (["train", "task.py:task", "--steps", "3", "--out", "task.py/run"], "cannot write to task.py/run"),
    (["train", "task.py:task", "--steps", "3", "--out", "y" * 5000], "File name too long"),
    (["train", "task.py:task", "--steps", "3", "--out", "a\0b"], "null byte"),
    (["train", "x" * 5000 + ".py:task", "--steps", "3"], "does not exist"),
    (["train", "task.py:task", "--seconds", "inf"], "seconds must be finite"),
    (["train", "task.py:task", "--steps", "3", "--regularize", "l1"], "--regularize wants name=number"),
    (["train", "task.py:task", "--steps", "3", "--text", "task.py"], "belongs to the task chars"),
    (["frobnicate"], "frobnicate"),
    (["--frobnicate"], "--frobnicate"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_clear_line(folder, capsys, args, message) -> None:
    before = sorted(os.listdir(folder))
    code, _, err = run(capsys, *args)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("gramian: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert sorted(os.listdir(folder)) == before, "nothing is half-written, and nothing in a pickle was run"


@pytest.mark.parametrize("name", ["good.safetensors", "good.pt"])
def test_inspect_prints_and_writes(folder, capsys, name) -> None:
    code, out, err = run(capsys, "inspect", name, "--html", "r.html", "--json", "r.json")
    assert code == 0
    assert "No trouble found in 3 layers" in out
    assert json.loads((folder / "r.json").read_text())["layers"][0]["name"] == "0.weight"
    assert "0.weight" in (folder / "r.html").read_text()
    assert "gramian:" not in err


def test_train_writes_its_figures(folder, capsys) -> None:
    code, *_ = run(capsys, "train", "task.py:task", "--steps", "3", "--compare", "adamw,sgd", "--json", "r.json", "-q")
    assert code == 0
    found = json.loads((folder / "r.json").read_text())
    assert [(key, row["steps"], row["optimizer"]) for key, row in found["runs"].items()] == [
        ("adamw", 3, "adamw"),
        ("sgd", 3, "sgd"),
    ]
    assert found["runs"]["sgd"]["history"][-1]["step"] == 3


@pytest.mark.parametrize("args", [["task.py:task"], ["good.safetensors", "--task", "task.py:task"]])
def test_a_task_gives_the_signal_too(folder, capsys, args) -> None:
    code, out, _ = run(capsys, "inspect", *args)
    assert code == 0
    assert "gradient" in out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["task.py:deep"], 0),
        (["task.py:deep", "--fail-on", "error"], 1),
        (["task.py:deep", "--fail-on", "info"], 1),
        (["task.py:task", "--fail-on", "info"], 0),
        (["task.py:deep", "--fail-on", "never"], 0),
    ],
)
def test_exit_codes_follow_the_findings(folder, capsys, args, code) -> None:
    assert run(capsys, "inspect", *args, "--quiet") == (code, "", "")


def test_weights_that_are_not_finite_are_reported_and_exit_with_2(folder, capsys) -> None:
    code, out, err = run(capsys, "inspect", "nan.safetensors", "--json", "r.json")
    assert code == 2
    assert "16 values of w are NaN or infinite" in err.splitlines()[-1]
    assert "1 error" in out
    assert json.loads((folder / "r.json").read_text())["findings"][0]["code"] == "non-finite-weights"


def test_one_value_that_is_not_finite_is_one(folder, capsys) -> None:
    save_tensors("one.safetensors", {"w": torch.eye(4).index_put((torch.tensor(1),) * 2, torch.tensor(float("nan")))})
    assert "1 value of w is NaN or infinite" in run(capsys, "inspect", "one.safetensors")[2].splitlines()[-1]


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ({"*.nothing": "o i -> o i"}, "'*.nothing' matches no matrix"),
        ({"*.bias": "o i -> o i"}, "'*.bias' matches no matrix"),
        ({"*": "skip", "0.*": "o i -> o i"}, "'0.*' matches only tensors that an earlier pattern matches"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--against", "good.pt"]])
def test_layouts_that_match_nothing_exit_with_2(folder, capsys, layouts, message, more) -> None:
    (folder / "layouts.json").write_text(json.dumps(layouts))
    code, _, err = run(capsys, "inspect", "good.safetensors", "--layouts", "layouts.json", *more)
    assert code == 2
    assert message in [line for line in err.splitlines() if line.startswith("gramian: ")][-1]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(folder, capsys, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, "inspect", "task.py:deep")
    assert max(len(line) for line in out.splitlines()) <= columns


def test_help_and_version(capsys) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert "demo" in out
    assert "inspect" in out
    assert run(capsys, "--version")[1].strip() == f"gramian {gm.__version__}"


TRAIN = ("train", "task.py:task", "--steps", "30", "--out", "runs/x")


def test_train_shows_how_it_goes_and_keeps_the_model(folder, capsys) -> None:
    code, out, err = run(capsys, *TRAIN)
    assert code == 0
    assert err.splitlines()[0].startswith("train   7%  step 2  loss 0.")
    assert len(err.splitlines()) == 20
    assert "muon (auto), learning rate 0.1" in out
    assert "as the task makes it: no error was found before the first step" in out
    assert "accuracy" in out
    assert out.endswith("Model: runs/x/model.safetensors\n")
    assert run(capsys, "inspect", "runs/x/model.safetensors", "--task", "task.py:task", "--quiet") == (0, "", "")
    before = (folder / "runs/x/model.safetensors").read_bytes()
    code, _, err = run(capsys, *TRAIN)
    assert code == 2
    assert "runs/x holds a finished run. Choose another folder" in err
    code, out, _ = run(capsys, *TRAIN, "--resume")
    assert code == 0
    assert "finished before" in out
    assert (folder / "runs/x/model.safetensors").read_bytes() == before


def test_train_says_what_it_did_to_a_network_that_cannot_learn(folder, capsys) -> None:
    out = run(capsys, "train", "task.py:deep", "--steps", "2", "--optimizer", "muon", "--seed", "1")[1]
    assert "isometric: Gain " in out
    assert "muon, learning rate 0.3464" in out
    assert out.endswith("The model was not saved; --out DIR saves it.\n")


def test_train_quietly(folder, capsys) -> None:
    assert run(capsys, *TRAIN, "--quiet") == (0, "", "")
    assert sorted(os.listdir("runs/x")) == ["metrics.jsonl", "model.safetensors"]


def test_train_that_diverges_exits_with_1(folder, capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = run(capsys, *TRAIN, "--optimizer", "adamw", "--lr", "1e38", "--quiet")
    assert (code, out) == (1, "")
    assert "gramian: warning: train: the loss is not finite" in err


def test_train_that_is_interrupted_says_how_to_go_on(folder, capsys, monkeypatch) -> None:
    from gramian.training import folder as run_folder

    def interrupt(self, state) -> None:
        keep(self, state)
        steps.append(state["steps"])
        raise KeyboardInterrupt

    keep, steps = run_folder.Folder.keep, []
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Folder, "keep", interrupt)
        code, _, err = run(capsys, *TRAIN)
    assert code == 130
    assert err.splitlines()[-1] == "gramian: interrupted; continue with the same command and --resume"
    code, _, err = run(capsys, *TRAIN)
    assert code == 2
    assert "runs/x holds an unfinished run" in err
    code, _, err = run(capsys, *TRAIN, "--resume", "--optimizer", "adamw")
    assert code == 2
    assert "the run in runs/x is of optimizer muon, not adamw; learning rate the usual one (0.173), not 0.001" in err
    code, out, _ = run(capsys, *TRAIN, "--resume")
    assert code == 0
    assert f"resumed at {steps[0]}" in out


def test_train_that_is_interrupted_and_not_kept_says_so(folder, capsys, monkeypatch) -> None:
    def interrupt(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gramian.training.train", interrupt)
    assert run(capsys, "train", "task.py:task", "--steps", "3") == (130, "", "gramian: interrupted\n")


def test_a_folder_with_the_name_of_a_task_is_meant_beside_a_task(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = gm.train(tasks.TASKS["diabetes"].make(), optimizer="sgd", steps=1, out="diabetes").model
    found = with_task("diabetes", "diabetes")
    assert found is not None
    assert all(map(torch.equal, found[0].state_dict().values(), trained.state_dict().values()))
    with pytest.warns(GramianWarning, match="write ./diabetes --task diabetes"):
        assert with_task("diabetes", None) is not None


def test_an_error_of_the_task_is_one_line_and_told_from_divergence(folder, capsys) -> None:
    code, _, err = run(capsys, "train", "task.py:wrong_rows", "--steps", "3", "--init", "default")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "the forward pass or the loss raised RuntimeError: mat1 and mat2 shapes cannot be multiplied" in err
    code, _, err = run(capsys, "train", "task.py:wrong_rows", "--steps", "3", "--init", "default", "--traceback")
    assert code == 2
    assert err.startswith("Traceback")


def test_a_task_file_imports_what_lies_beside_it(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    code, out, _ = run(capsys, "train", "../task.py:neighbor", "--steps", "3")
    assert code == 0
    assert "from beside" in out


def test_runs_of_two_tasks_of_a_file_are_told_apart(folder, capsys) -> None:
    assert run(capsys, *TRAIN, "--quiet")[0] == 0
    command = [part.replace("task.py:task", "task.py:deep") for part in TRAIN]
    code, _, err = run(capsys, *command, "--resume")
    assert code == 2
    assert "task.py:task, not " in err
    assert "task.py:deep; model" in err


@pytest.mark.slow
def test_train_under_torchrun(folder) -> None:
    """Two processes, one of which prints and writes; a refusal is told and exits with 2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "gramian", *TRAIN]
    command[command.index("task.py:task")] = "task.py:ends"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Model: runs/x/model.safetensors") == 1
    assert done.stderr.count("train 100%") == 1
    assert sorted(os.listdir("runs/x")) == ["metrics.jsonl", "model.safetensors"]
    assert "finalized" not in done.stderr  # a thread of the process group may not meet it
    assert done.stderr.count("handler") == 2
    done = subprocess.run([*command, "--resume", "--seed", "7"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1  # torchrun's own, which tells the processes' in its report
    assert (
        "gramian: train: rank 0 of 2 failed: train: cannot resume, the run in runs/x is of seed 0, not 7" in done.stderr
    )
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_compress_under_torchrun(folder) -> None:
    """Two processes calibrate, and one prints and writes; a task that cannot be loaded is told once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "gramian", "compress", "task.py:task", "--keep", "0.7", "--no-curve", "--out", "small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Model and report: small") == 1
    assert sorted(os.listdir("small")) == ["model.safetensors", "report.html", "report.json"]
    command[-6:] = ["task.py:none", "--keep", "0.7", "--out", "other"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000)
    assert done.stderr.count("gramian: compress: rank 0 of 2 failed") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("columns", [40, 160])
def test_train_fits_the_terminal(folder, columns) -> None:
    from rich.console import Console

    from gramian import tasks
    from gramian.training import display, train

    stream = io.StringIO()
    console = Console(file=stream, width=columns, force_terminal=True)
    with display.Watched(console=console) as watched:
        trained = train(
            tasks.load("task.py:deep"), init="auto", steps=40, progress=watched.evaluated, on_step=watched.stepped
        )
    trained.metrics["a long name of a number that is measured here"] = 0.125
    display.show(trained, "task", console=console)
    # Every movement of the cursor begins a line, colors do not.
    drawn = re.sub(r"\r|\x1b\[[0-9?]*[A-Zhl]", "\n", stream.getvalue())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
    assert max(map(len, lines)) <= columns
    assert any("accuracy 1" in line for line in lines)
    assert any("0.125" in line for line in lines)


def test_the_help_of_train_names_what_the_tables_hold(capsys) -> None:
    from gramian.optim import OPTIMIZERS
    from gramian.training import INITS

    words = run(capsys, "train", "--help")[1].replace(",", " ").replace(".", " ").split()
    assert {"auto", *OPTIMIZERS, *INITS} <= set(words)


@pytest.mark.parametrize(
    ("tensors", "layouts", "wanted"),
    [
        ({"a.weight": torch.ones(8, 8)}, {"zz*": "skip"}, "matches no matrix"),
        ({"a.weight": torch.ones(8, 8)}, {"*": "skip"}, "nothing was inspected"),
        ({"a.bias": torch.ones(8)}, None, "nothing was inspected"),
        ({"strange": torch.ones(4, 4, 4)}, None, "nothing was inspected"),
    ],
)
def test_inspect_without_a_matrix_is_bad_input(tmp_path, capfd, tensors, layouts, wanted):
    save_tensors(tmp_path / "m.safetensors", tensors)
    args = ["inspect", str(tmp_path / "m.safetensors")]
    if layouts is not None:
        (tmp_path / "l.json").write_text(json.dumps(layouts))
        args += ["--layouts", str(tmp_path / "l.json")]
    assert main(args) == 2
    out, err = capfd.readouterr()
    assert not out
    assert len(err.splitlines()) == 1, err
    assert wanted in err


def test_an_error_leaves_no_spinner_behind(tmp_path, capfd, monkeypatch):
    def fails(*args, progress, **options):
        progress("spectra", 1, 3)
        raise gm.errors.InputError("no more")

    monkeypatch.setattr("gramian.remedies.inspect", fails)
    save_tensors(tmp_path / "m.safetensors", {"weight": torch.ones(4, 4)})
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 2
    assert capfd.readouterr().err == "gramian: no more\n"


def test_one_value_is_singular(tmp_path, capfd):
    w = torch.ones(4, 4)
    w[1, 1] = float("nan")
    save_tensors(tmp_path / "m.safetensors", {"w": w, "v": torch.eye(4)})
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 2
    assert "1 value of w is NaN or infinite" in capfd.readouterr().err


def test_a_broken_config_is_noted(tmp_path, capfd):
    save_tensors(tmp_path / "model.safetensors", {"w": torch.eye(4)})
    for text, wanted in (("{broken", True), ("[1]", True), ("{}", False)):
        (tmp_path / "config.json").write_text(text)
        assert main(["inspect", str(tmp_path)]) == 0
        assert ("config.json cannot be read" in " ".join(capfd.readouterr().out.split())) == wanted


# ---- a file of options -----------------------------------------------------------------------------------------------

WRONG_CONFIG = {
    "weight_decy = 1": "unknown key 'weight_decy'; did you mean weight-decay?",
    "zzz = 1": "unknown key 'zzz'; known are task, text, model, optimizer, lr,",
    "config = 'a'": "unknown key 'config'",
    "steps = 1.5": "run.toml: steps = 1.5",
    "steps = 'many'": "run.toml: steps = 'many': ",
    "steps = true": "steps must be text or a number; got True",
    "steps = [1]": "steps must be text or a number; got [1]",
    "quiet = 1": "quiet must be true or false; got 1",
    "augment = {shift = 'x'}": "augment must be text or a number",
    "clip = 1\nclip = 2": "is not TOML: ",
    "weight-decay = 1\nweight_decay = 2": "weight-decay is there twice",
    "\x00": "is not TOML: ",
}


@pytest.mark.parametrize("text", WRONG_CONFIG)
def test_a_wrong_file_of_options_is_one_line(folder, capsys, text) -> None:
    (folder / "run.toml").write_text(text)
    code, out, err = run(capsys, "train", "task.py:task", "--config", "run.toml", "--epochs", "1")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert WRONG_CONFIG[text] in err
    assert run(capsys, "train", "--config", "none.toml")[2].count("cannot be read (No such file or directory)") == 1


def test_a_file_of_options_is_as_their_flags_and_flags_win(folder, capsys) -> None:
    (folder / "run.toml").write_text(
        "task = 'task.py:task'\nsteps = 5\noptimizer = 'adamw'\nweight-decay = 0.1\nquiet = true\n"
        "compare = ['adamw', 'sgd']\n[augment]\nnoise = 0.1\n"
    )
    assert run(capsys, "train", "--config", "run.toml", "--compare", "", "--steps", "3", "--out", "a") == (0, "", "")
    flags = ["--optimizer", "adamw", "--weight-decay", "0.1", "--augment", "noise=0.1", "--steps", "3"]
    assert run(capsys, "train", "task.py:task", *flags, "--quiet", "--out", "b") == (0, "", "")
    one, two = (load_tensors(folder / name / "model.safetensors")[0] for name in "ab")
    assert all(map(torch.equal, one.values(), two.values()))


def test_tensorboard_gets_what_the_metrics_have(folder, capsys) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(capsys, *TRAIN, "--quiet", "--tensorboard")[0] == 0
    board = events.EventAccumulator(str(folder / "runs/x/tensorboard"))
    board.Reload()
    rows = [json.loads(line) for line in (folder / "runs/x/metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "accuracy"):
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert len(board.Scalars("rate")) == len(rows)
    code, _, err = run(capsys, "train", "task.py:task", "--steps", "3", "--tensorboard")
    assert (code, err.count("--tensorboard needs --out DIR")) == (2, 1)


def test_a_file_is_inspected_without_its_checksums(folder, capsys) -> None:
    save_tensors(folder / "w.safetensors", {"a.weight": torch.eye(8), "b.weight": 2 * torch.eye(8)})
    damaged = bytearray((folder / "w.safetensors").read_bytes())
    damaged[-2] ^= 1
    (folder / "w.safetensors").write_bytes(damaged)
    code, _, err = run(capsys, "inspect", "w.safetensors", "--quiet")
    assert (code, "the checksum is another" in err) == (2, True)
    assert run(capsys, "inspect", "w.safetensors", "--quiet", "--no-checksums") == (0, "", "")
    both = ["inspect", "w.safetensors", "--against", "w.safetensors", "--quiet"]
    assert [run(capsys, *both, *more)[0] for more in ([], ["--no-verify"])] == [2, 0]
    code, _, err = run(capsys, "inspect", "task.py:task", "--no-checksums")
    assert (code, err.count("--no-checksums is for files")) == (2, 1)


def test_inspect_with_an_optimizer_looks_at_its_steps(folder, capsys) -> None:
    def looked(*options: str) -> tuple[str, list[str]]:
        run(capsys, "inspect", "task.py:task", "--json", "report.json", "--quiet", *options)
        report = json.loads((folder / "report.json").read_text())
        return report["verdict"], [finding["code"] for finding in report["findings"]]

    assert "optimizer's steps (no optimizer was given)" in looked()[0]
    verdict, codes = looked("--optimizer", "sgd:lr=1e6")
    assert "no optimizer was given" not in verdict
    assert "rate-too-high" in codes


@pytest.mark.parametrize("text", ["adamq", "adamw:lr=x", "adamw:rate=1", "adamw:lr=auto"])
def test_a_wrong_optimizer_of_inspect_is_one_line(folder, capsys, text: str) -> None:
    code, out, err = run(capsys, "inspect", "task.py:task", "--optimizer", text)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "inspect --optimizer" in err
