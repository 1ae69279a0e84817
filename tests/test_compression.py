"""A factored model: never larger than asked, nearest in the loss's own metric, the same where nothing is dropped."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import gramian as gm
from cases import seeded
from gramian import Gram, Statistics
from gramian.checkpoint import save_tensors
from gramian.compression import (
    LowRank,
    Plan,
    compress,
    load_compressed,
    save_compressed,
)
from gramian.compression.calibration.parts import output_roots
from gramian.compression.calibration.shrinkage import FLOOR, roots, shrunk_mean
from gramian.errors import CheckpointError, GramianWarning, InputError
from gramian.site import Site
from kernels import Operations
from test_capture import assert_same, snapshot
from zoo import ZOO, Conv1D
from zoo_modules import MODULES

CASES = ZOO | MODULES
CLASSIFY = gm.Objective.classification()
KEEPS = (0.25, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)


def plan_of(name: str, keep: float = 0.5) -> tuple[nn.Module, list, Plan]:
    case = ZOO[name]
    model, batches = case.make_model(0).eval(), case.make_batches(0)[:2]
    return (
        model,
        batches,
        compress(model, batches=batches, objective=getattr(gm.Objective, case.objective)(), keep=keep),
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gram(m: Tensor, n: int = 10**9) -> Gram:
    """A Gram of mean zero with the given matrix."""
    g = Gram(len(m))
    g.total, g.count = m.double() * n, torch.tensor(float(n), dtype=torch.float64)
    return g


def second_moment(n: int, seed: int, *, rank: int | None = None, scale: float = 1.0) -> Tensor:
    x = torch.randn(rank or 3 * n, n, generator=seeded(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -2, n, dtype=torch.float64)
    return scale**2 * x.T @ x


def one_linear(m: int = 8, n: int = 12, *, bias: bool = False, a: Tensor | None = None, g: Tensor | None = None):
    """A model of one Linear with chosen A and G, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=torch.float64))
    a, g = (second_moment(n, 1) if a is None else a), (second_moment(m, 2) if g is None else g)
    return model, Statistics({"0.weight": [Site(gram(a), gram(g))]})


COMPRESSIBLE = ["mlp", "mlp_regression", "deep_tanh_mlp", "batchnorm_cnn", "residual_cnn", "transformer_classifier",
                "transformer_lm", "grouped_query", "mixture_of_experts"]  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_budget_is_kept_and_counted(name: str) -> None:
    model, batches, plan = plan_of(name, keep=1.0)
    before = snapshot(model)
    total, sizes = count(model), []
    for keep in KEEPS:
        try:
            part = plan.at(keep=keep)
        except InputError as error:  # attention and experts are not factored, and weigh more than that
            least = float(str(error).rpartition(" ")[2])
            assert least > keep
            assert plan.at(keep=least + 1e-3).parameters <= (least + 1e-3) * total
            continue
        small = part.apply()
        assert count(small) == part.parameters <= keep * total
        assert small(batches[0][0]).shape == model(batches[0][0]).shape
        sizes.append(part.parameters)
    assert sizes == sorted(sizes)
    assert len(sizes) > 1
    assert_same(before, snapshot(model))


