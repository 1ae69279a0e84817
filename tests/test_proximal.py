"""Proximal is its base's step and then a proximal map; under gradient descent it minimizes loss + penalty."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gramian as gm
from cases import seeded
from gramian.errors import InputError
from gramian.optim import Muon, Proximal


def regression() -> tuple[Tensor, Tensor]:
    g = seeded(0)
    x = gm.random.normal(80, 12, generator=g, dtype=torch.float64)
    w = torch.zeros(12, dtype=torch.float64)
    w[:4] = torch.tensor([3.0, -2.0, 1.0, 0.5])
    return x, x @ w + 0.1 * gm.random.normal(80, generator=g, dtype=torch.float64)


def descend(penalty: gm.prox.Penalty, num_steps: int = 4000) -> Tensor:
    """The minimizer of 1/(2m) ‖Xw − y‖² + penalty(w) by proximal gradient descent at rate 1/λmax."""
    x, y = regression()
    w = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    lr = 1 / torch.linalg.eigvalsh(gm.linalg.second_moment(x))[-1].item()
    optimizer = Proximal(torch.optim.SGD([("w", w)], lr=lr), {"w": penalty})
    for _ in range(num_steps):
        w.grad = x.mT @ (x @ w.detach() - y) / len(x)
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("strength", [0.001, 0.01, 0.1, 0.5, 1.0, 10.0])
def test_the_l1_path_is_scikit_learns_lasso(strength: float) -> None:
    x, y = regression()
    ours = descend(gm.prox.L1(strength))
    lasso = Lasso(alpha=strength, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x.numpy(), y.numpy())
    theirs = torch.tensor(lasso.coef_)
    assert (ours - theirs).abs().max() < 1e-6
    assert ((ours == 0) == (theirs == 0)).all()


def test_elastic_net_and_ridge_are_scikit_learns() -> None:
    x, y = regression()
    theirs = ElasticNet(alpha=0.3, l1_ratio=0.4, fit_intercept=False, tol=1e-14, max_iter=100_000)
    coef = torch.tensor(theirs.fit(x.numpy(), y.numpy()).coef_)
    assert (descend(gm.prox.ElasticNet(0.3 * 0.4, 0.3 * 0.6)) - coef).abs().max() < 1e-6
    coef = torch.tensor(Ridge(alpha=0.3 * len(x), fit_intercept=False).fit(x.numpy(), y.numpy()).coef_)
    for form in ("decoupled", "coupled"):
        assert (descend(gm.prox.L2(0.3, form=form)) - coef).abs().max() < 1e-6, form


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(net: nn.Module, seed: int = 0) -> None:
    net.zero_grad()
    net(gm.random.normal(16, 1, 8, 8, generator=seeded(seed))).square().mean().backward()


BASES = {
    "sgd": lambda net: torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9),
    "adam": lambda net: torch.optim.Adam(net.named_parameters(), lr=0.01),
    "muon": lambda net: Muon(net, lr=0.05),
}


@pytest.mark.parametrize("name", BASES)
def test_a_step_is_the_bases_and_then_the_map(name: str) -> None:
    net, twin = network(), network()
    penalties = {"0.weight": gm.prox.Nuclear(0.5), "2.weight": gm.prox.L1(0.02), "*.bias": gm.prox.L2(0.1)}
    optimizer, alone = Proximal(BASES[name](net), penalties), BASES[name](twin)
    for seed in range(3):
        backward(net, seed), backward(twin, seed)
        optimizer.step(), alone.step()
        lr = alone.param_groups[0]["lr"]
        rates = alone.rates() if name == "muon" else {key: lr for key, _ in twin.named_parameters()}
        for key, p in twin.named_parameters():
            penalty = {"0.weight": penalties["0.weight"], "2.weight": penalties["2.weight"]}.get(key)
            penalty = penalties["*.bias"] if key.endswith("bias") else penalty
            if penalty is not None:
                value = penalty.prox(p.detach().flatten(1) if penalty.of_matrix else p.detach(), rates[key])
                p.data.copy_(value.reshape(p.shape))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
    assert torch.isfinite(optimizer.penalty())
    expected = 0.02 * net[2].weight.abs().sum() + 0.5 * torch.linalg.matrix_norm(net[0].weight.flatten(1), "nuc")
    expected = expected + sum(0.05 * net[i].bias.square().sum() for i in (0, 2, 4))
    torch.testing.assert_close(optimizer.penalty(), expected)


@pytest.mark.parametrize("name", BASES)
def test_a_coupled_l2_joins_the_gradient_and_leaves_it_as_it_was(name: str) -> None:
    net, twin = network(), network()
    optimizer, alone = Proximal(BASES[name](net), {"*.weight": gm.prox.L2(0.1, form="coupled")}), BASES[name](twin)
    for seed in range(3):
        backward(net, seed), backward(twin, seed)
        before = net[2].weight.grad.clone()
        optimizer.step()
        assert torch.equal(net[2].weight.grad, before)
        for key, p in twin.named_parameters():
            if key.endswith("weight"):
                p.grad = p.grad.add(p.detach(), alpha=0.1)
        alone.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_models_layouts_say_which_matrices() -> None:
    """A fused QKV is three matrices, whose ranks are cut one by one."""
    attention = nn.MultiheadAttention(6, 2)
    base = torch.optim.SGD(attention.named_parameters(), lr=1.0)
    penalty = gm.prox.Nuclear(0.4)
    optimizer = Proximal(base, {"in_proj_weight": penalty}, model=attention)
    parts = attention.in_proj_weight.detach().clone().chunk(3)
    for p in attention.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for now, part in zip(attention.in_proj_weight.detach().chunk(3), parts, strict=True):
        torch.testing.assert_close(now, penalty.prox(part, 1.0))
        assert torch.linalg.matrix_rank(now) < 6


@pytest.mark.parametrize("name", BASES)
def test_state_schedules_and_copies_pass_through(name: str) -> None:
    """A scheduler acts on both halves; saved, pickled or copied, the next steps are the same, bit for bit."""
    net = network()
    penalties = {"2.weight": gm.prox.L1(0.05)}
    optimizer = Proximal(BASES[name](net), penalties)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            backward(net, seed)
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASES[name](net).param_groups[0]["lr"] / 8)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = network()
    other.load_state_dict(net.state_dict())
    resumed = Proximal(BASES[name](other), penalties)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.base.param_groups is resumed.param_groups
    pair = copy.deepcopy((net, optimizer))
    pickled = pickle.loads(pickle.dumps((net, optimizer)))
    for model, opt in ((net, optimizer), (other, resumed), pair, pickled):
        backward(model, 7)
        opt.step()
    for model in (other, pair[0], pickled[0]):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), model.parameters(), strict=True))


def test_a_group_added_later_and_a_parameter_without_gradient() -> None:
    net = network()
    optimizer = Proximal(torch.optim.SGD(list(net[0].named_parameters()), lr=0.1), {"weight": gm.prox.L1(10.0)})
    frozen = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [("new.weight", frozen)], "lr": 1.0})
    assert optimizer.base.param_groups is optimizer.param_groups
    backward(net)
    optimizer.step()
    assert not net[0].weight.any()
    assert frozen.eq(1).all()  # no gradient, and no pattern of its own either


def test_a_closure_is_called_and_its_loss_returned() -> None:
    for form in ("decoupled", "coupled"):
        w = nn.Parameter(torch.ones(3))
        optimizer = Proximal(torch.optim.SGD([w], lr=0.1), {"*": gm.prox.L2(1.0, form=form)})

        def closure(w: Tensor = w) -> Tensor:
            w.grad = None
            loss = (w * 2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) == 6
        expected = {"decoupled": (1 - 0.2) / 1.1, "coupled": 1 - 0.1 * 3}[form]
        torch.testing.assert_close(w.detach(), torch.full((3,), expected))


def test_refusals_say_why() -> None:
    net = network()
    nameless = torch.optim.SGD(net.parameters(), lr=0.1)
    named = torch.optim.SGD(net.named_parameters(), lr=0.1)
    with pytest.raises(InputError, match="named_parameters"):
        Proximal(nameless, {"*.weight": gm.prox.L1(1.0)})
    with pytest.raises(InputError, match="matches no parameter"):
        Proximal(named, {"w": gm.prox.L1(1.0)})
    with pytest.raises(InputError, match="holds no matrix"):
        Proximal(named, {"*": gm.prox.Nuclear(1.0)})
    Proximal(nameless, {"*": gm.prox.L1(1.0)})


@pytest.mark.parametrize("name", BASES)
def test_hooks_of_both_run_once(name: str) -> None:
    """Those of the step, of the state and of loading it; a hook of all optimizers sees the outer step alone."""
    net = network()
    base = BASES[name](net)
    optimizer = Proximal(base, {"2.weight": gm.prox.L1(0.1)})
    calls: list[str] = []
    kinds = [f"{what}_{when}" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]
    for whose, opt in (("outer", optimizer), ("base", base)):
        for kind in kinds:
            getattr(opt, f"register_{kind}_hook")(lambda *_, name=f"{whose} {kind}": calls.append(name))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: calls.append(f"global pre {type(opt).__name__}")),
        register_optimizer_step_post_hook(lambda opt, *_: calls.append(f"global post {type(opt).__name__}")),
    ]
    try:
        backward(net)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert sorted(calls) == sorted(
        [f"{whose} {kind}" for whose in ("outer", "base") for kind in kinds]
        + ["global pre Proximal", "global post Proximal"]
    )


@pytest.mark.parametrize("name", BASES)
def test_a_penalty_stays_whatever_names_a_state_brings(name: str) -> None:
    net = network()
    optimizer = Proximal(BASES[name](net), {"2.weight": gm.prox.L1(100.0)})
    for renamed in (False, True):
        state = copy.deepcopy(optimizer.state_dict())
        for number, group in enumerate(state["param_groups"]):
            names = group.pop("param_names")
            if renamed:
                group["param_names"] = [f"{number}.{i}" for i in range(len(names))]
        optimizer.load_state_dict(state)
        optimizer.add_param_group({"params": [(f"new.{len(optimizer.param_groups)}", nn.Parameter(torch.ones(2)))]})
    assert optimizer.penalty() > 0
    backward(net)
    optimizer.step()
    assert not net[2].weight.any()
