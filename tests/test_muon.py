"""Muon steps along the polar factor of the momentum, and nothing that a gradient holds breaks it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from cases import DEVICES, seeded
from gramian.errors import GramianError, InputError
from gramian.optim import Muon
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")

EXACT = 1e-5  # asked of the polar factor


def polar(a: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(a.double(), full_matrices=False)
    return u @ vt


def naive_muon(w: Tensor, grads: list[Tensor], lr, momentum, nesterov, weight_decay, length, maximize=False) -> Tensor:
    """The docstring's formula in float64, for one matrix; `length` is its s."""
    w, b = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for step, g in enumerate(grads, 1):
        g = -g.double() if maximize else g.double()
        beta = min(momentum, step / (step + 10))
        b = beta * b + (1 - beta) * g
        w = (1 - lr * weight_decay) * w - lr * length * polar(beta * b + (1 - beta) * g if nesterov else b)
    return w


def gradients(shape: tuple[int, ...], num: int, seed: int = 0) -> list[Tensor]:
    """Of condition about 10, so that every route to the polar factor is accurate."""
    out = []
    for i in range(num):
        u, _, vt = torch.linalg.svd(torch.randn(shape, generator=seeded(100 * seed + i)), full_matrices=False)
        out.append(u * torch.linspace(1, 0.1, min(shape)) @ vt)
    return out


def skips(optimizer: Muon) -> dict[str, int]:
    """The counts of skipped steps that are not zero."""
    return {name: row["skipped"] for name, row in optimizer.health().items() if row["skipped"]}


OPTIONS = {
    "default": {},
    "no_nesterov": {"nesterov": False},
    "no_momentum": {"momentum": 0.0},
    "little_momentum": {"momentum": 0.2},
    "decay": {"weight_decay": 0.1},
    "adamw_scale": {"scale": "match_rms_adamw"},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_the_formula(name: str, shape: tuple[int, int], device: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0, "scale": "spectral"} | OPTIONS[name]
    start = torch.randn(shape, generator=seeded(1))
    w = nn.Parameter(start.clone().to(device))
    optimizer = Muon([w], rtol=EXACT, **options)
    grads = gradients(shape, 4)
    for g in grads:
        w.grad = g.clone().to(device)
        optimizer.step()
    length = math.sqrt(shape[0] / shape[1]) if options.pop("scale") == "spectral" else 0.2 * math.sqrt(max(shape))
    wanted = naive_muon(start, grads, length=length, **options)
    torch.testing.assert_close(w.detach().cpu().double(), wanted, rtol=0, atol=2e-4)
    assert torch.equal(w.grad.cpu(), grads[-1])


def test_five_iterations_are_near_enough() -> None:
    w = nn.Parameter(torch.zeros(32, 32))
    optimizer = Muon([w], lr=1.0, momentum=0.0)
    (g,) = gradients((32, 32), 1)
    w.grad = g
    optimizer.step()
    step = -w.detach().double()
    sigma = torch.linalg.svdvals(step)
    assert sigma.min() > 0.7
    assert sigma.max() < 1.3
    assert (step * polar(g)).sum() / step.norm() / 32**0.5 > 0.98


def test_the_step_is_shared_by_all_matrices() -> None:
    """Two equal matrices of a model move half as far as one alone."""
    g = gradients((5, 5), 1)[0]

    def step(num: int) -> Tensor:
        ws = [nn.Parameter(torch.zeros(5, 5)) for _ in range(num)]
        optimizer = Muon(ws, lr=1.0)
        for w in ws:
            w.grad = g.clone()
        optimizer.step()
        return ws[0].detach()

    torch.testing.assert_close(2 * step(2), step(1))


CONVOLUTIONS = {
    "conv": (nn.Conv2d(3, 4, 3), lambda t: t.reshape(1, 4, 27)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), lambda t: t.reshape(2, 2, 18)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), lambda t: t.movedim(0, -1).reshape(1, 36, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernels_step_as_their_matrices(name: str) -> None:
    conv, matrices = CONVOLUTIONS[name]
    model = nn.Sequential(copy.deepcopy(conv), nn.Linear(2, 2))
    w = model[0].weight
    before = w.detach().clone()
    optimizer = Muon(model, lr=1.0, momentum=0.0, rtol=EXACT)
    w.grad = torch.randn(w.shape, generator=seeded(0))
    optimizer.step()
    step = matrices(before - w.detach()).double()
    wanted = torch.stack([polar(g) for g in matrices(w.grad)])
    scale = math.sqrt(step.shape[1] / step.shape[2]) / len(step)
    torch.testing.assert_close(step, scale * wanted, rtol=0, atol=1e-3)


def test_fused_and_separate_parameters_step_alike() -> None:
    start, grads = torch.randn(24, 8, generator=seeded(0)), [torch.randn(24, 8, generator=seeded(i)) for i in (1, 2, 3)]
    fused = nn.Sequential(nn.Linear(8, 24, bias=False), nn.Linear(1, 1))
    parts = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)), nn.Linear(1, 1))
    fused[0].weight.data.copy_(start)
    for layer, w in zip(parts[:3], start.chunk(3), strict=True):
        layer.weight.data.copy_(w)
    first = Muon(fused, layouts={"0.weight": "(three o) i -> three o i"})
    second = Muon(parts)
    for g in grads:
        fused[0].weight.grad = g.clone()
        for layer, part in zip(parts[:3], g.chunk(3), strict=True):
            layer.weight.grad = part.clone()
        first.step()
        second.step()
    torch.testing.assert_close(fused[0].weight, torch.cat([m.weight for m in parts[:3]]), rtol=1e-6, atol=1e-7)


