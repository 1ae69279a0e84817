"""What one backward pass says of each sample is what the gradient of that sample alone says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.compression.samplewise import by_sample, draws_of, samples_of


def _samples(batches):
    parts = list(samples_of(batches))
    return parts, draws_of(parts)


class Pooled(nn.Module):
    """Tokens through two layers, one of them twice and in place behind it, and pooled; and a layer on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu_()
        hidden = hidden + self.twice(hidden).tanh_()
        hidden = hidden + self.twice(hidden)
        return self.last(hidden.mean(1))


def case(frozen: bool):
    torch.manual_seed(0)
    net, x = Pooled().requires_grad_(not frozen), torch.randn(5, 7, 6)
    direction = torch.randn(5, 4)

    def sampled(output, batch, generator):
        yield (output[0][0] * direction).sum()

    objective = replace(gm.Objective.self_distillation(), sampled=sampled)
    plan = gm.compress(
        net, batches=[torch.randn(64, 7, 6) for _ in range(3)], objective=gm.Objective.self_distillation(), keep=0.9
    )
    return net, x, direction, objective, plan


@pytest.mark.parametrize("frozen", [False, True])
def test_each_sample_has_the_coefficients_of_its_own_gradient(frozen):
    net, x, direction, objective, plan = case(frozen)
    layers = [plan.model.get_submodule(s.name) for s in plan.spectra]
    seen = by_sample(plan.model, plan.spectra, layers, *_samples([x]), objective)
    net.requires_grad_(True)
    for s, one in zip(plan.spectra, seen, strict=True):
        layer = net.get_submodule(s.name)
        wanted = []
        for i in range(len(x)):
            grads = torch.autograd.grad((net(x[i : i + 1]) * direction[i]).sum(), list(layer.parameters()))
            gradient = grads[0].double()
            if s.mean is not None and len(grads) > 1:
                gradient = gradient - grads[1].double()[:, None] * s.mean
            wanted.append((s.left.mT @ gradient @ s.right.mT).diagonal())
        assert one is not None
        assert len(one.rounds) >= 1
        assert torch.allclose(one.rows[0], torch.stack(wanted), rtol=1e-4, atol=1e-5)  # one unit a sample


def test_a_layer_whose_rows_are_no_samples_is_left_to_gradients_of_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 9), nn.Unflatten(0, (-1, 7)), nn.Linear(9, 9), nn.Linear(9, 4))
    batches = [torch.randn(64, 7, 6) for _ in range(3)]
    objective = gm.Objective.self_distillation()
    plan = gm.compress(net, batches=batches, objective=objective, keep=0.9)
    layers = [plan.model.get_submodule(s.name) for s in plan.spectra]
    seen = by_sample(plan.model, plan.spectra, layers, *_samples(batches), objective)
    assert [one is None for one in seen] == [True, False, False]
