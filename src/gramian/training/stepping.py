"""One step of a run: gradients of one batch or several, over all ranks, and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.batchnorm import _NormBase

from gramian import placement
from gramian.calls import prepared
from gramian.errors import TaskError, some
from gramian.inspection.live.gradients import all_finite
from gramian.objective import Objective
from gramian.seeding import kept_random
from gramian.training import agreement
from gramian.training.augmentation import augmented, mixed
from gramian.training.bare_steps import forget_gradients, step_of
from gramian.training.optimizers import skips_itself
from gramian.training.options import PRECISIONS, Options
from gramian.training.scaling import LossScale
from gramian.training.sharding import is_divided
from gramian.training.slices import Slices, clip_
from gramian.training.slow_steps import Slow
from gramian.training.stream import Stream
from gramian.training.task import Task, calling, named
from gramian.training.usual_loss import usual

__all__ = ["Stepper"]

FORWARD = "the forward pass or the loss"


class Stepper:
    """Takes steps on a model.

    A step is skipped, on all ranks alike, where the loss is not finite, or a gradient that the optimizer would take;
    the model's buffers are then as they were before. A batch without units (all labels are ignored) adds nothing.
    In float16 the loss is scaled, and a step whose scaled gradient overflows is left out with a smaller scale.

    Args:
        model, task, objective, optimizer, options: of the run.
        seed: of the changes of the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        options: Options,
        seed: int,
    ) -> None:
        self.model, self.task, self.objective, self.optimizer, self.options = model, task, objective, optimizer, options
        self.divided = is_divided(model)
        self.seed, self.failure = seed, agreement.Failure(kept=not self.divided)
        self.device = next(model.parameters()).device
        self._params = list(model.parameters())  # a walk over the modules in every step would cost more than the sums
        self._summed = usual(model, objective)
        self._buffers = _Buffers(model)
        self.scale = LossScale(active=options.precision == "float16")
        self._nothing = torch.zeros((), device=self.device)
        self._flag = torch.zeros(())  # for the look at gradients
        self.overflowed = False  # whether the last step was left out, since its scaled gradient was too large
        self._gradient: dict[tuple[float, torch.dtype], Tensor] = {}  # of the loss, by its divisor
        self.alone = not placement.is_distributed()
        self._half = PRECISIONS[options.precision]
        self._step = step_of(optimizer)
        self.slices = None if options.slices is None else Slices(model, options.slices, seed)
        self._share = agreement.share()
        # Then a batch's loss is all that there is to its forward pass.
        self._is_plain = self.alone and self._half is None and not options.augment and self.slices is None
        self._watch = options.clip is not None or self.scale.active or not skips_itself(optimizer)

    def step(self, stream: Stream, num_batches: int) -> tuple[float, float, bool]:
        """Take one step; return the sum of the losses, the number of units, and whether the step was taken.

        A step that only the scale of the loss prevented counts as taken; `overflowed` tells it.

        Args:
            stream: of the batches.
            num_batches: whose gradients are added up.
        """
        self._buffers.note()
        forget_gradients(self.optimizer)
        if self.slices is not None:
            self.slices.begin()
        total = units = 0.0
        first = 0.0  # the divisor of all gradients, until the number of all units is known
        sound = True
        slow = (
            Slow("train: a step has taken", f"of its {num_batches:,} batches (accumulate)") if num_batches > 1 else None
        )
        for number in range(num_batches):
            if number and slow is not None:
                slow.tell(number)
            if self.slices is None:
                amount, counted, own, weight = self._forward(stream)
            else:
                amount, counted = self._in_slices(self.slices, stream, last=number == num_batches - 1)
                own, weight = None, 1.0
            total, units = total + amount, units + counted
            sound = sound and math.isfinite(amount)
            if sound and counted:
                first = first or (counted if self.slices is None else 1.0)
                try:
                    if own is not None:
                        if not own.requires_grad:
                            raise self._without_gradient()
                        _backward(own, self._gradient_of(own, weight * self.scale.value / first))
                except BaseException as error:
                    self._caught(error, "the backward pass")
        if not self.divided and not (self.alone and self.slices is None):
            agreement.add_gradients(self.model, self.failure, None if self.slices is None else self.slices.sums)
        taken = sound and not first  # there is nothing to do
        self.overflowed = False
        if sound and first:
            taken = self._apply(first / units / self.scale.value)
            if taken:
                self.scale.stepped()
            else:
                self.overflowed = self.scale.overflowed()
        if not taken:
            self._buffers.restore()
        return total, units, taken or self.overflowed

    def check_parameters(self) -> None:
        """Raise `TaskError` where a step made or replaced parameters of the model: the optimizer has only the old ones.

        With FSDP2 the wrapper replaces them itself.
        """
        known = set(map(id, self._params))
        new = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if new and not self.divided:
            raise TaskError(
                f"{named(self.task)}: the first step put new parameters into its model, {some(new)}, which the "
                "optimizer does not have. Make them in __init__, and change their numbers in place (copy_ under "
                "torch.no_grad())"
            )

    def _without_gradient(self) -> TaskError:
        return TaskError(
            f"{named(self.task)}: the loss depends on no parameter that requires a gradient, so nothing can be "
            "trained. Is its graph cut (detach, no_grad, item), or made of integers (argmax, long, a comparison)?"
        )

    def _gradient_of(self, loss: Tensor, value: float) -> Tensor:
        """The gradient with which the backward pass begins, in place of a division of the loss."""
        key = (value, loss.dtype)
        if key not in self._gradient:
            self._gradient = {key: torch.full((), value, dtype=loss.dtype, device=loss.device)}
        return self._gradient[key]

    def _forward(self, stream: Stream) -> tuple[float, float, Tensor | None, float]:
        """The loss and the units of the next batch, of all ranks; and this rank's own loss, and its weight.

        The weight is zero where this rank has no rows, and takes part in a divided model's collectives only.
        """
        if self._is_plain:
            batch = stream.take()
            try:
                own, units = self._summed(batch)
            except BaseException:
                with calling(self.task, FORWARD):
                    raise
            return own.item(), units, own, 1.0
        batch, own = None, None
        loss, units, weight = self._nothing, 0.0, 1.0
        try:
            batch, seed = self._batch_of(stream)
            weight = 1.0 if self.alone else float(agreement.has_rows(batch, self._share))
            if weight or self.divided:
                own, count = self._loss(batch, seed, self._share)
                loss, units = (own, count) if weight else (loss, units)
        except BaseException as error:
            self._caught(error)
        amount, number = self._sums(stream, batch, loss, units, [self._share])
        return amount, number, own, weight

    def _in_slices(self, slices: Slices, stream: Stream, *, last: bool) -> tuple[float, float]:
        """The loss and the units of the next batch, of all ranks, after the backward passes of this rank's slices.

        Gradients are those of the loss itself: the number of units is not known yet.
        """
        batch, loss, units = None, 0.0, 0.0
        try:
            batch, seed = self._batch_of(stream)
            with kept_random():
                for share in slices.shares:
                    weight = float(agreement.has_rows(batch, share))
                    if not (weight or self.divided):
                        continue
                    slices.expect(last=last and share is slices.shares[-1])
                    slices.seed(share, (stream.epoch, stream.taken))
                    own, count = self._loss(batch, seed, share)
                    if count or self.divided:
                        if not own.requires_grad:
                            raise self._without_gradient()
                        with calling(self.task, "the backward pass"):
                            _backward(own, self._gradient_of(own, weight * self.scale.value))
                    loss, units = loss + weight * own.item(), units + weight * count
                    slices.add()
            if changed := self._buffers.changed() if stream.epoch == 0 and stream.taken == 1 else []:
                slices.warn_of(changed)
        except BaseException as error:
            self._caught(error)
        return self._sums(stream, batch, torch.tensor(loss, dtype=torch.float64), units, slices.shares)

    def _batch_of(self, stream: Stream) -> tuple[Any, tuple[int, ...]]:
        """The next batch, changed by the augmentation, with the seed of the changes."""
        batch = stream.take()
        seed = (self.seed, stream.epoch, stream.taken)
        batch = augmented(batch, self.options.augment, seed) if self.options.augment else batch
        if stream.taken == 1:
            agreement.check_rows(self.model, batch, self.options.slices or self._share.of)
        return batch, seed

    def _sums(
        self, stream: Stream, batch: Any, loss: Tensor, units: float, shares: Sequence[agreement.Share]
    ) -> tuple[float, float]:
        """The loss and the units of a batch, of all ranks; the first of an epoch is checked."""
        found = agreement.sums(loss, units, None if self.alone else self.failure, (stream.epoch, stream.taken))
        if stream.taken == 1:
            agreement.check_batch(self.model, self.objective, batch, shares, self.failure)
        return found

    def _loss(self, batch: Any, seed: tuple[int, ...], share: agreement.Share) -> tuple[Tensor, float]:
        """The loss and units of a share of a batch, with the precision of the forward pass."""
        try:
            if self._half is None:
                return self._of_parts(batch, seed, share)
            with torch.autocast(self.device.type, self._half):
                return self._of_parts(batch, seed, share)
        except BaseException:
            with calling(self.task, FORWARD):
                raise

    def _of_parts(self, batch: Any, seed: tuple[int, ...], share: agreement.Share) -> tuple[Tensor, float]:
        """The loss and units of a share of a batch; of a mixed one, both parts share the forward pass."""
        parts = mixed(batch, self.options.augment, seed) if self.options.augment else [(1.0, batch)]
        if len(parts) == 1:
            return self._summed(agreement.rows(batch, share))
        own = [(weight, prepared(self.model, agreement.rows(part, share))) for weight, part in parts]
        if self.objective is not self.task.objective:  # loss(model, batch), whose forward pass is its own
            found = [(w, *self.objective.loss(self.model, part, empty=True)) for w, part in own]
        else:
            output = self.objective.predict(self.model, own[0][1])
            results = [(w, self.objective.criterion(output, part)) for w, part in own]
            found = [(w, *self.objective.checked(result, empty=True)) for w, result in results]
        loss = sum((w * loss for w, loss, _ in found), torch.zeros((), device=self.device))
        units = sum((w * units for w, _, units in found), torch.zeros((), device=self.device))
        return loss, float(units.item())

    def _apply(self, factor: float) -> bool:
        """Step with the gradients times a factor, and clipped; false where they are not finite."""
        grads = [grad for p in self._params if (grad := p.grad) is not None]
        if not grads:  # the loss may have a gradient, by something that is no parameter
            raise self._without_gradient()
        grads = placement.locals_of(grads) if self.divided else grads
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        if self._watch:
            sound = all_finite(grads, flag=self._flag)
            if placement.any_rank(not sound) if self.divided else not sound:
                return False
            if self.options.clip is not None and self.slices is not None:
                clip_(grads, self.options.clip, divided=self.divided)
            elif self.options.clip is not None:
                torch.nn.utils.clip_grad_norm_([p for p in self._params if p.grad is not None], self.options.clip)
        try:
            self._step()
        except BaseException as error:
            self._caught(error, "optimizer.step()")
        return True

    def _caught(self, error: BaseException, function: str = "") -> None:
        """Tell an exception as one of the task's function, which other ranks hear of with the next sum.

        In place of contexts around what is called, since a step of a small network notices those.
        """
        with self.failure.caught():
            if not function:
                raise error
            with calling(self.task, function):
                raise error


