"""`gramian bench rates`: the walk over a grid ends at its best, and what is carried is judged against that."""

from __future__ import annotations

import math

import pytest
import torch

from gramian.bench import rates


@pytest.mark.parametrize("best", [1e-3, 0.05, 3.0])
def test_the_walk_ends_with_the_best_between_two_worse(best: float):
    scores = rates.grid(lambda rate: (math.log(rate) - math.log(best)) ** 2, 0.1)
    found = min(scores, key=lambda rate: scores[rate])
    assert list(scores) == sorted(scores)
    assert found / rates.HALF_DECADE < best < found * rates.HALF_DECADE
    assert found not in (min(scores), max(scores))


def test_the_walk_leaves_rates_that_diverge_and_ends():
    assert min(rates.grid(lambda rate: math.inf if rate > 1e-3 else 1 / rate, 0.1)) < 1e-3
    assert len(rates.grid(lambda rate: rate, 0.1)) == rates.MOST_RATES


def test_a_rate_that_carries_meets_its_goals_and_one_that_does_not_misses(monkeypatch: pytest.MonkeyPatch):
    ideal = {"small": 0.1, "large": 0.1}

    def score(task, make, steps, lr):
        return 1 + math.log(lr / ideal[label]) ** 2

    shapes = dict.fromkeys(ideal, (4, 8))
    for carried, met in ((0.1, True), (0.001, False)):
        ideal["large"] = carried
        labels = iter(ideal)

        def tasks(*args, labels=labels):
            nonlocal label
            label = next(labels)

        label = ""
        monkeypatch.setattr(rates, "_score", score)
        monkeypatch.setattr(rates, "classes", tasks)
        row = rates._transfer("AdamW", shapes, 1, "row")
        assert [goal.met(figure) for goal, figure in row.goals] == [met, met]
        assert [m.method for m in row.measurements] == ["small", "large"]


@pytest.mark.parametrize("name", rates.NETWORKS)
def test_the_networks_take_the_digits_and_repeat_with_their_seed(name: str):
    task = rates.classes(name, rates.NETWORKS[name], 0)
    one, other = task.model(), task.model()
    x, _ = task.batches(1)[0]
    assert torch.equal(one(x), other(x))
    assert one(x).shape == (len(x), 10)
