"""Optimizers in the loops that people write: strides, names, groups, scalers, schedules, wrappers, foreign states."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from cases import seeded
from directions import maker
from distributed import run_on_ranks
from gramian.errors import GramianWarning, InputError, UnsupportedError
from gramian.optim import OPTIMIZERS, Muon, Proximal
from gramian.optim.registry import MATRIX_OPTIMIZERS
from gramian.prox import L1, Nuclear
from zoo import ZOO

MAKERS: dict[str, Callable[..., Any]] = {name: maker(name) for name in MATRIX_OPTIMIZERS}


class Net(nn.Module):
    """What a table of names can tell: an embedding, a kernel, hidden layers, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed_tokens = nn.Embedding(7, 8)
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.fc1 = nn.Linear(16, 8)
            self.norm = nn.LayerNorm(8)
            self.fc2 = nn.Linear(8, 8)
            self.lm_head = nn.Linear(8, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed_tokens(tokens).view(-1, 2, 2, 2)).flatten(1)
        return self.lm_head(self.fc2(torch.relu(self.norm(self.fc1(x)))))


TOKENS = torch.arange(7)
ROLES = {
    "embed_tokens.weight": "adamw",
    "conv.weight": "matrix",
    "fc1.weight": "matrix",
    "fc2.weight": "matrix",
    "lm_head.weight": "adamw",
}


def loss_of(net: nn.Module, seed: int = 0) -> Tensor:
    target = torch.randint(7, (7,), generator=seeded(seed))
    return nn.functional.cross_entropy(net(TOKENS), target)


def train(net: nn.Module, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def roles(optimizer: Any) -> dict[str, str]:
    return {row["name"]: row["direction"] for row in optimizer.explain()}


# ---- strides


def strided(shape: tuple[int, ...], how: str) -> Tensor:
    """A tensor of zeros of this shape whose entries are not in order in memory."""
    if how == "column":
        return torch.zeros(*shape, 3)[..., 1]
    if how == "transposed":
        return torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    assert how == "channels last"
    return torch.zeros(shape).to(memory_format=torch.channels_last)


STRIDES = [(shape, how) for shape in ((6,), (5, 4), (3, 2, 2, 2)) for how in ("column", "transposed")]
STRIDES += [((3, 2, 2, 2), "channels last")]


@pytest.mark.filterwarnings("ignore:.*parameters without names")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_strides_change_nothing(name: str) -> None:
    """Parameters, gradients and both, and what lies between a parameter's entries stays."""
    adamw_of_model = OPTIMIZERS[name].make
    for shape, how in STRIDES:
        for what in ("parameter", "gradient", "both"):
            values = [torch.randn(shape, generator=seeded(i)) for i in range(4)]
            storage = strided(shape, how) if what != "gradient" else torch.zeros(shape)
            around = storage._base if storage._base is not None else storage
            around.fill_(0.5) if around.shape[: len(shape)] == shape and around.ndim > len(shape) else None
            module, twin = nn.Module(), nn.Module()
            module.w, twin.w = nn.Parameter(storage.copy_(values[0])), nn.Parameter(values[0].clone())
            before = around.clone()
            if name in MATRIX_OPTIMIZERS:
                optimizers = [MAKERS[name]([m.w]) for m in (module, twin)]
            else:
                optimizers = [adamw_of_model(m, 0.1) for m in (module, twin)]
            for value in values[1:]:
                twin.w.grad = value
                module.w.grad = value if what == "parameter" else strided(shape, how).copy_(value)
                if name == "adamw" and what != "parameter":  # torch's own, as autograd gives it gradients
                    module.w.grad = torch.empty_like(module.w).copy_(value)
                for optimizer in optimizers:
                    optimizer.step()
            if name in MATRIX_OPTIMIZERS:
                assert torch.equal(module.w, twin.w), (shape, how, what)
            torch.testing.assert_close(module.w, twin.w, msg=f"{shape}, {how}, {what}")
            if how == "column" and what != "gradient":
                assert torch.equal(around[..., 0::2], before[..., 0::2])


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_expanded_gradients_step_as_whole_ones(name: str) -> None:
    for shape in ((6,), (5, 4)):
        one, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        one.grad, other.grad = torch.ones(1).expand(shape), torch.ones(shape)
        for w in (one, other):
            MAKERS[name]([w]).step()
        assert torch.equal(one, other)


def test_a_convolution_in_channels_last_trains_as_in_any_other() -> None:
    net, twin = Net(), Net()
    net.to(memory_format=torch.channels_last)
    train(net, Muon(net), range(3)), train(twin, Muon(twin), range(3))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- names and roles


def decay_groups(net: nn.Module) -> list[dict[str, Any]]:
    """As Hugging Face's Trainer has them."""
    decay = [p for n, p in net.named_parameters() if "bias" not in n and "norm" not in n]
    rest = [p for n, p in net.named_parameters() if "bias" in n or "norm" in n]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}, {"params": []}]


