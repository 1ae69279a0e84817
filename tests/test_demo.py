"""The demo, shortened: its files, its summary, and that they agree with each other."""

from __future__ import annotations

import json

import pytest
import torch

import gramian as gm
from gramian import demo, tasks
from gramian.checkpoint import load_into
from gramian.cli import main

SUMMARY = (
    "accuracy_logistic", "accuracy_untreated", "accuracy_trained", "accuracy_compressed", "parameters",
    "parameters_compressed", "seconds",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--depth", "12", "--seconds", "1.5", "--seed", "3", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_files_and_summary(out, summary) -> None:
    names = {"report.html", "model.safetensors", "compressed.safetensors", "metrics.jsonl", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    assert set(SUMMARY) <= set(summary)
    assert 0.85 < summary["accuracy_logistic"] < 0.95
    assert summary["parameters_compressed"] <= 0.30 * summary["parameters"]


@pytest.mark.slow
def test_the_saved_models_are_the_ones_reported(out, summary) -> None:
    """Loaded into fresh models, each file has the size and reaches the accuracy that the summary states."""
    task = tasks.digits(depth=12, seed=3)
    trained = load_into(task.model(), out / "model.safetensors")
    assert task.evaluate(trained)["accuracy"] == summary["accuracy_trained"]
    assert sum(p.numel() for p in trained.parameters()) == summary["parameters"]
    small = gm.load_compressed(task.model(), out / "compressed.safetensors")
    assert task.evaluate(small)["accuracy"] == pytest.approx(summary["accuracy_compressed"], abs=1e-9)
    assert sum(p.numel() for p in small.parameters()) == summary["parameters_compressed"]
    size = (out / "compressed.safetensors").stat().st_size
    assert size == summary["bytes_compressed"]
    assert size < 4 * summary["parameters_compressed"] + 10_000


@pytest.mark.slow
def test_metrics_hold_every_run(out, summary) -> None:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for init, optimizer in demo.CELLS:
        own = [row for row in rows if (row["init"], row["optimizer"]) == (init, optimizer)]
        assert len(own) >= 10
        assert own[-1]["accuracy"] == summary["accuracy_grid"][f"{init} + {optimizer}"]


@pytest.mark.slow
def test_the_report_states_the_numbers(out, summary) -> None:
    page = (out / "report.html").read_text()
    for key in ("logistic", "untreated", "trained", "compressed"):
        assert f"{summary['accuracy_' + key]:.1%}" in page
    assert page.count("<svg") > 5
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_ten_classes_without_pictures(tmp_path, capsys) -> None:
    arguments = ["--depth", "4", "--classes", "10", "--seconds", "0.5", "--no-plots", "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    assert "<svg" not in (tmp_path / "report.html").read_text()
    assert "Report:" in capsys.readouterr().out


def test_runs_have_steps_unless_seconds_are_given() -> None:
    given, deep, timed = demo.Story(100, 2, 0, None), demo.Story(1200, 2, 0, None), demo.Story(100, 2, 0, 12.0)
    assert [given.budget("muon"), deep.budget("muon"), timed.budget("muon")] == [
        {"steps": 350},
        {"steps": 175},
        {"seconds": 12.0},
    ]
    assert given.told_budget() == "1,050 steps of AdamW and 350 steps of Muon"


def test_the_digits_are_split_by_seed() -> None:
    first, again, other = (tasks.Digits.load(seed=s) for s in (0, 0, 1))
    assert torch.equal(first.x_test, again.x_test)
    assert not torch.equal(first.x_test, other.x_test)
    assert len(first.x_test) == 540
    assert len(first.x_train) == 1257
    assert abs(first.y_test.float().mean() - 0.5) < 0.02


def test_models_of_a_seed_are_the_same_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again = (tasks.plain_tanh_network(5, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