def test_torch_encoder_runs_factored_in_its_fast_path_too() -> None:
    """Without gradients, TransformerEncoderLayer reads `linear1.weight` and calls one fused kernel."""
    model, batches, _ = plan_of("transformer_classifier", keep=0.9)
    plan = compress(model, batches=batches, objective=CLASSIFY, include=["*linear1"], of="factorable", keep=0.5)
    small, x = plan.apply(), batches[0][0]
    assert isinstance(small.encoder.layers[0].linear1, LowRank)
    with torch.no_grad():
        fused = small(x)
    torch.testing.assert_close(fused, small(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model, batches, plan = plan_of(name, keep=1.0)
    assert set(plan.ranks.values()) == {None}
    same = plan.apply()
    assert torch.equal(same(batches[0][0]), model(batches[0][0]))
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert plan.predicted_loss == 0


def test_stacks_of_an_unknown_layout_are_left_dense_by_name_with_the_reason() -> None:
    model, batches, plan = plan_of("mixture_of_experts", keep=0.9)
    experts = {name: m for name, m in model.named_modules() if type(m).__name__ == "Experts"}
    small = plan.apply()
    assert experts
    for name, module in experts.items():
        assert {f"{name}.up", f"{name}.down"} <= {row["name"] for row in plan.explain()}
        assert "a stack of 4 matrices" in plan.reasons[f"{name}.up"]
        assert torch.equal(small.get_submodule(name).up, module.up)
    assert torch.equal(plan.at(keep=1.0).apply()(batches[0][0]), model(batches[0][0]))


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "transformer_classifier"])
def test_more_budget_never_loses_more(name: str) -> None:
    _, _, plan = plan_of(name, keep=1.0)
    low, ranks, losses = sum(plan.spectra[0].shape) / plan.parameters_dense, [], []
    for keep in torch.linspace(low, 1, 60).tolist():
        try:
            part = plan.at(keep=keep)
        except InputError:
            continue
        ranks.append(part.ranks)
        losses.append(part.predicted_loss)
    assert len(ranks) > 20
    assert losses == sorted(losses, reverse=True)
    assert ranks[0] != ranks[-1]


def test_another_share_costs_no_decomposition() -> None:
    model, _, plan = plan_of("deep_tanh_mlp")
    with Operations() as done:
        plan.at(keep=0.5)
    # `Plan.at` promises less than a second: it sorts and sums singular values that are known.
    assert done.count < 200
    assert done.entries < count(model)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_factors_are_the_best_in_the_weighted_norm(rank: int) -> None:
    model, stats = one_linear()
    keep = rank * 20 / 96
    w = model[0].weight.detach()
    low = compress(model, stats, keep=keep).apply()[0]
    assert low.rank == rank
    got = low[1].weight.detach() @ low[0].weight.detach()

    def root(m: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(m + FLOOR * m.diagonal().mean() * torch.eye(len(m)))
        return vectors * values.sqrt() @ vectors.T

    g, a = root(stats["0.weight"].G.matrix), root(stats["0.weight"].A.matrix)

    def error(v: Tensor) -> Tensor:
        return torch.linalg.norm(g @ (w - v) @ a)

    best = torch.linalg.svdvals(g @ w @ a)[rank:].norm()  # Eckart and Young
    assert error(got) == pytest.approx(best.item(), rel=1e-6)
    generator = seeded(3)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            left = low[1].weight.detach()
            right = low[0].weight.detach()
            left = left + size * left.std() * torch.randn(left.shape, generator=generator, dtype=torch.float64)
            right = right + size * right.std() * torch.randn(right.shape, generator=generator, dtype=torch.float64)
            assert error(left @ right) > best
    assert compress(model, stats, keep=keep).predicted_loss == pytest.approx(0.5 * best.item() ** 2, rel=1e-6)


def test_the_budget_goes_where_the_loss_notices() -> None:
    """Two equal layers; the loss sees the second's output a hundred times as strongly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight.data.copy_(model[0].weight)
    a, g = second_moment(16, 1), second_moment(16, 2)
    stats = Statistics({"0.weight": [Site(gram(a), gram(g))], "1.weight": [Site(gram(a), gram(1e4 * g))]})
    ranks = compress(model, stats, keep=0.6).ranks
    assert (ranks["1"] or 16) > ranks["0"]


def test_the_bias_takes_up_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 4)).double()
    x = torch.randn(200, 10, generator=seeded(0), dtype=torch.float64) + 3
    stats = gm.capture(model, [(x, torch.randint(4, (200,), generator=seeded(1)))], CLASSIFY, fisher="gauss_newton")
    small = compress(model, stats, keep=0.6).apply()
    assert isinstance(small[0], LowRank)
    assert not torch.allclose(small(x), model(x), rtol=0.01)
    mean = shrunk_mean(stats["0.weight"].A, 200.0)  # x has mean 3 and 200 rows: nearly the mean itself
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(small[0](mean), model[0](mean), rtol=1e-9, atol=1e-9)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "dilated": {"dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "no_bias": {"bias": False},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_kernel_of_low_rank_is_found_again(name: str) -> None:
    """A convolution whose matrix has rank 2 is the same function in two factors."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, **CONVOLUTIONS[name], dtype=torch.float64)
    conv.weight.data = (torch.randn(8, 2).double() @ torch.randn(2, 27).double()).view_as(conv.weight)
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(4, dtype=torch.float64))
    x, y = torch.randn(40, 3, 7, 7, dtype=torch.float64), torch.randint(4, (40,))
    model(x)
    stats = gm.capture(model, [(x, y)], CLASSIFY, fisher="gauss_newton")
    del stats.blocks["2.weight"]
    small = compress(model, stats, keep=(count(model) - 216 + 70) / count(model)).apply()
    assert small[0].rank == 2
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_is_not_factored_has_a_reason() -> None:
    _, _, plan = plan_of("transformer_lm", keep=0.95)
    assert "embed" in plan.ranks
    assert {"encoder.layers.0.self_attn.in_proj", "encoder.layers.0.self_attn.out_proj"} <= plan.ranks.keys()
    _, _, plan = plan_of("batchnorm_cnn", keep=0.95)
    assert "4 groups" in plan.reasons["6"]

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Own(64, 64), nn.Linear(64, 10), nn.Linear(10, 10))
    tied[1].weight = tied[0].weight
    case = ZOO["mlp"]
    plan = compress(tied, batches=case.make_batches(0)[:1], objective=CLASSIFY, keep=0.97)
    assert "0" in plan.ranks  # with 1, see test_compress_tables.py
    assert plan.reasons["2"] == "Own is not factored: its forward is its own"
    only = nn.Sequential(nn.Linear(64, 64), Own(64, 64))
    only[1].weight = only[0].weight
    with pytest.raises(InputError, match=r"no layer of Sequential can be factored \(0: tied to 1.weight; Own is not"):
        compress(only, batches=case.make_batches(0)[:1], objective=CLASSIFY)


