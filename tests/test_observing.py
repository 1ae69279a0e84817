"""Watched training steps: the model is left as it was, and the numbers are those of direct computations."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import gramian as gm
from gramian.inspection.passes.moments import moments
from gramian.inspection.passes.watched_steps import observe

CLASSIFY = gm.Objective.classification()


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    observe(model, [(torch.ones(4, 8), torch.arange(4) % 3)], CLASSIFY)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model] == [True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_moments_are_those_of_float64() -> None:
    for scale in (1e-30, 1.0, 1e30):
        x = (torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 2) * scale
        wide, found = x.numpy().astype(np.float64), moments(x)
        np.testing.assert_allclose(found.rms, np.sqrt((wide**2).mean()), rtol=1e-5)
        np.testing.assert_allclose(found.between, np.sqrt(wide.var(0).mean()), rtol=1e-5)


def test_dead_units_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    x = torch.randn(64, 4)
    seen = observe(model, [(x, torch.arange(64) % 3)], CLASSIFY)
    assert seen.activations[0].dead == int((model[:2](x) == 0).all(0).sum())