GIVEN: dict[str, Callable[[Net], Any]] = {
    "model": lambda net: Muon(net),
    "pairs": lambda net: Muon(net.named_parameters()),
    "pairs in groups": lambda net: Muon(
        [
            {"params": [(n, p) for n, p in net.named_parameters() if p.ndim > 1]},
            {"params": [(n, p) for n, p in net.named_parameters() if p.ndim < 2], "lr": 0.01},
        ]
    ),
    "another optimizer's groups": lambda net: Muon(
        torch.optim.SGD(net.named_parameters()).param_groups[0]["params"], model=net
    ),
    "parameters and the model": lambda net: Muon(net.parameters(), model=net),
    "decay groups and the model": lambda net: Muon(decay_groups(net), model=net),
    "some parameters and the model": lambda net: Muon([net.fc1.weight, *net.lm_head.parameters()], model=net),
    "groups with param_names": lambda net: Muon(
        [{"params": list(net.parameters()), "param_names": [n for n, _ in net.named_parameters()]}]
    ),
}


@pytest.mark.parametrize("how", GIVEN)
def test_roles_are_kept_however_parameters_are_given(how: str) -> None:
    net = Net()
    optimizer = GIVEN[how](net)
    found = roles(optimizer)
    assert {name: found[name] for name in ROLES if name in found} == {n: r for n, r in ROLES.items() if n in found}
    if "some" not in how:
        assert found.keys() == weights(net).keys()
    train(net, optimizer, range(2))


def test_groups_of_the_model_step_as_the_model() -> None:
    net, twin = Net(), Net()
    train(net, Muon(net), range(3)), train(twin, Muon(twin.parameters(), model=twin), range(3))
    assert_equal(weights(net), weights(twin))
    decayed = {n: g["weight_decay"] for g in Muon(decay_groups(net), model=net).param_groups for n in g["param_names"]}
    assert decayed["fc1.weight"] == decayed["lm_head.weight"] == 0.1
    assert decayed["fc1.bias"] == decayed["norm.weight"] == 0.0


def test_without_names_or_model_a_warning_says_what_to_write() -> None:
    net = Net()
    for given in (net.parameters(), decay_groups(net), [net.fc1.weight, net.lm_head.weight]):
        with pytest.warns(GramianWarning, match=r"model=model") as caught:
            Muon(given)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon([net.fc1.weight, net.fc2.weight], routes={"*": "matrix"})
        Muon([net.fc1.weight])
        Muon([net.fc1.bias, net.fc2.bias])


def test_what_names_do_not_tell_is_not_guessed() -> None:
    w = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.warns(GramianWarning, match="100% of the hidden parameters step by AdamW"):
        (row,) = Muon([("odd", w)]).explain()
    assert row["direction"] == "adamw"
    assert "unknown name" in row["reason"]
    hidden = [(f"layers.{i}.weight", nn.Parameter(torch.ones(3, 3))) for i in range(3)]
    assert set(roles(Muon(hidden)).values()) == {"matrix"}  # chosen by hand: the last is no head
    with_biases = [*hidden, *((f"layers.{i}.bias", nn.Parameter(torch.ones(3))) for i in range(3))]
    assert roles(Muon(with_biases))["layers.2.weight"] == "adamw"  # as in a file


@pytest.mark.parametrize("case", ZOO)
def test_names_tell_the_roles_of_the_zoo(case: str) -> None:
    """And its matrices, except for the groups of a convolution, which only the module knows."""
    model = ZOO[case].make_model(0)
    by_role, by_name = ({r["name"]: r for r in Muon(given).explain()} for given in (model, model.named_parameters()))
    for name, row in by_role.items():
        assert by_name[name]["direction"] == row["direction"], name
        if not (case == "batchnorm_cnn" and name == "6.weight"):
            assert by_name[name]["matrices"] == row["matrices"], name


