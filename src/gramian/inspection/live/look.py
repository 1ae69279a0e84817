"""What a look of a `watch` measures of weights, gradients and a step, and which rules judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from statistics import median

from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.block import Block, blocks
from gramian.errors import GramianError
from gramian.inspection.causes import Context
from gramian.inspection.causes.gates import RULES as GATES
from gramian.inspection.causes.modules import RULES as MODULES
from gramian.inspection.causes.norm_sizes import RULES as NORM_SIZES
from gramian.inspection.causes.norms import RULES as NORMS
from gramian.inspection.causes.norms import SETTLED, norm_statistics
from gramian.inspection.causes.optimizer import RULES as STEPPING
from gramian.inspection.causes.optimizer import SLOW
from gramian.inspection.causes.parameters import RULES as PARAMETERS
from gramian.inspection.causes.wiring import numbers, shared, unreached
from gramian.inspection.experiments.optimizer_steps import Steps
from gramian.inspection.live.clipping import LASTING
from gramian.inspection.live.gradients import norms, sampled
from gramian.inspection.live.loop_faults import Loop
from gramian.inspection.live.rate_damage import SWOLLEN, Driven
from gramian.inspection.passes.signal import in_words
from gramian.inspection.passes.step_records import Observed
from gramian.report import Finding

__all__ = ["CODES", "Looker"]

EVERY_LOOK: tuple[Callable, ...] = (numbers, unreached, *MODULES, *GATES, *NORMS, *NORM_SIZES)

CODES = frozenset((
    "gain-above-one", "gain-below-one", "non-finite-weights", "input-non-finite",
    "loss-non-finite", "gradient-overflow", "gradient-underflow",
    "steps-skipped", "graph-cut", "parameter-unused", "parameter-shared", "zero-weights", "parameter-constant",
    "parameter-rank-one", "parameter-scale-small", "parameter-scale-large", "embedding-scale", "head-scale",
    "dead-units", "saturated-units", "gate-shut", "dropout-rate", "dropout-evaluation", "attention-saturated",
    "attention-masked", "residual-growth", "reduction-cancels", "norm-zero-gain", "norm-single-value",
    "norm-few-values", "norm-statistics", "norm-evaluation-mode", "modes-disagree", "parameter-not-stepped",
    "gradient-kept", "gradient-dropped", "gradient-clipped", "parameter-frozen", "rate-grows", "rate-vanished",
    "momentum-too-high", "weight-decay-too-large", "rate-too-high", "rate-too-low", "loss-maximized",
    "state-lost",
))  # fmt: skip
"""Codes of all findings that a watch can make."""

# What errors show that a rate has grown too far, if they were not there before: steps, or weights, that are too large.
_TOO_FAR = frozenset((
    "rate-too-high", "gain-above-one", "norm-statistics", "head-scale", "parameter-scale-large", "attention-saturated",
))  # fmt: skip
# What has its cause in the modules, perhaps, which only a full look sees.
_PUZZLING = frozenset(("rate-too-high", "rate-too-low"))

# Change of a matrix's norm, as a share, from which on the rules about its values are run again.
CHANGED = 0.05


class Looker:
    """Measures and judges the steps that are looked at.

    The rules about parameters' values and about the model's structure are run at the first look, and again when a
    norm has changed by a twentieth, or whether all samples get the same output.

    Attributes:
        numbers: of the last look.
        failed: by name, rules that could not be run, and why.
        is_puzzled: whether a full look should follow the brief one that was made.

    Args:
        root: the model.
        parameters: those that are trained, by name.
        optimizer: that steps them, or `None`.
    """

    def __init__(self, root: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        self.root, self.parameters, self.optimizer = root, parameters, optimizer
        self.numbers: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.is_settled = False
        self.loop = Loop(parameters, optimizer)
        self._matrices: tuple[Block, ...] | None = None
        self._judged: tuple[dict[str, float], bool] | None = None  # norms, and whether the output was constant
        self._before: dict[str, Tensor] = {}
        self._found: list[Finding] = []
        self.is_puzzled = False
        self._zero: frozenset[str] | None = None  # matrices that are zero at the first look
        self._asked: set[str] = set()  # codes for which a full look was asked for
        self._first: dict[str, float] = {}  # norms of matrices at the first look
        self._usual: set[str] = set()  # codes that were found while no rate had grown
        self._driven = Driven(self._growth)

    def ordered(self, found: Collection[Finding]) -> list[Finding]:
        """What was found at a step, causes first, with what a rate did to weights that were in order linked to it."""
        return self._driven.ordered(found)

    def _growth(self) -> float:
        """Times its first norm that the median matrix has now; infinite where one is not finite."""
        sizes = norms(sampled((n, self.parameters[n]) for n in self._first))
        growth = [size / self._first[n] for n, size in sizes.items() if self._first[n]]
        return median(growth or [1.0]) if all(map(math.isfinite, growth)) else math.inf

    def before_step(self, seen: Observed, passes: int, scale: Tensor | None, step: int) -> None:
        """Measures gradients and weights, and judges the pass, before the step moves the weights."""
        self._measure_gradients(seen, scale)
        matrices = ((n, p) for n, p in self.parameters.items() if p.ndim >= 2 and seen.gradients.get(n))
        self._before = {n: t.clone() for n, t in sampled(matrices).items()}
        found = self.loop.judge(seen, passes, step, scaled=scale is not None)
        self._found = [*found, *self.judge_modules(seen, passes)]

    def after_step(self, seen: Observed, passes: int, *, is_brief: bool = False) -> list[Finding]:
        """What was found of the pass and of the step that was made.

        A brief look does not see what makes steps too large or too small: then it asks for a full one, once.
        """
        before, self._before = self._before, {}
        changes: dict[str, float] = {}
        sizes: dict[str, float] = {}
        if before:
            sizes = norms(before)
            self._first = self._first or sizes
            after = sampled((n, self.parameters[n]) for n in before)
            moved = {n: t.sub_(after[n]) for n, t in before.items()}
            changes = {n: norm / sizes[n] for n, norm in norms(moved).items() if sizes[n] > 0}
        if changes:
            self.numbers["change"] = median(changes.values())
            self.loop.changes |= changes
        found = self._harmful([*self._found, *self._judge(STEPPING, seen, passes, changes)], changes, sizes)
        if is_brief:
            puzzling = {f.code for f in found} & _PUZZLING
            self.is_puzzled = bool(puzzling - self._asked)
            self._asked |= puzzling
            return [f for f in found if f.code not in puzzling]
        self.is_puzzled = False
        return found

    def _harmful(self, found: list[Finding], changes: Mapping[str, float], sizes: Mapping[str, float]) -> list[Finding]:
        """Leaves out what is meant where it does no harm, as clipping and a test of rates are."""
        codes = {f.code for f in found}
        is_slow = "rate-too-low" in codes or (
            self.loop.clipping.count >= LASTING and bool(changes) and median(changes.values()) < SLOW
        )
        growth = [size / self._first[n] for n, size in sizes.items() if self._first.get(n)]
        errors = {f.code for f in found if f.severity == "error"}
        is_large = bool(_TOO_FAR & errors - self._usual) or (bool(growth) and median(growth) > SWOLLEN)
        if "rate-grows" not in codes:
            self._usual |= errors
        found = [replace(f, severity="error") if f.code == "rate-grows" else f for f in found]
        does_harm = {"gradient-clipped": is_slow, "rate-grows": is_large}
        return [f for f in found if does_harm.get(f.code, True)]

    def judge_modules(self, seen: Observed, passes: int) -> list[Finding]:
        """Of the weights as they were in the forward pass; nothing if that was not seen."""
        if not seen.called:
            return []
        self.is_settled = self.is_settled or _is_settled(self.root)
        rules = [rule for rule in EVERY_LOOK if self.is_settled or rule is not norm_statistics]
        context = self._context(seen, passes)
        sizes = norms({n: p for n, p in self.parameters.items() if p.ndim >= 2})
        if self._zero is None:
            self._zero = frozenset(n for n, size in sizes.items() if size == 0.0)
        context.began_at_zero = self._zero
        state = sizes, context.has_constant_output
        if self._judged is None or _has_changed(self._judged, state):
            rules += [shared, *PARAMETERS]
            self._judged = state
        found = self._run(rules, context)
        self._driven.begin(found)
        return found

    def _measure_gradients(self, seen: Observed, scale: Tensor | None) -> None:
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        if not gradients:
            return  # a closure makes them within the step
        factor = 1.0 if scale is None else 1.0 / float(scale)
        sizes = {n: norm * factor for n, norm in norms(gradients).items()}
        for name, p in self.parameters.items():
            rms = sizes[name] / math.sqrt(max(1, p.numel())) if name in sizes else None
            seen.gradients[name] = rms
            seen.zero_gradients[name] = float(rms is None or rms == 0.0)
        self.numbers["gradient"] = math.hypot(*sizes.values())

    def _judge(
        self, rules: Iterable[Callable], seen: Observed, passes: int, changes: Mapping[str, float]
    ) -> list[Finding]:
        sizes = [g for g in seen.gradients.values() if g]
        steps = Steps(changes=dict(changes), gradient=median(sizes or [0.0])) if changes else None
        return self._run(rules, self._context(seen, passes, steps))

    def _context(self, seen: Observed, passes: int, steps: Steps | None = None) -> Context:
        seen.batches = [None] * passes
        context = Context(self.root, seen, self.optimizer, steps)
        if self._matrices is None:
            try:
                self._matrices = blocks(self.root).blocks
            except GramianError as error:
                self._matrices, self.failed["weights"] = (), in_words(error)
        context.matrices = sorted(self._matrices, key=lambda block: seen.used.get(block.name, math.inf))
        return context

    def _run(self, rules: Iterable[Callable], context: Context) -> list[Finding]:
        found: list[Finding] = []
        for rule in rules:
            try:
                found += rule(context)
            except Exception as error:  # a rule must not stop a training
                self.failed[rule.__name__.replace("_", " ")] = f"the rule failed: {in_words(error)}"
        return found


def _has_changed(old: tuple[dict[str, float], bool], new: tuple[dict[str, float], bool]) -> bool:
    return old[1] != new[1] or any(not abs(size - old[0][n]) <= CHANGED * old[0][n] for n, size in new[0].items())


def _is_settled(root: nn.Module) -> bool:
    """Whether all running statistics have seen enough batches to be those of the data."""
    counts = [getattr(module, "num_batches_tracked", None) for module in root.modules()]
    return all(count.item() >= SETTLED for count in counts if isinstance(count, Tensor))
