"""When the costly parts of a direction are made anew: staggered over the steps, within a share of the time."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.errors import GramianWarning, InputError
from gramian.optim.batches import Batch

__all__ = ["Clock", "due", "stagger"]

NUM_TIMED = 4  # steps of each kind whose median counts
LONGEST = 100  # steps: a direction older than that is not worth its name


def stagger(batches: Sequence[Batch], refresh: int) -> None:
    """Gives each matrix its step of a cycle of `refresh`, so that all steps cost about the same."""
    costs = [batch.shape[1] * batch.shape[2] * min(batch.shape[1:]) for batch in batches for _ in range(batch.shape[0])]
    phases = torch.tensor(placement.assign(costs, refresh), dtype=torch.long)
    for batch, phase in zip(batches, phases.split([b.shape[0] for b in batches]), strict=True):
        batch.stagger = refresh
        batch.phases = phase


def due(batch: Batch, group: dict[str, Any]) -> Tensor | None:
    """The indices of the matrices whose turn it is; `None` for all."""
    if batch.fresh or group["refresh"] == 1:
        return None
    return (batch.phases == group["step"] % group["refresh"]).nonzero()[:, 0].to(batch.device)


class Clock:
    """Sets `refresh` once, so that the optimizer takes at most a share of a step's time.

    It times some steps in which everything is due, and some in which nothing is. The choice is kept in the groups
    (`overhead_met`), agreed among the ranks, and never made again.
    """

    def __init__(self, max_overhead: float | None) -> None:
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise InputError(f"max_overhead must be a share of a step's time between 0 and 1, got {max_overhead}")
        self.max_overhead = max_overhead
        self._own: list[float] = []
        self._outside: list[float] = []
        self._ended: float | None = None

    @contextmanager
    def timed(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """Around a step."""
        if self.max_overhead is None or not groups or "max_overhead" in groups[0]:
            yield
            return
        begin = _now(groups)
        # The first step allocates; then as many with everything due, and as many with nothing.
        idle = len(self._own) > NUM_TIMED
        for group in groups:
            group["refresh"] = LONGEST * LONGEST if idle else 1
        yield
        end = _now(groups)
        if self._ended is not None:
            self._outside.append(begin - self._ended)
        self._own.append(end - begin)
        self._ended = end
        if len(self._own) == 1 + 2 * NUM_TIMED:
            self._choose(groups)

    def _choose(self, groups: list[dict[str, Any]]) -> None:
        assert self.max_overhead is not None
        outside = statistics.median(self._outside)
        full = statistics.median(self._own[1 : 1 + NUM_TIMED])
        base = statistics.median(self._own[1 + NUM_TIMED :])
        room = outside * self.max_overhead / (1 - self.max_overhead) - base
        wanted = math.ceil((full - base) / room) if room > 0 else LONGEST
        refresh = min(max(wanted, 1), LONGEST)
        if placement.is_distributed():
            refresh = max(map(int, placement.exchange(str(refresh))))
        if wanted > LONGEST or room <= 0:
            share = base / (outside + base)
            warnings.warn(
                f"max_overhead={self.max_overhead}: what cannot be put off takes {share:.0%} of a step here; the costly "
                f"parts are renewed every {LONGEST} steps. Larger batches lower the share",
                GramianWarning,
                stacklevel=2,
            )
        for group in groups:
            group["refresh"] = refresh
            group["max_overhead"] = self.max_overhead


def _now(groups: list[dict[str, Any]]) -> float:
    device = groups[0]["params"][0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
