"""Matrices of one shape, stacked, so that every product of a step is one batched product."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations, compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.errors import InputError
from gramian.linalg.engine.workspace import is_kept, scratch
from gramian.optim.route import Route

__all__ = ["Stack", "State", "alike", "joined", "same"]

State = dict[str, Tensor]

MAX_BYTES = {"cpu": 6 << 20}
"""Of the matrices in one stack, by kind of device: on a CPU so many as stay in its cache between operations."""

MAX_BYTES_ELSEWHERE = 256 << 20

STACK = 200_000
"""Multiplications, as `Recipe.pads` counts them, that cost as much as what is called for a stack, whatever its size."""

Work = Callable[[Sequence[tuple[int, int]], tuple[int, int], torch.device], int | None]
"""`Recipe.pads`, with the options of a group."""


def alike(routes: Sequence[Route]) -> list[list[Route]]:
    """Routes grouped by the shape and dtype of their matrices and by device, in groups of bounded size.

    Experts and fused projections join the plain matrices of their shape.
    """
    kinds: dict[tuple, list[list[Route]]] = {}
    sizes: dict[tuple, int] = {}  # of the last group of each kind
    for r in routes:
        p = r.parameter
        kind = (_matrices(r)[-2:], p.dtype, p.device)
        most = MAX_BYTES.get(p.device.type, MAX_BYTES_ELSEWHERE)
        if kind not in kinds or sizes[kind] + 4 * p.numel() > most:
            kinds.setdefault(kind, []).append([])
            sizes[kind] = 0
        kinds[kind][-1].append(r)
        sizes[kind] += 4 * p.numel()
    return [group for groups in kinds.values() for group in groups]


def joined(stacks: Sequence[list[Route]], work: Work) -> list[list[Route]]:
    """What `alike` found, with stacks made one where `work` lets them and that costs less.

    Matrices are padded with zeros then, and those that are too tall transposed: products with zeros in place of calls.
    """
    found: list[tuple[int | None, list[Route]]] = [(_work(routes, work), routes) for routes in stacks]
    while True:
        best: tuple[int, int, int] = (0, 0, 0)
        whole: int | None = None
        for i, j in combinations(range(len(found)), 2):
            (a, some), (b, others) = found[i], found[j]
            together = None if a is None or b is None else _work([*some, *others], work)
            if a is None or b is None or together is None:
                continue
            if (saved := (STACK + a + b - together, -i, -j)) > best:
                best, whole = saved, together
        saved, i, j = best
        if not saved:
            return [routes for _, routes in found]
        _, more = found.pop(-j)
        found[-i] = (whole, [*found[-i][1], *more])


def _work(routes: Sequence[Route], work: Work) -> int | None:
    """Multiplications for these matrices as one stack; `None` where that would not do."""
    p, room = routes[0].parameter, _sides(routes)
    number, shapes = sum(map(_number, routes)), list(dict.fromkeys(map(_shape, routes)))
    one = len({(r.parameter.dtype, r.parameter.device) for r in routes}) == 1
    one = one and p.dtype != torch.float64  # whose users ask for digits, which products in float32 do not round alike
    views = len(shapes) == 1 or all(_number(r) == 1 or _shape(r)[0] == room[0] for r in routes)
    fits = 4 * number * math.prod(room) <= MAX_BYTES["cpu"]
    if not (one and views and fits and all(map(_is_reshaped, routes))):
        return None
    each = work(shapes, room, p.device)
    return None if each is None else number * each


def _sides(routes: Sequence[Route]) -> tuple[int, int]:
    """The sides, the shorter one first, of the least matrix in which each of theirs has room."""
    pairs = [sorted(_shape(r)) for r in routes]
    return max(short for short, _ in pairs), max(long for _, long in pairs)


class Stack:
    """K matrices (m, n) of one or more parameters, and their state as tensors `(K, …)`.

    Where they are of several shapes, each is padded with zeros, and transposed if it is too tall.

    The state of each parameter is a view of these, of shape `(*its number of matrices, …)`, so that both change
    together. `fresh` says which matrices lacked a part of their state before this step. It is `in_order` where each
    parameter holds its matrices in the order of its entries, so that they are views of the stack in its shape. `sides`
    are those of `Recipe`. `sizes` are the numbers of rows and of columns (K, 1, 1), as they lie here, if it is padded.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        init: Callable[[Tensor], State],
        states: Mapping[Tensor, State],
        sides: Mapping[str, str],
    ) -> None:
        self.routes = tuple(routes)
        self.params = [r.parameter for r in routes]
        self.counts = [_number(r) for r in routes]
        self.first = _shape(self.routes[0])
        self.is_padded = len(set(map(_shape, routes))) > 1
        self.shape = (sum(self.counts), *(_sides(routes) if self.is_padded else self.first))
        p = self.routes[0].parameter
        like = torch.empty((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.param_dtype, self.dtype, self.device = p.dtype, like.dtype, like.device
        self.state = init(like.expand(self.shape))
        self.views: list[State] = [{} for _ in routes]
        self.scaled_for: object = None  # what `scales`, the lengths of the steps (K, 1, 1), were computed from
        self.scales = self.alive = torch.ones(self.shape[0], 1, 1, dtype=self.dtype, device=self.device)
        self.in_order = all(map(_is_reshaped, routes))
        self.is_plain = not any(hasattr(r.parameter, "placements") for r in routes)
        self._buffer: Tensor | None = None  # the memory for the gradients, and views of it in the parameters' shapes
        self._shaped: list[Tensor] = []
        self.sizes = self._sizes() if self.is_padded else None
        self.fresh: set[int] = set()
        self.phases = [0] * self.shape[0]  # the step of a cycle in which each matrix is due
        numbers = torch.arange(self.shape[0]).split(self.counts)
        for key, buffer in self.state.items():
            for r, views, part, these in zip(self.routes, self.views, buffer.split(self.counts), numbers, strict=True):
                name, own = self._held(r, key, part, sides)
                views[name] = own.view(*_matrices(r)[:-2], *own.shape[1:])
                known = states.get(r.parameter, {}).get(name)
                if known is None:
                    self.fresh.update(these.tolist())
                elif known.shape != views[name].shape:
                    raise InputError(
                        f"the state {name!r} of {r.name!r} has shape {tuple(known.shape)}, but this optimizer with its "
                        f"options needs {tuple(views[name].shape)}. Load the state of the same optimizer, and keep the "
                        "options that set a shape, such as rank"
                    )
                else:
                    views[name].copy_(known)

    def holds(self, states: Mapping[Tensor, State]) -> bool:
        """Whether the present state of its parameters lies here, in the dtype and on the device that they have now."""
        if not same(list(map(states.get, self.params)), self.views):
            return False
        return all(p.dtype == self.param_dtype and p.device == self.device for p in self.params)

    def stacked(self, tensors: Sequence[Tensor | None], *, lasting: bool) -> Tensor:
        """A copy of one tensor for each parameter, as matrices (K, m, n); zeros for `None`.

        Unless it is `lasting`, the next stack is copied to the same memory.
        """
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device) if lasting else self._scratch()
        if self.is_padded:
            out.zero_()
        known = [tensor for tensor in tensors if tensor is not None]
        if self.in_order and len(known) == len(tensors):
            torch._foreach_copy_(self._as_params(out), known)
            return out
        for r, tensor, into in zip(self.routes, tensors, out.split(self.counts), strict=True):
            if tensor is None:
                into.zero_()
            else:
                self._own(r, into).view(_matrices(r)).copy_(r.layout.split(tensor))  # type: ignore[union-attr]
        return out

    def _own(self, r: Route, part: Tensor) -> Tensor:
        """Of a parameter's part of a buffer (K, …), what is not padding, as its matrices lie."""
        if not self.is_padded:
            return part
        m, n = _shape(r)
        return (part.mT if self._turns(r) else part)[:, :m, :n]

    def _turns(self, r: Route) -> bool:
        """Whether a parameter's matrices lie here transposed."""
        return self.is_padded and _shape(r)[0] > self.shape[1]

    def _held(self, r: Route, name: str, part: Tensor, sides: Mapping[str, str]) -> tuple[str, Tensor]:
        """The name by which a parameter holds its part of a buffer (K, …), and what of that is not padding."""
        of_rows, of_columns = name in sides, name in sides.values()
        if not self.is_padded or not (of_rows or of_columns):
            return name, self._own(r, part)
        if self._turns(r):
            of_rows, name = not of_rows, ({**sides} | {right: left for left, right in sides.items()})[name]
        size = _shape(r)[0 if of_rows else 1]
        return name, part[:, :size, :size]

    def _sizes(self) -> tuple[Tensor, Tensor]:
        shapes = [_shape(r)[::-1] if self._turns(r) else _shape(r) for r in self.routes]
        rows, columns = torch.tensor(shapes, dtype=self.dtype, device=self.device).unbind(1)
        return self.repeated(rows), self.repeated(columns)

    def _scratch(self) -> Tensor:
        found = scratch("stack", self.shape, self.dtype, self.alive)
        if self.in_order and found is not self._buffer and is_kept(found):
            self._shaped = self._as_params(found)
            self._buffer = found
        return found

    def _as_params(self, x: Tensor) -> list[Tensor]:
        """Matrices (K, m, n) that are `in_order` as views of each parameter's shape."""
        if x is self._buffer:
            return self._shaped
        parts = zip(self.routes, x.split(self.counts), strict=True)
        return [self._own(r, part).view(r.parameter.shape) for r, part in parts]

    def unstacked(self, matrices: Tensor) -> list[Tensor]:
        """Matrices (K, m, n) as one tensor for each parameter, of its shape; views where layouts allow."""
        if self.in_order:
            return self._as_params(matrices)
        parts = zip(self.routes, matrices.split(self.counts), strict=True)
        return [r.layout.join(part.view(_matrices(r))) for r, part in parts]  # type: ignore[union-attr]

    def add_(self, update: Tensor, present: Sequence[bool], keep: Mapping[Tensor, Tensor] | float) -> None:
        """Multiplies each parameter that is present by its entry of `keep`, then adds its matrices of `update`.

        To the matrices that a parameter is made of, as they lie in it, where they are views.
        """
        params = list(compress(self.params, present))
        if not self.is_plain:
            params = placement.locals_of(params)
        if not params:
            return
        if not isinstance(keep, float | int):
            torch._foreach_mul_(params, [keep[p].to(self.device) for p in compress(self.params, present)])
        elif keep != 1:
            torch._foreach_mul_(params, keep)
        if self.in_order:
            targets, steps = params, list(compress(self._as_params(update), present))
        else:
            targets, steps = [], []
            parts = list(zip(self.routes, update.split(self.counts), strict=True))
            for (r, part), p in zip(compress(parts, present), params, strict=True):
                layout, step = r.layout, part.view(_matrices(r))
                target = layout.split(p)  # type: ignore[union-attr]
                if target.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
                    target, step = p, layout.join(step)  # type: ignore[union-attr]
                targets.append(target)
                steps.append(step)
        if self.param_dtype != self.dtype:
            steps = [step.to(self.param_dtype) for step in steps]
        torch._foreach_add_(targets, steps)

    def repeated(self, values: Tensor) -> Tensor:
        """One value for each matrix, (K, 1, 1), from one for each parameter."""
        counts = torch.tensor(self.counts, device=values.device)
        return values.repeat_interleave(counts, output_size=self.shape[0]).view(-1, 1, 1)


def same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether both hold the same objects, in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def _is_reshaped(r: Route) -> bool:
    """Whether the entries of the matrices follow each other as in the parameter, so that a reshape gives them."""
    assert r.layout is not None
    return sum(r.layout.dims, ()) == sum(r.layout.sides, ())


def _shape(r: Route) -> tuple[int, int]:
    m, n = _matrices(r)[-2:]
    return m, n


def _number(r: Route) -> int:
    return math.prod(_matrices(r)[:-2])


def _matrices(r: Route) -> tuple[int, ...]:
    assert r.layout is not None
    return r.layout.matrices