def test_later_groups_have_the_models_roles() -> None:
    net = Net()
    optimizer = Muon(net.fc1.parameters(), model=net)
    optimizer.add_param_group({"params": net.fc2.parameters()})
    optimizer.add_param_group({"params": net.lm_head.parameters()})
    assert roles(optimizer)["lm_head.weight"] == "adamw"
    assert roles(optimizer)["fc2.weight"] == "matrix"
    optimizer.add_param_group({"params": [("extra.weight", nn.Parameter(torch.ones(3, 3)))]})  # not of the model
    assert roles(optimizer)["extra.weight"] == "matrix"


LISTS: dict[str, tuple[Callable[[], Any], str]] = {
    "another model": (lambda: Muon(Net().parameters(), model=Net()), "none of the parameters"),
    "another model than the one": (lambda: Muon(Net(), model=Net()), "and another one"),
    "no model": (lambda: Muon(Net().parameters(), model="net"), "model must be the model"),
    "in two groups": (
        lambda: Muon([{"params": [w := nn.Parameter(torch.ones(2, 2))]}, {"params": [w]}]),
        "give each once",
    ),
    "one name": (lambda: Muon([("w", nn.Parameter(torch.ones(2, 2))) for _ in range(2)]), "have the name 'w'"),
    "quantized, trained": (
        lambda: Muon([("w", nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn)))]),
        "real floating-point",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_cannot_be_right_are_refused(case: str) -> None:
    make, message = LISTS[case]
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_frozen_quantized_parameters_are_left_out_with_a_reason(dtype: torch.dtype) -> None:
    net = Net()
    net.fc1.weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    for optimizer in (Muon(net), Muon(net.named_parameters()), Muon(net.parameters(), model=net)):
        (row,) = [row for row in optimizer.explain() if row["name"] == "fc1.weight"]
        assert row["direction"] == "none"
        assert "left out" in row["reason"]
        assert all(p is not net.fc1.weight for g in optimizer.param_groups for p in g["params"])
        optimizer.health("spectra")
    net.fc2.weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert copy.deepcopy(optimizer).explain() == optimizer.explain()


# ---- loops


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_compiled_loop_steps_as_a_plain_one(name: str) -> None:
    """The step is not compiled: a graph ends before it and another begins after it."""
    net, twin = Net(), Net()
    optimizer, plain = MAKERS[name](net), MAKERS[name](twin)

    @torch.compile(backend="eager")
    def advance(seed: int) -> None:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()

    for seed in range(3):
        advance(seed)
    train(twin, plain, range(3))
    assert_equal(weights(net), weights(twin))


def test_a_compiled_step_and_a_compiled_model_step_alike() -> None:
    net, twin = Net(), Net()
    optimizer, plain = Muon(torch.compile(net, backend="eager")), Muon(twin)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(2):
        for m, move in ((net, step), (twin, plain.step)):
            m.zero_grad()
            loss_of(m, seed).backward()
            move()
    assert_equal(weights(net), weights(twin))


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_scaler_skips_the_whole_step_where_a_gradient_overflows(name: str) -> None:
    net, twin = Net(), Net()
    optimizer, plain = MAKERS[name](net), MAKERS[name](twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        if seed == 1:
            net.fc1.weight.grad[0, 0] = torch.inf
        before = weights(net)
        scaler.step(optimizer)
        scaler.update()
        if seed == 1:
            assert_equal(before, weights(net))
        else:
            train(twin, plain, range(seed, seed + 1))
    assert_equal(weights(net), weights(twin))
    assert all(row["skipped"] == 0 for row in optimizer.health().values())  # the scaler did it, not the optimizer


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_accumulation_checkpointing_clipping_and_averages(name: str) -> None:
    net, twin = Net(), Net()
    optimizer, plain = MAKERS[name](net), MAKERS[name](twin)
    average = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    expected = weights(net)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False), plain.zero_grad()
        for part in range(2):
            target = torch.randint(7, (7,), generator=seeded(2 * step + part))
            for out in (net(TOKENS), checkpoint(twin, TOKENS, use_reentrant=False)):
                nn.functional.cross_entropy(out, target).div(2).backward()
        norms = [float(nn.utils.clip_grad_norm_(m.parameters(), 0.1)) for m in (net, twin)]
        assert norms[0] == norms[1] > 0.1
        optimizer.step(), plain.step()
        average.update_parameters(net)
        expected = {n: p if step == 0 else expected[n].lerp(p, 0.5) for n, p in weights(net).items()}
    assert_equal(weights(net), weights(twin))
    for n in expected:
        torch.testing.assert_close(average.module.get_parameter(n), expected[n])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 3)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "swa": lambda o: swa_utils.SWALR(o, [g["lr"] / 2 for g in o.param_groups], anneal_epochs=3),
    "one cycle, one rate": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic, one rate": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "swa, one rate": lambda o: swa_utils.SWALR(o, 0.1, anneal_epochs=3),
    "one lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.5**step]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, eta_min=1e-3),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rates_of_all_parameters_keep_their_ratio(schedule: str) -> None:
    """AdamW's follow `lr`, also where a scheduler or a loop sets one rate for all groups."""
    net = Net()
    optimizer = Muon(net, lr=0.05, rest_lr=3e-3)
    built = optimizer.rates()
    assert len(set(built.values())) == 2
    scheduler = SCHEDULES[schedule](optimizer)
    moved = set()
    for seed in range(5):
        factor = optimizer.param_groups[0]["lr"] / 0.05
        moved.add(factor)
        assert optimizer.rates() == pytest.approx({name: rate * factor for name, rate in built.items()})
        train(net, optimizer, range(seed, seed + 1))
        scheduler.step()
    assert len(moved) > 1


