"""One training step, watched: what every module gives and gets back, without changing the model.

Hooks on the modules say where the computation is; a torch function mode sees the operations, also those that no module
wraps: activations, attention, residual additions, and where autograd is cut. All of it is kept as a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gramian.alignment import labels_of
from gramian.batch import tensors
from gramian.objective import Objective
from gramian.recording.measuring import eager
from gramian.recording.tracking import tensors_of
from gramian.recording.unfused import UNFUSED

__all__ = [
    "Activation",
    "Addition",
    "Attention",
    "Call",
    "Cut",
    "Moments",
    "Observed",
    "batch_statistics",
    "observe",
    "training_as_used",
]

# Batches that are read for a diagnosis of the signal.
NUM_BATCHES = 4

# Operations that cut the graph and are looked into.
MOST_CUTS = 64

# A unit of tanh or sigmoid counts as saturated this close to an end of its range, as a share of the range.
SATURATED = 0.01


@dataclass(frozen=True)
class Moments:
    """The size of a tensor whose first dimension holds the samples.

    Attributes:
        rms: root mean square of all entries.
        between: root mean square over positions of the standard deviation between samples.
        is_finite: whether all entries are.
    """

    rms: float
    between: float
    is_finite: bool


@dataclass
class Call:
    """A call of a module that applies parameters or has no children; `gradient` is that of the loss at its output."""

    name: str
    kind: str
    order: int
    input: Moments | None
    output: Moments
    gradient: Moments | None = None


@dataclass
class Activation:
    """An activation function's output: which of its channels never act."""

    name: str
    function: str
    order: int
    channels: int
    dead: int
    saturated: float
    mean: float
    rows: int


@dataclass(frozen=True)
class Attention:
    """Softmax weights over keys: their entropy as a share of ln(number of keys), on average."""

    name: str
    order: int
    entropy: float


@dataclass(frozen=True)
class Addition:
    """A residual addition of two tensors of one shape, neither of them a parameter."""

    name: str
    order: int
    shape: torch.Size
    rms: float


@dataclass(frozen=True)
class Cut:
    """An operation whose input needs a gradient and whose output does not."""

    name: str
    function: str
    order: int
    behind: frozenset[str] = frozenset()  # the parameters whose gradient would come through it


@dataclass
class Observed:
    """What a few training steps showed.

    Attributes:
        calls, activations, attentions, additions, cuts: in the order of the forward pass of the first batch.
        modes: whether each batch norm and dropout used its training form, by name.
        gradients: root mean square of the loss's gradient by parameter; `None` where it does not reach the parameter.
        zero_gradients: share of exact zeros in it.
        used: order of the first operation that takes each parameter; those that are missing take part in nothing.
        called: names of the modules whose forward ran.
        logits: what cross-entropy was applied to, as float32, from the first batch.
        loss: mean over units, in training mode.
        units: number of units.
        batches: the batches themselves, for the rules about data.
        first_non_finite: module and operation that made the first value that is not finite out of finite ones.
        labels: smallest and largest label, and the number of classes, of the first batch.
        error: what the loss raised, where the labels explain it; then nothing else was watched.
        branch_ends: modules whose output is an operand of a residual addition.
        needs_gradient: whether the loss does.
        statistics: of each batch norm whose stored statistics are no longer the initial ones: how far their means are
            from those of the batch, in standard deviations, and the ratio of the variances.
    """

    calls: list[Call] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    gradients: dict[str, float | None] = field(default_factory=dict)
    zero_gradients: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    statistics: dict[str, tuple[float, float]] = field(default_factory=dict)
    logits: Tensor | None = None
    loss: float = float("nan")
    units: float = 0.0
    batches: list[Any] = field(default_factory=list)
    first_non_finite: tuple[str, str] | None = None
    branch_ends: set[str] = field(default_factory=set)
    needs_gradient: bool = True
    labels: tuple[int, int, int] | None = None
    error: Exception | None = None


