"""Where the first value that is not finite came from: a forward pass, run again with a look at every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped, tensors
from gramian.errors import some
from gramian.inspection.causes import Context
from gramian.inspection.causes.context import SHOWN
from gramian.inspection.causes.loss import non_finite
from gramian.inspection.causes.precision import gradient_overflow
from gramian.inspection.passes.nonfinite_derivatives import first_infinite_derivative
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_pass import Watcher
from gramian.placement import exchange_json
from gramian.recording.measuring import training
from gramian.report import Finding

NARROW = (torch.float16, torch.bfloat16)
# In place of a module and operation: no derivative in the model is infinite.
BEHIND = ("", "")

__all__ = ["Pass", "are_finite", "find_origin", "values_of"]


@dataclass(frozen=True)
class Pass:
    """A forward pass that can be run again: what the model was given, without a graph, and under which autocast.

    `call` is what is called with the arguments, where that is not the model.
    """

    args: tuple
    kwargs: dict[str, Any]
    autocasts: list[tuple[str, torch.dtype]]
    call: Callable | None = None

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any], call: Callable | None = None) -> Pass:
        """The pass that begins now."""
        values = (*args, *kwargs.values()) if kwargs else args
        is_plain = all(type(t) is Tensor and not t.requires_grad for t in values)
        if is_plain and not torch._C._is_any_autocast_enabled():  # nothing to copy: this is paid at every step
            return Pass(args, kwargs, [], call)
        kinds = {t.device.type for t in values if type(t) is Tensor}

        def kept(t: Tensor) -> Tensor:
            kinds.add(t.device.type)
            return t.detach() if t.requires_grad else t

        if not is_plain:
            args, kwargs = mapped((args, kwargs), kept)
        enabled = [(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)]
        return Pass(args, kwargs, enabled, call)

    @property
    def is_narrow(self) -> bool:
        """Whether autocast computes in float16 or bfloat16."""
        return any(dtype in NARROW for _, dtype in self.autocasts)

    @contextmanager
    def run(self, model: nn.Module, watcher: Watcher | None = None) -> Iterator[Any]:
        """A context with what it gives once more, watched, and uncompiled.

        At its end the model's mode, its buffers and the random state are restored: after a backward pass, which may
        need the buffers as the forward pass left them.
        """
        with ExitStack() as inside:
            for kind, dtype in self.autocasts:
                inside.enter_context(torch.autocast(kind, dtype=dtype))
            inside.enter_context(training(model))
            if watcher is not None:
                inside.enter_context(watcher.installed())
            yield (self.call or model)(*self.args, **self.kwargs)


def find_origin(
    model: nn.Module, last: Pass | None, parallel: nn.parallel.DistributedDataParallel | None, when: str
) -> Finding:
    """Say where the values that are not finite come from: weights, inputs, an operation, or behind the model.

    Args:
        model: left as it was.
        last: its last forward pass; `None` where it could not be watched.
        parallel: around the model; then all ranks ask together, and all get the answer of the first that has one.
        when: the step, in words.

    Returns: the finding.
    Cost: a pass over the weights and a forward pass with a look at each operation.
    """
    weights = [n for n, p in model.named_parameters() if not are_finite([values_of(p)])]
    if weights:
        return Finding(
            "non-finite-weights",
            "error",
            f"{some(weights, SHOWN)} {'has' if len(weights) == 1 else 'have'} values that are NaN or infinite",
            where=some(weights, SHOWN),
            evidence=f"before {when} (exact)",
            cause="An earlier step, or the checkpoint, made them.",
            advice="Go back to an earlier checkpoint, and continue with a lower learning rate or clipped gradients.",
        )
    found = None if last is None else _run_again(model, last)
    if parallel is not None:
        every = exchange_json(found, parallel.process_group)
        found = next(((one[0], one[1]) for one in every if one is not None), None)
    if found == ("", ""):
        return Finding(
            "input-non-finite",
            "error",
            "The inputs have values that are NaN or infinite",
            where="input",
            evidence=f"in the last batch of {when} (exact)",
            cause="The data have missing or overflown values; everything computed from them is lost.",
            advice="Find where they come from, and replace or drop those samples.",
        )
    if found is not None:
        (finding,) = non_finite(Context(model, Observed(first_non_finite=found)))
        return replace(finding, evidence=f"{when}: {finding.evidence.partition('; ')[2]}")  # the loss is not known
    gradients = {n: values_of(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    bad = [n for n, grad in gradients.items() if not are_finite([grad])]
    again = "; a forward pass of its last batch has finite values only (exact)" if last is not None else ""
    is_narrow = any(t.dtype in NARROW for t in gradients.values()) or (last is not None and last.is_narrow)
    derivative = None if last is None or not bad else _differentiated_again(model, last)
    if parallel is not None:
        every = exchange_json(derivative, parallel.process_group)
        derivative = next(((one[0], one[1]) for one in every if one is not None), None)
    told = f"{when}: {len(bad)} of {len(gradients)} gradients (exact){again}"
    if derivative != BEHIND:
        return gradient_overflow(bad, len(gradients), told, derivative, is_narrow=is_narrow)
    finding = gradient_overflow(bad, len(gradients), told, None, is_narrow=is_narrow)
    return _behind(finding) if finding.where == "all layers" and not is_narrow else finding


def _behind(finding: Finding) -> Finding:
    """The finding about gradients that are lost behind the model, in a loss that is not watched."""
    return replace(
        finding,
        title=f"{finding.title}, from the loss on",
        where="loss",
        evidence=f"{finding.evidence}; from other gradients at the outputs all that come of them are finite (exact)",
        cause="The derivative of an operation behind the model is infinite where its function is finite (√0, ‖0‖, "
        "arccos 1), or left the range of the dtype.",
        advice="gm.inspect(model, batches, loss) names the operation; an ε inside of a root, a norm or a logarithm, or "
        "a clamp before it, keeps its argument away from that point.",
    )


def _differentiated_again(model: nn.Module, last: Pass) -> tuple[str, str] | None:
    """The module and operation whose derivative is not finite where a random gradient arrives at the outputs.

    `BEHIND`, where all are finite.
    """
    if any(hasattr(p, "to_local") for p in model.parameters()):
        return None  # sharded parameters are gathered for a backward pass of the whole loss alone

    held = ExitStack()

    def forward() -> Tensor:
        made = [t for t in tensors(held.enter_context(last.run(model))) if t.is_floating_point() and t.requires_grad]
        generators = {t.device: torch.Generator(t.device).manual_seed(0) for t in made}
        return torch.stack(
            [(t * torch.randn(t.shape, generator=generators[t.device], device=t.device)).float().sum() for t in made]
        ).sum()

    try:
        with held:
            return first_infinite_derivative(model, forward) or BEHIND
    except Exception:  # a pass that cannot be repeated with a graph, or outputs that have none
        return None


def _run_again(model: nn.Module, last: Pass) -> tuple[str, str] | None:
    """The module and operation that make the first value that is not finite; two empty names for the inputs."""
    if not are_finite(tensors((last.args, last.kwargs))):
        return "", ""
    watcher = Watcher(model, Observed(), careful=True)
    try:
        with torch.enable_grad(), last.run(model, watcher):  # a model may differentiate on its way
            pass
    except Exception:  # an operation that refuses such values: what was found before it counts
        pass
    return watcher.first_non_finite


def are_finite(found: Iterable[Tensor]) -> bool:
    """Whether all values are, from the largest: one synchronization with the device."""
    floats = [t.detach() for t in found if t.is_floating_point() and t.numel()]
    return not floats or bool(torch.nn.utils.get_total_norm(floats, float("inf")).isfinite())


def values_of(t: Tensor) -> Tensor:
    """The stored values: of a sparse tensor those that are not zero, of a sharded one this rank's; complex as pairs,
    and floats of a byte, for which torch has no sums, in float32."""
    t = t.detach()
    local = getattr(t, "to_local", None)
    t = t if local is None else local()
    t = t.coalesce().values() if t.is_sparse else t
    if t.is_complex():
        return torch.view_as_real(t.resolve_conj())
    return t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t