def test_the_rest_steps_at_the_rate_that_is_told() -> None:
    net, twin = Net(), Net()
    optimizer, plain = Muon(net, lr=0.05, rest_lr=3e-3), Muon(twin, lr=0.01, rest_lr=6e-4)
    optimizer.param_groups[0]["lr"] = 0.01
    train(net, optimizer, range(3)), train(twin, plain, range(3))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(net)
    train(net, optimizer, range(1))
    assert_equal(before, weights(net))


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_sparse_gradient_is_refused_before_anything_moves(name: str) -> None:
    net = Net()
    net.embed_tokens = nn.Embedding(7, 8, sparse=True)
    optimizer = MAKERS[name](net)
    loss_of(net).backward()
    before = weights(net)
    with pytest.raises(UnsupportedError, match=r"'embed_tokens.weight' has one; make the embedding with sparse=False"):
        optimizer.step()
    assert_equal(before, weights(net))
    assert not optimizer.state


# ---- parameters that change


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_model_may_change_its_dtype_in_the_middle(name: str) -> None:
    net, twin = Net(), Net()
    optimizer, plain = MAKERS[name](net), MAKERS[name](twin)
    train(net, optimizer, range(2)), train(twin, plain, range(2))
    net.double()
    train(net, optimizer, range(2, 4)), train(twin, plain, range(2, 4))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.double(), atol=2e-3, rtol=1e-3)
    assert {s["exp_avg"].dtype for s in optimizer.state.values() if "exp_avg" in s} == {torch.float64}
    net.bfloat16()
    train(net, optimizer, range(4, 6))
    assert all(p.isfinite().all() for p in net.parameters())


def test_frozen_parameters_may_be_trained_later() -> None:
    net = Net()
    net.fc1.requires_grad_(False)
    optimizer = Muon(net)
    before = weights(net)
    train(net, optimizer, range(2))
    assert torch.equal(net.fc1.weight, before["fc1.weight"])
    net.fc1.requires_grad_(True)
    train(net, optimizer, range(2, 4))
    assert not torch.equal(net.fc1.weight, before["fc1.weight"])
    assert roles(optimizer)["fc1.weight"] == "matrix"


def materialized() -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        net = Net()
    optimizer = Muon(net)
    net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.normal_(p, std=0.1, generator=seeded(0))
    return net, optimizer


def with_new_head() -> tuple[nn.Module, Any]:
    net = Net()
    optimizer = Muon(net)
    net.lm_head = nn.Linear(8, 7, bias=False)
    return net, optimizer


@pytest.mark.parametrize("replace", [materialized, with_new_head])
def test_a_model_with_new_parameters_is_refused(replace: Callable[[], tuple[nn.Module, Any]]) -> None:
    net, optimizer = replace()
    loss_of(net).backward()
    with pytest.raises(InputError, match=r"has new parameters in place of \d+ .*before building the optimizer"):
        optimizer.step()


