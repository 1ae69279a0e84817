"""What new data show of a rise that is measured on the data that a model was trained on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.compression.budget.optimism import Kept, kept_on_new_data
from gramian.compression.budget.points import Point
from gramian.compression.budget.predicting import predict
from gramian.compression.calibration.measure import Measure
from gramian.errors import InputError

SAMPLES, INPUTS, OUTPUTS = 320, 16, 16
REGRESSION = gm.Objective.regression()
Batches = list[tuple[Tensor, Tensor]]


def fitted(signal: float) -> tuple[nn.Module, Batches, tuple[Tensor, Tensor]]:
    """A linear layer after some steps on noisy targets that follow two directions, its batches, and new data."""
    g = seeded(0)
    truth = signal * torch.randn(OUTPUTS, OUTPUTS, generator=g) @ torch.randn(OUTPUTS, INPUTS, generator=g)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(num, INPUTS, generator=g)
        return x, x @ truth.mT + 2 * torch.randn(num, OUTPUTS, generator=g)

    x, y = draw(SAMPLES)
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    nn.init.zeros_(net[0].weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(10):
        optimizer.zero_grad()
        (REGRESSION.loss(net, (x, y))[0] / SAMPLES).backward()
        optimizer.step()
    return net, list(zip(x.split(10), y.split(10), strict=True)), draw(20000)


@pytest.mark.parametrize("signal", [0.0, 0.1], ids=["noise", "signal"])
def test_the_rise_on_new_data_follows_from_how_many_samples_were_trained_on(signal: float, tmp_path) -> None:
    net, batches, new = fitted(signal)
    plain = gm.compress(net, batches, REGRESSION, of="factorable", keep=0.4).predicted
    # As one of 10⁹ samples, whose noise is none, the rise is that on these.
    seen = gm.compress(net, batches, REGRESSION, trained_on=10**9, of="factorable", keep=0.4).predicted
    told = gm.compress(net, batches, REGRESSION, trained_on=SAMPLES, of="factorable", keep=0.4)
    with torch.no_grad():
        (after, units), (before, _) = (REGRESSION.loss(model, new) for model in (told.apply(), net))
    rise = float(after - before) / float(units)
    found = told.predicted
    assert found.low <= rise <= found.high
    assert abs(found.rise - rise) < max(0.15 * abs(seen.rise - rise), 0.15 * rise)
    # Nothing said, the number is as if these were all samples, and the interval holds the case that they are not too.
    assert abs(plain.rise - rise) < max(0.2 * abs(seen.rise - rise), 0.2 * rise)
    assert plain.low <= min(found.low, seen.rise)
    assert max(found.high, seen.rise) <= plain.high
    assert found.high - found.low < plain.high - plain.low
    gm.compression.save_plan(told, tmp_path / "plan.safetensors")
    assert gm.compression.load_plan(net, tmp_path / "plan.safetensors").predicted == pytest.approx(found)


def test_the_share_is_that_of_the_mean_gradient_in_all_of_it() -> None:
    """With gradients that are drawn, against the share of their own distribution."""
    g = seeded(1)
    net = nn.Sequential(nn.Linear(16, 16, bias=False))
    x, mean = torch.randn(4096, 16, generator=g), 0.3 * torch.randn(16, 16, generator=g)
    with torch.no_grad():
        y = net(x) - x @ mean.mT - 2 * torch.randn(4096, 16, generator=g)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    plan = gm.compress(net, batches, REGRESSION, of="factorable", keep=0.6)
    u, v = (torch.linalg.qr(side[:, plan.ranks["0"] :]).Q for side in (plan.spectra[0].left, plan.spectra[0].right.mT))
    signal = float((u.mT @ mean.double() @ v).square().sum())
    noise = u.shape[1] ** 2 * (4 + float(mean.square().sum(1).mean()))  # of one sample, whose inputs vary too
    for num in (4096, 500):
        (kept,) = kept_on_new_data([plan], Measure(batches, REGRESSION, trained_on=num))
        assert kept is not None
        assert kept.share == pytest.approx(signal / (signal + noise / num), abs=max(kept.error, 0.02))
        assert kept.error < 0.1


@pytest.mark.parametrize(("e", "noise"), [(0.9, 0.0), (0.9, 0.5), (0.9, 1.0), (0.4, 0.02)])
def test_what_labels_add_is_that_of_a_quadratic_loss(e: float, noise: float) -> None:
    """Of curvature 1, after 1 − e of the way to an optimum of which a share is noise: drawn, and by the formula."""
    g = seeded(2)
    n = noise**0.5 * torch.randn(200000, generator=g, dtype=torch.float64)
    w = (1 - noise) ** 0.5 * torch.randn(n.shape, generator=g, dtype=torch.float64)
    weight = (1 - e) * (w + n)  # its cut is −weight, and the gradient is that of (weight − optimum)² / 2
    labels, new = (float((-weight * (weight - optimum)).mean()) for optimum in (w + n, w))
    folds = [weight - w - n - k * m for k, m in ((1, n.roll(1)), (-1, n.roll(1)))]  # as two halves of the noise
    share = float((folds[0] * folds[1]).mean() / (weight - w - n).square().mean())
    assert share == pytest.approx(1 - noise / e**2, abs=0.05)
    kept = Kept(share, 0.0)
    low, rise, high = kept.added(labels, 0.5 * float(weight.square().mean()))
    assert min(low, high) <= low <= rise <= high <= labels
    slack = 0.01 * labels
    assert low - slack <= new <= high + slack
    if e == 0.9:  # where the middle between e and 1 is near e
        assert rise == pytest.approx(new, abs=0.06 * labels)
    assert kept.added(-labels, 1.0) == (-labels,) * 3


def test_a_prediction_says_of_which_data_it_is() -> None:
    known = Point(1.0, 0.3, 0.01, divergence=0.1)
    like = predict(1.0, [known])
    assert like.seen
    assert str(like).endswith(" on new data, 0.3 on data like the calibration's")
    told = predict(1.0, [known._replace(kept=Kept(0.5, 0.1))])
    assert not told.seen
    assert 0.1 < told.rise < 0.3
    assert told.high < like.high
    assert "calibration" not in str(told)
    assumed = predict(1.0, [known._replace(kept=Kept(0.5, 0.1, True))])
    assert (assumed.rise, assumed.seen) == (told.rise, False)
    assert (assumed.low, assumed.high) == (min(told.low, like.low), like.high)
    between = predict(
        2.0, [known._replace(kept=Kept(0.5, 0.1)), Point(4.0, 1.2, 0.01, divergence=0.4, kept=Kept(0.5, 0.1))]
    )
    assert between.rise == pytest.approx(2 * told.rise)  # all of it is in proportion
    assert predict(1.0, [known._replace(divergence=None)]).interval == "0.3 (0.27 to 0.33)"


def test_a_number_of_samples_is_checked() -> None:
    net, batches, _ = fitted(0.0)
    with pytest.raises(InputError, match="trained_on must be a number of samples, got 0"):
        gm.compress(net, batches, REGRESSION, trained_on=0)
    with pytest.raises(InputError, match="give held_out or trained_on"):
        gm.compress(net, batches, REGRESSION, trained_on=320, held_out=batches)
    few = gm.compress(net, batches[:4], REGRESSION, trained_on=320, of="factorable", keep=0.5)
    assert few.predicted.low < 0 < few.predicted.high  # too few folds: as without the number
