"""Fewer heads, units and channels: what can go is found by what it changes, and what stays makes up for it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.bench.learning_networks import Transformer
from gramian.compression.calibration.shrinkage import Roots
from gramian.compression.calibration.weighting import Weighting
from gramian.compression.units.cutting import compensate_
from gramian.compression.units.elimination import eliminated
from gramian.errors import CheckpointError, InputError
from test_compress_calibration import inputs, network

DISTILL = gm.Objective.self_distillation()


def moment(n: int, seed: int) -> tuple[Tensor, Roots]:
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m = x.mT @ x @ torch.diag(torch.linspace(0.2, 2, n, dtype=torch.float64))
    m = m.mT @ m
    values, vectors = torch.linalg.eigh(m)
    return m, Roots(vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT)


@pytest.mark.parametrize("size", [1, 3])
def test_what_stays_is_the_least_squares_fit(size: int) -> None:
    """The oracle: `W A_:K A_KK⁻¹` and its error, for every number of units that may stay."""
    m, n = 5, 12
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (a, of_a), (g, of_g) = moment(n, 0), moment(m, 1)
    gone = eliminated(w, Weighting(of_a, of_g, None, True), n // size)
    assert sorted(gone.order) == list(range(n // size))
    for kept in range(n // size + 1):
        steps = n - kept * size
        stay = torch.tensor(gone.order[n // size - kept :], dtype=torch.long)
        columns = (stay[:, None] * size + torch.arange(size)).flatten().sort().values
        found = w - gone.left[:, :steps] @ gone.right[:steps]
        best = torch.zeros_like(w)
        best[:, columns] = w @ a[:, columns] @ torch.linalg.inv(a[columns][:, columns])
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)
        error = w - best
        cost = torch.trace(g @ error @ a @ error.mT)
        torch.testing.assert_close(gone.values[:steps].square().sum(), cost, rtol=1e-6, atol=1e-8)
    first = [
        torch.trace(g @ e @ a @ e.mT)
        for u in range(n // size)
        for k in [torch.tensor([j for j in range(n) if j // size != u])]
        for e in [w - torch.zeros_like(w).index_copy_(1, k, w @ a[:, k] @ torch.linalg.inv(a[k][:, k]))]
    ]
    assert gone.order[0] == int(torch.stack(first).argmin())


class Residual(nn.Module):
    """The channels between the two convolutions can go; those of the sum cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.norm, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(x.mean((2, 3)))


def test_channels_of_a_sum_stay() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 6, 6)
    plan = gm.narrow(Residual(), batches=list(x.split(8)), objective=DISTILL)
    assert list(plan.kept) == ["two"]
    assert "reach other layers too" in plan.reasons["one"]
    small = plan.at(keep=0.7).apply().eval()
    assert (small.one.out_channels, small.norm.num_features, small.two.in_channels) == (
        plan.at(keep=0.7).kept["two"],
    ) * 3
    assert small.norm.running_var.shape == small.one.bias.shape
    assert small(x).shape == (64, 4)


def normalized(groups: int, width: int = 24, **kind) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(groups, 16, **kind), nn.ReLU(),
        nn.Conv2d(16, width, 3, stride=2), nn.GroupNorm(groups, width), nn.SiLU(),
        nn.Flatten(), nn.Linear(4 * width, 5),
    )  # fmt: skip


@pytest.mark.parametrize("affine", [True, False])
def test_groups_of_a_norm_go_whole(affine: bool) -> None:
    """The oracle: the model in which the columns that go are zero, and every norm has all of its channels."""
    torch.manual_seed(0)
    model, x = normalized(8, affine=affine), torch.randn(64, 3, 6, 6)
    plan = gm.narrow(model, list(x.split(8)), DISTILL)
    part = plan.at(keep=0.4)
    small, masked = part.apply(), copy.deepcopy(model)
    for layer in plan.layers:
        compensate_(masked, layer.spectrum, part.kept[layer.units.name] * layer.columns)
    assert [layer.units.num for layer in plan.layers] == [8, 8]
    assert [small[i].num_groups for i in (1, 4)] == list(part.kept.values())
    assert sum(p.numel() for p in small.parameters()) == part.parameters <= 0.4 * plan.parameters_dense
    torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-5)


def test_a_norm_with_an_activation_in_it_goes_too() -> None:
    class Active(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    net = nn.Sequential(nn.Conv2d(3, 16, 3), Active(16), nn.Conv2d(16, 4, 3)).eval()
    plan = gm.narrow(net, list(torch.randn(32, 3, 6, 6).split(8)), DISTILL)
    small = plan.at(keep=0.5).apply()
    assert small[1].num_features == plan.at(keep=0.5).kept["2"] < 16


def test_a_norm_of_all_channels_together_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"3: 1 \(GroupNorm\) before it normalizes all its inputs together"):
        gm.narrow(normalized(1), list(torch.randn(32, 3, 6, 6).split(8)), DISTILL)