def mixed() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 6)
        )  # fmt: skip


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = seeded(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_the_rest_is_torch_adamw_to_the_bit() -> None:
    model, twin = mixed(), mixed()
    optimizer = Muon(model, lr=1e-4, rest_lr=2e-3, rest_weight_decay=0.01, rest_betas=(0.8, 0.9), rest_eps=1e-7)
    rates = optimizer.rates()
    rest = [row["name"] for row in optimizer.explain() if row["direction"] == "adamw"]
    assert len(rest) == 7  # embedding, head, norm's two, three biases
    vectors = [name for name in rest if twin.get_parameter(name).ndim < 2]
    assert {name: rates[name] for name in rest} == {name: 5e-5 if name in vectors else 2e-3 for name in rest}
    same = [
        {"params": [twin.get_parameter(n)], "lr": rates[n], "weight_decay": 0.0 if n in vectors else 0.01} for n in rest
    ]
    reference = torch.optim.AdamW(same, betas=(0.8, 0.9), eps=1e-7, fused=True)
    for step in range(5):
        set_gradients(model, step)
        set_gradients(twin, step)
        optimizer.step()
        reference.step()
    for name in rest:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
    assert not torch.equal(model[1].weight, twin[1].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_state_resumes_to_the_bit(dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    optimizer = Muon(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def run(model: nn.Module, optimizer: Muon, scheduler, steps: range) -> None:
        for step in steps:
            set_gradients(model, step)
            optimizer.step()
            scheduler.step()

    run(model, optimizer, scheduler, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    weights, state, schedule = torch.load(file, weights_only=True)
    other = mixed().to(dtype)
    other.load_state_dict(weights)
    again = Muon(other, lr=7.0)
    after = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1 / (1 + step))
    again.load_state_dict(state)
    after.load_state_dict(schedule)
    run(model, optimizer, scheduler, range(3, 6))
    run(other, again, after, range(3, 6))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_steps_alike(clone) -> None:
    model = mixed()
    pair = {"model": model, "optimizer": Muon(model)}
    for step in range(2):
        set_gradients(model, step)
        pair["optimizer"].step()
    twin = clone(pair)
    for both in (pair, twin):
        set_gradients(both["model"], 9)
        both["optimizer"].step()
    for p, q in zip(model.parameters(), twin["model"].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_scheduler_drives_every_group() -> None:
    optimizer = Muon(mixed())
    before = optimizer.rates()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.rates() == {name: rate / 2 for name, rate in before.items()}
    model = mixed()
    optimizer = Muon(model)
    for g in optimizer.param_groups:
        g["lr"] = 0.0
    weights = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "2.weight", "4.weight"])
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone(name: str, bad: float) -> None:
    model, twin = mixed(), mixed()
    first, second = Muon(model), Muon(twin)
    for step in range(3):
        for m in (model, twin):
            set_gradients(m, step)
        broken = model.get_parameter(name)
        if step == 1:
            before = broken.detach().clone()
            broken.grad.view(-1)[0] = bad
        first.step()
        second.step()
        if step == 1:
            assert torch.equal(broken, before)
            assert not broken.grad.isfinite().all()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q) == (key != name)
    assert skips(first) == {name: 1}
    assert skips(second) == {}


HARD = {
    "zero": torch.zeros(8, 8),
    "rank_one": torch.outer(torch.arange(8.0), torch.arange(1, 9.0)),
    "tiny": torch.full((8, 8), 1e-30).fill_diagonal_(3e-30),
    "subnormal": torch.full((8, 8), 1e-42).fill_diagonal_(3e-42),
    "huge": torch.full((8, 8), 1e30).fill_diagonal_(-1e30),
    "one_element": torch.zeros(8, 8).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(1e-20)),
    "repeated": torch.eye(8),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_gradients_give_a_finite_step_of_bounded_length(name: str) -> None:
    w = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([w], lr=1.0)
    for step in range(3):
        before = w.detach().clone()
        w.grad = HARD[name].clone()
        optimizer.step()
        moved = torch.linalg.matrix_norm(w.detach() - before, 2)
        assert moved < 1.3, step
        assert (moved > 0.5) == (name != "zero")
    assert skips(optimizer) == {}


def test_half_precision_keeps_its_momentum_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w = nn.Parameter(torch.randn(6, 6, generator=seeded(0)).to(dtype))
        optimizer = Muon([w], lr=0.1, nesterov=False, momentum=0.5)
        w.grad = torch.full((6, 6), 0.5, dtype=dtype).fill_diagonal_(1.0)
        optimizer.step()
        optimizer.step()
        buffer = optimizer.state[w]["momentum"]
        assert buffer.dtype == torch.float32
        wanted = (1 - 1 / 11 * 2 / 12) * w.grad.float()  # torch 2.13's own is normalized in place
        torch.testing.assert_close(buffer, wanted, rtol=1e-6, atol=0)
        assert w.dtype == dtype


def test_missing_gradients_and_frozen_parameters_stay() -> None:
    model = mixed()
    model[3].requires_grad_(False)
    optimizer = Muon(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()  # no gradient at all
    model[1].weight.grad = torch.randn(8, 8, generator=seeded(0))
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])} == {"1.weight"}
    assert [p for p in optimizer.state if p is not model[1].weight] == []


