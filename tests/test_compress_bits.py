"""Integers of few bits and zeros, with errors passed on by the inverse Gram; and budgets of bytes over all forms."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.checkpoint import open_checkpoint, save_tensors
from gramian.checkpoint.packing import RANKS
from gramian.compression.budget.mixing import Form
from gramian.compression.calibration.shrinkage import Roots, roots
from gramian.compression.choosing.measuring import in_int8, num_bytes
from gramian.compression.layers.feedback import RIDGE, Feedback, feedback_of, settle
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.layers.pruning import Pattern, pruned
from gramian.compression.layers.quantized import Quantized, multiplies_integers, pack, unpack
from gramian.compression.layers.rounding import BITS, noise, rounded
from gramian.errors import InputError, UnsupportedError
from gramian.gram import Gram
from gramian.layers import layout_of


def moments(m: int, n: int, seed: int = 0) -> tuple[Tensor, Gram, Gram]:
    """A matrix, and second moments of correlated inputs and of gradients."""
    generator = seeded(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.rand(n, generator=generator)
    x = torch.randn(4 * n, n, generator=generator) @ mixing
    g = torch.randn(4 * m, m, generator=generator) * torch.rand(m, generator=generator)
    return torch.randn(m, n, generator=generator), Gram(n).update(x), Gram(m).update(g)


def surgeon(w: Tensor, h: Tensor, order: Tensor, value) -> Tensor:
    """The optimal brain surgeon's update, with the inverse of the free weights' H anew for each column."""
    w, free = w.clone(), order.tolist()
    while free:
        j = free[0]
        inverse = torch.linalg.inv(h[free][:, free])
        settled = value(w[:, j], j)
        w[:, free] -= torch.outer(w[:, j] - settled, inverse[0] / inverse[0, 0])
        w[:, j] = settled
        free.pop(0)
    return w


VALUES = {
    "rounding": lambda column, j: (column * 2).round() / 2,
    "zeros": lambda column, j: column * (j % 2),
}


@pytest.mark.parametrize("what", VALUES)
def test_an_error_is_passed_on_as_the_optimal_brain_surgeon_does(what: str, monkeypatch) -> None:
    monkeypatch.setattr("gramian.compression.layers.feedback.BLOCK", 5)
    w, a, _ = moments(5, 24)
    w, h, value = w.double(), a.matrix, VALUES[what]
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT
    order = torch.randperm(24, generator=seeded(1))
    feedback = Feedback(torch.arange(24), upper, torch.arange(1.0, 6.0).double()).reordered(order)
    found, lost = settle(w, feedback, lambda block, diagonal, place: lambda c, i: value(c, int(order[place.start + i])))
    torch.testing.assert_close(found, surgeon(w, h, order, value), rtol=1e-9, atol=1e-9)
    error = found - w
    cost = 0.5 * (torch.arange(1.0, 6.0).double()[:, None] * (error @ h) * error).sum()
    torch.testing.assert_close(feedback.cost(error), cost, rtol=1e-9, atol=0)
    torch.testing.assert_close(lost, ((error @ h) * error).sum(1), rtol=1e-9, atol=0)


def test_the_feedback_is_the_factored_inverse_of_the_shrunk_moment() -> None:
    _, a, g = moments(5, 24)
    inputs, outputs = roots(a, 96.0), roots(g, 20.0)
    feedback = feedback_of(inputs, outputs, 96.0)
    h = inputs.root @ inputs.root
    h = h + RIDGE * 24 / 96 * h.diagonal().mean() * torch.eye(24)
    inverse = torch.linalg.inv(h)[feedback.order][:, feedback.order]
    upper = feedback.factor.double()
    torch.testing.assert_close(upper.mT @ upper, inverse, rtol=1e-4, atol=1e-5 * float(inverse.abs().max()))
    wide = Roots(inputs.root.diagonal(), inputs.inverse.diagonal())
    expected = (wide.root.square() + RIDGE * 24 / 96 * wide.root.square().mean()).rsqrt()
    diagonal = feedback_of(wide, outputs, 96.0)
    torch.testing.assert_close(diagonal.factor.double(), expected[diagonal.order], rtol=1e-6, atol=0)
    assert (upper.tril(-1) == 0).all()
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(feedback.outputs, (outputs.root @ outputs.root).diagonal())
    diagonal = (inputs.root @ inputs.root).diagonal()
    assert (diagonal[feedback.order].diff() <= 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num", [1, 7, 8, 64, 65])
def test_codes_come_out_of_bytes_as_they_went_in(bits: int, num: int) -> None:
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (5, num), generator=seeded(bits), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (5, bits * -(-num // 8))
    assert torch.equal(unpack(packed, bits, num), codes)


@pytest.mark.parametrize("group", [16, 40, 1000])
@pytest.mark.parametrize("bits", BITS[1:])
def test_rounding_with_feedback_loses_less_than_to_the_nearest_and_as_expected(bits: int, group: int) -> None:
    w, a, g = moments(32, 96)
    feedback = feedback_of(roots(a, 384.0), roots(g, 128.0))
    low = 2 ** (bits - 1)
    codes = rounded(w, bits, group, feedback)
    assert int(codes.codes.min()) >= -low
    assert int(codes.codes.max()) < low
    ours, nearest = (float(feedback.cost(c.matrix(group) - w)) for c in (codes, rounded(w, bits, group)))
    assert ours < (0.95 if bits == 3 else 0.7) * nearest  # with few bits, most of the error is of clipping
    assert 1 <= ours / noise(w, bits, group, feedback) < (2.0 if bits > 4 else 4.0)


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_large_weight_that_others_can_make_up_for_does_not_push_them_out_of_range(bits: int, group: int) -> None:
    """Of a weight whose input is nearly a sum of the others, clipping seems to cost nothing."""
    generator = seeded(0)
    x = torch.randn(2000, 96, generator=generator)
    x[:, 0] = x[:, 1:].sum(1) / 95**0.5 + 0.03 * x[:, 0]
    w = torch.randn(16, 96, generator=generator)
    w[:8, 0] = 8.0
    feedback = feedback_of(roots(Gram(96).update(x), 2000.0), roots(Gram(16).update(torch.eye(16)), 16.0))
    new = torch.randn(2000, 96, generator=generator)
    new[:, 0] = new[:, 1:].sum(1) / 95**0.5 + 0.03 * new[:, 0]
    ours, nearest = (rounded(w, bits, group, given).matrix(group) - w for given in (feedback, None))
    assert (feedback.quadratic(ours) <= feedback.quadratic(nearest) * (1 + 1e-5)).all()
    held_out = [float((new @ error.mT).square().mean()) for error in (ours, nearest)]
    assert held_out[0] < held_out[1]


@pytest.mark.parametrize("num", [4, 24, 60, 96, 200, 1000])
def test_of_few_rows_feedback_is_no_worse_on_new_ones_than_rounding_to_the_nearest(num: int) -> None:
    """Errors are put where the inputs did not vary; with few rows, that is where new ones do."""
    generator = seeded(num)
    mixing = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0] * torch.logspace(0, -2, 96)
    x, new = (torch.randn(k, 96, generator=generator) @ mixing.T for k in (num, 4000))
    w = torch.randn(24, 96, generator=generator)
    moment = roots(Gram(96).update(x), float(num))
    feedback = feedback_of(moment, roots(Gram(24).update(torch.eye(24)), 24.0), float(num))
    found = {}
    for name, given in (("ours", feedback), ("nearest", None)):
        error = rounded(w, 8, 96, given).matrix(96) - w
        found[name] = float((new @ error.mT).square().mean())
    assert found["ours"] <= found["nearest"]


@pytest.mark.parametrize("share", [0.5, 0.8, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_zeros_with_feedback_cost_less_than_half_of_the_smallest(share) -> None:
    w, a, g = moments(32, 96)
    feedback = feedback_of(roots(a, 384.0), roots(g, 128.0))
    found = pruned(w, share, feedback)
    if isinstance(share, Pattern):
        zeros = (found == 0).unflatten(1, (-1, share.of)).sum(2)
        assert (zeros == share.zeros).all()
        size = w.abs().unflatten(1, (-1, share.of))
        smallest = (size.argsort(2).argsort(2) >= share.zeros).flatten(1) * w
    else:
        assert int((found == 0).sum()) == round(share * w.numel())
        smallest = torch.where(w.abs() > w.abs().flatten().kthvalue(round(share * w.numel())).values, w, 0.0)
    assert float(feedback.cost(found - w)) < 0.5 * float(feedback.cost(smallest - w))


def test_of_a_row_that_a_pattern_does_not_divide_the_rest_has_its_share() -> None:
    w, a, g = moments(4, 10)
    found = pruned(w, Pattern(2, 4), feedback_of(roots(a, 40.0), roots(g, 16.0)))
    assert ((found[:, :8] == 0).unflatten(1, (2, 4)).sum(2) == 2).all()
    assert (found[:, 8:] != 0).all()  # two weights of four may be the ones that stay


LAYERS = {
    "linear": (lambda: nn.Linear(20, 7), (3, 5, 20)),
    "no bias": (lambda: nn.Linear(20, 7, bias=False), (3, 20)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (2, 4, 9, 9)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9)),
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_computes_and_answers_as_its_original(name: str, bits: int) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, generator=seeded(0), requires_grad=True)
    layer.note = "kept"
    layout = layout_of(layer)
    assert layout is not None
    codes = rounded(layout.split(layer.weight.detach()), bits, 8)
    low = Quantized(layer, bits, 8).set_(codes)
    with torch.no_grad():
        layer.weight.copy_(layout.join(codes.matrix(8)))
    torch.testing.assert_close(low(x), layer(x))
    torch.testing.assert_close(low.weight + 0, layer.weight.detach(), rtol=0, atol=0)
    assert (low.weight.shape, low.weight.dtype, low.note) == (layer.weight.shape, torch.float32, "kept")
    assert all(getattr(low, option) == getattr(layer, option) for option in layer.__constants__)
    low(x).sum().backward()
    assert x.grad is not None
    half = copy.deepcopy(low).half()
    assert (half.weight.dtype, half.scales.dtype, half(x.detach().half()).dtype) == (
        torch.float16, torch.bfloat16, torch.float16,
    )  # fmt: skip
    torch.testing.assert_close(half.float()(x), low(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pickle.loads(pickle.dumps(low))(x), low(x), rtol=0, atol=0)


def test_integers_are_multiplied_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3)), torch.randn(4, 5, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = in_int8(model)
        found = small(x)
    assert [type(m).__name__ for m in small] == ["Quantized", "Tanh", "Quantized"]
    assert num_bytes(small) < 0.35 * num_bytes(model)
    torch.testing.assert_close(found, model(x), rtol=0.03, atol=0.03)
    assert torch.isfinite(small(torch.zeros(1, 64))).all()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_products_of_integers_with_few_columns(n: int) -> None:
    """A factor of rank one has one column, whose integer product torch gets wrong."""
    torch.manual_seed(0)
    layer = nn.Linear(n, 24).requires_grad_(False)
    made = Quantized(layer, 8, n).set_(rounded(layer.weight, 8, n))
    made.integer = multiplies_integers("cpu")
    x = torch.randn(17, n)
    assert torch.allclose(made(x), layer(x), atol=0.02 * float(x.norm(dim=1).max() * layer.weight.norm(dim=1).max()))


def test_integers_are_not_multiplied_where_their_sums_overflow(monkeypatch) -> None:
    """As on x86 without VNNI, where sums of two products saturate at 16 bits and outputs are off by a seventh."""

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        products = (a.int() + 128).unsqueeze(2) * b.int()  # one side is made unsigned, as the instruction wants it
        pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1) - 128 * b.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    multiplies_integers.cache_clear()
    try:
        assert not multiplies_integers("cpu")
        layer, x = nn.Linear(64, 48), torch.randn(5, 64)
        (small,) = in_int8(nn.Sequential(layer))
        torch.testing.assert_close(small(x), layer(x), rtol=0.01, atol=0.01)
        with pytest.raises(UnsupportedError, match="overflow on this processor"):
            small.integer = True
    finally:
        multiplies_integers.cache_clear()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))


def data(num: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs of decaying variance, and what the network should give, in batches of 32."""
    generator = seeded(seed)
    mixing = torch.linalg.qr(torch.randn(48, 48, generator=seeded(9)))[0] * torch.logspace(0.5, -1.5, 48)
    return [(x, x.roll(1, 1)) for x in (torch.randn(32, 48, generator=generator) @ mixing.T for _ in range(num))]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model, optimizer_steps = net(), data(150, 3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for x, y in optimizer_steps:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def plan(trained) -> gm.Plan:
    return gm.compress(trained, batches=data(32), objective=gm.Objective.regression(), keep=0.9)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(nn.functional.mse_loss(model(x), y)) for x, y in data(20, 5)) / 20


