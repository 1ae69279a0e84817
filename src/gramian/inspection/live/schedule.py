"""When a `watch` looks: rarely enough that its looks take no more than a share of the time."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from time import perf_counter, thread_time

__all__ = ["Schedule"]

# Ordinary steps, and looks, of which the median is what one takes.
ORDINARY, LOOKS = 8, 3

# What is left for looks where the check of every step alone takes most of the share, as a part of it.
LEFT = 0.1

# The first looks may take this many seconds together, whatever share that is: in a short run a share is too little.
FIRST, SECONDS = 3, 0.5

# A brief look beside the multiples of `every`: soon, and with steps before it to compare with.
EARLY = 3


class Schedule:
    """Chooses the steps to look at: the first, and then each that is a multiple of the interval.

    The interval is `every`, doubled until looks take at most `share` of the time, together with the checks of every
    step. The first three looks are a budget of their own. Multiples of `every` in between get a brief look, and so does
    the third step; only where brief looks alone would take more than the share, every second or fourth does.

    Intervals that are doubled keep ranks together: one that looks less often than another does so at the same steps. A
    look takes what its step takes longer, from the beginning of its forward pass to the end of the step, than other
    steps do; loading data and evaluations are not in between. Steps shortly before a look are timed: by the time of the
    thread, which other processes do not disturb, or where a device computes by the clock.

    Args:
        every: steps from one look to the next, at least.
        share: of the time, at most; `None` for any.
        on_processor: whether the model computes there.
    """

    def __init__(self, every: int, share: float | None, *, on_processor: bool = True) -> None:
        self.every, self.share = every, share
        self.clock = thread_time if on_processor else perf_counter
        self.is_due = self.is_timed = True
        self.is_brief = self.is_asked = False
        self.looked: list[int] = []  # the steps that were looked at, but for brief looks
        self._begun: float | None = None
        self._ended: float | None = None
        self._looks: deque[float] = deque(maxlen=LOOKS)
        self._spans: deque[float] = deque(maxlen=ORDINARY)
        self._periods: deque[float] = deque(maxlen=ORDINARY)
        self._checks: deque[float] = deque(maxlen=ORDINARY)
        self._briefs: deque[float] = deque(maxlen=ORDINARY)
        self._checking = 0.0  # of the step that has begun

    @property
    def interval(self) -> int:
        """Steps from one look to the next, by what steps and looks have taken so far."""
        if self.share is None or not self._looks or not self._spans or not self._periods:
            return self.every
        period = median(self._periods)
        checks = median(self._checks or (0.0,))
        checks += max(0.0, median(self._briefs or (0.0,)) - checks) / self.brief_interval
        left = max(LEFT * self.share, self.share - checks / period) * period
        return self._doubled((median(self._looks) - median(self._spans)) / left)

    @property
    def brief_interval(self) -> int:
        """Steps from one brief look to the next."""
        if self.share is None or not self._briefs or not self._periods:
            return self.every
        return self._doubled(median(self._briefs) / (self.share * median(self._periods)))

    @property
    def look_in_steps(self) -> float:
        """What a look adds to its step, as a multiple of an ordinary step; NaN where that is not known."""
        if not self._looks or not self._spans:
            return math.nan
        return (median(self._looks) - median(self._spans)) / median(self._periods or self._spans)

    def _doubled(self, steps: float) -> int:
        return self.every * 2 ** max(0, math.ceil(math.log2(steps / self.every))) if steps > 0 else self.every

    def _is_within_budget(self) -> bool:
        """Whether the next look is one of the first, and these are cheap enough in all."""
        if not self._looks or not self._spans or len(self.looked) >= FIRST:
            return False
        return sum(self._looks) + min(self._looks) - (len(self._looks) + 1) * median(self._spans) <= SECONDS

    def begin(self) -> None:
        """A forward pass begins, the first of its step or a later one."""
        if self._begun is None and self.is_timed:
            self._begun = self.clock()

    def ask(self) -> None:
        """Makes the next step one to look at, whatever the interval is."""
        self.is_asked = True

    def check(self, seconds: float) -> None:
        """Adds to what is done at every step."""
        self._checking += seconds

    def end(self, step: int, looked: bool) -> None:
        """A step ends, and is counted as the `step`-th."""
        now = self.clock() if self.is_timed else None
        self.looked += [step] if looked else []
        if now is None:
            pass
        elif self._begun is not None and looked:
            self._looks.append(now - self._begun)
        elif self.is_brief:
            self._briefs.append(self._checking)
        elif self._begun is not None:
            self._spans.append(now - self._begun)
            self._periods.extend(() if self._ended is None else (now - self._ended,))
            self._checks.append(self._checking)
        self._checking = 0.0
        self._begun, self._ended = None, now
        is_known = self.share is None or bool(self._spans)  # else the next step is one to compare with
        is_multiple = (step + 1) % self.every == 0 and is_known
        # What is asked of the times takes longer than all else here, and is asked at few steps.
        self.is_due = self.is_asked or (is_multiple and ((step + 1) % self.interval == 0 or self._is_within_budget()))
        self.is_asked = False
        is_brief = (is_multiple and (step + 1) % self.brief_interval == 0) or step + 1 == EARLY
        self.is_brief = is_brief and not self.is_due
        near = -(step + 1) % self.every <= ORDINARY or len(self._spans) < ORDINARY
        self.is_timed = self.share is not None and (self.is_due or self.is_brief or near)

    def drop(self) -> None:
        """The step that has begun is not taken."""
        self._begun, self._checking = None, 0.0