def test_accumulated_gradients_are_the_sum() -> None:
    model, twin = ZOO["mlp"].make_model(0), ZOO["mlp"].make_model(0)
    x, y = ZOO["mlp"].make_batches(0)[0]
    for part in (slice(0, 32), slice(32, 64)):
        (ZOO["mlp"].loss(model, (x[part], y[part])) / 2).backward()
    ZOO["mlp"].loss(twin, (x, y)).backward()
    for m in (model, twin):
        Muon(m, rtol=EXACT).step()
    # AdamW's first step is the gradient's sign, which rounding may turn where it is near zero: matrices only.
    for i in (0, 2):
        torch.testing.assert_close(model[i].weight, twin[i].weight, rtol=0, atol=1e-3)


def test_a_closure_is_called_with_gradients() -> None:
    model = mixed()[1:]
    optimizer = Muon(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


def test_model_names_and_lists_are_accepted() -> None:
    for make in (
        lambda m: m,
        lambda m: m.named_parameters(),
        lambda m: list(m.parameters()),
        lambda m: iter(m.parameters()),
    ):
        model = mixed()
        optimizer = Muon(make(model))
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
        set_gradients(model, 0)
        optimizer.step()
    assert Muon(mixed().named_parameters()).explain()[0]["name"] == "0.weight"


def test_routes_override() -> None:
    rows = {r["name"]: r for r in Muon(mixed(), routes={"1.*": "adamw", "4.weight": "matrix"}).explain()}
    assert rows["1.weight"]["direction"] == "adamw"
    assert rows["4.weight"]["direction"] == "matrix"
    assert rows["4.weight"]["reason"] == "routes['4.weight']"
    assert rows["0.weight"]["direction"] == "adamw"


ERRORS = {
    "empty": (lambda: Muon([]), "empty"),
    "no_match": (lambda: Muon(mixed(), routes={"nothing": "adamw"}), "'nothing' matches no parameter"),
    "vector": (lambda: Muon(mixed(), routes={"1.bias": "matrix"}), r"'1\.bias' is a vector"),
    "empty group": (lambda: Muon([{"params": []}]), "empty parameter list"),
    "unknown option": (lambda: Muon([torch.zeros(2, 2)], beta=0.5), "there is no option 'beta'"),
    "misspelt option of a group": (
        lambda: Muon([{"params": [torch.zeros(2, 2)], "momentm": 0.5}]),
        "no option 'momentm'; did you mean 'momentum'",
    ),
    "layouts_of_a_list": (lambda: Muon(mixed().parameters(), layouts={"*": "o i -> i o"}), "layouts= needs the model"),
    "lr": (lambda: Muon(mixed(), lr=-1.0), r"lr must be in \[0, ∞\), got -1\.0"),
    "lr_nan": (lambda: Muon(mixed(), lr=math.nan), r"lr must be in \[0, ∞\), got nan"),
    "momentum": (lambda: Muon(mixed(), momentum=1.0), "momentum must be in"),
    "no_parameters": (lambda: Muon(nn.ReLU()), "no parameters"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name: str) -> None:
    make, message = ERRORS[name]
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert issubclass(InputError, GramianError)


def test_empty_parameters_are_stepped_over() -> None:
    ws = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(0))]
    optimizer = Muon(ws)
    for w in ws:
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert not torch.equal(ws[1], torch.ones(3, 4))


def test_the_largest_finite_gradient_gives_a_finite_step() -> None:
    w = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([w], lr=1.0)
    for _ in range(3):
        w.grad = torch.full((4, 4), 3e38).fill_diagonal_(-3e38)
        optimizer.step()
    assert w.isfinite().all()