def replaced_by(model: nn.Module, change) -> nn.Module:
    made = copy.deepcopy(model)
    for layer in made:
        if isinstance(layer, nn.Linear):
            layer.weight.data = change(layer.weight.data)
    return made


def test_four_bits_and_half_of_the_weights_lose_at_most_half_of_what_they_usually_do(trained, plan) -> None:
    dense = loss(trained)
    nearest = loss(replaced_by(trained, lambda w: rounded(w, 4, 64).matrix(64))) - dense
    assert loss(plan.at(bits=4).apply()) - dense <= 0.5 * nearest

    def magnitude(w: Tensor) -> Tensor:
        return torch.where(w.abs() > w.abs().flatten().kthvalue(w.numel() // 2).values, w, 0.0)

    half = plan.at(sparsity=0.5).apply()
    weights = [m.weight for m in half if isinstance(m, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in weights) == sum(w.numel() for w in weights) // 2
    assert loss(half) - dense <= 0.5 * (loss(replaced_by(trained, magnitude)) - dense)
    pattern = plan.at(sparsity="2:4").apply()
    assert all(((m.weight == 0).unflatten(1, (-1, 4)).sum(2) == 2).all() for m in pattern if isinstance(m, nn.Linear))


@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"keep": 0.6, "bits": 4}])
def test_zeros_and_factors_of_integers_cost_what_is_told(trained, options: dict[str, float], tmp_path) -> None:
    """Points of rounded weights and of cut ranks do not tell it."""
    objective, held_out = gm.Objective.regression(), data(20, 5)

    def mean_loss(model: nn.Module) -> float:
        with torch.no_grad():
            parts = [objective.summed(model, batch) for batch in held_out]
        return sum(float(total) for total, _ in parts) / sum(units for _, units in parts)

    told = gm.compress(trained, data(6), objective, held_out=held_out).at(**options)
    rise = mean_loss(told.apply()) - mean_loss(trained)
    assert told.predicted.rise == pytest.approx(rise, rel=0.05)
    gm.compression.save_plan(told, tmp_path / "plan.safetensors")
    assert gm.compression.load_plan(trained, tmp_path / "plan.safetensors").predicted == pytest.approx(told.predicted)


