"""Properties of every direction of the registry, and what follows from a row of it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from directions import checks_of, has, maker, variants
from gramian.bench import competitors, rates
from gramian.errors import InputError
from gramian.optim import registry
from gramian.optim.options import SHARED
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.registry import MATRIX_OPTIMIZERS, OPTIMIZERS
from gramian.optim.shell import MatrixOptimizer
from steps import gradients, run
from zoo import ZOO

DOCS = Path(__file__).parents[1] / "docs" / "optim.md"
TRAINED = variants(3)
OPTIONS = [(name, key) for name, e in MATRIX_OPTIMIZERS.items() for key in e.optimizer.recipe.options]  # type: ignore[attr-defined]


def parameters_of(name: str) -> dict[str, Any]:
    signature = inspect.signature(MATRIX_OPTIMIZERS[name].optimizer)
    return {key: p.default for key, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}


def recipe_of(name: str) -> Recipe:
    return MATRIX_OPTIMIZERS[name].optimizer.recipe  # type: ignore[attr-defined]


def group_of(name: str, **options: Any) -> dict[str, Any]:
    """The options of its group of matrices."""
    return maker(name, **options)([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]


# --- what a recipe declares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_signature_and_the_recipe_name_the_same_options(name: str) -> None:
    own = parameters_of(name).keys() - {"params", "lr"}
    assert own == recipe_of(name).options.keys()
    assert not own & SHARED.keys()


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_every_option_has_a_range_that_holds_its_default_and_refuses_others(name: str, key: str) -> None:
    valid = recipe_of(name).options[key]
    assert valid.holds(parameters_of(name)[key])
    for value in (float("nan"), "no such word", None, [7.0], 1e400):
        assert not valid.holds(value), value
    with pytest.raises(InputError, match=f"{key} must be "):
        MATRIX_OPTIMIZERS[name].optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))], key: float("nan")}])


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_state_is_what_the_recipe_says(name: str, refresh: int) -> None:
    """Every buffer that a declaration names exists in its form, and every buffer has a matrix's dimensions."""
    recipe, options = recipe_of(name), group_of(name, refresh=refresh)
    state = recipe.init(torch.zeros(3, 6, 4), options)
    assert all(buffer.ndim == 3 and len(buffer) == 3 and buffer.is_contiguous() for buffer in state.values())
    assert {recipe.momentum, recipe.fallbacks} - {None} <= state.keys()
    shapes = {"exp_avg": (3, 6, 4), "exp_avg_sq": (3, 6, 4), "exp_avg_sq_weight": (3, 1, 1)}
    for buffer, part in recipe.adamw.items():
        assert state[buffer].shape == shapes[part]
        assert not state[buffer].any()
    if recipe.momentum is not None:
        assert state[recipe.momentum].shape == (3, 6, 4)
    if recipe.staleness is not None and (stale := recipe.staleness(state, options)) is not None:
        assert stale.shape == (3,)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_direction_is_no_longer_than_a_polar_factor(name: str, shape: tuple[int, int], refresh: int) -> None:
    recipe, options = recipe_of(name), group_of(name, refresh=refresh)
    state = recipe.init(torch.zeros(2, *shape), options)
    alive = torch.ones(2, 1, 1)
    for step in range(5):
        due = None if step == 0 else torch.arange(2)[: 1 if step % 2 else 0]
        g = torch.randn(2, *shape, generator=seeded(step))
        d = recipe.update(g, state, StepContext(alive, True, due, options))
        assert d.shape == (2, *shape)
        assert (torch.linalg.matrix_norm(d) <= 1.3 * min(shape) ** 0.5).all()


DUE = {"all": None, "both": torch.arange(2), "the other": torch.tensor([0]), "none": torch.arange(0)}


@pytest.mark.parametrize("due", DUE)
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_matrix_without_a_gradient_keeps_its_state(name: str, due: str) -> None:
    """Bit for bit where it is not due; otherwise but for what is recomputed from that state."""
    recipe, options = recipe_of(name), group_of(name, refresh=3)
    state = recipe.init(torch.zeros(2, 5, 4), options)
    for step in range(3):
        g = torch.randn(2, 5, 4, generator=seeded(step))
        recipe.update(g, state, StepContext(torch.ones(2, 1, 1), True, None, options))
    before = {key: value.clone() for key, value in state.items()}
    dead = torch.tensor([1.0, 0.0])[:, None, None]
    g = torch.randn(2, 5, 4, generator=seeded(9)) * dead
    recipe.update(g, state, StepContext(dead, False, DUE[due], options))
    for key in state if due in ("the other", "none") else {*recipe.adamw, recipe.momentum} - {None}:
        # A basis may rotate, and with it what is stored in it.
        torch.testing.assert_close(state[key][1].norm(), before[key][1].norm())
        assert due in ("all", "both") or torch.equal(state[key][1], before[key][1]), key
    assert any(not torch.equal(state[key][0], before[key][0]) for key in state)


