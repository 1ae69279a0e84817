"""Windows of several channels: what is frozen, unread, zero, in other units or shuffled is named; twins stay silent."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes.dependence import DEPENDENCE, Dependence, labels_depend

CLASSIFY = gm.Objective.classification()
CHANNELS, LENGTH, CLASSES = 4, 48, 3


def windows(num: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Waves of three frequencies and any phase, in all channels, with noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (num,), generator=g)
    angle = torch.tensor([2.0, 4.0, 7.0])[y][:, None] * torch.arange(LENGTH) / LENGTH + torch.rand(num, 1, generator=g)
    wave = torch.sin(2 * math.pi * angle)[:, None] * torch.tensor([1.0, -0.5, 0.8, 1.5])[:, None]
    return wave + 0.7 * torch.randn(num, CHANNELS, LENGTH, generator=g), y


class Windows(nn.Module):
    """A convolution, a recurrence over its outputs, and a head at one of its states."""

    def __init__(self, state: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(CHANNELS, 24, 5, padding=2), nn.BatchNorm1d(24)
        self.gru, self.drop, self.head = nn.GRU(24, 24, batch_first=True), nn.Dropout(0.1), nn.Linear(24, CLASSES)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(self.gru(h.transpose(1, 2))[0][:, self.state]))


class Recurrent(nn.Module):
    """A recurrence over the inputs as they are."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(CHANNELS, 24, batch_first=True), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Images(nn.Module):
    """A convolution of images, averaged over some of the rows."""

    def __init__(self, rows: slice = slice(None)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.rows = nn.Conv2d(CHANNELS, 8, 3), nn.Linear(8, CLASSES), rows

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x))[:, :, self.rows].mean((2, 3)))


def inspected(model: nn.Module, x: Tensor | None = None, y: Tensor | None = None) -> gm.Report:
    given, labels = windows()
    x, y = given if x is None else x, labels if y is None else y
    return gm.inspect(model, list(zip(x.split(64), y.split(64), strict=True)), CLASSIFY)


def asked_of(x: Tensor, y: Tensor) -> Dependence:
    test = labels_depend([[x]], [y])
    assert test is not None
    return test


def serious(report: gm.Report) -> dict[str, str]:
    return {f.code: f.title for f in report.findings if f.severity != "info"}