def test_bytes_are_counted_as_they_are_and_more_of_them_never_lose_more(plan) -> None:
    losses = []
    for size in (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8, 1.0):
        part = plan.at(size=size)
        assert part.bytes == num_bytes(part.apply()) <= size * plan.bytes_dense
        losses.append(part.predicted_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    mixed = plan.at(keep=0.6, bits=8)
    assert mixed.bytes == num_bytes(mixed.apply()) < 0.3 * plan.bytes_dense
    assert plan.at(bits=8).predicted_loss >= plan.at(size=plan.at(bits=8).bytes / plan.bytes_dense).predicted_loss


def test_at_the_bytes_of_int8_less_is_lost_than_by_int8(trained, plan) -> None:
    int8 = replaced_by(trained, lambda w: rounded(w, 8, w.shape[1]).matrix(w.shape[1]))
    same = plan.at(size=plan.at(bits=8).bytes / plan.bytes_dense).apply()
    x = torch.cat([x for x, _ in data(20, 5)])
    with torch.no_grad():
        ours, peer = ((model(x) - trained(x)).square().mean() for model in (same, int8))
    assert ours < 0.7 * peer


def test_factors_in_few_bits_lose_little_beside_the_cut(trained, plan) -> None:
    floats, ints = plan.at(keep=0.5), plan.at(keep=0.5, bits=8)
    assert floats.ranks == ints.ranks
    x = data(1, 5)[0][0]
    with torch.no_grad():
        cut = (floats.apply()(x) - trained(x)).square().mean()
        both = (ints.apply()(x) - trained(x)).square().mean()
    assert both < 1.1 * cut
    low = next(m for m in ints.apply() if isinstance(m, LowRank))
    assert [type(m) for m in low] == [Quantized, Quantized]
    assert (low.rank, low.weight.shape, low.in_features) == (low[0].codes.shape[0], (64, 48), 48)


HOSTILE = {
    "constant": [(torch.ones(32, 48), torch.ones(32, 48))],
    "zero": [(torch.zeros(32, 48), torch.zeros(32, 48))],
    "one sample": [(torch.randn(1, 48, generator=seeded(0)), torch.ones(1, 48))],
    "dead inputs": [(x * (torch.arange(48) < 20), y) for x, y in data(8)],
}


@pytest.mark.filterwarnings("ignore::gramian.errors.GramianWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_calibration_gives_finite_models(name: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[3] = 0.0
        model[2].weight.zero_()
    made = gm.compress(model, batches=HOSTILE[name], objective=gm.Objective.regression(), keep=0.9)
    x = data(1, 5)[0][0]
    for part in (made.at(bits=4), made.at(bits=2, group=8), made.at(size=0.3), made.at(keep=0.6, bits=8),
                 made.at(sparsity=0.5), made.at(sparsity="2:4")):  # fmt: skip
        small = part.apply()
        assert small(x).isfinite().all()
        if isinstance(small[0], Quantized):
            assert (small[0].weight[3] == 0).all()
            assert (small[2].weight == 0).all()
        assert part.predicted_loss >= 0


def test_what_is_not_finite_is_refused_by_name(plan) -> None:
    broken = copy.deepcopy(plan)
    broken.model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"the weight of '2' is not finite"):
        broken.at(bits=4).apply()


REFUSED = {
    "nothing": ({}, "give one of keep, size, bits and sparsity"),
    "two": ({"size": 0.5, "bits": 4}, "got size and bits"),
    "nine bits": ({"bits": 9}, "bits must be from 2 to 8, got 9"),
    "size": ({"size": 0.0}, r"size must be a share in \(0, 1\]"),
    "too small": ({"size": 0.001}, "the smallest possible size is 0.0"),
    "all zeros": ({"sparsity": 1.0}, "sparsity must be a share"),
    "no pattern": ({"sparsity": "4:2"}, "a pattern of zeros is like '2:4'"),
    "group": ({"bits": 4, "group": 0}, "group must be a number of columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(plan, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        plan.at(**options)


def test_a_plan_tells_what_each_layer_becomes(plan) -> None:
    assert "2 × 4 bits" in str(plan.at(bits=4)) or "3 × 4 bits" in str(plan.at(bits=4))
    assert plan.at(bits=4).explain()[0]["form"] == "4 bits"
    assert plan.at(keep=0.9).ranks == {name: form.rank for name, form in plan.forms.items()}
    assert plan.at(sparsity="2:4").forms["0"] == Form(zeros="2:4")


FORMS = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3, "group": 16},
    "mixed": {"size": 0.2},
    "factors": {"keep": 0.5, "bits": 8},
    "zeros": {"sparsity": 0.5},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_gives_the_same_model(plan, name: str, device: str, tmp_path) -> None:
    small = plan.at(**FORMS[name]).apply()
    gm.save_compressed(small, tmp_path / "small.safetensors")
    with torch.device(device):
        again = gm.load_compressed(net(), tmp_path / "small.safetensors")
    x = data(1, 5)[0][0]
    assert torch.equal(again(x), small(x))
    assert num_bytes(again) == num_bytes(small)


def test_a_plan_in_a_file_rounds_as_before(plan, tmp_path) -> None:
    gm.save_plan(plan.at(size=0.2), tmp_path / "plan.safetensors")
    again = gm.load_plan(plan.model, tmp_path / "plan.safetensors")
    assert again.forms == plan.at(size=0.2).forms
    x = data(1, 5)[0][0]
    assert torch.equal(again.apply()(x), plan.at(size=0.2).apply()(x))


def test_quantized_layers_are_left_alone_by_name(plan) -> None:
    small = plan.at(bits=4).apply()
    small.append(nn.Linear(48, 48))
    again = gm.compress(small, batches=data(8), objective=gm.Objective.regression(), keep=0.9)
    assert again.reasons["0"] == "quantized already"
    assert list(again.forms) == ["5"]


@pytest.mark.parametrize("options", [{"bits": 4}, {"keep": 0.7, "bits": 8}, {"size": 0.3}], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_from_pretrained_gives_the_same_quantized_model(family: str, options: dict, tmp_path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    from gramian.integrations import compressed  # noqa: F401

    torch.manual_seed(0)
    if family == "bert":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
        model = transformers.BertForSequenceClassification(config).eval()
    else:
        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=1, eos_token_id=1, **sizes)).eval()
    tokens = torch.randint(0, 50, (32, 8), generator=seeded(0))
    batches = [{"input_ids": tokens}]
    made = gm.compress(model, batches=batches, objective=gm.Objective.self_distillation(), keep=0.9)
    small = made.at(**options, of="factorable").apply()
    gm.save_compressed(small, tmp_path / "small")
    stored = open_checkpoint(tmp_path / "small")
    for one, layer in small.named_modules():
        if isinstance(layer, Quantized):
            assert torch.equal(stored.load(f"{one}.weight"), layer.weight + 0)
    again = type(model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, small(tokens).logits)
        assert torch.equal(
            gm.load_compressed(copy.deepcopy(model), tmp_path / "small")(tokens).logits, again(tokens).logits
        )
    assert num_bytes(again) == num_bytes(small)
    again.save_pretrained(tmp_path / "more")
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path / "more").eval()(tokens).logits, again(tokens).logits)
    part = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert any(isinstance(m, Quantized) for m in part.modules())


