"""When the costly parts of a direction are recomputed: staggered over the steps, within a share of the time."""

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
from gramian.errors import GramianWarning
from gramian.optim.route import Route
from gramian.optim.stacks import Stack

__all__ = ["Clock", "due", "stagger"]

NUM_TIMED = 4  # steps of each kind whose median counts
NUM_STEPS = 1 + 2 * NUM_TIMED  # the first allocates; then as many with everything due, and as many with nothing
LONGEST = 100  # steps: older results say too little about the present gradients
NEVER = 10**9  # the `refresh` of a step in which only new matrices are due


def stagger(stacks: Sequence[Stack], routes: Sequence[Route], refresh: int) -> None:
    """Gives each matrix its step of a cycle of `refresh`, so that all steps cost about the same.

    Args:
        stacks: of the parameters that this rank works on.
        routes: of all parameters of the group, so that the steps do not depend on which rank works on what.
    """
    shapes = [r.layout.matrices for r in routes if r.layout is not None]
    counts = [math.prod(shape[:-2]) for shape in shapes]
    costs = [m * n * min(m, n) for (*_, m, n), num in zip(shapes, counts, strict=True) for _ in range(num)]
    steps = torch.tensor([-1] * len(costs) if refresh == NEVER else placement.assign(costs, refresh))
    phases = dict(zip(routes, steps.long().split(counts), strict=True))
    for stack in stacks:
        stack.phases = torch.cat([phases[r] for r in stack.routes]).tolist()


def due(stack: Stack, group: dict[str, Any]) -> Tensor | None:
    """The indices of the matrices that are new or whose phase this step is; `None` for all."""
    if group["refresh"] == 1:
        return None
    step = group["step"] % group["refresh"]
    now = [i for i, phase in enumerate(stack.phases) if phase == step or i in stack.fresh]
    return None if len(now) == len(stack.phases) else torch.tensor(now, dtype=torch.long, device=stack.device)


class Clock:
    """Sets `refresh` once, so that the optimizer takes at most a share of a step's time.

    It times some steps in which everything is due, and some in which nothing is. The measurements and the choice are
    kept in the parameter groups, so that a restored run continues with them: the choice is made once, by all ranks
    together, and replayed.
    """

    def __init__(self) -> None:
        self._ended: float | None = None

    @contextmanager
    def timed(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """Times the step of the groups of matrices that runs inside."""
        if not groups or groups[0]["max_overhead"] is None or groups[0].get("overhead_met"):
            yield
            return
        first = groups[0]
        # Of a fixed length, since torch.distributed.checkpoint restores only what has the same form.
        timings = list(first.get("timings", (math.nan,) * (2 * NUM_STEPS)))
        number = sum(not math.isnan(seconds) for seconds in timings[::2])
        for group in groups:
            group["refresh"] = 1 if number <= NUM_TIMED else NEVER
        begin = _now(first)
        yield
        end = _now(first)
        outside = math.nan if self._ended is None else begin - self._ended
        timings[2 * number : 2 * number + 2] = end - begin, outside
        self._ended = end
        first["timings"] = tuple(timings)
        first["overhead_met"] = number + 1 == NUM_STEPS
        if first["overhead_met"]:
            self._choose(groups, timings[::2], timings[1::2])

    def _choose(self, groups: list[dict[str, Any]], own: Sequence[float], outside: Sequence[float]) -> None:
        share = groups[0]["max_overhead"]
        around = statistics.median(seconds for seconds in outside if not math.isnan(seconds))
        full = statistics.median(own[1 : 1 + NUM_TIMED])
        base = statistics.median(own[1 + NUM_TIMED :])
        room = around * share / (1 - share) - base
        wanted = math.ceil((full - base) / room) if room > 0 else math.inf
        refresh = int(min(max(wanted, 1), LONGEST))
        if placement.is_distributed():
            refresh = max(map(int, placement.exchange(str(refresh))))
        if wanted > LONGEST:
            warnings.warn(
                f"max_overhead={share}: the part that must run in every step takes {base / (around + base):.0%} of a "
                f"step here; the costly parts are recomputed every {LONGEST} steps. Larger batches lower the share",
                GramianWarning,
                stacklevel=2,
            )
        for group in groups:
            group["refresh"] = refresh


def _now(group: dict[str, Any]) -> float:
    device = group["params"][0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