# --- what every direction does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_scale_of_the_gradients_does_not_matter(name: str, scale: float) -> None:
    grads, make = gradients((6, 5)), maker(name, exact=True, refresh=3)
    accuracy = checks_of(name).accuracy
    torch.testing.assert_close(run(make, [g * scale for g in grads]), run(make, grads), rtol=1e-6, atol=accuracy)


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_fused_and_separate_parameters_step_alike(name: str) -> None:
    fused = nn.Sequential(nn.Linear(8, 24, bias=False), nn.Linear(1, 1))
    parts = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)), nn.Linear(1, 1))
    for layer, w in zip(parts[:3], fused[0].weight.detach().chunk(3), strict=True):
        layer.weight.data.copy_(w)
    make = maker(name, refresh=2)
    first, second = make(fused, layouts={"0.weight": "(three o) i -> three o i"}), make(parts)
    for g in gradients((24, 8)):
        fused[0].weight.grad = g.float()
        for layer, part in zip(parts[:3], g.chunk(3), strict=True):
            layer.weight.grad = part.float()
        first.step()
        second.step()
    assert torch.equal(fused[0].weight, torch.cat([m.weight for m in parts[:3]]))


def signed_permutation(n: int, seed: int) -> Tensor:
    signs = torch.randint(2, (n,), generator=seeded(seed)).double() * 2 - 1
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=seeded(seed + 1))] * signs


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=torch.float64)).Q


@pytest.mark.parametrize(
    "name", [name for name, e in MATRIX_OPTIMIZERS.items() if "signed permutations" not in e.checks.exempt]
)
def test_a_change_of_coordinates_changes_nothing_else(name: str) -> None:
    """Permuted and reflected gradients give the permuted and reflected path: moments move with the basis."""
    grads, p, q = gradients((6, 5)), signed_permutation(6, 1), signed_permutation(5, 5)
    # One side, so that no basis of a null space is left to rounding.
    make = maker(name, exact=True, refresh=2, **({"sides": "small"} if has(name, "sides") else {}))
    found = run(make, [p @ g @ q.T for g in grads])
    torch.testing.assert_close(found, p @ run(make, grads) @ q.T, rtol=0, atol=checks_of(name).accuracy)


@pytest.mark.parametrize("name", [name for name, e in MATRIX_OPTIMIZERS.items() if "rotations" not in e.checks.exempt])
def test_any_rotation_of_square_gradients_rotates_the_path(name: str) -> None:
    """Of full rank, since the first basis is new."""
    grads, p, q = gradients((5, 5)), rotation(5, 1), rotation(5, 2)
    make = maker(name, exact=True, refresh=2)
    found, accuracy = run(make, [p @ g @ q.T for g in grads]), max(1e-7, checks_of(name).accuracy)
    torch.testing.assert_close(found, p @ run(make, grads) @ q.T, rtol=0, atol=accuracy)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("case", ZOO)
def test_the_zoo_learns(case: str, name: str) -> None:
    model, batch = ZOO[case].make_model(0), ZOO[case].make_batches(0)[0]
    optimizer = TRAINED[name](model, lr=0.1)
    torch.manual_seed(0)  # dropout
    losses = []
    for step in range(9):
        optimizer.zero_grad()
        loss = ZOO[case].loss(model, batch)
        losses.append(loss.item())
        if step < 8:
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0] * (0.999 if case == "deep_tanh_mlp" else 0.99)
    assert all(row["skipped"] == 0 for row in optimizer.health().values())


# --- what follows from a row ------------------------------------------------------------------------------------------


def test_there_is_one_usual_rate() -> None:
    for name, entry in MATRIX_OPTIMIZERS.items():
        assert entry.lr == (parameters_of(name)["lr"] or entry.optimizer.base_lr)
        assert entry.make(nn.Linear(2, 2), entry.lr).param_groups[0]["lr"] <= entry.lr
    for name in OPTIMIZERS.keys() - MATRIX_OPTIMIZERS.keys():  # torch's, whose own defaults are no advice
        assert OPTIMIZERS[name].usual_lr is not None


def test_every_class_is_public_and_races() -> None:
    for entry in MATRIX_OPTIMIZERS.values():
        name = entry.optimizer.__name__
        assert getattr(gm.optim, name) is entry.optimizer
        assert name in gm.optim.__all__
        assert competitors.COMPETITORS[f"gramian {name}"].start == entry.lr
        assert rates.CONTENDERS[name].usual == entry.lr


