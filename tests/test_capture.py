"""Capture gives the second moments that a naive loop over samples gives, and leaves the model as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gramian as gm
from cases import DEVICES, seeded
from gramian import DiagonalGram
from gramian.errors import InputError
from zoo import ZOO

CLASSIFY = gm.Objective.classification()
IN_SCOPE = [
    "mlp", "deep_tanh_mlp", "batchnorm_cnn", "residual_cnn", "transformer_lm", "gpt2", "grouped_query",
]  # fmt: skip
SIZES = {"whole": [6], "ones": [1] * 6, "uneven": [2, 1, 3]}


def some(name: str, sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x, y = ZOO[name].make_batches(seed)[0]
    total = sum(sizes)
    return list(zip(x[:total].split(sizes), y[:total].split(sizes), strict=True))


# --- the oracle: float64, sample by sample, no shared code --------------------------------------------------------


def naive_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Every receptive field of one image (1, i, h, w), copied out by hand."""
    (ph, pw), (sh, sw), (kh, kw) = conv.padding, conv.stride, conv.kernel_size  # type: ignore[misc]
    padded = F.pad(x[0], (pw, pw, ph, ph))
    fields = [
        padded[:, i : i + kh, j : j + kw].flatten()
        for i in range(0, padded.shape[1] - kh + 1, sh)
        for j in range(0, padded.shape[2] - kw + 1, sw)
    ]
    return torch.stack(fields)


def rows(module: nn.Module, t: Tensor) -> Tensor:
    """Output gradients (…) of one sample as rows of the layer's matrix."""
    return t[0].flatten(1).T if isinstance(module, nn.Conv2d) else t.flatten(0, -2)


def naive(model: nn.Module, batches: list, fisher: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) of every layer in scope, from derivatives by each sample's outputs; G over the units of the loss."""
    model = copy.deepcopy(model).double().eval()
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, kinds)}
    # Not those of attention modules, nor positions, which all samples share.
    layers = {n: m for n, m in layers.items() if getattr(m, "groups", 1) == 1}
    moments = {n: [[], torch.zeros(())] for n in layers if not re.search("out_proj|position|wpe", n)}
    units = 0

    def run(x: Tensor, shifts: dict[str, Tensor] | None) -> tuple[Tensor, dict, dict]:
        inputs, outputs = {}, {}

        def hook(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inputs[name], outputs[name] = args[0], output
            return output if shifts is None else output + shifts[name]

        handles = [layers[n].register_forward_hook(partial(hook, n)) for n in moments]
        try:
            return model(x).flatten(0, -2), inputs, outputs
        finally:
            for handle in handles:
                handle.remove()

    for x, y in batches:
        for i in range(len(x)):
            sample = x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]
            labels = y[i : i + 1].flatten()
            units += len(labels)
            scores, inputs, outputs = run(sample, None)
            zero = {n: torch.zeros_like(o) for n, o in outputs.items()}
            if fisher == "empirical":
                loss = lambda s: F.cross_entropy(run(sample, s)[0], labels, reduction="sum")  # noqa: B023, E731
                grads = [(n, rows(layers[n], g)) for n, g in torch.func.grad(loss)(zero).items()]
            else:  # one unit for each sample: Jᵀ H J
                p = scores[0].detach().softmax(-1)
                root = torch.linalg.cholesky(torch.diag(p) - torch.outer(p, p) + 1e-14 * torch.eye(len(p)))
                jacobian = torch.func.jacrev(lambda s: run(sample, s)[0][0])(zero)  # noqa: B023
                grads = [
                    (n, torch.cat([rows(layers[n], j) for j in torch.tensordot(root.T, stack, 1)]))
                    for n, stack in jacobian.items()
                ]
            for n, g in grads:
                moments[n][1] = moments[n][1] + (g[:, :, None] * g[:, None, :]).sum(0)
                module, a = layers[n], inputs[n]
                if isinstance(module, nn.Embedding):
                    a = F.one_hot(a.flatten(), module.num_embeddings).double()
                else:
                    a = naive_patches(module, a) if isinstance(module, nn.Conv2d) else a.flatten(0, -2)
                moments[n][0].append(a)
    second = {n: torch.cat(a).detach() for n, (a, _) in moments.items()}
    return {n: (second[n].T @ second[n] / len(second[n]), g.detach() / units) for n, (_, g) in moments.items()}


def check(stats: gm.Statistics, wanted: dict[str, tuple[Tensor, Tensor]], tolerance: float = 2e-5) -> None:
    for name, (a, g) in wanted.items():
        site = next(site for site in stats.sites() if site.name == name)
        assert site.A is not None, (name, site.reason)
        assert site.G is not None, (name, site.reason)
        got = torch.diag(site.A.diagonal) if isinstance(site.A, DiagonalGram) else site.A.matrix
        for label, x, y in (("A", got, a), ("G", site.G.matrix, g)):
            assert y.abs().max() > 0
            assert (x - y).abs().max() <= tolerance * y.abs().max(), (name, label)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", IN_SCOPE)
