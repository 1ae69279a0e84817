"""Which matrices a norm or a skip already keeps in order, read from the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gramian.objective import Objective
from gramian.recording import measuring

__all__ = ["BRANCH", "RESTORED", "kept_in_order"]

RESTORED = "left as they were, since a norm restores their scale before the next matrix"
BRANCH = "left as they were, since a skip goes around them"

# Variance of a matrix's output over that of its input. Below 1 at most initializations of transformers (0.02² · width,
# over twice the depth at the end of a branch); a kaiming kernel that narrows four times is at 8.
HEALTHY = {RESTORED: (1e-4, 1e2), BRANCH: (1e-4, 10.0)}

# More matrices than this in a row without a norm are a plain deep network, whatever skip goes around all of them.
MOST_IN_BRANCH = 4

_NORMS = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeGroupNorm", "FusedRmsNorm")
_MATRICES = (
    "Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution", "Mkldnn", "ScaledDot",
    "Bilinear", "Trilinear",
)  # fmt: skip
_SAME_VALUES = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "T", "Clone", "ToCopy", "Squeeze", "Unsqueeze")
_ROOTS = {"Mul": ("Rsqrt", "Reciprocal"), "Div": ("Sqrt", "LinalgVectorNorm", "Norm", "ClampMin", "Expand")}

Node = Any  # torch.autograd.graph.Node; its subclasses are made by torch, one for each operation


def kept_in_order(
    model: nn.Module, layers: Collection[nn.Module], depthwise: Collection[nn.Module], sample: Any, objective: Objective
) -> dict[nn.Module, str]:
    """The layers whose scale a norm restores, or that a skip goes around, with the reason.

    - Every path from the layer's output meets a norm before it meets another matrix or the model's output.
    - The output is added to a tensor from which the layer's input was computed, and not more than four matrices follow
      one another without a norm on that way.

    A layer on which the sample's variance changes by a factor outside `HEALTHY` is not among them.
    """
    flow = _trace(model, layers, depthwise, sample, objective)
    starts: dict[nn.Module, list[Node]] = {m: nodes for m, nodes in flow.outputs.items() if m in layers}
    through = {node for m in depthwise for node in flow.outputs.get(m, ())}
    graph = _Graph(flow.roots, through)
    in_branch = graph.branches({node for nodes in starts.values() for node in nodes})
    kept: dict[nn.Module, str] = {}
    for layer, nodes in starts.items():
        if all(graph.is_restored(node) for node in nodes):
            reason = RESTORED
        elif all(node in in_branch for node in nodes):
            reason = BRANCH
        else:
            continue
        low, high = HEALTHY[reason]
        if all(low <= gain <= high for gain in flow.gains[layer]):
            kept[layer] = reason
    return kept


class _Flow(NamedTuple):
    outputs: dict[nn.Module, list[Node]]
    gains: dict[nn.Module, list[float]]
    roots: list[Node]


def _trace(
    model: nn.Module, layers: Collection[nn.Module], depthwise: Collection[nn.Module], sample: Any, objective: Objective
) -> _Flow:
    flow = _Flow({}, {}, [])

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None and args and isinstance(args[0], Tensor):
            flow.outputs.setdefault(module, []).append(output.grad_fn)
            size = [float(t.detach().float().square().mean()) for t in (output, args[0])]
            flow.gains.setdefault(module, []).append(size[0] / size[1] if size[1] else float("nan"))

    handles = [m.register_forward_hook(note) for m in {*layers, *depthwise}]
    handles.append(model.register_forward_pre_hook(_differentiable, with_kwargs=True))
    try:
        with measuring(model), _all_trainable(model), torch.enable_grad():
            output = objective.predict(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    flow.roots.extend(t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None)
    flow.roots.extend(node for nodes in flow.outputs.values() for node in nodes)
    return flow


def _differentiable(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Inputs with a node in the graph, so that a skip from the input is seen; leaves would forbid work in place."""

    def mark(x: Any) -> Any:
        return x.detach().requires_grad_() * 1 if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(mark, args), tree_map(mark, kwargs)


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Frozen parameters take part in the graph."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class _Graph:
    """The autograd graph, with the nodes in the order of the forward pass.

    Args:
        roots: the nodes of the outputs.
        through: nodes of matrices that count as none: depthwise kernels.
    """

    def __init__(self, roots: list[Node], through: set[Node]) -> None:
        self.through = through
        self.before: dict[Node, list[Node]] = {}
        self.after: dict[Node, list[Node]] = {}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node not in self.before:
                self.before[node] = [n for n, _ in node.next_functions if n is not None]
                stack.extend(self.before[node])
        for node, inputs in self.before.items():
            for n in inputs:
                self.after.setdefault(n, []).append(node)
        waiting = {node: len(inputs) for node, inputs in self.before.items()}
        self.order = [node for node, count in waiting.items() if not count]
        for node in self.order:  # it grows
            for n in self.after.get(node, ()):
                waiting[n] -= 1
                if not waiting[n]:
                    self.order.append(n)
        self.position = {node: i for i, node in enumerate(self.order)}

    def is_norm(self, node: Node) -> bool:
        """Of torch's, or written out: a product with a reciprocal root of what is computed from the same tensor."""
        name = _operation(node)
        if name in _NORMS:
            return True
        parts = self.before[node]
        for root in parts if name in _ROOTS and len(parts) == 2 else ():
            x = parts[1] if root is parts[0] else parts[0]
            if _operation(root) in _ROOTS[name] and x in self._upstream(root, self._is_matrix):
                return True
        return False

    def is_restored(self, start: Node) -> bool:
        """Whether every path from a node meets a norm before a matrix or the end."""
        seen, stack = {start}, [start]
        while stack:
            node = stack.pop()
            following = self.after.get(node, [])
            if not following:
                return False
            for n in following:
                if n in seen or self.is_norm(n):
                    continue
                if self._is_matrix(n):
                    return False
                seen.add(n)
                stack.append(n)
        return True

    def branches(self, matrices: set[Node]) -> set[Node]:
        """Of the matrices, those in a branch that is added to the tensor it was computed from."""
        found: set[Node] = set()
        for node in self.order:
            if _operation(node) == "Add" and len(self.before[node]) == 2:
                for skip, end in (self.before[node], self.before[node][::-1]):
                    found |= self._branch(skip, end, matrices)
        return found

    def _branch(self, skip: Node, end: Node, matrices: set[Node]) -> set[Node]:
        while _operation(skip) in _SAME_VALUES and len(self.before[skip]) == 1 and skip not in matrices:
            skip = self.before[skip][0]
        first = self.position[skip]
        way = self._upstream(end, lambda n: self.position[n] <= first)
        if skip not in way or not self.before[skip]:  # a parameter is no stream
            return set()
        depth = {skip: 0}
        for node in sorted(way, key=self.position.__getitem__):
            inputs = [depth[n] for n in self.before[node] if n in depth]
            if inputs and node is not skip:
                depth[node] = 0 if self.is_norm(node) else max(inputs) + (node in matrices)
        return set() if max(depth.values()) > MOST_IN_BRANCH else matrices & (depth.keys() - {skip})

    def _is_matrix(self, node: Node) -> bool:
        return _operation(node) in _MATRICES and node not in self.through

    def _upstream(self, node: Node, stop: Callable[[Node], bool]) -> set[Node]:
        """A node and what it was computed from, up to the nodes at which to stop."""
        seen, stack = {node}, [node]
        while stack:
            n = stack.pop()
            for m in () if stop(n) else self.before[n]:
                if m not in seen:
                    seen.add(m)
                    stack.append(m)
        return seen


def _operation(node: Node) -> str:
    return node.name().partition("Backward")[0]
