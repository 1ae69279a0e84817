"""A model that is watched in its training loop: what is done at each forward pass and step, and what is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gramian.batch import tensors
from gramian.calls import wrappings
from gramian.errors import FindingError, GramianWarning, InputError, some
from gramian.inspection.live.closure import before_moving
from gramian.inspection.live.evaluation_mode import left_in_evaluation
from gramian.inspection.live.forgotten_state import Forgetting
from gramian.inspection.live.forward import Forward
from gramian.inspection.live.gradients import all_finite
from gramian.inspection.live.log import Teller
from gramian.inspection.live.look import Looker
from gramian.inspection.live.schedule import Schedule
from gramian.inspection.live.skipped_steps import Skips, skipped_steps
from gramian.inspection.passes.nonfinite_origin import are_finite, find_origin
from gramian.inspection.passes.signal import in_words
from gramian.inspection.passes.step_records import Observed
from gramian.report import Finding
from gramian.report.formatting import plural

__all__ = ["Watch"]

MODULE_CHECKS, RARE = "modules", "modules and norms at most steps"

# Steps that a summary spells out.
SHOWN = 6

# What every watch leaves to `inspect`.
_LEFT = {
    "data, loss and labels": "they are outside of the model's forward pass; call gm.inspect",
    "attention and gates inside torch's fused functions": "they run as they are; call gm.inspect",
    "frozen and rank-one parameters": "they are judged beside the spectra; call gm.inspect",
    "spectra": "they cost more than a step; call gm.inspect",
}


class Watch:
    """A model that is watched in its training loop, until `close()` or the end of the `with`; made by `watch`.

    `findings` is what was found so far, each code and place once; `not_looked_at` says what is not looked at, and why.
    `step` is the number of steps that were taken: of the optimizer, or forward passes in training where none is given.
    `numbers` has those of the last step that was looked at: `gradient`, the norm of all gradients, and `change`, the
    ‖ΔW‖_F / ‖W‖_F of the median matrix, of large ones by a sample of rows. `looks` is the number of full looks,
    `looked` has their steps, and `interval` is the number of steps from one to the next, as it is now. `brief_looks`
    counts the steps of which gradients, rates and changes alone were looked at.

    Args:
        model: as it is trained.
        optimizer: whose steps are counted, or `None`.
        every: steps from one look to the next, at least.
        share: of the time that looks may take, or `None`.
        on_finding: called with each finding and the step.
        raise_on: severity, or codes, for which `FindingError` is raised.
        log: called with the numbers, the findings and the step.

    Raises:
        InputError: nothing could be watched.
    Cost: as `watch`.
    Source: this library's own.

    >>> import torch
    >>> from gramian.inspection.live.watch import watch
    >>> net = nn.Linear(2, 1)
    >>> with watch(net, torch.optim.SGD(net.parameters(), lr=0.1)) as watching:
    ...     watching.step, watching.findings
    (0, [])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        every: int,
        share: float | None,
        on_finding: Callable[[Finding, int], Any] | None,
        raise_on: str | Collection[str] | None,
        log: Any,
    ) -> None:
        self._teller = Teller(on_finding, raise_on, log)
        self.not_looked_at: dict[str, str] = dict(_LEFT)
        self.step = self.looks = self.brief_looks = 0
        self._parallel = next((m for m in wrappings(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        self._optimizer = optimizer
        self._on_processor = all(p.is_cpu for p in model.parameters())
        self._schedule = Schedule(every, share, on_processor=self._on_processor)
        self._forward = Forward(model, self._forward_begins, self._forward_ends if optimizer is None else None)
        self._root = self._forward.root
        self._parameters = {n: p for n, p in self._root.named_parameters() if p.requires_grad}
        self._trained = [*self._parameters.values()]
        self._looker = Looker(self._root, self._parameters, optimizer)
        self._skips = Skips(self._trained if optimizer is not None else [])
        self._forgetting = Forgetting(optimizer)
        self._is_lost = self._is_skipped = self._is_stopped = self._has_trained = self._is_stepping = False
        self._seen: Observed | None = None  # what a look, full or brief, judges at this step
        self._meant: Exception | None = None  # an error that is to reach the user's loop
        self._handles: list[Any] = []
        reason = self._forward.failure
        if optimizer is None:
            if reason or self._forward.is_replayed:
                reason = reason or "the model is compiled, and is seen when its batch is run again at a step"
                self.close()
                raise InputError(f"watch: {reason}; without an optimizer nothing is left to watch. Pass optimizer=")
            self.not_looked_at["gradients and steps"] = "no optimizer was given"
        else:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._say_left()

    def __repr__(self) -> str:
        found = ", ".join(dict.fromkeys(finding.title for finding in self.findings[:3])) or "no findings"
        more = f" and {len(self.findings) - 3} more" if len(self.findings) > 3 else ""
        looks = plural(self.looks, "look") + (
            f" and {plural(self.brief_looks, 'brief one')}" if self.brief_looks else ""
        )
        rare = f" ({self._rare()})" if self.step and self._is_rare() else ""
        return f"<Watch of {type(self._root).__name__}: step {self.step:,}, {looks}{rare}: {found}{more}>"

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def findings(self) -> list[Finding]:
        """What was found so far, each code and place once."""
        return self._teller.findings

    @property
    def numbers(self) -> dict[str, float]:
        """Those of the last step that was looked at."""
        return self._looker.numbers

    @property
    def interval(self) -> int:
        """Steps from one look to the next: `every`, doubled until looks take no more than their share of the time."""
        return self._schedule.interval

    @property
    def looked(self) -> list[int]:
        """The steps of the full looks."""
        return self._schedule.looked

    def _is_rare(self) -> bool:
        """Whether fewer than half of the looks were made that `every` asks for."""
        return self.looks < (1 + self.step // self._schedule.every) / 2

    def _rare(self) -> str:
        """How many full looks were made, at which steps, and why no more."""
        schedule, steps = self._schedule, some([f"{s:,}" for s in self.looked], SHOWN) or "none"
        cost = f"{schedule.look_in_steps:.1f} steps' time"
        return (
            f"full looks at {self.looks:,} of {self.step:,} steps: {steps}; one takes {cost}, so that "
            f"{100 * (schedule.share or 1):.3g}% of the time allows one in {self.interval:,}"
        )

    def close(self) -> None:
        """Removes the hooks; `findings` stay."""
        if self._is_rare() and not self._is_stopped:
            self.not_looked_at[RARE] = f"{self._rare()}; share=None looks at every {self._schedule.every}-th"
        self._forward.close()
        self._skips.close()
        self._looker.loop.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- the forward pass ----

    def around(self, function: Callable, again: Callable | None = None) -> Callable:
        """Watches a function that makes the forward passes, in a loop that does not call the model itself.

        Args:
            function: such as the `training_step` of a Lightning module.
            again: makes a pass again, from the same arguments, without what else the function does; `None` for passes
                that cannot be repeated, so that the operation that made a NaN is not named.

        Returns: the function to call in its place.
        """
        return self._forward.around(function, again)

    def left_out(self) -> None:
        """Tells where the first value that is not finite came from, where a loop leaves out the step for it."""
        self._safely(self._judge_left_out)

    def _safely(self, look: Callable, *args: Any) -> Any:
        """Runs what looks, which must not end the user's training: after an error of its own the watch ends."""
        if self._is_stopped:
            return None
        is_timed = self._on_processor and self._schedule.is_timed  # elsewhere, most of it is waiting
        begun = self._schedule.clock() if is_timed else 0.0
        try:
            return look(*args)
        except Exception as error:
            if error is self._meant:
                raise
            self._is_stopped = True  # the optimizer's hooks stay until close(): one of them may be running
            self._forward.close()
            self._skips.close()
            self.not_looked_at[f"steps after {self.step}"] = f"the watch failed: {in_words(error)}"
            warnings.warn(
                f"watch: stopped at step {self.step + 1}, and the training goes on: {in_words(error)}. This is a fault "
                "of gramian",
                GramianWarning,
                stacklevel=2,
            )
            return None
        finally:
            if is_timed:
                self._schedule.check(self._schedule.clock() - begun)

    def _forward_begins(self) -> bool:
        return bool(self._safely(self._begins))

    def _begins(self) -> bool:
        self._schedule.begin()
        # A closure is called until its step is long enough, and drops the gradients of the calls before.
        if not self._is_stepping and self._skips.forward_begins(self._forward.passes - 1):
            self._tell_skipped()
        if self._schedule.is_due or self._schedule.is_brief:
            self._looker.loop.follow()
        return self._schedule.is_due

    def _forward_ends(self, output: Any) -> None:
        self._safely(self._ends, output)

    def _ends(self, output: Any) -> None:
        made = [t.detach() for t in tensors(output) if t.is_floating_point()]
        if not are_finite(made):
            self._tell([self._origin()])
        elif self._forward.seen is not None:
            self._tell(self._looker.judge_modules(self._forward.seen, self._forward.passes))
        self._next(looked=self._forward.seen is not None)

    # ---- the optimizer's step ----

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._is_stepping = True
        return before_moving(args, kwargs, lambda: self._safely(self._judge_gradients, optimizer))

    def _judge_gradients(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # of a GradScaler that leaves the skipping to the optimizer
        self._is_skipped = skipped is not None and bool(skipped)
        if self._is_skipped:
            return
        self._schedule.begin()
        if not self._are_gradients_finite():
            if not self._is_lost:
                self._tell([self._origin(), *self._looker.loop.grown(self.step)])
            self._is_lost = True
            return
        self._is_lost = False
        self._looker.loop.note()
        if forgotten := self._forgetting.before_step(self.step):
            self._tell(forgotten)
        if self._schedule.is_due:
            self._forward.look_again()
            self._forward.seen = self._forward.seen or Observed()
        if self._schedule.is_due or self._schedule.is_brief:
            self._seen = self._forward.seen or Observed()
            scale = getattr(optimizer, "grad_scale", None)
            self._looker.before_step(self._seen, self._forward.passes, scale, self.step)

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._is_stepping = False
        self._safely(self._judge_step)

    def _judge_step(self) -> None:
        if self._is_skipped:
            if self._skips.skipped(was_finite=False):
                self._tell_skipped()
            self._forward.clear()  # no step was taken
            self._schedule.drop()
            return
        self._skips.stepped()
        self._forgetting.after_step()
        (seen, self._seen), forward, is_due = (self._seen, None), self._forward, self._schedule.is_due
        in_evaluation = forward.evaluations > 0 and not forward.passes
        if in_evaluation and (self._has_trained or seen is not None):
            self._tell(left_in_evaluation(self._root, self.step + 1, has_trained=self._has_trained))
        self._has_trained |= forward.passes > 0
        if seen is not None and not self._is_lost:
            found = self._looker.after_step(seen, forward.passes, is_brief=not is_due)
            if self._looker.is_puzzled:
                self._schedule.ask()
            if is_due and not forward.passes and not forward.failure and not in_evaluation:
                forward.failure = "no forward pass of this model was seen: the loop calls another object"
            if in_evaluation:
                self.not_looked_at[MODULE_CHECKS] = "the model is trained in evaluation mode"
            self._say_left()
            self._tell(found)
        self.brief_looks += seen is not None and not is_due
        self._next(looked=seen is not None and is_due)

    def _judge_left_out(self) -> None:
        was_lost, self._is_lost = self._is_lost, True
        if not was_lost:
            self._tell([self._origin()])
        self._next(looked=False)

    def _are_gradients_finite(self) -> bool:
        return all_finite([g for p in self._trained if (g := p.grad) is not None])

    def _next(self, *, looked: bool) -> None:
        self.step += 1
        self.looks += looked
        self._forward.clear()
        self._schedule.end(self.step, looked)

    # ---- what it means ----

    def _origin(self) -> Finding:
        """Finds where the first value that is not finite came from, before the step spoils the weights."""
        with self._forward.asleep():
            return find_origin(self._root, self._forward.last, self._parallel, f"step {self.step + 1}")

    def _tell_skipped(self) -> None:
        self._tell([skipped_steps(self._origin(), self._skips.was_finite)])

    def _say_left(self) -> None:
        if self._forward.failure:
            self.not_looked_at[MODULE_CHECKS] = self._forward.failure
        self.not_looked_at |= self._looker.failed

    def _tell(self, found: list[Finding]) -> None:
        found = self._looker.ordered(found)
        try:
            self._teller(found, self.numbers, self.step + 1)
        except Exception as error:  # FindingError, or an error of the user's own function or logger
            self._meant = error
            if isinstance(error, FindingError):
                self.close()
            raise
