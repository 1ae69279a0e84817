"""`gramian bench linalg`: its tasks are named, its peers are right, and it calibrates nothing but itself."""

from __future__ import annotations

import pytest
import torch

from gramian import random
from gramian.bench import linalg, matrix_functions, run
from gramian.cli import main
from gramian.errors import InputError


def test_the_coupled_newton_of_the_bench_is_a_fair_peer():
    spectrum = torch.logspace(0, -3, 32, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    m = random.with_spectrum(32, 32, spectrum=spectrum, symmetric=True, generator=generator, dtype=torch.float64)
    w, v = torch.linalg.eigh(m)
    exact = (v * w**-0.25) @ v.mT
    assert torch.linalg.norm(matrix_functions.coupled_newton(m.float(), 4) - exact) < 1e-3 * torch.linalg.norm(exact)


def test_one_task_gives_one_row(monkeypatch):
    monkeypatch.setattr(linalg, "TASKS", {name: lambda repeats, name=name: (name, repeats) for name in ("one", "two")})
    told = []
    assert list(linalg.rows(3, "w", told.append)) == [("two", 3)]
    assert told == ["two"]


def test_every_task_of_the_issue_has_a_name():
    assert set(linalg.TASKS) >= {"polar_wide", "polar_square", "inv_root", "svdvals", "orthogonalize_many"}
    with pytest.raises(InputError, match="no task contains"):
        run("linalg", only="no such task")


def test_only_linalg_can_be_calibrated(capsys):
    assert main(["bench", "--calibrate"]) == 2
    assert "gramian bench linalg --calibrate" in capsys.readouterr().err
