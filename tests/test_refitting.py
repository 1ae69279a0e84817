"""Refitting: layers of a compressed model are fit to the original's outputs, in turn, by least squares."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import gramian as gm
from gramian.compression.choosing.deciding import decide
from gramian.compression.choosing.target import Target
from gramian.compression.fitting.lockstep import Walk, watched
from gramian.compression.layers.lowrank import LowRank
from gramian.errors import InputError

SELF = gm.Objective.self_distillation()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A residual stream of a width, as transformers have it."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm(x)))))


def stacked(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for layer in layers))


NETS = {
    "perceptron": (
        lambda: stacked(
            lambda: nn.Linear(16, 32), nn.Tanh, lambda: nn.Linear(32, 32), nn.Tanh, lambda: nn.Linear(32, 4)
        ),
        (16,),
    ),
    "stream": (lambda: stacked(*[lambda: Block(16)] * 4), (6, 16)),
    "convolutions": (
        lambda: stacked(
            lambda: nn.Conv2d(3, 16, 3), nn.ReLU, lambda: nn.Conv2d(16, 16, 3), nn.ReLU, lambda: nn.Conv2d(16, 8, 3)
        ),
        (3, 9, 9),
    ),
    "torch's encoder": (
        lambda: stacked(*[lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)] * 3),
        (6, 16),
    ),
    "without biases": (
        lambda: stacked(lambda: nn.Linear(16, 32, bias=False), nn.Tanh, lambda: nn.Linear(32, 8, bias=False)),
        (16,),
    ),
}


HELPS = {"perceptron": 0.95, "stream": 0.92, "convolutions": 0.985, "without biases": 0.98, "torch's encoder": 0.98}
"""The share of the error that may be left with 30 % of the parameters."""


def distance(one, other, x):
    one.eval(), other.eval()
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean())


@pytest.mark.parametrize("name", NETS)
def test_new_data_lose_less(name):
    make, shape = NETS[name]
    net = make()
    batches = [draw(64, *shape, seed=i) for i in range(8)]
    small = gm.compress(net, batches, SELF).at(keep=0.3, of="factorable").apply()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    better, new = gm.refit(small, net, batches, SELF), draw(512, *shape, seed=99)
    assert distance(better, net, new) < HELPS[name] * distance(small, net, new)
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    assert [m.rank for m in better.modules() if isinstance(m, LowRank)] == [
        m.rank for m in small.modules() if isinstance(m, LowRank)
    ]
    assert not any(module._forward_hooks for m in (net, small, better) for module in m.modules())


def test_one_layer_is_fit_by_least_squares():
    """No other left factor and bias come nearer by more than what the damping costs."""
    net, x = nn.Linear(12, 8), draw(4000, 12)
    small = gm.compress(net, [x], SELF).at(keep=0.5, of="factorable").apply()
    with torch.no_grad():
        small[1].weight += 0.3 * draw(*small[1].weight.shape, seed=5)
        better = gm.refit(small, net, [x], SELF, samples=4000)
        inner = torch.cat([small[0](x), torch.ones(len(x), 1)], 1).double()
        wanted = net(x).double()
        least = float((inner @ torch.linalg.lstsq(inner, wanted).solution - wanted).square().mean())
    assert distance(better, net, x) < 1.001 * least < 0.8 * distance(small, net, x)
    assert torch.equal(better[0].weight, small[0].weight)


def test_the_sum_with_a_stream_is_fit():
    """An error of the stream that later layers can make up for is made up for: their target is the sum."""
    net = NETS["stream"][0]()
    batches = [draw(64, 6, 16, seed=i) for i in range(8)]
    small = gm.compress(net, batches, SELF).at(keep=0.4, of="factorable").apply()
    off = copy.deepcopy(small)
    with torch.no_grad():  # a constant error of the stream, which the next block's bias can take away
        bias = off[0].down[1].bias if isinstance(off[0].down, LowRank) else off[0].down.bias
        bias += 3.0
        off[0].down.requires_grad_(False)
    x = draw(256, 6, 16, seed=99)
    assert distance(gm.refit(off, net, batches, SELF), net, x) < 1.05 * distance(
        gm.refit(small, net, batches, SELF), net, x
    )


def test_few_rows_do_no_harm():
    net = NETS["perceptron"][0]()
    small = gm.compress(net, [draw(512, 16)], SELF).at(keep=0.5, of="factorable").apply()
    new = draw(512, 16, seed=9)
    for num in (2, 4, 8, 16):
        better = gm.refit(small, net, [draw(num, 16, seed=num)], SELF)
        assert distance(better, net, new) < 1.5 * distance(small, net, new), num


def test_layers_used_twice_and_shared_ones_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    net, x = Twice(), draw(512, 16)
    small = gm.compress(net, [x], SELF).at(keep=0.6, of="factorable").apply()
    better = gm.refit(small, net, [x], SELF)
    assert all(torch.equal(a, b) for a, b in zip(small.inner.parameters(), better.inner.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(small.head.parameters(), better.head.parameters(), strict=True))


def test_padding_does_not_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, mask = draw(64, 5, 8), torch.ones(64, 5, dtype=torch.bool)
    mask[:, 3:] = False
    other = torch.where(mask[..., None], x, 100 * draw(64, 5, 8, seed=1))
    objective = replace(
        gm.Objective.self_distillation(predict=lambda model, b: model(b["x"])), rows=lambda b: b["mask"]
    )
    small = gm.compress(net, [{"x": x, "mask": mask}], objective).at(keep=0.5, of="factorable").apply()
    one, two = (gm.refit(small, net, [{"x": rows, "mask": mask}], objective) for rows in (x, other))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_passes_that_go_different_ways():
    """A batch that comes to other layers takes what is fit already, and no pass waits for ever."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.left(x) if x[0, 0] > 0 else self.right(x)))

    torch.manual_seed(0)
    net, batches = Routed(), [draw(64, 16, seed=i) for i in range(8)]
    small = gm.compress(net, batches, SELF).at(keep=0.6, of="factorable").apply()
    num = threading.active_count()
    better = gm.refit(small, net, batches, SELF)
    assert threading.active_count() == num
    new = draw(256, 16, seed=70)
    assert distance(better, net, new) < 1.02 * distance(small, net, new)