@contextmanager
def training_as_used(model: nn.Module) -> Iterator[None]:
    """A context with the model in the mode in which it is trained; modes, buffers and random state are restored.

    A model whose root is in training mode is left as it is, so that parts that are in evaluation mode on purpose stay
    there. One in evaluation mode as a whole is set to training.

    Args:
        model: any module.

    Returns: the context manager.
    Raises: nothing of its own.
    Cost: a copy of the buffers.
    Source: this library's own.

    >>> layer = nn.BatchNorm1d(2)
    >>> with training_as_used(layer):
    ...     _ = layer(torch.ones(4, 2))
    >>> int(layer.num_batches_tracked)
    0
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), eager():
            if not model.training:
                model.train()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which batch norms that train use the batch's statistics in evaluation mode too.

    Args:
        model: any module.

    Returns: the context manager.
    Raises: nothing of its own.
    Cost: a pass over the modules.
    Source: this library's own.

    >>> layer = nn.BatchNorm1d(1)
    >>> with batch_statistics(layer):
    ...     layer.eval()(torch.tensor([[1.0], [3.0]])).detach().abs().round(decimals=3).flatten().tolist()
    [1.0, 1.0]
    """
    kept = []
    for module in model.modules():
        trains = module.training or not model.training
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and trains:
            kept.append((module, module.running_mean, module.running_var))
            module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def observe(
    model: nn.Module, batches: Iterable[Any], objective: Objective, *, num_batches: int = NUM_BATCHES
) -> Observed:
    """Run a few training steps without the step, and say what every module gave and got back.

    Args:
        model: left as it was: parameters, their `.grad`, buffers, modes, random state.
        batches: the first `num_batches` are read.
        objective: its loss is differentiated.
        num_batches: how many.

    Returns: an `Observed`.
    Raises: what the model raises.
    Cost: `num_batches` training steps without the optimizer, and a few passes over each activation.
    Source: this library's own.
    """
    seen = Observed()
    seen.batches = list(islice(batches, num_batches))
    parameters = dict(model.named_parameters())
    with training_as_used(model):
        for i, batch in enumerate(seen.batches):
            watcher = _Watcher(model, seen, first=i == 0)
            try:
                with watcher.installed(), torch.enable_grad():
                    total, units = objective.loss(model, batch)
            except Exception as error:
                seen.labels = seen.labels or _labels_of(model, batch, objective)
                if seen.labels is None or not _is_out_of_range(*seen.labels):
                    raise
                seen.error = error
                return seen
            _differentiate(total / units, parameters, seen, first=i == 0)
            seen.loss = (0.0 if i == 0 else seen.loss) + float(total.detach())
            seen.units += float(units)
        bad = any(not call.output.is_finite for call in seen.calls) or not _finite(seen.loss)
        if bad and seen.batches:
            watcher = _Watcher(model, Observed(), first=True, careful=True)
            with watcher.installed(), torch.no_grad():
                objective.loss(model, seen.batches[0])
            seen.first_non_finite = watcher.first_non_finite
    seen.loss = seen.loss / seen.units if seen.units else float("nan")
    return seen