def convolutions() -> nn.Module:
    """A depthwise convolution and norms between, and a matrix behind that sees sixteen columns for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10),
    ).eval()  # fmt: skip


def decoder() -> nn.Module:
    return Transformer(width=32, depth=1, heads=4, vocabulary=30, context=16)


CASES = {
    "units": (network, list(inputs(256, 1).split(32))),
    "channels": (convolutions, list(torch.randn(64, 3, 10, 10).split(8))),
    "heads": (decoder, list(torch.randint(30, (64, 16)).split(8))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_narrow_model_is_plain_and_comes_back(name: str, tmp_path) -> None:
    make, batches = CASES[name]
    torch.manual_seed(0)
    model, x = make(), batches[0]
    plan = gm.narrow(model, batches=batches, objective=DISTILL)
    torch.testing.assert_close(plan.apply()(x), model(x))
    part = plan.at(keep=0.6)
    small = part.apply().eval()
    gm.save_plan(part, tmp_path / "plan.safetensors")
    again = gm.load_plan(model, tmp_path / "plan.safetensors")
    assert again.explain() == part.explain()
    assert torch.equal(again.at(keep=0.6).apply()(x), small(x))
    numel = sum(p.numel() for p in small.parameters())
    assert numel == part.parameters <= 0.6 * plan.parameters_dense
    assert numel > 0.5 * plan.parameters_dense  # no more than needed
    assert {type(m) for m in small.modules()} == {type(m) for m in model.modules()}
    if name == "heads":
        assert small.blocks[0].heads == part.kept["blocks.0.out"]
    gap, size = (small(x) - model(x)).square().mean(), model(x).square().mean()
    assert gap < 0.1 * size
    assert part.predicted.measured
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x))
    if name == "heads":
        torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))
    gm.save_compressed(small, tmp_path / "small.safetensors")
    torch.manual_seed(1)
    assert torch.equal(gm.load_compressed(make(), tmp_path / "small.safetensors").eval()(x), small(x))
    if name == "channels":
        both = gm.compress(small, batches=batches, objective=DISTILL, keep=0.8).apply()
        gm.save_compressed(both, tmp_path / "both.safetensors")
        assert torch.equal(gm.load_compressed(make(), tmp_path / "both.safetensors").eval()(x), both.eval()(x))
    with pytest.raises(CheckpointError, match="does not fit"):
        gm.load_compressed(nn.Sequential(nn.Linear(2, 2)), tmp_path / "small.safetensors")


def test_it_is_better_than_removing_the_smallest() -> None:
    torch.manual_seed(0)
    model, x = network(), inputs(2048, 9)
    plan = gm.narrow(model, batches=list(inputs(1024, 1).split(64)), objective=DISTILL)
    part = plan.at(keep=0.6)
    small = part.apply()
    naive = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plan.layers:
            consumer, producer = (naive.get_submodule(n) for n in (layer.units.name, layer.units.parts[0].name))
            size = consumer.weight.norm(dim=0) * producer.weight.norm(dim=1)
            consumer.weight[:, size.argsort()[: layer.units.num - part.kept[layer.units.name]]] = 0
    ours, theirs = ((other(x) - model(x)).square().mean() for other in (small, naive))
    assert ours < 0.5 * theirs


def test_what_cannot_be_narrowed_is_refused_with_the_reason() -> None:
    batches = list(torch.randn(64, 8).split(16))
    with pytest.raises(InputError, match="nothing of Linear can be removed"):
        gm.narrow(nn.Linear(8, 8), batches=batches, objective=DISTILL)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(InputError, match=r"nothing of Sequential can be removed .*excluded by '0'"):
        gm.narrow(net, batches=batches, objective=DISTILL, exclude=["0"])
    plan = gm.narrow(net, batches=batches, objective=DISTILL)
    with pytest.raises(InputError, match=r"below the smallest possible share of the parameters, 0\.0"):
        plan.at(keep=0.01)
    with pytest.raises(InputError, match=r"share in \(0, 1\]"):
        plan.at(keep=1.5)

    class Fixed(nn.Module):  # its own arithmetic names the width
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)) * torch.arange(16.0).view(16))

    with pytest.raises(InputError, match=r"the model fails \(The size of tensor.*: code fixes their number"):
        gm.narrow(Fixed(), batches=batches, objective=DISTILL)


def test_a_skip_that_is_concatenated_is_refused_with_that_reason() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.relu(self.one(x))
            return self.out(torch.cat([torch.relu(self.two(a)), a], 1))

    with pytest.raises(InputError, match=r"out: with fewer inputs .* out fails .*joined with \(torch.cat\) other ones"):
        gm.narrow(Skip(), batches=list(torch.randn(64, 8).split(16)), objective=DISTILL)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fewer_heads_come_back_from_a_folder(name: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    import gramian.integrations.compressed  # noqa: F401

    torch.manual_seed(0)
    if name == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 1}
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=16, **ends)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=60, **heads)
        model = transformers.LlamaForCausalLM(config).eval()

    def scores(model: nn.Module, x: Tensor) -> Tensor:
        return model(input_ids=x).logits

    batches = list(torch.randint(60, (64, 12)).split(16))
    plan = gm.narrow(model, batches=batches, objective=gm.Objective.self_distillation(predict=scores))
    assert {layer.units.num for layer in plan.layers} == ({4, 128} if name == "gpt2" else {2, 48})
    small = plan.at(keep=plan.smallest).apply()
    small.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(scores(loaded, batches[0]), scores(small, batches[0]))
    assert sum(p.numel() for p in loaded.parameters()) == plan.at(keep=plan.smallest).parameters


def test_units_are_found_where_most_are_off() -> None:
    """A unit that is off on every sample changes nothing when it is set to zero, so those that are on are asked."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 4))
    with torch.no_grad():
        net[0].bias[torch.arange(24) != 13] -= 1e3
        net[0].bias[13] += 3
    plan = gm.narrow(net, list(inputs(64, 0).split(16)), DISTILL)
    assert plan.kept == {"2": 24, "4": 24}
    assert plan.layers[0].losses[1] < 1e-4 * plan.layers[0].losses[0]  # one unit is enough
    assert plan.layers[0].order[-1] == 13


