"""The command line: what it writes, its exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.checkpoint import save_tensors
from gramian.cli import main

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

def empty():
    import dataclasses
    return dataclasses.replace(task(), train_batches=lambda epoch, generator: [])
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
    (tmp_path / "syntax.py").write_text("def task(:\n")
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
    (["inspect", "good.safetensors", "--task", "nothing"], "no task is named"),
    (["inspect", "other.safetensors", "--task", "task.py:task"], "does not fit"),
    (["inspect", "good.safetensors", "--html", "absent/x.html"], "does not exist"),
    (["inspect", "good.safetensors", "--html", "x.pdf"], "ends in .html or .json"),
    (["inspect", "good.safetensors", "--fail-on", "sometimes"], "--fail-on"),
    (["inspect"], "model"),
    (["inspect", "good.safetensors", "--frobnicate"], "--frobnicate"),
    (["demo", "--depth", "two"], "--depth"),
    (["demo", "--depth", "2"], "--depth"),
    (["demo", "--classes", "3"], "classes must be 2"),
    (["demo", "--seconds", "0"], "--seconds"),
    (["demo", "--out", "task.py"], "cannot write"),
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