def labels_range(scores: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[int, int, int] | None:
    """Smallest and largest label, and the number of classes."""
    axis = 1 if target.ndim < scores.ndim and scores.ndim > 1 and target.shape != scores.shape[:-1] else -1
    kept = target[target != ignore_index]
    return (int(kept.min()), int(kept.max()), scores.shape[axis]) if kept.numel() else None


def _labels_of(model: nn.Module, batch: Any, objective: Objective) -> tuple[int, int, int] | None:
    """The range of the labels where the criterion refused them before it called a loss of torch."""
    try:
        with torch.no_grad():
            output, target = objective.predict(model, batch), labels_of(batch)
    except Exception:
        return None
    if not isinstance(output, Tensor) or output.ndim < 2 or target.is_floating_point():
        return None
    return labels_range(output, target)


def _is_out_of_range(smallest: int, largest: int, classes: int) -> bool:
    return smallest < 0 or largest >= classes


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _differentiate(loss: Tensor, parameters: Mapping[str, Tensor], seen: Observed, *, first: bool) -> None:
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not loss.requires_grad or not wanted:
        seen.needs_gradient = bool(loss.requires_grad)
        seen.gradients |= dict.fromkeys(wanted)
        return
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for (name, _), grad in zip(wanted.items(), found, strict=True):
        if grad is None:
            seen.gradients.setdefault(name, None)
        elif first or seen.gradients.get(name) is None:
            grad = grad.coalesce().values() if grad.is_sparse else grad
            wide = grad.detach().abs().double()
            seen.gradients[name] = float(wide.square().mean().sqrt()) if wide.numel() else 0.0
            seen.zero_gradients[name] = float((wide == 0).double().mean()) if wide.numel() else 0.0


def moments(t: Tensor) -> Moments:
    """The size of a tensor, from one pass for the moments over samples."""
    wide = t.detach().float()
    if wide.ndim == 0 or wide.shape[0] < 2:
        wide = wide.reshape(-1, 1) if wide.ndim < 2 else wide.reshape(-1, wide.shape[-1])
    if wide.numel() == 0:
        return Moments(0.0, 0.0, is_finite=True)
    largest = float(wide.abs().amax())
    if not _finite(largest):
        return Moments(largest, largest, is_finite=False)
    scale = largest or 1.0  # squares of very large and very small values exist after division
    variance, mean = torch.var_mean(wide / scale, dim=0, correction=0)
    between = float(variance.mean().sqrt()) * scale
    rms = float((variance + mean.square()).mean().sqrt()) * scale
    return Moments(rms, between, is_finite=True)


# Activations whose zeros are dead units, and those with an end on both sides: name, lower and upper end.
_RECTIFIERS: dict[Callable, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", Tensor.relu: "relu", Tensor.relu_: "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh",
}  # fmt: skip
_BOUNDED: dict[Callable, tuple[str, float, float]] = {
    torch.tanh: ("tanh", -1.0, 1.0), Tensor.tanh: ("tanh", -1.0, 1.0), F.tanh: ("tanh", -1.0, 1.0),
    torch.sigmoid: ("sigmoid", 0.0, 1.0), Tensor.sigmoid: ("sigmoid", 0.0, 1.0), F.sigmoid: ("sigmoid", 0.0, 1.0),
}  # fmt: skip
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__, Tensor.__radd__}


