"""What a loss has of its own, a discriminator, a teacher or a rate, is not taken for a part of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

NOISE, D, N = 4, 6, 64


def noise() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(N, NOISE, generator=g) for _ in range(3)]


def generator(end: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, D), *([end] if end else []))


def discriminator(end: nn.Module | None = None, *, is_dead: bool = False) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 1), *([end] if end else []))
    if is_dead:
        nn.init.constant_(net[0].bias[:12].detach(), -50.0)
    return net.requires_grad_(False)


def against(critic: nn.Module, **options):
    def loss(model: nn.Module, z: Tensor) -> Tensor:
        scores = critic(model(z))[:, 0]
        return F.binary_cross_entropy_with_logits(scores, torch.ones(len(z)), **options)

    return loss


def codes(model: nn.Module, loss, **options) -> list[str]:
    return [f.code for f in gm.inspect(model, noise(), loss, **options).findings if f.severity != "info"]


@pytest.mark.parametrize("is_frozen", [True, False])
def test_dead_units_of_a_discriminator_are_not_the_generators(is_frozen) -> None:
    critic = discriminator(is_dead=True).requires_grad_(not is_frozen)
    assert codes(generator(), against(critic)) == []


def test_dead_units_of_a_teacher_are_not_the_students() -> None:
    teacher = discriminator(is_dead=True)
    student = nn.Sequential(nn.Linear(NOISE, D), nn.ReLU(), nn.Linear(D, 1))

    def loss(model: nn.Module, z: Tensor) -> Tensor:
        return F.mse_loss(model(z), teacher(F.pad(z, (0, D - NOISE))))

    assert "dead-units" not in codes(student, loss)
    with torch.no_grad():
        student[0].bias[:5] = -50.0  # its own are
    assert "dead-units" in codes(student, loss)


@pytest.mark.parametrize("end", [None, nn.Tanh()])
@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.Softmax(-1)])
def test_a_discriminator_that_ends_with_probabilities(end, function) -> None:
    if isinstance(function, nn.Softmax):
        critic = nn.Sequential(discriminator(), nn.Linear(1, 2), function).requires_grad_(False)
    else:
        critic = discriminator(function)
    found = gm.inspect(generator(end), noise(), against(critic)).findings
    assert (found[0].code, found[0].where) == ("loss-double-sigmoid", "loss")


@pytest.mark.parametrize("is_wrong", [True, False])
def test_one_of_two_outputs_ends_with_a_sigmoid(is_wrong) -> None:
    """As a detector's boxes do. Its scores all lie between 0 and 1 at first."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.box, self.score = nn.Linear(D, 16), nn.Linear(16, 4), nn.Linear(16, 1)
            nn.init.normal_(self.score.weight, std=0.02)
            nn.init.constant_(self.score.bias, 0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).relu()
            return self.box(h).sigmoid(), self.score(h).sigmoid() if is_wrong else self.score(h)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        box, score = model(batch[0])
        return F.smooth_l1_loss(box, batch[0][:, :4].sigmoid()) + F.binary_cross_entropy_with_logits(score, batch[1])

    draw = torch.Generator().manual_seed(0)
    data = [torch.randn(64, D, generator=draw) for _ in range(4)]
    found = gm.inspect(Detector(), [(x, (x[:, 4:5] > 0).float()) for x in data], loss).findings
    assert ("loss-double-sigmoid" in [f.code for f in found]) is is_wrong


def test_a_loss_of_probabilities_and_weights_between_zero_and_one_are_healthy() -> None:
    critic = discriminator(nn.Sigmoid())

    def loss(model: nn.Module, z: Tensor) -> Tensor:
        return F.binary_cross_entropy(critic(model(z))[:, 0], torch.ones(len(z)))

    assert codes(generator(), loss) == []
    weight = torch.sigmoid(torch.linspace(-1, 1, N))
    assert codes(generator(nn.Tanh()), against(discriminator(), weight=weight)) == []


def test_a_rate_that_does_nothing_is_told_beside_a_discriminator() -> None:
    model = generator()
    slow = torch.optim.AdamW(model.parameters(), lr=1e-8)
    assert codes(model, against(discriminator(is_dead=True)), optimizer=slow) == ["rate-too-low"]


def test_a_discriminator_that_is_sure_of_all_samples_has_no_offset_of_the_generator() -> None:
    critic = discriminator()
    with torch.no_grad():
        critic[2].bias.fill_(-40.0)
    assert codes(generator(), against(critic)) == []
