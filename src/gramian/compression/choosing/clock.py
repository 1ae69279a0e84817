"""How long passes take on this machine, and how far a figure of a machine that others use can be trusted.

Models take turns, and it is ratios of neighbors in time that count, so a slow phase affects both. A pass during which
this thread waited for a processor tells of the machine and not of the model: such passes are left out where others are
enough. Where they are not, the times are those of the processor.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.report.contenders import Ratio

__all__ = ["Race", "fused_kernels", "race"]

Call = Callable[[nn.Module, Any], Any]

FEWEST, MOST = 8, 400
"""Rounds that are measured at least and at most; eight pairs are the fewest whose range holds the median in 99 %."""
ENOUGH = 16
"""Undisturbed rounds, from which on the disturbed ones are left out."""
PATIENCE = 6
"""How many times as long as asked is measured, where the machine is busy."""
ON_PROCESSOR = 0.9
"""The least share of an undisturbed pass that this thread spent on a processor."""
GROUPS = 20
"""Neighbors in time are alike, so rounds count in so many groups at most."""
BUSY = 0.1
"""From this share of waiting on, a report says that the machine was busy."""
FUSED = {
    "_transformer_encoder_layer_fwd": "nn.TransformerEncoderLayer",
    "_native_multi_head_attention": "nn.MultiheadAttention",
}
"""Kernels of torch's inference path, which take dense weights alone, and the classes that call them."""


@dataclass
class Race:
    """Seconds of passes of several models, which took turns.

    Args:
        wall: by name, of each round.
        cpu: of processors, all threads of this process together.
        own: of a processor, this thread alone.
        clocked: whether waiting can be seen: the passes run on this machine's processors, and it has such a clock.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    own: dict[str, list[float]] = field(default_factory=dict)
    clocked: bool = True

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(next(iter(self.wall.values())))

    @property
    def waited(self) -> float:
        """The share of the time in which this thread waited for a processor."""
        if not self.clocked:
            return 0.0
        on, all_ = (sum(map(sum, times.values())) for times in (self.own, self.wall))
        return max(0.0, 1 - on / all_)

    def quiet(self, *names: str) -> list[int]:
        """The rounds in which no pass of these models was disturbed."""
        if not self.clocked:
            return list(range(self.rounds))
        return [i for i in range(self.rounds) if all(self.own[n][i] >= ON_PROCESSOR * self.wall[n][i] for n in names)]

    def milliseconds(self, name: str) -> float:
        """The median of a model's passes."""
        times, rounds = self._times(name)
        return 1e3 * statistics.median(times[name][i] for i in rounds)

    def ratio(self, name: str, than: str) -> Ratio:
        """How many times as fast as another a model is: the median of rounds, and an interval of 95 % or more.

        The interval is that of order statistics, which asks for no shape of the distribution.
        """
        if name == than:
            return Ratio(1.0, 1.0, 1.0)
        times, rounds = self._times(name, than)
        ratios = [times[than][i] / max(times[name][i], 1e-12) for i in rounds]
        size = max(1, len(ratios) // GROUPS)
        groups = sorted(statistics.median(ratios[i : i + size]) for i in range(0, len(ratios) - size + 1, size))
        out = _outside(len(groups))
        return Ratio(statistics.median(ratios), groups[out], groups[-1 - out])

    def _times(self, *names: str) -> tuple[dict[str, list[float]], Sequence[int]]:
        quiet = self.quiet(*names)
        if len(quiet) >= min(ENOUGH, self.rounds):
            return self.wall, quiet
        return self.cpu, range(self.rounds)


def _outside(num: int) -> int:
    """How many of `num` sorted values can be left out at each end so that the rest holds the median in 95 %."""
    out, tail = 0, 0.5**num
    while tail + math.comb(num, out + 1) * 0.5**num <= 0.025:
        out += 1
        tail += math.comb(num, out) * 0.5**num
    return out


@torch.no_grad()
def race(models: Mapping[str, nn.Module], call: Call, batch: Any, seconds: float = 0.5) -> Race:
    """Times a forward pass of each model in turn.

    Args:
        models: by name.
        call: runs a model on the batch.
        batch: the input.
        seconds: about how long to measure, of all models together; on a busy machine up to `PATIENCE` times as long.

    Raises: what a model raises at its first pass.
    """
    names = list(models)
    for name in names:  # the first pass allocates
        call(models[name], batch)
    made = Race({n: [] for n in names}, {n: [] for n in names}, {n: [] for n in names}, _clocked())
    begin, turn = time.perf_counter(), 0
    while turn < FEWEST or (turn < MOST and time.perf_counter() - begin < seconds * _patience(made)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait()
            cpu, start, own = time.process_time(), time.perf_counter(), time.thread_time()
            call(models[name], batch)
            _wait()
            own, stop = time.thread_time() - own, time.perf_counter()
            made.own[name].append(own)
            made.wall[name].append(stop - start)
            made.cpu[name].append(time.process_time() - cpu)
        turn += 1
    return made


def _patience(made: Race) -> int:
    return 1 if not made.rounds or len(made.quiet(*made.wall)) >= min(ENOUGH, made.rounds) else PATIENCE


def _clocked() -> bool:
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    return not on_device and time.get_clock_info("thread_time").resolution < 1e-5


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@torch.no_grad()
def fused_kernels(model: nn.Module, call: Call, batch: Any) -> dict[str, int]:
    """How many times a pass calls torch's fused inference kernel of each class."""
    counter = _Counter()
    with counter:
        call(model, batch)
    return counter.num


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num = dict.fromkeys(FUSED.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = FUSED.get(func.overloadpacket.__name__)
        if name is not None:
            self.num[name] += 1
        return func(*args, **(kwargs or {}))