class _Watcher(TorchFunctionMode):
    def __init__(self, model: nn.Module, seen: Observed, *, first: bool, careful: bool = False) -> None:
        super().__init__()
        self.model, self.seen, self.first, self.careful = model, seen, first, careful
        self.stack: list[str] = []
        self.order = 0
        self.unfused = 0  # depth of calls that run unfused
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.made_by: dict[int, list[str]] = {}
        self.alive: list[Tensor] = []  # so that no id of an output is used twice
        self.first_non_finite: tuple[str, str] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), always_call=True, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.alive.clear()

    def _enter(self, name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            if self.first and isinstance(module, nn.modules.batchnorm._BatchNorm):
                given = _first_float((*args, *kwargs.values()))
                if given is not None and given.ndim > 1 and given.numel() > given.shape[1]:
                    with torch._C.DisableTorchFunction():  # before the call, which updates the statistics
                        self._compare_statistics(name, module, given)

        return hook

    def _leave(self, name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.stack:
                self.stack.pop()
            with torch._C.DisableTorchFunction():
                self._returned(name, module, args, kwargs, output)

        return hook

    def _returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen.called.add(name)
        made = _first_float((output,))
        if made is None or not self.first:
            return
        self.made_by.setdefault(id(made), []).append(name)
        self.alive.append(made)
        given = _first_float((*args, *kwargs.values()))
        if any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False)):
            return
        self.order += 1
        call = Call(
            name, type(module).__name__, self.order, moments(given) if given is not None else None, moments(made)
        )
        self.seen.calls.append(call)
        if made.requires_grad:
            made.register_hook(lambda grad: setattr(call, "gradient", moments(grad)))

    def _compare_statistics(self, name: str, module: nn.modules.batchnorm._BatchNorm, given: Tensor) -> None:
        """Keeps how far the stored statistics of a batch norm are from those of this batch."""
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None:
            return
        if bool((mean == 0).all()) and bool((variance == 1).all()):
            if _is_trained(module):  # the statistics were lost
                self.seen.statistics[name] = (float("inf"), float("inf"))
            return  # as they are made: nothing was averaged yet
        channels = given.detach().transpose(0, 1).flatten(1).float()
        found_variance, found_mean = torch.var_mean(channels, dim=1)
        eps = module.eps
        shift = ((mean - found_mean).square() / (found_variance + eps)).mean().sqrt()
        ratio = ((variance.clamp(min=0) + eps) / (found_variance + eps)).log().abs().mean().exp()
        self.seen.statistics[name] = (float(shift), float(ratio))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in UNFUSED:
            self.unfused += 1
            try:
                with self:
                    return UNFUSED[func](*args, **kwargs)
            finally:
                self.unfused -= 1
        if func in (F.cross_entropy, F.nll_loss) and self.first:
            self._labels(args, kwargs)
        finite_before = self.careful and self.first_non_finite is None and _all_finite((*args, *kwargs.values()))
        output = func(*args, **kwargs)
        name = self.stack[-1] if self.stack else ""
        with torch._C.DisableTorchFunction():
            if finite_before and not _all_finite((output,)):
                self.first_non_finite = (name, getattr(func, "__name__", str(func)))
            if self.first and not self.careful:
                self._see(name, func, args, kwargs, output)
        return output

    def _see(self, name: str, func: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        self.order += 1
        given = list(tensors_of((*args, *kwargs.values())))
        for t in given:
            if id(t) in self.names:
                self.seen.used.setdefault(self.names[id(t)], self.order)
        made = output if isinstance(output, Tensor) else None
        if made is None:
            return
        if not made.requires_grad and made.ndim and any(t.requires_grad for t in given):
            self._cut(name, getattr(func, "__name__", str(func)), given)
        if func in _RECTIFIERS:
            self._activation(name, _RECTIFIERS[func], made, None)
        elif func in _BOUNDED:
            function, *ends = _BOUNDED[func]
            finite = given[0].isfinite() if given and given[0].shape == made.shape else None
            self._activation(name, function, made, (ends[0], ends[1]), finite)
        elif func in _SOFTMAX and made.ndim >= 3 and made.shape[-1] > 1:
            self._attention(name, made)
        elif func is F.scaled_dot_product_attention and len(args) >= 2:
            self._attention(name, _weights(*args[:2], **kwargs))
        elif func in _ADDITIONS and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            self._addition(name, args[0], args[1], made)
        elif func is F.cross_entropy or func is F.nll_loss:
            scores = args[0] if args else kwargs.get("input")
            if isinstance(scores, Tensor) and func is F.cross_entropy and self.seen.logits is None:
                self.seen.logits = _rows_of_scores(scores)

    def _activation(
        self, name: str, function: str, made: Tensor, ends: tuple[float, float] | None, finite: Tensor | None = None
    ) -> None:
        if made.ndim < 2 or (finite is not None and not bool(finite.all())):
            return  # scores that a mask has set to −∞ are at their end on purpose
        axis = 1 if made.ndim == 4 or (made.ndim == 3 and self._is_convolutional()) else made.ndim - 1
        channels = made.detach().movedim(axis, -1).reshape(-1, made.shape[axis])
        dead, saturated = 0, 0.0
        if ends is None:
            dead = int((channels == 0).all(0).sum())
        else:
            low, high = ends
            margin = SATURATED * (high - low)
            at_end = (channels < low + margin) | (channels > high - margin)
            saturated = float(at_end.float().mean())
            dead = int((at_end.float().mean(0) > 0.99).sum())
        mean = float(channels.float().mean())
        found = Activation(name, function, self.order, channels.shape[1], dead, saturated, mean, channels.shape[0])
        self.seen.activations.append(found)

    def _labels(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Keeps the number of classes and the range of the labels, before a loss that may refuse them."""
        scores = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(scores, Tensor) and isinstance(target, Tensor) and not target.is_floating_point():
            self.seen.labels = labels_range(scores, target, kwargs.get("ignore_index", -100))

    def _cut(self, name: str, function: str, given: list[Tensor]) -> None:
        if len(self.seen.cuts) < MOST_CUTS:
            behind = frozenset(self.names[leaf] for t in given for leaf in _leaves(t) if leaf in self.names)
            self.seen.cuts.append(Cut(name, function, self.order, behind))

    def _is_convolutional(self) -> bool:
        """Whether the last module with a matrix was a convolution, whose channels are the second dimension."""
        kinds = [call.kind for call in self.seen.calls if "Conv" in call.kind or call.kind == "Linear"]
        return bool(kinds) and "Conv" in kinds[-1]

    def _attention(self, name: str, weights: Tensor | None) -> None:
        if weights is None:
            return
        p = weights.detach().float()
        allowed = (p > 0).sum(-1).clamp(min=2)
        kept = (p > 0).sum(-1) > 1
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1) / allowed.float().log()
        # Weights that underflow to zero are saturation too: rows with one key left count where they could see more.
        last = p.shape[-1]
        rows = torch.where(kept, entropy, torch.zeros_like(entropy))
        if p.ndim >= 2 and p.shape[-2] == last:
            rows = rows[..., 1:]  # the first row of a causal mask sees one key
        if rows.numel():
            self.seen.attentions.append(Attention(name, self.order, float(rows.mean())))

    def _addition(self, name: str, left: Tensor, right: Tensor, made: Tensor) -> None:
        if left.shape != right.shape or left.ndim < 2 or not left.is_floating_point():
            return
        if self.unfused or id(left) in self.names or id(right) in self.names:
            return
        self.seen.branch_ends |= {*self.made_by.get(id(left), ()), *self.made_by.get(id(right), ())}
        self.seen.additions.append(Addition(name, self.order, made.shape, moments(made).rms))


def _weights(
    query: Tensor,
    key: Tensor,
    *rest: Any,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Attention weights of the first samples."""
    with torch.no_grad():
        q, k = query[:4].float(), key[:4].float()
        if q.shape[:-2] != k.shape[:-2]:
            if q.ndim < 4 or q.shape[1] % k.shape[1]:
                return None
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
        if isinstance(attn_mask, Tensor):
            try:
                mask = attn_mask[:4] if attn_mask.ndim == 4 and attn_mask.shape[0] > 4 else attn_mask
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            except RuntimeError:
                return None
        return scores.softmax(-1).nan_to_num()


def _leaves(tensor: Tensor) -> set[int]:
    """The ids of the tensors that a graph begins with."""
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, waiting, seen = set(), [tensor.grad_fn], {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))  # type: ignore[attr-defined]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _is_trained(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the weight and bias of a norm have values that no initialization gives."""
    if norm.weight is None or norm.bias is None:
        return False
    return len(norm.weight) > 1 and len(norm.weight.detach().unique()) > 1 and bool(norm.bias.detach().any())


def _rows_of_scores(scores: Tensor) -> Tensor:
    scores = scores.detach().float()
    return scores.movedim(1, -1).reshape(-1, scores.shape[1]) if scores.ndim > 1 else scores.reshape(1, -1)


def _first_float(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        for t in tensors(value) if not isinstance(value, nn.Module) else ():
            if t.is_floating_point() and t.ndim:
                return t
    return None


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_of(values) if t.is_floating_point())