def fused(interleaved: bool) -> nn.Module:
    """Two heads of GPT-NeoX' interleaved projection, or GPT-2's (in, out) one, and a head."""
    if interleaved:
        layer = nn.ModuleDict({"query_key_value": nn.Linear(64, 48)})
        layer.config = {"model_type": "gpt_neox", "num_attention_heads": 2}
        run = layer["query_key_value"]
    else:
        layer = nn.ModuleDict({"c_attn": Conv1D(48, 16), "enter": nn.Linear(64, 16)})
        run = nn.Sequential(layer["enter"], layer["c_attn"])
    model = nn.ModuleDict({"attn": layer, "head": nn.Linear(48, 10)})
    model.forward = lambda x: model["head"](torch.tanh(run(x)))
    return model


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_fused_projection_is_factored_whole_with_a_gradient_moment_for_each_part(interleaved: bool) -> None:
    model, batches = fused(interleaved), ZOO["mlp"].make_batches(0)
    name = "attn.query_key_value" if interleaved else "attn.c_attn"
    stats = gm.capture(model, batches, CLASSIFY, fisher="gauss_newton")
    assert stats[f"{name}.weight"].G.batch == (3,)
    plan = compress(model, stats, keep=0.9)
    whole = next(s for s in plan.spectra if s.name == name)
    assert whole.shape == (48, 64 if interleaved else 16)
    w = model.get_parameter(f"{name}.weight").detach()
    w = w if interleaved else w.T
    torch.testing.assert_close((whole.left @ whole.right).float(), w, rtol=1e-3, atol=1e-4)
    # The roots of the parts' moments lie where their outputs are; head 0's query comes first, then its key or its rest.
    block = next(b for b in gm.blocks(model).blocks if b.name == f"{name}.weight")
    parts = roots(stats[f"{name}.weight"].G, 1e3).root
    root = output_roots(block, stats[f"{name}.weight"].G, 1e3, block.module).root
    rows = {"q": [*range(8), *range(24, 32)], "k": [*range(8, 16), *range(32, 40)]} if interleaved else {}
    rows = rows or {"q": list(range(16)), "k": list(range(16, 32))}
    for part, outputs in enumerate(rows.values()):
        assert torch.equal(root[outputs][:, outputs], parts[part])
    assert not root[rows["q"]][:, rows["k"]].any()