def test_what_is_excluded_stays():
    net = NETS["stream"][0]()
    batches = [draw(64, 6, 16, seed=i) for i in range(8)]
    small = gm.compress(net, batches, SELF).at(keep=0.3, of="factorable").apply()
    better = gm.refit(small, net, batches, SELF, exclude=["*.up"])
    rows = zip(small.state_dict().items(), better.state_dict().values(), strict=True)
    changed = [name for (name, a), b in rows if not torch.equal(a, b)]
    assert changed
    assert not [name for name in changed if ".up" in name]


def test_integers_stay():
    net, x = NETS["stream"][0](), draw(256, 6, 16)
    small = gm.compress(net, [x], SELF).at(keep=0.5, of="factorable", bits=8).apply()
    better = gm.refit(small, net, [x], SELF)
    rows = zip(small.state_dict().items(), better.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (name, a), b in rows if "bias" not in name)
    assert distance(better, net, x) <= 1.01 * distance(small, net, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    net = NETS["stream"][0]()
    batches = [draw(64, 6, 16, seed=i) for i in range(8)]
    small = gm.compress(net, batches, SELF).at(keep=0.3, of="factorable").apply()
    new = draw(256, 6, 16, seed=50)
    wide = distance(gm.refit(small, net, batches, SELF), net, new)
    assert wide < 0.95 * distance(small, net, new)
    with torch.autocast("cpu", dtype):
        better = gm.refit(small, net, batches, SELF)
    assert distance(better, net, new) < min(1.15 * wide, distance(small, net, new))
    low = [copy.deepcopy(one).to(dtype) for one in (small, net)]
    better = gm.refit(*low, [b.to(dtype) for b in batches], SELF)
    assert {p.dtype for p in better.parameters()} == {dtype}
    assert distance(better.float(), net, new) < min(1.15 * wide, distance(small, net, new))


def test_the_command_refits_where_that_is_better():
    net = NETS["stream"][0]().eval()
    batches, new = [draw(64, 6, 16, seed=i) for i in range(8)], draw(256, 6, 16, seed=50)
    error = lambda model: {"error": distance(model, net, new)}  # noqa: E731
    made = decide(net, batches, SELF, error, Target(keep=0.5), curve=False)
    assert distance(made.model, net, new) < distance(made.plan.apply(), net, new)
    assert made.outcome.compressed.quality == distance(made.model, net, new)
    cut = made.outcome.contenders[2]
    assert (cut.name, cut.quality) == ("before the refit", distance(made.plan.apply(), net, new))
    assert any("refit" in note for note in made.outcome.remarks)


def test_errors():
    net, x = NETS["perceptron"][0](), draw(64, 16)
    small = gm.compress(net, [x], SELF).at(keep=0.5, of="factorable").apply()
    with pytest.raises(InputError, match="no layer"):
        gm.refit(small, nn.Linear(16, 4), [x], SELF)
    with pytest.raises(InputError, match="two samples"):
        gm.refit(small, net, [x[:1]], SELF)
    with pytest.raises(InputError, match="no layer that can be fit matches 'nine'"):
        gm.refit(small, net, [x], SELF, exclude=["nine"])
    with pytest.raises(InputError, match="distinct"):
        gm.refit(small, net, [x[:1].expand(64, -1)], SELF)
    num = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gm.refit(small, net, lambda: iter([x, x, x[:, :5]]), SELF)
    assert threading.active_count() == num


def test_a_walk_stops_before_the_first_use():
    layer = nn.Linear(4, 4)
    x = draw(3, 4)
    got = []

    def run():
        y = layer(x)
        assert y.shape == (3, 4)  # a look is no use
        got.append(functional.dropout(y, 0.5, training=False) + x)

    with watched({"layer": layer}):
        walk = Walk(run)
        stop = walk.advance()
        assert stop is not None
        assert (stop.name, stop.other is x, got) == ("layer", True, [])
        for tensor in stop.outputs:
            tensor.fill_(1.0)
        assert walk.advance() is None
    torch.testing.assert_close(got[0], x + 1)


def test_what_refitting_wins_back_makes_the_model_smaller():
    net, shape = NETS["stream"][0]().eval(), NETS["stream"][1]
    x, held = draw(256, *shape), draw(128, *shape, seed=1)
    error = lambda m: {"error": distance(m, net, held)}  # noqa: E731
    allowed = 0.02
    made = decide(net, [x], SELF, error, Target(max_drop=allowed), curve=True)
    without = [keep for keep, value in made.outcome.curve if value <= allowed]
    assert made.outcome.compressed.quality <= allowed
    assert made.outcome.keep < min(without)
    assert made.plan.parameters <= made.outcome.keep * made.plan.parameters_dense
    assert error(made.model)["error"] == pytest.approx(made.outcome.compressed.quality, rel=1e-3)