@pytest.mark.parametrize("name", ["4 bits", "3 bits", "factors"])
def test_a_file_of_integers_is_inspected_as_the_matrices_that_are_applied(plan, name: str, tmp_path) -> None:
    small = plan.at(**FORMS[name]).apply()
    gm.save_compressed(small, tmp_path / "small.safetensors")
    checkpoint = open_checkpoint(tmp_path / "small.safetensors")
    layers = {n: m for n, m in small.named_modules() if isinstance(m, Quantized)}
    for one, layer in layers.items():
        assert torch.equal(checkpoint.load(f"{one}.weight"), layer.matrix())
    report = gm.inspect(tmp_path / "small.safetensors")
    assert {layer.name for layer in report.layers} == {f"{one}.weight" for one in layers}
    assert all("(gramian)" in layer.note for layer in report.layers)


def test_integers_of_kernels_and_transposed_weights_are_read_in_the_shape_of_the_weight(tmp_path) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    for i, layer in enumerate((Conv1D(12, 20), nn.Conv2d(4, 6, 3))):
        layout = layout_of(layer)
        assert layout is not None
        made = Quantized(layer, 5, 16).set_(rounded(layout.split(layer.weight.detach()), 5, 16))
        gm.save_compressed(nn.Sequential(made), tmp_path / f"{i}.safetensors")
        weight = open_checkpoint(tmp_path / f"{i}.safetensors").load("0.weight")
        assert weight.shape == layer.weight.shape
        assert torch.equal(weight, made.weight + 0)
        assert [one.name for one in gm.inspect(tmp_path / f"{i}.safetensors").layers] == ["0.weight"]


HARMED = {
    "bits": ({"bits": 3}, "do not fit what the file says"),
    "shape": ({"shape": [0, 3]}, "do not fit what the file says"),
    "text": ({"group": "x"}, "do not fit what the file says"),
    "no shape": ({"shape": None}, "earlier version"),
}


@pytest.mark.parametrize("name", HARMED)
def test_integers_that_do_not_fit_what_the_file_says_are_left_out_by_name(name: str, tmp_path) -> None:
    changed, words = HARMED[name]
    made = Quantized(nn.Linear(20, 7), 4, 16)
    about = {key: value for key, value in (made.about | changed).items() if value is not None}
    save_tensors(tmp_path / "a.safetensors", nn.Sequential(made).state_dict(), {RANKS: json.dumps({"0": about})})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert "0.weight" not in checkpoint.entries
    assert any(words in note for note in checkpoint.notes)
