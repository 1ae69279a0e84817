"""The cost of capture: a training step's forward and backward passes with and without it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from gramian.bench.learning_networks import Transformer
from gramian.bench.table import Goal, Measurement, Row
from gramian.bench.timing import interleaved
from gramian.gram import Gram
from gramian.objective import Objective
from gramian.recording import capture, capturing
from gramian.statistics import Statistics

_GOAL = 1.6
_STEPS = 3  # inside one `capturing`, which a training loop also enters once for many steps


def _transformer() -> nn.Module:
    """Return a transformer: four layers of width 384, six heads, 65 characters, fused attention."""
    return Transformer(width=384, depth=4, heads=6, context=256)


def _cnn() -> nn.Module:
    """Return a CNN: three stages of two 3×3 convolutions, with 64, 128 and 256 channels, for 32×32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, width in enumerate((64, 128, 256)):
        for i in range(2):
            stride = 2 if stage and not i else 1
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(65, (16, 257), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:]


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 3, 32, 32, generator=generator), torch.randint(10, (256,), generator=generator)


_QKV = {"*.qkv.weight": "(three o) i -> three o i"}
_CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Objective, dict[str, str]]] = {
    "transformer, 4,096 tokens": (_transformer, _tokens, Objective.next_token(), _QKV),
    "CNN, 256 images": (_cnn, _images, Objective.classification(), {}),
}


def rows(repeats: int, only: str, tell: Callable[[str], None]) -> Iterator[Row]:
    """Yield one row per network: a plain step, the step inside `capturing`, and `capture` alone."""
    for task, (make_model, make_batch, objective, layouts) in _CASES.items():
        if only in task:
            tell(task)
            yield _row(task, make_model, make_batch(), objective, layouts, repeats)


def _row(
    task: str,
    make_model: Callable[[], nn.Module],
    batch: tuple[Tensor, Tensor],
    objective: Objective,
    layouts: dict[str, str],
    repeats: int,
) -> Row:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make_model()

    def step() -> None:
        model.zero_grad()
        total, units = objective.loss(model, batch)
        (total / units).backward()

    def plain_steps() -> None:
        for _ in range(_STEPS):
            step()

    def live(precision: Literal["float32", "bfloat16"]) -> Statistics:
        with capturing(model, objective, layouts=layouts, precision=precision) as stats:
            plain_steps()
        return stats

    def alone() -> None:
        capture(model, [batch] * _STEPS, objective, layouts=layouts)

    step()
    plain = _peak()
    times = interleaved(
        {
            "step": plain_steps,
            "step inside capturing": lambda: live("float32"),
            "step inside capturing, bfloat16": lambda: live("bfloat16"),
            "capture, sampled": alone,
        },
        repeats=repeats,
    )
    base = times["step"].median
    stats = times["step inside capturing"].result
    error = _difference(times["step inside capturing, bfloat16"].result, stats)
    size = sum(t.nbytes for s in stats.sites() for m in (s.A, s.G) if m is not None for t in m.tensors())
    measurements = (
        Measurement("forward + backward", base / _STEPS),
        *(
            Measurement(
                name,
                timing.median / _STEPS,
                error if "bfloat16" in name else None,
                remark=f"{timing.median / base:.2f}×",
            )
            for name, timing in times.items()
            if name != "step"
        ),
    )
    extra = f"‖M − M₃₂‖ / ‖M₃₂‖. Grams {size / 2**20:.0f} MiB; peak {plain:.0f} MiB without, {_peak():.0f} MiB with"
    return Row(
        task,
        extra,
        measurements,
        (
            (Goal("capturing ÷ plain step", "<=", _GOAL), times["step inside capturing"].median / base),
            (
                Goal("capturing in bfloat16 ÷ plain step", "<=", _GOAL),
                times["step inside capturing, bfloat16"].median / base,
            ),
            (Goal("capture ÷ plain step", "<=", _GOAL), times["capture, sampled"].median / base),
        ),
    )


def _difference(stats: Statistics, exact: Statistics) -> float:
    """Return the largest relative Frobenius error of any A or G."""
    worst = 0.0
    for mine, wanted in zip(stats.sites(), exact.sites(), strict=True):
        for m, w in ((mine.A, wanted.A), (mine.G, wanted.G)):
            if isinstance(m, Gram) and isinstance(w, Gram):
                worst = max(worst, float((m.matrix - w.matrix).norm() / w.matrix.norm()))
    return worst


def _peak() -> float:
    """Return the process's peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