def swap_parameters(net: nn.Module, optimizer: Any) -> None:
    """As accelerate does under FSDP2, without shards."""
    for module in list(net.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(p.detach().clone())
            setattr(module, name, new)
            for group in optimizer.param_groups:
                group["params"] = [new if q is p else q for q in group["params"]]


def test_parameters_that_a_wrapper_swaps_in_the_groups_are_followed() -> None:
    net, twin = Net(), Net()
    optimizer, plain = Muon(net), Muon(twin)
    swap_parameters(net, optimizer)
    train(net, optimizer, range(3)), train(twin, plain, range(3))
    assert_equal(weights(net), weights(twin))
    assert roles(optimizer) == roles(plain)
    assert optimizer.health("spectra") == plain.health("spectra")


@pytest.mark.parametrize("name", ["muon", "sgd"])
def test_penalties_follow_too(name: str) -> None:
    net, twin = Net(), Net()
    both = []
    for m in (net, twin):
        base = Muon(m) if name == "muon" else torch.optim.SGD(m.named_parameters(), lr=0.1)
        both.append(Proximal(base, {"fc*.weight": Nuclear(0.05), "conv.weight": L1(0.1)}, model=m))
    swap_parameters(net, both[0])
    train(net, both[0], range(2)), train(twin, both[1], range(2))
    assert_equal(weights(net), weights(twin))
    assert bool((net.conv.weight == 0).any())
    both[0].base.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(UnsupportedError, match="Add groups to the Proximal"):
        both[0].step()


def test_flat_parameters_are_refused_by_name() -> None:
    """DeepSpeed's ZeRO gives each group one flat tensor."""
    net = Net()
    optimizer = Muon(net)
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    before = weights(net)
    with pytest.raises(UnsupportedError, match="DeepSpeed's ZeRO and FSDP1 flatten parameters"):
        optimizer.step()
    assert_equal(before, weights(net))


def sharded_afterwards() -> str:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    optimizer = Muon(net)
    fully_shard(net)
    loss_of(net).backward()
    try:
        optimizer.step()
    except InputError as error:
        return str(error)
    return ""


def test_a_model_that_is_sharded_after_its_optimizer_was_built_is_refused() -> None:
    for message in run_on_ranks(sharded_afterwards, 2):
        assert "Call fully_shard, to_empty or whatever replaced them before building the optimizer" in message


def zero_redundancy() -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = Net()
    try:
        ZeroRedundancyOptimizer(net.parameters(), Muon, lr=0.02)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_zero_redundancy_is_refused_by_name() -> None:
    for message in run_on_ranks(zero_redundancy, 2):
        assert "Muon under ZeroRedundancyOptimizer is not supported" in message


# ---- states


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(name: str) -> None:
    net = Net()
    optimizer = MAKERS[name](net)
    adamw = torch.optim.AdamW(net.parameters())
    train(net, adamw, range(1))
    with pytest.raises(InputError, match=r"another optimizer, with exp_avg, exp_avg_sq, step\. Call load_adamw"):
        optimizer.load_state_dict(adamw.state_dict())
    muon = torch.optim.Muon([net.fc1.weight, net.fc2.weight])
    net.fc1.weight.grad = torch.ones_like(net.fc1.weight)
    muon.step()
    with pytest.raises(InputError, match=r"another optimizer, with momentum_buffer\. load_adamw takes the state of an"):
        optimizer.load_state_dict(muon.state_dict())
    other = MAKERS["shampoo" if name != "shampoo" else "soap"](net)
    train(net, other, range(1))
    with pytest.raises(InputError, match="state of another direction"):
        optimizer.load_state_dict(other.state_dict())
    train(net, optimizer, range(1))  # and it can still be used


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_pair_steps_alike(clone: Callable[[Any], Any]) -> None:
    """Also of an optimizer with a proximal map around it."""
    net = Net()
    optimizer = Proximal(Muon(net), {"fc1.weight": L1(0.1)})
    train(net, optimizer, range(2))
    twin, again = clone((net, optimizer))
    train(net, optimizer, range(2, 4)), train(twin, again, range(2, 4))
    assert_equal(weights(net), weights(twin))


def test_global_hooks_run_once_a_step() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    net, calls = Net(), []
    optimizer = Muon(net)
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    own = optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    try:
        train(net, optimizer, range(2))
    finally:
        handle.remove(), own.remove()
    assert sorted(calls) == ["global", "global", "own", "own"]
