"""What the forward pass does with a layer's output: whether a norm undoes its scale, and whether a path avoids it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian.objective import Objective
from gramian.recording import measuring

__all__ = ["batch_statistics", "bypassed", "hooked", "normalized"]

NUM_PROBES = 8

# ‖J y‖² over ‖J‖² ‖y‖² / n: 1 for a linear or positively homogeneous map, 0 behind a norm. With 8 probes a map of ratio
# 1 is taken for a norm with a probability of 1e-7.
INVARIANT = 0.01


def normalized(
    model: nn.Module, modules: Iterable[nn.Module], sample: Any, objective: Objective, generator: torch.Generator
) -> set[nn.Module]:
    """The modules whose output may be multiplied by any number without a change in the input of the next ones.

    That is where the derivative along the output itself is zero (Euler's theorem for degree 0): `J y = 0`, with J the
    Jacobian from a module's output to the inputs of the next modules. The graph is cut at both, so that one backward
    pass with random vectors measures all modules. Outputs are taken at a mean square of one, since an activation that
    saturates does not follow its input either. Batch norms take the statistics of the batch, as in training.

    Args:
        model: left as it was.
        modules: those that hold matrices.
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

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        y = output.detach()
        rms = y.float().square().mean().sqrt()
        leaf = (y / rms.to(y.dtype) if rms.isfinite() and rms > 0 else y.clone()).requires_grad_()
        outputs.append((module, leaf))
        return leaf.clone()

    handles = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        with measuring(model), batch_statistics(model), torch.enable_grad():
            objective.predict(model, sample)
    finally:
        for handle in handles:
            handle.remove()
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


def bypassed(
    model: nn.Module, modules: Iterable[nn.Module], sample: Any, objective: Objective
) -> tuple[set[nn.Module], set[nn.Module]]:
    """The modules around which a path goes, a skip or a branch beside theirs; and those whose output a skip adds to.

    In the graph of one forward pass, something that a module's input depends on then has a successor that leads to the
    model's output without the module. The second ones are the last of their branch: a sum has their output on one side,
    and on the other what their own input depends on.

    Args:
        model: left as it was.
        modules: those that hold matrices.
        sample: a batch.
        objective: predicts.
    """
    uses: list[tuple[nn.Module, Any, Any]] = []
    sources: set[Any] = set()

    def track(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.requires_grad:
            return x
        tracked = x.detach().requires_grad_().clone()
        sources.add(tracked.grad_fn)
        return tracked

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(track(x) for x in args), {key: track(x) for key, x in kwargs.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = next((x for x in args if isinstance(x, Tensor)), None)
        if isinstance(output, Tensor) and output.grad_fn is not None:
            uses.append((module, None if x is None else x.grad_fn, output.grad_fn))
            sources.add(output.grad_fn)

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with hooked(modules, after), measuring(model), torch.enable_grad():
            output = objective.predict(model, sample)
    finally:
        handle.remove()
    last = [x.grad_fn for x in _tensors(output) if x.grad_fn is not None] or [y for _, _, y in uses]
    order = _from_first(last)
    # One bit for each node that the data reach; those that parameters alone reach are no paths.
    bits: dict[Any, int] = {}
    before: dict[Any, int] = {}  # what a node depends on
    successors: dict[Any, int] = {}  # of a node
    for node in order:
        parents = [p for p, _ in node.next_functions if p in bits]
        if not parents and node not in sources:
            continue
        bits[node] = 1 << len(bits)
        before[node] = 0
        for parent in parents:
            before[node] |= before[parent] | bits[parent]
            successors[parent] = successors.get(parent, 0) | bits[node]
    reached: dict[Any, int] = {}  # successors of all that a node depends on, and its own
    for node in bits:
        reached[node] = successors.get(node, 0)
        for parent, _ in node.next_functions:
            if parent in bits:
                reached[node] |= reached[parent]
    around = {m for m, x, y in uses if x in bits and y in bits and reached[x] & ~(before[y] | bits[y])}
    ends: set[nn.Module] = set()
    carried: dict[Any, dict[Any, tuple[nn.Module, Any]]] = {}  # outputs that reach a node without another module
    made = {y: (module, x) for module, x, y in uses}
    for node in bits:
        parents = [p for p, _ in node.next_functions if p in bits]
        carried[node] = {}
        for parent in parents:
            carried[node] |= carried[parent]
        if node in made:
            carried[node] = {node: made[node]}
        if node.name() == "AddBackward0" and len(parents) == 2:
            for one, other in (parents, parents[::-1]):
                branches = [(m, x) for m, x in carried[one].values() if x in bits]
                ends |= {m for m, x in branches if (before[x] | bits[x]) & bits[other]}
    return around, ends & around


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


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


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

    handles = [norm.register_forward_pre_hook(hide) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """A context in which `hook(module, args, output)` runs after each of the modules; what it returns is ignored."""
    handles = [m.register_forward_hook(lambda *args: (hook(*args), None)[1]) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