@pytest.mark.parametrize("name", ["gpt2", "conv1d", "conv3d"])
def test_layers_with_a_row_are_factored_saved_and_loaded(name: str, tmp_path) -> None:
    case = CASES[name]
    model, batches = case.make_model(0).eval(), case.make_batches(0)
    objective = CLASSIFY if case.objective == "classification" else gm.Objective.next_token()
    plan = compress(model, batches=batches, objective=objective, keep=0.9)
    assert any(rank is not None for rank in plan.ranks.values())
    small = plan.apply()
    before, after = (sum(case.loss(m, b).item() for b in batches) for m in (model, small))
    assert after < before + 0.1 * abs(before)
    assert count(small) == plan.parameters <= 0.9 * count(model)
    save_compressed(small, tmp_path / "x.safetensors")
    loaded = load_compressed(case.make_model(1), tmp_path / "x.safetensors").eval()
    assert torch.equal(loaded(batches[0][0]), small(batches[0][0]))


HARD = {
    "zero_a": (torch.zeros(12, 12), None),
    "zero_g": (None, torch.zeros(8, 8)),
    "rank_one": (second_moment(12, 1, rank=1), second_moment(8, 2, rank=1)),
    "two_classes": (None, second_moment(8, 2, rank=2)),
    "tiny": (second_moment(12, 1, scale=1e-30), second_moment(8, 2, scale=1e-30)),
    "huge": (second_moment(12, 1, scale=1e30), second_moment(8, 2, scale=1e30)),
    "dead_inputs": (torch.diag(torch.tensor([1.0] * 3 + [0.0] * 9)), None),
    "negative": (second_moment(12, 1) - 1e-3 * torch.eye(12), None),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_singular_statistics_never_crash(name: str, bias: bool) -> None:
    a, g = HARD[name]
    model, stats = one_linear(bias=bias, a=a, g=g)
    told = pytest.warns(GramianWarning, match="zero") if name.startswith("zero") else nullcontext()
    with told:
        plan = compress(model, stats, keep=0.7)
    small = plan.apply().float()
    assert all(p.isfinite().all() for p in small.parameters())
    # A dead direction costs nothing to drop; what is alive stays.
    x = torch.randn(5, 12, generator=seeded(0), dtype=torch.float64)
    if name == "dead_inputs":
        x[:, 3:] = 0
        torch.testing.assert_close(small(x.float()).double(), model(x), rtol=1e-3, atol=1e-3)
    assert plan.predicted_loss >= 0


def test_a_dead_layer_yields_its_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    a, g = second_moment(16, 1), second_moment(16, 2)
    stats = Statistics({"0.weight": [Site(gram(a), gram(0 * g))], "1.weight": [Site(gram(a), gram(1e-8 * g))]})
    ranks = compress(model, stats, keep=0.6).ranks
    assert ranks["0"] == 1
    assert ranks["1"] is None or ranks["1"] > 5


def test_a_constant_input_far_from_zero() -> None:
    """The covariance is rounding alone, with negative eigenvalues; the mean is all there is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    x = 1000 + 1e-4 * torch.randn(64, 12)
    stats = gm.capture(model, [(x, torch.randint(4, (64,)))], CLASSIFY, fisher="gauss_newton")
    with pytest.warns(GramianWarning, match="the same for all samples"):
        small = compress(model, stats, keep=0.7).apply()
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "transformer_classifier", "transformer_lm"])
def test_saved_and_loaded(name: str, tmp_path) -> None:
    model, batches, plan = plan_of(name, keep=0.9)
    small = plan.apply()
    path, dense = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    save_compressed(small, path)
    save_tensors(dense, model.state_dict())
    assert path.stat().st_size < 0.95 * dense.stat().st_size + 4096  # names and ranks
    state = torch.get_rng_state()
    loaded = load_compressed(ZOO[name].make_model(1), path).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(batches[0][0]), small(batches[0][0]))
    assert count(loaded) == plan.parameters


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path) -> None:
    _, _, plan = plan_of("mlp", keep=0.5)
    path = tmp_path / "small.safetensors"
    save_compressed(plan.apply(), path)
    others = {"wrong_size": ZOO["mlp_regression"].make_model(0), "wrong_layers": ZOO["residual_cnn"].make_model(0)}
    for model in others.values():
        before, modules = snapshot(model), list(model.modules())
        with pytest.raises(CheckpointError, match="does not fit Sequential") as caught:
            load_compressed(model, path)
        assert "\n" not in str(caught.value)
        assert_same(before, snapshot(model))
        assert list(model.modules()) == modules
    dense = tmp_path / "dense.safetensors"
    save_tensors(dense, ZOO["mlp"].make_model(0).state_dict())
    with pytest.raises(CheckpointError, match="not written by save_compressed"):
        load_compressed(ZOO["mlp"].make_model(0), dense)
    with pytest.raises(CheckpointError, match="no such file"):
        load_compressed(ZOO["mlp"].make_model(0), tmp_path / "missing.safetensors")
    for ranks in ('{"0": 1000000}', '{"0": "4"}', '{"1": 2}', "[1]", "3"):
        bad = tmp_path / "bad.safetensors"
        save_tensors(bad, ZOO["mlp"].make_model(0).state_dict(), {"gramian.ranks": ranks})
        with pytest.raises(CheckpointError, match="does not fit"):
            load_compressed(ZOO["mlp"].make_model(0), bad)


def test_a_model_that_is_one_layer(tmp_path) -> None:
    layer = nn.Linear(64, 10)
    plan = compress(layer, batches=ZOO["mlp"].make_batches(0), objective=CLASSIFY, keep=0.7)
    small = plan.apply()
    assert isinstance(small, LowRank)
    assert count(small) == plan.parameters
    save_compressed(small, tmp_path / "x.safetensors")
    loaded = load_compressed(nn.Linear(64, 10), tmp_path / "x.safetensors")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compiled"]
)
def test_wrapped_models(wrap, tmp_path) -> None:
    model, batches, plan = plan_of("mlp")
    wrapped = compress(wrap(copy.deepcopy(model)), batches=batches, objective=CLASSIFY)
    assert wrapped.ranks == plan.ranks
    small = wrapped.apply()
    x = batches[0][0]
    torch.testing.assert_close(small(x), plan.apply()(x))
    save_compressed(wrap(small), tmp_path / "x.safetensors")
    assert torch.equal(load_compressed(ZOO["mlp"].make_model(3), tmp_path / "x.safetensors")(x), small(x))


def test_factors_keep_what_the_layer_was() -> None:
    model = ZOO["mlp"].make_model(0).bfloat16().eval()
    model[0].requires_grad_(False)
    state = torch.get_rng_state()
    batches = [(x.bfloat16(), y) for x, y in ZOO["mlp"].make_batches(0)]
    low = compress(model, batches=batches, objective=CLASSIFY, keep=0.4).apply()[0]
    assert isinstance(low, LowRank)
    assert not low.training
    assert {(p.dtype, p.requires_grad) for p in low.parameters()} == {(torch.bfloat16, False)}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", [nn.Linear(9, 6), nn.Conv2d(3, 8, 3, stride=2, padding=1), Conv1D(6, 9)])
def test_a_factored_layer_has_the_options_of_the_dense_one(layer: nn.Module) -> None:
    """Models read them: Whisper the stride of its convolutions, others in_features."""
    low = LowRank(layer, 2)
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            assert getattr(low, name) == value, name
    assert {name for name, _ in low.named_parameters()} == {"0.weight", "1.weight", "1.bias"}


def test_a_layer_in_two_places_is_factored_in_both(tmp_path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second, self.last = self.first, nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model, batches = Shared(), ZOO["mlp"].make_batches(0)[:2]
    plan = compress(model, batches=batches, objective=CLASSIFY, keep=0.5)
    small = plan.apply()
    assert small.first is small.second
    assert isinstance(small.first, LowRank)
    assert count(small) == plan.parameters <= 0.5 * count(model)
    save_compressed(small, tmp_path / "m.safetensors")
    again = load_compressed(Shared(), tmp_path / "m.safetensors")
    assert torch.equal(again(batches[0][0]), small(batches[0][0]))


@pytest.mark.parametrize(
    "how", [nn.utils.weight_norm, nn.utils.spectral_norm, partial(prune.random_unstructured, name="weight", amount=0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_that_a_pass_computed_is_copied(how) -> None:
    """torch's own copy.deepcopy refuses such a model."""
    model, batches = ZOO["mlp"].make_model(0), ZOO["mlp"].make_batches(0)[:2]
    how(model[0])
    plan = compress(model.eval(), batches=batches, objective=CLASSIFY, keep=0.95)
    small = plan.apply()
    assert "made of others" in plan.reasons["0"]
    assert "0" not in plan.ranks
    small(batches[0][0]).sum().backward()
    made = [name for name, _ in gm.blocks(model).blocks[0].owners]
    assert small.get_parameter(made[0]).grad is not None
    assert model.get_parameter(made[0]).grad is None


def test_it_beats_the_plain_svd() -> None:
    model, batches, plan = plan_of("mlp", keep=0.4)
    case = ZOO["mlp"]
    small = plan.apply()
    naive = copy.deepcopy(model)
    for name, rank in plan.ranks.items():
        if rank is not None:
            u, s, vt = torch.linalg.svd(naive[int(name)].weight.data, full_matrices=False)
            naive[int(name)].weight.data = u[:, :rank] * s[:rank] @ vt[:rank]
    kl = [
        nn.functional.kl_div(m(batches[0][0]).log_softmax(-1), model(batches[0][0]).softmax(-1), reduction="batchmean")
        for m in (small, naive)
    ]
    assert kl[0] < 0.5 * kl[1]
    assert case.loss(small, batches[0]) < 1.1 * case.loss(model, batches[0])


def test_the_default_share_is_raised_to_the_smallest_possible_one() -> None:
    """A large vector stays dense here, so one half cannot be reached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 10))
    model.register_parameter("dense", nn.Parameter(torch.zeros(2000)))
    plan = compress(model, batches=BATCHES, objective=CLASSIFY)
    assert 0.5 < plan.keep < 1
    assert set(plan.ranks.values()) == {1}
    assert plan.parameters == round(plan.keep * plan.parameters_dense)
    assert "smallest possible share" in str(plan)
    assert plan.at(keep=0.95).parameters <= 0.95 * plan.parameters_dense
    assert "smallest" not in str(plan.at(keep=0.95))
    with pytest.raises(InputError, match="smallest possible keep"):
        compress(model, batches=BATCHES, objective=CLASSIFY, keep=0.5)


ERRORS = {
    "a batch alone": (lambda m: compress(m, torch.ones(4, 8)), "give statistics from gm.capture, or batches and"),
    "twice": (
        lambda m: compress(m, [torch.ones(4, 8)], CLASSIFY, batches=[1]),
        r"compress\(model, batches, objective\)",
    ),
    "no_statistics": (lambda m: compress(m), "give statistics from"),
    "keep_zero": (lambda m: compress(m, batches=BATCHES, objective=CLASSIFY, keep=0.0), r"\(0, 1\], got 0"),
    "keep_above": (lambda m: compress(m, batches=BATCHES, objective=CLASSIFY, keep=1.5), r"\(0, 1\], got 1\.5"),
    "keep_too_small": (
        lambda m: compress(m, batches=BATCHES, objective=CLASSIFY, keep=0.001),
        "smallest possible keep is 0",
    ),
    "another_model": (
        lambda m: compress(m, gm.capture(nn.Sequential(nn.Linear(64, 10)), BATCHES, CLASSIFY)),
        "another model's",
    ),
    "not_finite": (
        lambda m: compress(m, gm.capture(m, BROKEN, CLASSIFY, non_finite="keep")),
        r"A of '0\.weight' is not finite",
    ),
    "loss_not_finite": (
        lambda m: compress(m, batches=BROKEN, objective=CLASSIFY),
        "the loss of batch 0 is nan",
    ),
}
BATCHES = ZOO["mlp"].make_batches(0)[:1]
BROKEN = [(x * float("nan"), y) for x, y in BATCHES]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name: str) -> None:
    make, message = ERRORS[name]
    with pytest.raises(InputError, match=message) as caught:
        make(ZOO["mlp"].make_model(0))
    assert "\n" not in str(caught.value)
