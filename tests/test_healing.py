"""A compressed model that is healed is nearer to the model that it was made of, or it is the one that was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.errors import InputError

OBJECTIVE = gm.Objective.self_distillation()


def case() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor], nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8))
    mix = torch.randn(16, 16)
    known = [torch.randn(32, 16) @ mix for _ in range(16)]
    new = [torch.randn(64, 16) @ mix for _ in range(2)]
    return net, known, new, gm.compress(net, batches=known, objective=OBJECTIVE, keep=0.5).apply()


def distance(one: nn.Module, teacher: nn.Module, data: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([(one(x) - teacher(x)).square().sum(1).mean() for x in data]).mean() / 2)


def test_a_healed_model_is_nearer_on_data_that_nobody_saw():
    net, known, new, small = case()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    shares: list[float] = []
    healed = gm.heal(small, net, known, OBJECTIVE, steps=100, progress=lambda share, distance: shares.append(share))
    assert healed.kept
    assert distance(healed.model, net, new) < 0.9 * distance(small, net, new)
    assert healed.after < healed.before == pytest.approx(distance(small, net, known[7::8]), rel=1e-5)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())  # left as it was
    assert [p.requires_grad for p in healed.model.parameters()] == [p.requires_grad for p in small.parameters()]


@pytest.mark.parametrize("mode", [False, True])
def test_dropout_does_not_act_and_the_mode_stays(mode):
    net, known, _, _ = case()
    net = nn.Sequential(*net[:4], nn.Dropout(0.5), net[4]).eval()
    small = gm.compress(net, batches=known, objective=OBJECTIVE, keep=0.5).apply().train(mode)
    healed = gm.heal(small, net, known, OBJECTIVE, steps=40)
    assert healed.kept
    assert [m.training for m in healed.model.modules()] == [m.training for m in small.modules()]
    assert distance(healed.model.eval(), net, known[7::8]) == pytest.approx(healed.after, rel=1e-5)


def test_the_same_seed_heals_the_same():
    net, known, _, small = case()
    one, two = (gm.heal(small, net, known, OBJECTIVE, steps=20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_dense_matrices_stay_and_frozen_factors_learn():
    net, known, _, _ = case()
    net.requires_grad_(False)
    small = gm.compress(net, batches=known, objective=OBJECTIVE, exclude=["4"], keep=0.6).apply()
    healed = gm.heal(small, net, known, OBJECTIVE, steps=20)
    assert healed.kept
    assert torch.equal(healed.model.get_submodule("4").weight, net[4].weight)
    assert not any(p.requires_grad for p in healed.model.parameters())


def test_a_model_that_got_worse_is_not_kept():
    net, known, _, small = case()
    healed = gm.heal(small, net, known, OBJECTIVE, steps=5, lr=10.0)
    assert not healed.kept
    assert healed.model is small
    assert "did not fall" in healed.reason


def test_a_second_domain_on_which_it_got_worse_is_told():
    net, known, _, small = case()
    # It learns from one constant sample, which says nothing of other data.
    one = [torch.ones(8, 16)]
    healed = gm.heal(small, net, one * 8, OBJECTIVE, steps=100, lr=0.01, held_out=one, other=known)
    assert healed.after < healed.before
    assert not healed.kept
    assert healed.model is small
    assert "other domain" in healed.reason


def test_labels_are_not_needed_and_a_classifier_learns_from_its_scores():
    net, known, _, _ = case()
    labeled = [(x, torch.randint(8, (32,))) for x in known]
    objective = gm.Objective.classification()
    small = gm.compress(net, batches=labeled, objective=objective, keep=0.5).apply()
    assert gm.heal(small, net, labeled, objective, steps=50).kept


def test_bad_input_is_told():
    net, known, _, small = case()
    with pytest.raises(InputError, match="steps"):
        gm.heal(small, net, known, OBJECTIVE)
    with pytest.raises(InputError, match="held_out"):
        gm.heal(small, net, [known[0][:2]], OBJECTIVE, steps=5)
    with pytest.raises(InputError, match="lr="):
        gm.heal(small, net, known, OBJECTIVE, steps=5, optimizer="sgd")
    table = nn.Embedding(4, 3)
    with pytest.raises(InputError, match="nothing can learn"):
        gm.heal(table, table, [torch.arange(4)] * 8, OBJECTIVE, steps=5)