class Branches(nn.Module):
    """Which layer is run depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last((self.one(x) if float(x.mean()) > 0 else self.two(x)).relu()).relu())


def test_units_of_a_layer_with_two_ways_to_it_stay() -> None:
    torch.manual_seed(0)
    x = inputs(64, 0).abs()
    plan = gm.narrow(Branches(), [x, -x, x], DISTILL)
    assert plan.kept == {"head": 24}
    assert "last fails" in plan.reasons["last"]
    small = plan.at(keep=0.8).apply()
    assert small(x).isfinite().all()
    assert small(-x).isfinite().all()


@pytest.mark.parametrize(
    ("core", "reason"), [("attention", "its attention is factored"), ("gru", "recurrent module uses it whole")]
)
def test_factors_inside_one_function_have_the_true_reason(core: str, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attention = core == "attention"
            self.core = nn.MultiheadAttention(16, 2, batch_first=True) if attention else nn.GRU(16, 16)
            self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.core(x, x, x)[0] if core == "attention" else self.core(x)[0]
            return self.two(torch.relu(self.one(y)))

    batches = list(torch.randn(64, 5, 16).split(8))
    small = gm.compress(Net(), batches, DISTILL, include=["core.*"]).at(keep=0.5, of="factorable").apply()
    plan = gm.narrow(small, batches, DISTILL)
    inner = {name: why for name, why in plan.reasons.items() if name.startswith("core.")}
    assert inner
    assert all(reason in why for why in inner.values())


def test_a_parametrized_convolution_is_left_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv1d(4, 8, 3, padding=1)
            self.shared = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)
            self.up, self.down, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.first(x))
            h = (h + torch.relu(self.shared(h))).transpose(1, 2)
            return self.last((h + self.down(torch.relu(self.up(h)))).mean(1))

    torch.manual_seed(0)
    batches = [(torch.randn(32, 4, 6), torch.randint(3, (32,))) for _ in range(2)]
    plan = gm.narrow(Net().eval(), batches, gm.Objective.classification())
    assert "computed by a parametrization" in plan.reasons["shared"]
    small = plan.at(keep=0.7).apply()
    assert small.up.out_features < 16
    assert small.shared.weight.shape == (8, 4, 3)


def test_a_kernel_with_tensors_of_other_sizes_beside_it_is_left_whole():
    torch.manual_seed(0)
    normed = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, groups=8))  # its u has 8 numbers, and its v nine
    net = nn.Sequential(nn.Conv2d(3, 8, 3), normed, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    plan = gm.narrow(net, list(torch.randn(16, 3, 6, 6).split(4)), DISTILL)
    assert list(plan.kept) == ["4"]
    assert "1 fails" in plan.reasons["2"]
