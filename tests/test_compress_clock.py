"""The clock of `gramian compress`: a busy machine is seen, and a difference is one only where it is sure."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression.choosing.clock import ENOUGH, FEWEST, Race, fused_kernels, race
from gramian.compression.choosing.speeds import Speeds
from gramian.report.contenders import Ratio


def call(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def made(rounds: int, disturbed: int, factor: float = 2.0) -> Race:
    """Passes of one and of `factor` milliseconds, of which the first ones waited ten for a processor."""
    generator = torch.Generator().manual_seed(0)
    noise = (1 + 0.05 * torch.randn(2, rounds, generator=generator)).tolist()
    own = {"a": [1e-3 * factor * n for n in noise[0]], "b": [1e-3 * n for n in noise[1]]}
    wall = {name: [t + 1e-2 * (i < disturbed) for i, t in enumerate(times)] for name, times in own.items()}
    return Race(wall, own, own)


@pytest.mark.parametrize("disturbed", [0, 10, 95, 100])
def test_passes_that_waited_do_not_count(disturbed: int) -> None:
    """With few quiet passes, or none, it is the processor's time that counts."""
    found = made(100, disturbed)
    ratio = found.ratio("b", "a")
    assert ratio.low < 2.0 < ratio.high
    assert ratio.high - ratio.low < 0.2
    assert found.milliseconds("a") == pytest.approx(2.0, rel=0.05)
    assert (found.waited > 0.1) == (disturbed > 0)
    assert len(found.quiet("a", "b")) == 100 - disturbed


def test_where_waiting_cannot_be_seen_all_passes_count() -> None:
    found = made(100, 60)
    found.clocked = False
    assert found.milliseconds("a") == pytest.approx(12.0, rel=0.05)
    assert found.waited == 0.0


def test_the_interval_is_that_of_order_statistics() -> None:
    """Of 8 values the whole range, of 20 the sixth to the fifteenth (a binomial tail of 2.1 %)."""
    for num, low, high in ((8, 1, 8), (20, 6, 15)):
        times = {"a": [1.0 + i for i in range(num)], "b": [1.0] * num}
        ratio = Race(times, times, times).ratio("b", "a")
        assert (ratio.low, ratio.high) == (low, high)


@pytest.mark.parametrize(
    ("ratio", "told"),
    [
        (Ratio(1.31, 1.1, 1.52), "1.31× (1.10–1.52)"),
        (Ratio(0.5, 0.4, 0.6), "0.50× (0.40–0.60)"),
        (Ratio(1.1, 0.9, 1.3), "no difference seen (0.90–1.30)"),
        (Ratio(20, 15, 25), "20× (15–25)"),
    ],
)
def test_a_ratio_says_whether_there_is_a_difference(ratio: Ratio, told: str) -> None:
    assert str(ratio) == told
    assert ratio.seen == ("no difference" not in told)


def test_a_model_beside_itself_is_rarely_different() -> None:
    """Eighteen of twenty at least: three false ones of twenty have a chance of 1.6 % at 2.5 % for each end."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(32, 64)
    ratios = [race({"a": model, "b": model}, call, x, 0.05).ratio("b", "a") for _ in range(20)]
    assert sum(ratio.seen and abs(ratio.median - 1) > 0.02 for ratio in ratios) <= 3
    assert race({"a": model}, call, x, 0.0).ratio("a", "a") == (1, 1, 1)


def test_a_difference_that_is_there_is_seen_also_on_a_busy_machine() -> None:
    x, dense = torch.randn(64, 512), nn.Linear(512, 2048)
    small = nn.Linear(512, 256)
    stop = threading.Event()

    def work() -> None:
        a = torch.randn(512, 512)
        while not stop.is_set():
            a = (a @ a).clamp(-1, 1)
            time.sleep(0)

    others = [threading.Thread(target=work) for _ in range(3)]
    for other in others:
        other.start()
    try:
        found = race({"dense": dense, "small": small}, call, x, 1.0)
    finally:
        stop.set()
        for other in others:
            other.join()
    ratio = found.ratio("small", "dense")
    assert found.rounds >= min(FEWEST, ENOUGH)
    assert ratio.low > 1


def test_the_fused_kernels_of_encoder_layers_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model, x = (
        nn.Sequential(layer, nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval(),
        torch.randn(2, 3, 16),
    )
    layers, attentions = "nn.TransformerEncoderLayer", "nn.MultiheadAttention"
    assert fused_kernels(model, call, x) == {layers: 2, attentions: 0}
    assert fused_kernels(nn.Linear(16, 2), call, x) == {layers: 0, attentions: 0}
    model[0].norm_first = True  # which the kernel takes
    model[1].train()
    assert fused_kernels(model, call, x) == {layers: 1, attentions: 0}


class Attends(nn.Module):
    """Attention in a block of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@torch.no_grad()
def test_what_loses_its_fused_kernel_is_named_by_its_class() -> None:
    x = torch.randn(2, 3, 16)
    dense = nn.Sequential(Attends(), Attends(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    speeds = Speeds(dense, gm.Objective.self_distillation(), x, 2)
    assert speeds.unfused(copy.deepcopy(dense)) == ""
    small = copy.deepcopy(dense)
    small[1] = nn.Identity()
    assert speeds.unfused(small).startswith("1 of 2 nn.MultiheadAttention lose torch's fused inference kernel")
    small[2] = nn.Identity()
    text = "1 of 1 nn.TransformerEncoderLayer and 1 of 2 nn.MultiheadAttention lose"
    assert speeds.unfused(small).startswith(text)