def test_agrees_with_the_naive_loop(name: str, sizes: str) -> None:
    model, batches = ZOO[name].make_model(0), some(name, SIZES[sizes])
    stats = gm.capture(model, batches, getattr(gm.Objective, ZOO[name].objective)(), fisher="empirical")
    check(stats, naive(model, batches, "empirical"))
    loss = ZOO[name].loss(model.eval(), tuple(map(torch.cat, zip(*batches, strict=True))))
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.fisher == "empirical"


@pytest.mark.parametrize("name", ["mlp", "deep_tanh_mlp", "batchnorm_cnn", "residual_cnn"])
def test_gauss_newton_is_exact(name: str) -> None:
    model, batches = ZOO[name].make_model(0), some(name, [2, 3])
    check(gm.capture(model, batches, CLASSIFY, fisher="gauss_newton"), naive(model, batches, "gauss_newton"), 1e-4)


def test_sampled_converges_to_gauss_newton() -> None:
    model, batches = ZOO["mlp"].make_model(0), ZOO["mlp"].make_batches(0) * 8
    exact = gm.capture(model, batches[:4], CLASSIFY, fisher="gauss_newton")
    draws = [gm.capture(model, batches, CLASSIFY, generator=seeded(seed)) for seed in (0, 1)]
    for name in exact:
        wanted = exact[name].G.matrix
        first, second = (d[name].G.matrix for d in draws)
        assert not torch.equal(first, second)
        assert torch.linalg.norm((first + second) / 2 - wanted) < 0.1 * torch.linalg.norm(wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_devices_and_seeds_agree(device: str) -> None:
    model, batches = ZOO["mlp"].make_model(0), some("mlp", [4])
    here = [(x.to(device), y.to(device)) for x, y in batches]
    twice = [gm.capture(copy.deepcopy(model).to(device), here, CLASSIFY) for _ in range(2)]
    for name in twice[0]:
        assert torch.equal(twice[0][name].G.matrix, twice[1][name].G.matrix)
        torch.testing.assert_close(
            twice[0][name].A.matrix.cpu(), gm.capture(model, batches, CLASSIFY)[name].A.matrix, rtol=1e-5, atol=1e-6
        )


CONVOLUTIONS = {
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "rectangular": {"kernel_size": (1, 3)},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_matrix_is_the_convolution(name: str) -> None:
    from gramian.recording import patches

    conv = nn.Conv2d(2, 3, **{"kernel_size": 3, **CONVOLUTIONS[name]}, bias=False)
    x = torch.randn(2, 2, 7, 8, generator=seeded(0))
    wanted = conv(x).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(patches(conv, x) @ conv.weight.flatten(1).T, wanted)
    torch.testing.assert_close(patches(conv, x[0]), patches(conv, x[:1]))


# --- the model is left as it was found --------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict:
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "frozen": {n: p.requires_grad for n, p in model.named_parameters()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    for key in ("modes", "hooks", "frozen"):
        assert before[key] == after[key], key
    for key in ("tensors", "grads"):
        for name, value in before[key].items():
            other = after[key][name]
            assert value is other if value is None else torch.equal(value, other), (key, name)
    assert torch.equal(before["random"], after["random"])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize("name", ZOO)
def test_the_model_is_left_as_it_was(name: str) -> None:
    case = ZOO[name]
    model, batch = case.make_model(0), case.make_batches(0)[0]
    list(model.modules())[-1].eval()  # a mode that differs from the others'
    next(model.parameters()).requires_grad_(False)
    case.loss(model, batch).backward()
    before = snapshot(model)
    stats = gm.capture(model, [batch], getattr(gm.Objective, case.objective)())
    assert_same(before, snapshot(model))
    assert set(stats) == {b.name for b in gm.blocks(model).blocks}
    assert {n for b in gm.blocks(model).blocks for n, _ in b.owners} == {*stats, *stats.aliases}
    assert all(site.reason for site in stats.sites() if site.A is None or site.G is None)


def test_a_model_that_draws_leaves_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(64, 8), Noisy(), nn.Linear(8, 10))
    before = snapshot(model)
    gm.capture(model, some("mlp", [4]), CLASSIFY)
    assert_same(before, snapshot(model))


def test_a_failure_half_way_leaves_no_hooks() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("half way")

    model = nn.Sequential(nn.Linear(64, 8), Fails(), nn.Linear(8, 10))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="half way"):
        gm.capture(model, some("mlp", [4]), CLASSIFY)
    assert_same(before, snapshot(model))


# --- hard models ------------------------------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))


def in_place(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in model))


