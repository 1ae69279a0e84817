"""Objectives: sums over known units, and factors whose outer products are the Hessian of the criterion."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gramian as gm
from cases import seeded
from gramian.errors import InputError
from gramian.objective import as_objective

Objective = gm.Objective
CLASSES = 4


def labeled(n: int = 6, padding: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (n, C) in float64 that require gradients, and labels of which `padding` are ignored."""
    scores = torch.randn(n, CLASSES, generator=seeded(seed), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (n,), generator=seeded(seed + 1))
    labels[n - padding :] = -100
    return scores, labels


def second_moment(objective: Objective, output: torch.Tensor, batch, fisher, generator=None) -> torch.Tensor:
    """Σ over the losses of each row's outer product of gradients, (n, C, C)."""
    total = torch.zeros(*output.shape, output.shape[-1], dtype=output.dtype)
    for loss in objective.losses(output, batch, fisher, generator or seeded(0)):
        (g,) = torch.autograd.grad(loss, output, retain_graph=True)
        total += g[..., :, None] * g[..., None, :]
    return total


def exact_hessian(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row's Hessian of cross-entropy, by automatic differentiation; zero where the label is padding."""

    def loss(s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(s[None], y[None], reduction="sum")

    rows = torch.func.vmap(torch.func.hessian(loss))(scores.detach(), labels.clamp_min(0))
    return rows * (labels >= 0)[:, None, None]


def test_gauss_newton_is_the_hessian_of_cross_entropy() -> None:
    scores, labels = labeled()
    got = second_moment(Objective.classification(), scores, (None, labels), "gauss_newton")
    torch.testing.assert_close(got, exact_hessian(scores, labels), rtol=1e-12, atol=1e-14)


def test_sampled_labels_give_it_in_expectation() -> None:
    scores, labels = labeled(n=3, padding=1)
    generator, draws = seeded(2), 4000
    objective = Objective.classification()
    samples = torch.stack(
        [second_moment(objective, scores, (None, labels), "sampled", generator) for _ in range(draws)]
    )
    error = (samples.mean(0) - exact_hessian(scores, labels)).abs()
    assert (error <= 5 * samples.std(0) / math.sqrt(draws) + 1e-12).all()
    assert samples.std(0)[:2].max() > 0.01


def test_empirical_is_the_gradient_of_the_loss() -> None:
    scores, labels = labeled()
    g = torch.autograd.grad(F.cross_entropy(scores, labels, reduction="sum"), scores)[0]
    got = second_moment(Objective.classification(), scores, (None, labels), "empirical")
    torch.testing.assert_close(got, g[:, :, None] * g[:, None, :])


def test_squared_error_has_the_identity_as_hessian() -> None:
    output = torch.randn(5, 3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    batch = (None, torch.zeros(5, 3, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64).expand(5, 3, 3)
    torch.testing.assert_close(second_moment(Objective.regression(), output, batch, "gauss_newton"), eye)
    generator, draws = seeded(1), 2000
    total = sum(second_moment(Objective.regression(), output, batch, "sampled", generator) for _ in range(draws))
    assert (total / draws - eye).abs().max() < 5 * math.sqrt(2 / draws)


def test_units_that_share_a_row_do_not_mix() -> None:
    """Two tokens read one hidden row, as in attention: in expectation, the sum of their Gauss–Newton terms."""
    hidden = torch.randn(3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    read = torch.randn(2, CLASSES, 3, generator=seeded(1), dtype=torch.float64)
    p = (read @ hidden.detach()).softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = (read.mT @ hessian @ read).sum(0)
    objective, generator, draws = Objective.classification(), seeded(2), 2000
    for fisher in ("gauss_newton", "sampled"):
        samples = []
        for _ in range(draws):
            losses = objective.losses(read @ hidden, (None, torch.tensor([0, 1])), fisher, generator)
            g = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses]
            samples.append(sum(torch.outer(row, row) for row in g))
        samples = torch.stack(samples)
        assert ((samples.mean(0) - exact).abs() <= 5 * samples.std(0) / math.sqrt(draws)).all(), fisher


G = seeded(3)
LOSSES = {
    "classification": (
        Objective.classification(),
        torch.randn(12, 5, CLASSES, generator=G),
        torch.randint(CLASSES, (12, 5), generator=G),
        60,
    ),
    "next_token": (
        Objective.next_token(),
        torch.randn(12, 5, CLASSES, generator=G),
        torch.randint(CLASSES, (12, 5), generator=G),
        60,
    ),
    "regression": (Objective.regression(), torch.randn(12, 5, 3, generator=G), torch.randn(12, 5, 3, generator=G), 60),
    "regression_1d": (Objective.regression(), torch.randn(12, generator=G), torch.randn(12, generator=G), 12),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sums_and_units_add_up_over_any_split(name: str) -> None:
    objective, output, target, units = LOSSES[name]
    whole = objective.checked(objective.criterion(output, (None, target)))
    parts = [
        objective.checked(objective.criterion(output[rows], (None, target[rows])))
        for rows in (slice(0, 1), slice(1, 8), slice(8, 12))
    ]
    assert int(whole[1]) == units == sum(int(n) for _, n in parts)
    torch.testing.assert_close(whole[0], sum(total for total, _ in parts))


def test_padding_has_no_weight_and_is_not_counted() -> None:
    scores, labels = labeled(n=6, padding=2)
    for fisher in ("empirical", "sampled", "gauss_newton"):
        moment = second_moment(Objective.classification(), scores, (None, labels), fisher)
        assert (moment[4:] == 0).all()
        assert (moment[:4].diagonal(dim1=1, dim2=2).sum(1) > 0).all()
    total, units = Objective.classification().criterion(scores, (None, labels))
    assert int(units) == 4
    torch.testing.assert_close(total, F.cross_entropy(scores[:4], labels[:4], reduction="sum"))
    other = Objective.classification(ignore_index=0).criterion(scores[:4], (None, torch.tensor([0, 1, 0, 2])))
    assert int(other[1]) == 2


def test_next_token_shifts_where_the_batch_has_tokens_alone() -> None:
    tokens, scores = torch.randint(CLASSES, (2, 5), generator=seeded(0)), torch.randn(2, 5, CLASSES)
    objective = Objective.next_token()
    total, units = objective.criterion(scores, (tokens,))
    shifted = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, shifted)
    assert int(units) == 8
    assert objective.criterion(scores, tokens)[0] == total


def test_a_plain_mean_becomes_a_sum_over_samples() -> None:
    net = nn.Linear(3, 2)

    def loss(model: nn.Module, batch) -> torch.Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch if isinstance(batch, torch.Tensor) else batch[0]
        return model(x).square().mean()

    x = torch.randn(7, 3, generator=seeded(0))
    for batch in (x, (x,), {"x": x, "y": None}, [x, 1]):
        total, units = as_objective(loss).loss(net, batch)
        assert int(units) == 7
        torch.testing.assert_close(total, 7 * net(x).square().mean())
    assert as_objective(loss).fisher == "empirical"


def test_float64_stays_float64() -> None:
    scores, labels = labeled()
    assert Objective.classification().criterion(scores, (None, labels))[0].dtype == torch.float64


BAD = {
    "a_vector": (lambda o, b: (o.sum(-1), 4), r"the first is a tensor of shape \(4,\)\. Sum over the batch"),
    "no_count": (lambda o, b: o.sum(), "got the value"),
    "three_things": (lambda o, b: (o.sum(), 4, 5), r"4, 5\)"),
    "a_float": (lambda o, b: (1.0, 4), r"the first is 1\.0"),
    "zero_units": (lambda o, b: (o.sum(), 0), "at least one unit"),
    "nan_units": (lambda o, b: (o.sum(), math.nan), "the value nan"),
    "negative_units": (lambda o, b: (o.sum(), -1), "the value -1"),
    "many_units": (lambda o, b: (o.sum(), torch.ones(4)), r"shape \(4,\)"),
    "none": (lambda o, b: None, "got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_criterion_that_returns_something_else_is_refused(name: str) -> None:
    criterion, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        Objective(lambda model, batch: model(batch), criterion).loss(nn.Linear(2, 3), torch.ones(4, 2))
    assert "\n" not in str(caught.value)


def test_other_misuse_is_refused() -> None:
    x, net = torch.ones(4, 3), nn.Linear(3, 2)
    cases = [
        (Objective.classification(), (x, torch.zeros(4, 2)), "classification wants"),
        (Objective.classification(), (x, torch.zeros(3, dtype=torch.long)), "classification wants"),
        (Objective.regression(), (x, torch.zeros(4)), "differ in shape"),
        (Objective.regression(), (x, torch.zeros(4, dtype=torch.long)), r"write gm.Objective.classification\(\)"),
        (Objective.classification(), (x, torch.randn(4, 2)), r"write gm.Objective.regression\(\)"),
        (as_objective(lambda output, target: F.mse_loss(output, target)), (x, torch.zeros(4)), "output and a target"),
        (as_objective(lambda o, t: F.mse_loss(o, t)), {"a": x, "y": x}, r"\(model\(batch\['a'\]\), batch\['y'\]\)"),
        (as_objective(lambda model, batch: model(batch)), x, "scalar mean"),
        (as_objective(lambda model, batch: model(x).mean()), ("text",), "must start with a tensor"),
    ]
    for objective, batch, message in cases:
        with pytest.raises(InputError, match=message):
            objective.loss(net, batch)
    with pytest.raises(InputError, match=r"expected gm\.Objective"):
        as_objective("mse")
    with pytest.raises(InputError, match="fisher='sampled' is not available here; wanted 'empirical'"):
        list(as_objective(lambda model, batch: model(batch).mean()).losses(x.mean(), x, "sampled", seeded(0)))


def test_scores_that_are_not_finite_do_not_raise() -> None:
    scores = torch.full((3, CLASSES), math.nan, requires_grad=True)
    (loss,) = Objective.classification().losses(scores, (None, torch.zeros(3, dtype=torch.long)), "sampled", seeded(0))
    assert loss.isnan()