def _backward(loss: Tensor, gradient: Tensor) -> None:
    """As `loss.backward(gradient)`, whose questions about shapes and dtypes take a small model longer than the look at
    its gradients: both are scalars of one dtype here.
    """
    if type(loss) is Tensor and not torch._C._are_functorch_transforms_active():
        _engine_run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        loss.backward(gradient)


class _Buffers:
    """The buffers that change during training, as they were before the step."""

    def __init__(self, model: nn.Module) -> None:
        self._all = list(model.buffers())
        # Batch norm's own kernel changes its statistics without a trace in their versions.
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._running = {buffer for module in norms for buffer in module.buffers()}
        self._kept: dict[Tensor, Tensor] = {}
        self._seen: dict[Tensor, int] = {}

    def changed(self) -> list[Tensor]:
        """Those that the first step has changed so far."""
        return [buffer for buffer, copy in self._kept.items() if not torch.equal(buffer, copy)]

    def note(self) -> None:
        """Keep copies of those that the last step changed; of all at first."""
        for buffer in self._all:
            if self._seen.get(buffer) == buffer._version and buffer not in self._running:
                self._kept.pop(buffer, None)
            else:
                self._kept[buffer] = buffer.clone()
                self._seen[buffer] = buffer._version

    def restore(self) -> None:
        """Undo a step's changes."""
        with torch.no_grad():
            for buffer, copy in self._kept.items():
                buffer.copy_(copy)