class Keywords(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(input=x)
        return x


class Checkpointed(nn.Sequential):
    def __init__(self, *modules: nn.Module, reentrant: bool = False) -> None:
        super().__init__(*modules)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for module in self[:-1]:
            x = checkpoint(module, x, use_reentrant=self.reentrant)
        return self[-1](x)


VARIANTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "in_place": in_place,
    "frozen": lambda m: m.requires_grad_(False),
    "frozen_in_place": lambda m: in_place(m).requires_grad_(False),
    "keywords": lambda m: Keywords(*m),
    "checkpointed": lambda m: Checkpointed(*m),
    "checkpointed_frozen": lambda m: Checkpointed(*m).requires_grad_(False),
    "data_parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "float64": lambda m: m.double(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_one_function_have_one_capture(name: str) -> None:
    torch.manual_seed(0)
    model, batches = plain(), some("mlp", [3, 5])
    wanted = naive(model, batches, "empirical")
    variant = VARIANTS[name](copy.deepcopy(model))
    dtype = next(variant.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in batches]
    variant(batches[0][0])  # compiled before the hooks come
    stats = gm.capture(variant, batches, CLASSIFY, fisher="empirical")
    check(stats, wanted, 1e-12 if dtype == torch.float64 else 2e-5)
    assert [site.calls for site in stats.values()] == [2, 2, 2]


def test_autocast() -> None:
    model, batches = plain(), some("mlp", [8])

    def predict(model: nn.Module, batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch[0])

    objective = gm.Objective(predict, CLASSIFY.criterion)
    check(gm.capture(model, batches, objective), naive(model, batches, "empirical"), 0.05)


def test_a_module_used_twice_is_one_site_with_all_its_calls() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(64, 10))
    batches = some("mlp", [2, 4])
    stats = gm.capture(model, batches, CLASSIFY, fisher="empirical")
    assert list(stats) == ["0.weight", "4.weight"]
    site, x = stats["0.weight"], torch.cat([x for x, _ in batches])
    assert site.calls == 4
    rows = torch.cat([x, shared(x).tanh()]).detach().double()
    torch.testing.assert_close(site.A.matrix, rows.T @ rows / 12, rtol=1e-5, atol=1e-6)
    # Gradients at both outputs, over the units and not over the calls.
    first = shared(x)
    second = shared(first.tanh())
    loss = F.cross_entropy(model[4](second.tanh()), torch.cat([y for _, y in batches]), reduction="sum")
    g = torch.cat(torch.autograd.grad(loss, [first, second])).double()
    torch.testing.assert_close(site.G.matrix, g.T @ g / 6, rtol=1e-4, atol=1e-8)


def test_a_layer_that_some_batches_skip_counts_their_units() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(64, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.always(x)
            return self.sometimes(x) if len(x) > 2 else x

    stats = gm.capture(Sometimes(), some("mlp", [4, 2]), CLASSIFY)
    assert stats["sometimes.weight"].A.count == 4
    assert stats["sometimes.weight"].G.count == stats.units == 6


REASONS = {
    "scaled": "used only by mul, which is not captured",
    "sliced": "used only by linear (of a slice or reshape of it), which is not captured",
    "unused.weight": "no batch reached it",
    "no_loss.weight": "no gradient reached it",
    "recomputed.weight": "ran without autograd",
}


def test_what_is_not_captured_is_listed_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled, self.sliced = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(9, 8))
            self.unused, self.no_loss, self.recomputed = nn.Linear(2, 2), nn.Linear(8, 2), nn.Linear(8, 8)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 8, 8) * self.scaled
            x = F.linear(x, self.sliced[1:])
            self.no_loss(x)
            x = checkpoint(self.recomputed, x, use_reentrant=True)
            return self.head(x.mean(1))

    stats = gm.capture(Odd(), some("mlp", [4]), CLASSIFY)
    for name, reason in REASONS.items():
        assert stats[name].G is None
        assert reason in stats[name].reason
    assert stats["head.weight"].G is not None
    assert list(stats)[-1] != "head.weight", "what was not reached comes last"


def test_errors() -> None:
    model, batches = plain(), some("mlp", [4])
    spent = iter(batches)
    next(spent)
    with pytest.raises(InputError, match=r"no batches.*spent generator"):
        gm.capture(model, spent, CLASSIFY)
    with pytest.raises(InputError, match="not available"):
        gm.capture(model, batches, lambda m, b: m(b[0]).mean(), fisher="sampled")
    with pytest.raises(InputError, match="no parameters"):
        gm.capture(nn.ReLU(), batches, CLASSIFY)


def test_progress_counts_batches() -> None:
    seen: list[int] = []
    gm.capture(plain(), some("mlp", [1, 2, 3]), CLASSIFY, progress=seen.append)
    assert seen == [1, 2, 3]


def test_vanishing_gradients_are_kept() -> None:
    """A plain tanh network of 100 layers: the first gradient is near 1e-24, whose square float32 does not hold."""
    from gramian.tasks import plain_tanh_network

    stats = gm.capture(plain_tanh_network(100, outputs=10), some("mlp", [8]), CLASSIFY)
    sizes = [site.G.rms for site in stats.values()]
    assert 0 < sizes[0] < 1e-20 * sizes[-1]