def learned(model: nn.Module) -> nn.Module:
    """The model with directions in its matrices that random entries do not have."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                a, b = torch.randn(len(p), generator=g), torch.randn(p[0].numel(), generator=g)
                p.add_((2 * float(p.std()) * torch.outer(a, b) / 3).view(p.shape))
    return model


@pytest.mark.parametrize("names", [["gru"], ["gru", "head"]])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_frozen_recurrence_is_forgotten_where_it_is_as_it_was_drawn(names: list[str], is_trained: bool) -> None:
    model = learned(Windows()) if is_trained else Windows()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    [finding] = [f for f in inspected(model).findings if f.code == "parameter-frozen"]
    assert finding.severity == ("info" if is_trained else "warning")
    assert ("as they were drawn" in finding.cause) != is_trained


class Tables(nn.Module):
    """Tokens, their places and their kinds, all by tables, as in an encoder."""

    def __init__(self, tokens: Tensor, places: Tensor) -> None:
        super().__init__()
        self.tokens, self.places = (nn.Embedding.from_pretrained(t, freeze=True) for t in (tokens, places))
        self.kinds = nn.Embedding(2, tokens.shape[1])
        self.kinds.requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(tokens.shape[1], 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places.weight + self.kinds(ids % 2)
        return self.body(h).mean(1)


def drawn(rows: int) -> Tensor:
    return 0.02 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))


def waves(rows: int) -> Tensor:
    angle = torch.arange(rows)[:, None] / 50 ** (torch.arange(8) / 8)
    return torch.cat((angle.sin(), angle.cos()), 1)


@pytest.mark.parametrize(
    ("tokens", "places", "severity"),
    [
        (drawn(40), drawn(12), "warning"),
        (torch.eye(16).repeat(3, 1), waves(12), "info"),  # codes and positions that were written down
        (drawn(40) + 0.05 * torch.outer(torch.randn(40), torch.randn(16)), waves(12), "info"),
    ],
    ids=["drawn", "written", "trained"],
)
def test_frozen_tables_are_forgotten_where_they_are_as_they_were_drawn(tokens, places, severity) -> None:
    ids = torch.randint(1, 40, (192, 12), generator=torch.Generator().manual_seed(0))
    [finding] = [
        f for f in inspected(Tables(tokens, places), ids, ids[:, 0] % 3).findings if f.code == "parameter-frozen"
    ]
    assert finding.severity == severity


@pytest.mark.parametrize(
    ("make", "dim", "idle"),
    [
        (lambda: Windows(state=0), "third", "24 to 47"),
        (lambda: Images(slice(6)), "third", "8 to 15"),
        (lambda: Windows(), "", ""),
        (lambda: Images(), "", ""),
    ],
    ids=["first step", "first rows", "last step", "all rows"],
)
def test_a_half_that_is_not_read_is_told_along_any_dimension(make: Callable, dim: str, idle: str) -> None:
    x = torch.randn(192, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    model = make()
    report = inspected(model, x if isinstance(model, Images) else None)
    told = serious(report).get("input-unused", "")
    assert (f"along its {dim} dimension, {idle} have" in told) if dim else not told


def test_what_a_long_recurrence_forgets_is_read_all_the_same() -> None:
    x = torch.randn(64, 320, CHANNELS, generator=torch.Generator().manual_seed(0))
    assert "input-unused" not in serious(inspected(Recurrent(nn.LSTM), x, torch.arange(64) % CLASSES))


@pytest.mark.parametrize("name", ["conv", "gru"])
def test_zeros_behind_which_all_is_constant_come_first_and_are_drawn_anew_alone(name: str) -> None:
    model = Windows()
    weights = [p for n, p in model.named_parameters() if n.startswith(name) and p.ndim > 1]
    for p in weights[:1]:
        nn.init.zeros_(p)
    report = inspected(model)
    [code] = serious(report)
    assert code == "zero-weights"
    assert not {"order-ignored", "dead-units"} & {f.code for f in report.findings if not f.follows}
    [action] = [f.action for f in report.findings if f.action is not None]
    exec(action.code, {"gm": gm, "model": model})
    assert bool(weights[0].any())
    assert not serious(inspected(model))


def test_a_head_of_zeros_says_nothing_of_the_order() -> None:
    model = Windows()
    nn.init.zeros_(model.head.weight)
    report = inspected(model)
    assert not serious(report)
    assert "order-ignored" not in {f.code for f in report.findings}


@pytest.mark.parametrize(
    "make",
    [lambda: (Windows(), (LENGTH,), 1), lambda: (Images(), (16, 16), 1), lambda: (Recurrent(), (LENGTH,), 2)],
    ids=["windows", "images", "recurrence"],
)
def test_a_channel_in_other_units_is_named(make: Callable) -> None:
    model, places, axis = make()
    x = torch.randn(192, CHANNELS, *places, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1000.0):
        x[:, 2] *= scale
        found = serious(inspected(model, x.movedim(1, axis).contiguous(), torch.arange(192) % CLASSES))
        assert [code for code in found if code.startswith("input")] == (["input-dominated"] if scale > 1 else [])
    assert "of 4 input channels" in found["input-dominated"]


def test_shuffled_labels_are_told_where_all_but_a_few_directions_is_noise() -> None:
    for num in (256, 1024):
        x, y = windows(num)
        noise = torch.randn(num, 8, LENGTH, generator=torch.Generator().manual_seed(2))
        x, order = torch.cat((x, noise), 1), torch.randperm(num, generator=torch.Generator().manual_seed(3))
        assert asked_of(x, y).p_value < 1e-6
        test = asked_of(x, y[order])
        assert test.p_value > test.level
        assert test.are_independent == (num > 1000)
        assert ("leading directions" in test.evidence) == (num > 1000)


def test_labels_by_a_detail_beside_the_leading_directions_may_be_missed() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (1024,), generator=g)
    x = F.interpolate(torch.randn(1024, 1, 4, 4, generator=g), size=(24, 24), mode="bicubic")
    x += 0.1 * torch.randn(x.shape, generator=g)
    for image, row, column in zip(x[y == 1], *torch.randint(20, (2, 1024), generator=g).tolist(), strict=False):
        image[0, row : row + 3, column : column + 3] += 1.5
    assert not asked_of(x, y).are_independent


def test_the_only_remark_stands_in_the_verdict_and_what_it_is_about_was_looked_at() -> None:
    x, y = windows(256)
    report = inspected(Windows(), x, y[torch.randperm(256, generator=torch.Generator().manual_seed(1))])
    assert report.verdict.startswith("No trouble found in 8 layers; 1 remark: the labels do not depend on the inputs")
    assert DEPENDENCE not in report.not_looked_at
