"""What the rules for causes look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.block import Block, blocks
from gramian.inspection.causes.batch_tensors import SHOWN, Fed
from gramian.inspection.experiments.blocked_inputs import EQUAL
from gramian.inspection.experiments.evaluation_mode import Evaluated
from gramian.inspection.experiments.opening_zeros import Opening
from gramian.inspection.experiments.optimizer_steps import Steps
from gramian.inspection.experiments.small_changes import Probes
from gramian.inspection.experiments.target_leaks import Leak
from gramian.inspection.experiments.zero_products import Zeroed
from gramian.inspection.passes.loss_inputs import VALUES
from gramian.inspection.passes.records import Activation, Call, Criterion
from gramian.inspection.passes.step_records import Observed
from gramian.report import Layer

__all__ = ["ONE", "SHOWN", "Context"]

# ‖W‖_F² / σ₁² of a matrix that counts as one direction; smaller matrices than this side are not judged. What tens of
# steps of Adam make of zeros was between 1.014 and 1.1 in a modulation whose inputs hardly differ.
ONE, SIDE = 1.001, 4

# Ratio of the differences between samples after and before a module from which on its weights' scale is told. Inputs
# that go one way move it.
SMALL_GAIN, LARGE_GAIN = 0.2, 3.0

# Variation of a module's output below which the ε of a norm behind it, 1e-5 of a variance, weighs too.
LOST_IN_NORM = 0.01

# Share of the loss of a constant output below which a network has learned.
LEARNED = 0.4

# Calls of a layer from which on it is a recurrence's.
STEPS = 4


@dataclass
class Context(Fed):
    """A model, what a few training steps and a pass in evaluation mode showed, and its optimizer's steps on a copy.

    Rules put into `skipped` what they could not judge, and why, and into `asleep` the parameters of rectified units
    that are never active and may still wake. `began_at_zero` are those that were zero when a watch began.
    """

    model: nn.Module
    observed: Observed
    optimizer: Optimizer | None = None
    steps: Steps | None = None
    evaluated: Evaluated | None = None
    opening: Opening | None = None
    leak: Leak | None = None
    zeroed: Zeroed | None = None
    moved_by_steps: float | None = None
    further: list[Any] = field(default_factory=list)
    probes: Probes = field(default_factory=Probes)
    layers: list[Layer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    asleep: set[str] = field(default_factory=set)
    began_at_zero: frozenset[str] = frozenset()

    @cached_property
    def matrices(self) -> list[Block]:
        """The parameters that hold matrices, in the order of the forward pass."""
        used = self.observed.used
        return sorted(blocks(self.model).blocks, key=lambda block: used.get(block.name, math.inf))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def owners(self) -> set[str]:
        """The modules that have parameters of their own."""
        return {name for name, m in self.modules.items() if any(True for _ in m.parameters(recurse=False))}

    @cached_property
    def frozen(self) -> list[str]:
        return [name for name, p in self.parameters.items() if not p.requires_grad]

    @cached_property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's group of each of the model's parameters that it has."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        of = {id(p): group for group in groups for p in group["params"]}
        return {name: of[id(p)] for name, p in self.parameters.items() if id(p) in of}

    @cached_property
    def has_constant_output(self) -> bool:
        """Whether all samples get the same output, but for what dropout does to it."""
        if self.probes.is_constant:
            return True
        output = self.observed.output if self.observed.logits is None else self.observed.logits
        if output is not None and output.ndim and len(output) > 1 and output.numel():
            output = output.float()
            return float(output.std(0).amax()) <= EQUAL * float(output.abs().amax())
        calls = self.observed.calls
        return bool(calls) and calls[-1].output.between <= EQUAL * calls[-1].output.rms

    @cached_property
    def last(self) -> frozenset[str]:
        """Matrices on which the input of no module with parameters depends; the head, where that was not looked at.

        Of those that are zero or small alone, where `opening` says which.
        """
        if self.opening is not None:
            return self.opening.last
        owners = [self.module_of(b.name) for b in self.matrices]
        alone = {b.name for b, owner in zip(self.matrices, owners, strict=True) if owners.count(owner) == 1}
        leading = self.observed.leading  # in a module with several, one may lead to another
        last = set() if leading is None else alone & set(self.observed.used) - leading
        return frozenset(last.union(b.name for b in self.matrices if b.role == "head"))

    @cached_property
    def is_blocked(self) -> bool:
        """Whether all samples get the same output, and not because a head, whose inputs differ, starts at zero."""
        if not self.has_constant_output:
            return False
        if self.opening is None:
            return not any(block.role == "head" and not bool(w.any()) for block, w in self.values())
        calls = [self.first_calls.get(self.module_of(name)) for name in self.opening.last]
        given = [call.input for call in calls if call is not None and call.input is not None]
        return all(size.between <= EQUAL * size.rms for size in given) if given else not self.opening.last

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether the first layer with a matrix is called for each of several steps."""
        owners = {self.module_of(block.name) for block in self.matrices}
        names = [call.name for call in self.observed.calls if call.name in owners]
        return bool(names) and names.count(names[0]) >= STEPS

    @cached_property
    def has_learned(self) -> bool:
        """Whether the loss is far below that of an output that is the same for all samples.

        What is unusual in a network that has learned was no obstacle.
        """
        seen = self.observed
        for found in seen.criteria:
            given, target = found.given.double(), found.target
            if found.function == "cross_entropy" and seen.logits is not None and not target.is_floating_point():
                return seen.first_loss < LEARNED * math.log(max(2, seen.logits.shape[-1]))
            if found.function in VALUES and given.shape == target.shape and target.numel() > 1:
                target = target.double()
                return float((given - target).square().mean()) < LEARNED * float(target.var())
            if (
                found.function in ("binary_cross_entropy_with_logits", "binary_cross_entropy")
                and given.shape == target.shape
            ):
                p = float(target.double().mean())
                chance = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
                return seen.first_loss < LEARNED * chance
        share = self.probes.share_of_constant
        return share is not None and share < LEARNED and not seen.criteria

    @property
    def is_not_finite(self) -> bool:
        """Whether the loss or a gradient is NaN or infinite."""
        sizes = [g for g in self.observed.gradients.values() if g is not None]
        return not all(map(math.isfinite, [self.observed.loss, *sizes]))

    def criterion(self, function: str) -> Criterion | None:
        """The first call of one of torch's losses, by its name."""
        return next((c for c in self.observed.criteria if c.function == function), None)

    @cached_property
    def trained(self) -> set[str]:
        """Parameters whose matrices have singular values that independent entries do not have."""
        return {layer.name.partition("[")[0] for layer in self.layers if layer.above_noise}

    @cached_property
    def rank_one(self) -> set[str]:
        """Parameters all of whose matrices have one direction."""
        found: dict[str, bool] = {}
        for layer in self.layers:
            name = layer.name.partition("[")[0]
            one = min(layer.shape, default=0) >= SIDE and layer.stable_rank is not None and layer.stable_rank < ONE
            found[name] = found.get(name, True) and one
        return {name for name, one in found.items() if one}

    @cached_property
    def has_zero_gates(self) -> bool:
        """Whether zeros are why most gradients of zero are: they open in a few steps, or, untried, look as if they did.

        Not most in an underflow, where a few gradients come and go between batches.
        """
        if self.opening is not None:
            still = {n for n, size in self.observed.gradients.items() if size == 0.0}
            return 2 * len(still & self.opening.waiting) > len(still)
        return any(
            0 < p.numel() == max(p.shape, default=1) and "bias" not in name and not bool(p.detach().any())
            for name, p in self.parameters.items()
            if self.observed.gradients.get(name)
        )

    def told(self, module: str) -> str:
        """A module in a sentence, where a name like 0.3.1 alone would read as a number."""
        if not module:
            return "the model"
        kind = type(self.modules.get(module)).__name__
        return f"module '{module}'" + (f" ({kind})" if kind != "NoneType" else "")

    @cached_property
    def activations(self) -> list[Activation]:
        """The activations of the network: not those of a loss, behind all that has parameters."""
        seen = self.observed
        last = max((*seen.used.values(), *(c.order for c in seen.calls if c.name in self.owners)), default=0)
        return [a for a in seen.activations if not a.is_outside or a.order < last]

    def source_of(self, activation: Activation) -> str:
        """The module with parameters before an activation, to which its pre-activations are due.

        A parameter that a module around it takes by itself counts as that module's.
        """
        seen, before = self.observed, activation.order
        called = [(c.order, c.name) for c in seen.calls if c.name in self.owners and c.name != activation.name]
        used = [(order, self.module_of(n)) for n, order in seen.used.items()]
        return max((one for one in called + used if one[0] < before), default=(0, activation.name))[1]

    def module_of(self, parameter: str) -> str:
        """The name of the module that owns a parameter."""
        return parameter.rpartition(".")[0]

    @cached_property
    def first_calls(self) -> dict[str, Call]:
        found: dict[str, Call] = {}
        for call in self.observed.calls:
            found.setdefault(call.name, call)
        return found

    def is_normed(self, block: Block) -> bool:
        """Whether the next module after the block's is a norm, which restores the scale."""
        call = self.first_calls.get(self.module_of(block.name))
        after = next((c for c in self.observed.calls if call is not None and c.order > call.order), None)
        return after is not None and "Norm" in after.kind

    def has_used_twin(self, name: str) -> bool:
        """Whether a module, or one that holds it, has a sibling of the same class that is called."""
        while name:
            parent, _, own = name.rpartition(".")
            holder = self.model.get_submodule(parent)
            kind = type(dict(holder.named_children()).get(own))
            prefix = f"{parent}." if parent else ""
            twins = [n for n, m in holder.named_children() if n != own and type(m) is kind]
            if any(prefix + n in self.observed.called for n in twins) and name not in self.observed.called:
                return isinstance(holder, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
            name = parent
        return False

    def has_gain(self, block: Block, scale: float) -> bool:
        """Whether the module was measured to change the differences between samples in the way its weights say.

        A bias is the same for all samples, so that it does not hide what the weights do.
        """
        call = self.first_calls.get(self.module_of(block.name))
        if call is None or call.input is None or not call.input.between > 0 or len(block.shape) > 2:
            return True
        gain = call.output.between / call.input.between
        return gain > LARGE_GAIN if scale > 1 else gain < SMALL_GAIN

    def is_lost_in_norm(self, block: Block) -> bool:
        """Whether the output of a layer is so small that the ε of the norm behind it weighs more."""
        call = self.first_calls.get(self.module_of(block.name))
        return call is not None and call.output.between < LOST_IN_NORM

    def values(self) -> Iterator[tuple[Block, Tensor]]:
        """Each matrix with the values of its parameter."""
        for block in self.matrices:
            p = self.parameters.get(block.name)
            if p is not None and p.is_floating_point():
                yield block, p.detach()