def test_the_table_of_the_docs_renders() -> None:
    """One line for each direction, with a text in every cell, and a place for it in the page that Sphinx builds."""
    head, _, *lines = [line.strip("|").split("|") for line in registry.table().splitlines()]
    assert len(lines) == len(MATRIX_OPTIMIZERS)
    for (name, entry), cells in zip(MATRIX_OPTIMIZERS.items(), lines, strict=True):
        assert len(cells) == len(head)
        assert all(cell.strip() and cell.count("`") % 2 == 0 for cell in cells)
        assert [cell.strip() for cell in cells[:2]] == [f"`{entry.optimizer.__name__}`", f"`{name}`"]
    assert "\n<!-- table: directions, " in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_row_says_what_tests_need_and_no_more(name: str) -> None:
    """Its options are accepted, and what it exempts is known."""
    maker(name, exact=True)([nn.Parameter(torch.zeros(2, 2))])
    assert checks_of(name).exempt <= set(registry.Property.__args__)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 2])
def test_cholesky_factors_do_as_well_as_roots(longest: int) -> None:
    """The direction of BalancedMuon, by eigendecompositions."""
    recipe, g = recipe_of("balanced"), torch.randn(1, 4, 8, dtype=torch.float64, generator=seeded(0))
    options = group_of("balanced", longest=longest, rtol=1e-10, damping=0.3)
    context = StepContext(torch.ones(1, 1, 1, dtype=torch.float64), True, None, options)
    found = recipe.update(g.clone(), recipe.init(g, options), context)

    def root(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment / moment.trace() * len(moment) + 0.3 * torch.eye(len(moment)))
        return vectors * values.rsqrt() @ vectors.mT

    p, q = root(g[0] @ g[0].mT), root(g[0].mT @ g[0]) if longest == 2 else torch.eye(8, dtype=torch.float64)
    wanted = p @ gm.linalg.polar(p @ g[0] @ q) @ q
    torch.testing.assert_close(found[0], wanted * 2 / wanted.norm(), rtol=0, atol=checks_of("balanced").accuracy)


def test_gradients_in_units_of_their_norm_whatever_their_size_and_neighbors() -> None:
    recipe, options = recipe_of("balanced"), group_of("balanced", moment_beta=0.0)
    g = torch.randn(4, 3, 5, generator=seeded(0))

    def moments(g: Tensor) -> Tensor:
        state = recipe.init(g, options)
        recipe.update(g.clone(), state, StepContext(torch.ones(len(g), 1, 1), True, None, options))
        return state["left_moment"]

    factors = torch.tensor([1.0, 1e30, 1e-30, 0.0]).view(4, 1, 1)
    found, wanted = moments(g * factors), g[:3] @ g[:3].mT / g[:3].square().sum((1, 2), keepdim=True)
    torch.testing.assert_close(found[:3], wanted)
    assert torch.equal(found[:1], moments(g[:1]))
    assert not found[3].any()


# --- a direction that is unlike the others ----------------------------------------------------------------------------


class Sign(MatrixOptimizer):
    """The sign of the gradient: no momentum, and a buffer called `variance` that is not Adam's."""

    recipe = Recipe(
        init=lambda m, options: {"variance": m.new_zeros(m.shape)},
        update=lambda g, state, context: g.sign() / max(g.shape[-2:]) ** 0.5,
        options={},
    )

    def __init__(self, params: Any, lr: float = 0.1, **shared: Any) -> None:
        super().__init__(params, lr, {}, **shared)


def test_a_name_alone_means_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    adamw = torch.optim.AdamW(model.parameters())
    optimizer = Sign(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=seeded(0))
    adamw.step()
    row = optimizer.load_adamw(adamw)[0]
    assert (row["carried"], row["lost"]) == ("", "exp_avg, exp_avg_sq, step")
    assert "no running mean" in row["reason"]
    optimizer.step()
    assert optimizer.health("spectra")["0.weight"] == {
        "skipped": 0, "fallbacks": 0, "condition": None, "effective_rank": None, "drift": None
    }  # fmt: skip


def test_shampoo_in_float32_does_not_amplify_rounding() -> None:
    """Gradients that differ by as much move the weights by no more; with moments in float32 they were 2e-5 apart."""
    ends = []
    for error in (0.0, 2e-7):
        generator, own = seeded(0), seeded(1)
        sizes = torch.logspace(0, -8, 32)  # the damping decides about some directions
        weight = nn.Parameter(torch.eye(32))
        optimizer = gm.optim.Shampoo([weight], lr=0.1)
        for _ in range(40):
            gradient = sizes[:, None] * torch.randn(32, 32, generator=generator) * sizes
            weight.grad = gradient * (1 + error * torch.randn(32, 32, generator=own))
            optimizer.step()
        ends.append(weight.detach())
    assert float((ends[1] - ends[0]).norm() / ends[0].norm()) < 1e-6
