"""What the forward pass does with a layer's output: whether a norm undoes its scale, and whether a path avoids it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gramian.layers import layer_of
from gramian.objective import Objective
from gramian.recording import measuring
from gramian.recording.hooks import hooks

__all__ = ["COMPOSED", "Flow", "batch_statistics", "hooked", "normalized", "trace"]

COMPOSED = ("attention", "recurrence")
"""Operations of modules that apply several matrices inside one function of torch."""

Node = Any  # torch.autograd.graph.Node; its subclasses are made by torch, one for each operation

NUM_PROBES = 8

# ‖J y‖² over ‖J‖² ‖y‖² / n: 1 for a linear or positively homogeneous map, 0 behind a norm. With 8 probes a map of ratio
# 1 is taken for a norm with a probability of 1e-7.
INVARIANT = 0.01

# More modules than this in a row without a norm are a plain deep network, whatever skip goes around all of them.
MOST_IN_BRANCH = 4


def normalized(
    model: nn.Module,
    modules: Collection[nn.Module],
    silent: Collection[nn.Module],
    sample: Any,
    objective: Objective,
    generator: torch.Generator,
) -> set[nn.Module]:
    """The modules whose output may be multiplied by any number without a change in the input of the next ones.

    That is where the derivative along the output itself is zero (Euler's theorem for degree 0): `J y = 0`, with J the
    Jacobian from a module's output to the inputs of the next modules. The graph is cut at both, so that one backward
    pass with random vectors measures all modules. Outputs are taken at a mean square of one, since an activation that
    saturates does not follow its input either. Batch norms take the statistics of the batch, as in training.

    Args:
        model: left as it was.
        modules: those that hold matrices.
        silent: of these, those whose output is taken as zero: the ends of residual branches, so that the norm before
            the next layer is seen to undo the scale of the stream.
        sample: a batch.
        objective: predicts.
        generator: draws the random vectors.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    arrivals: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not x.requires_grad:
            return None
        arrivals.append(x)
        return (x.detach().clone(), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        made = _made_by(module, output)
        if made is None:
            return None
        y = made.detach()
        rms = y.float().square().mean().sqrt()
        if module in silent:
            return _with(output, torch.zeros_like(y))
        leaf = (y / rms.to(y.dtype) if rms.isfinite() and rms > 0 else y.clone()).requires_grad_()
        outputs.append((module, leaf))
        return _with(output, leaf.clone())

    handles = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    with hooks(handles), measuring(model), batch_statistics(model), torch.enable_grad():
        objective.predict(model, sample)
    arrivals = [x for x in arrivals if x.requires_grad]
    if not outputs or not arrivals:
        return set()
    along = torch.zeros(len(outputs), dtype=torch.float64)
    total = torch.zeros(len(outputs), dtype=torch.float64)
    for probe in range(NUM_PROBES):
        v = [torch.empty_like(x).normal_(generator=generator) for x in arrivals]
        leaves = [leaf for _, leaf in outputs]
        keep = probe + 1 < NUM_PROBES
        grads = torch.autograd.grad(arrivals, leaves, v, retain_graph=keep, allow_unused=True)
        for k, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            if grad is not None:
                y, g = leaf.detach().double(), grad.double()
                along[k] += float((y * g).sum().square())
                total[k] += float(y.square().sum() * g.square().sum()) / y.numel()
    verdicts: dict[nn.Module, bool] = {}
    for k, (module, _) in enumerate(outputs):
        free = bool(total[k] > 0) and bool(along[k] < INVARIANT * total[k])
        verdicts[module] = verdicts.get(module, True) and free
    return {module for module, free in verdicts.items() if free}


@dataclass
class Flow:
    """The graph of one forward pass: what each step was computed from.

    Args:
        parents: of each step that the data reach, those that the data reach too; each step after its parents.
        made: the modules, by the step that made their output.
        gains: of each module's uses, the mean square of the output over that of the input.
    """

    parents: dict[Node, list[Node]]
    made: dict[Node, nn.Module]
    gains: dict[nn.Module, list[float]]

    def __post_init__(self) -> None:
        self.order = list(self.parents)
        self.position = {node: i for i, node in enumerate(self.order)}
        self.before: dict[Node, int] = {}  # what a step depends on, a bit for each
        for node, parents in self.parents.items():
            self.before[node] = 0
            for parent in parents:
                self.before[node] |= self.before[parent] | 1 << self.position[parent]

    def ends(self) -> set[nn.Module]:
        """The modules whose output a skip adds to: the last of each residual branch."""
        found: set[nn.Module] = set()
        for _, way in self._branches():
            inside, stack = set(way), [way[-1]]
            while stack:
                node = stack.pop()
                inside.discard(node)  # an unrolled recurrence has more ways than steps
                if node in self.made:
                    found.add(self.made[node])
                else:
                    stack.extend(p for p in self.parents[node] if p in inside)
        return found

    def bypassed(self, free: Collection[nn.Module]) -> set[nn.Module]:
        """The modules of residual branches: around all of their uses a path goes that passes no module.

        A branch with more than `MOST_IN_BRANCH` modules in a row is a plain deep network, whatever goes around it.

        Args:
            free: those whose scale a norm undoes; with them a row ends.
        """
        found: set[Node] = set()
        for skip, way in self._branches():
            length = {skip: 0}
            for node in way:
                module = self.made.get(node)
                longest = max(length[p] for p in self.parents[node] if p in length)
                length[node] = 0 if module in free else longest + (module is not None)
            if max(length.values()) <= MOST_IN_BRANCH:
                found.update(node for node in way if node in self.made)
        rest = {module for node, module in self.made.items() if node not in found}
        return {self.made[node] for node in found} - rest

    def _branches(self) -> Iterator[tuple[Node, list[Node]]]:
        """Of each sum of a branch and what it was computed from: where the two part, and the steps of the branch."""
        for node, parents in self.parents.items():
            if not _is_sum(node, parents):
                continue
            for end, other in (parents, parents[::-1]):
                # Of x + attention(x) + mlp(x), the first sum is the other side of the second.
                others = [other, *(self.parents[other] if _is_sum(other, self.parents[other]) else ())]
                skip = next((s for s in map(self._source, others) if self._depends(end, s)), None)
                if skip is not None:
                    steps = self.order[self.position[skip] + 1 : self.position[end] + 1]
                    yield skip, [n for n in steps if self._depends(n, skip) and (n is end or self._depends(end, n))]

    def _source(self, node: Node) -> Node:
        """Where a step's value comes from, without views, dropout, and whatever else takes one input."""
        while node not in self.made and len(self.parents[node]) == 1:
            node = self.parents[node][0]
        return node

    def _depends(self, node: Node, on: Node) -> bool:
        return bool(self.before[node] >> self.position[on] & 1)


def _is_sum(node: Node, parents: list[Node]) -> bool:
    return node.name() == "AddBackward0" and len(parents) == 2


def trace(model: nn.Module, modules: Collection[nn.Module], sample: Any, objective: Objective) -> Flow:
    """The graph of one forward pass on a sample; what runs in it without a graph (`no_grad`) is not seen.

    Args:
        model: left as it was.
        modules: those that hold matrices.
        sample: a batch.
        objective: predicts.
    """
    made: dict[Node, nn.Module] = {}
    gains: dict[nn.Module, list[float]] = {}
    sources: set[Node] = set()

    def track(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.requires_grad:
            return x
        tracked = x.detach().requires_grad_().clone()  # a copy, since a leaf forbids work in place
        sources.add(tracked.grad_fn)
        return tracked

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tree_map(track, args), tree_map(track, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = _made_by(module, output)
        if y is None:
            return None
        y = track(y)  # of frozen weights
        made[y.grad_fn] = module
        sources.add(y.grad_fn)
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            size, last = (float(x.detach().double().square().mean()) for x in (y, args[0]))
            gains.setdefault(module, []).append(size / last if last else math.nan)
        return _with(output, y)

    handles = [module.register_forward_hook(after) for module in modules]
    handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
    with hooks(handles), measuring(model), torch.enable_grad():
        output = objective.predict(model, sample)
    parents: dict[Node, list[Node]] = {}
    ends = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None]
    for node in _from_first([*ends, *made]):
        reached = [p for p, _ in node.next_functions if p in parents]
        if reached or node in sources:  # what parameters alone reach is no path
            parents[node] = reached
    return Flow(parents, {node: module for node, module in made.items() if node in parents}, gains)


def _made_by(module: nn.Module, output: Any) -> Tensor | None:
    """What a module makes, if real numbers: of an attention or a recurrence, which return several, the first."""
    if type(output) is tuple and layer_of(module).operation in COMPOSED:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _with(output: Any, y: Tensor) -> Any:
    """A module's output with another tensor in the place of the one that it makes."""
    return (y, *output[1:]) if type(output) is tuple else y


def _from_first(ends: Iterable[Any]) -> list[Any]:
    """The nodes of a graph, each after those that it depends on; without the leaves that are tensors."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(end, False) for end in ends]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            stack.append((node, True))
            stack.extend((p, False) for p, _ in node.next_functions if p is not None and p not in seen)
    return order


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which batch norms take the statistics of the batch, as in training, and keep their own as they are.

    Where the batch has one value for each channel, of which there is no variance, the running statistics are taken.
    """
    names = ("running_mean", "running_var")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: norm._buffers.get(name) for name in names} for norm in norms]

    def hide(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].numel() > args[0].shape[1]:
            norm._buffers.update(dict.fromkeys(names))

    try:
        with hooks([norm.register_forward_pre_hook(hide) for norm in norms]):
            yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """A context in which `hook(module, args, output)` runs after each of the modules; what it returns is ignored."""
    with hooks([m.register_forward_hook(lambda *args: (hook(*args), None)[1]) for m in modules]):
        yield
