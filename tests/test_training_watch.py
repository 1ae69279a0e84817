"""A run that is watched: what is found is told, kept over an interruption, and changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gramian as gm
from cases import seeded
from gramian.cli import main
from gramian.training import folder
from runs import Stop, stopping, weights

X = torch.randn(48, 6, generator=seeded(0))
Y = (X[:, 0] > 0).long()


def task(bias: float = 0.0) -> gm.Task:
    """A small network, whose units a bias of -100 kills."""

    def net() -> nn.Module:
        first = nn.Linear(6, 8)
        nn.init.constant_(first.bias, bias)
        return nn.Sequential(nn.Dropout(0.1), first, nn.ReLU(), nn.Linear(8, 2))

    return gm.Task(net, gm.Objective.classification(), lambda epoch, generator: [(X, Y)], lambda model: {"one": 1.0})


OPTIONS: dict[str, Any] = {"steps": 12, "ema": 0.9, "clip": 1.0, "accumulate": 2}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_watch_changes_no_number(optimizer: str) -> None:
    plain, seen = (gm.train(task(-100.0), optimizer=optimizer, watch=watch, **OPTIONS) for watch in (False, True))
    assert plain.findings == []
    assert seen.findings
    assert all(map(torch.equal, weights(plain), weights(seen)))
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in seen.history]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_healthy_run_has_no_findings(precision: str) -> None:
    run = gm.train(task(), optimizer="adamw", steps=60, accumulate=4, precision=precision, watch=True)
    assert run.findings == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_left_out_is_told(optimizer: str) -> None:
    """The module that made the first value that is not finite, and the run as it is without a watch."""

    class Root(nn.Module):
        def forward(self, x):
            return (x.square() - 1e9 * (x.abs() > 1e4)).sqrt()

    def made(epoch: int, generator: torch.Generator):
        return [(X * (1e6 if epoch == 2 else 1.0), Y)]

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), Root(), nn.Linear(8, 2))

    what = gm.Task(net, gm.Objective.classification(), made, lambda model: {"one": 1.0})
    with pytest.warns(gm.errors.GramianWarning, match="1 of 6 steps were skipped"):
        plain, seen = (gm.train(what, optimizer=optimizer, steps=6, watch=watch) for watch in (False, True))
    assert all(map(torch.equal, weights(plain), weights(seen)))
    assert [row["step"] for row in seen.findings] == [3]
    assert seen.findings[0]["where"].startswith("1")


def test_findings_outlive_an_interruption(often, tmp_path: Path) -> None:
    whole = gm.train(task(-100.0), optimizer="adamw", out=tmp_path / "whole", watch=True, **OPTIONS)
    with pytest.raises(Stop):
        gm.train(task(-100.0), optimizer="adamw", out=tmp_path / "a", watch=True, on_step=stopping(5), **OPTIONS)
    resumed = gm.train(task(-100.0), optimizer="adamw", out=tmp_path / "a", watch=True, resume=True, **OPTIONS)
    assert resumed.resumed
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    first = [row for row in whole.findings if row["step"] == 1]
    assert first == [row for row in resumed.findings if row["step"] == 1]
    assert len({(row["code"], row["where"]) for row in resumed.findings}) == len(resumed.findings)
    finished = gm.train(task(-100.0), optimizer="adamw", out=tmp_path / "a", resume=True, **OPTIONS)
    assert finished.findings == resumed.findings
    assert (tmp_path / "a" / folder.MODEL).exists()


def test_the_command_tells_them_and_the_report_shows_them(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watched_task.py").write_text(
        "import torch, gramian as gm\nfrom torch import nn\n"
        "x, y = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 2\n"
        "def net():\n"
        "    first = nn.Linear(6, 8)\n"
        "    nn.init.constant_(first.bias, -100.0)\n"
        "    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 2))\n"
        "def task():\n"
        "    return gm.Task(net, gm.Objective.classification(), [(x, y)], lambda model: {'one': 1.0})\n"
    )
    args = ["train", "watched_task.py:task", "--steps", "6", "--optimizer", "adamw", "--init", "default", "--watch"]
    assert main([*args, "--out", "run", "--html", "run.html"]) == 0
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if "step 1: " in line]
    assert told
    assert told[0].split(", step 1: ")[0] in ("error", "warning", "info")
    assert "nothing found" not in out
    assert "step 1: " in out
    assert "Found while training" in (tmp_path / "run.html").read_text()


def test_the_command_says_before_the_first_step_what_no_initialization_repairs(tmp_path, capsys, monkeypatch) -> None:
    """And at the end, of a watch that found nothing, in how many looks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labeled_task.py").write_text(
        "import torch, gramian as gm\nfrom torch import nn\n"
        "x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))\n"
        "def made(y):\n"
        "    loss = gm.Objective.classification()\n"
        "    return gm.Task(lambda: nn.Linear(6, 2), loss, [(x, y)], lambda model: {'one': 1.0})\n"
        "def broken():\n    return made(0 * x[:, 0].long())\n"
        "def sound():\n    return made((x[:, 0] > 0).long())\n"
    )
    args = ["--steps", "4", "--optimizer", "adamw", "--watch"]
    assert main(["train", "labeled_task.py:broken", *args]) == 0
    lines = capsys.readouterr().err.splitlines()
    at = [i for i, line in enumerate(lines) if "no initialization repairs this: All 48 labels are the same" in line]
    assert len(at) == 1
    assert all("step" not in line for line in lines[: at[0]])
    assert main(["train", "labeled_task.py:sound", *args]) == 0
    out, err = capsys.readouterr()
    assert "watch: nothing found in 1 look" in out
    assert "init:" not in err
