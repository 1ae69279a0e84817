"""AdamW for parameters that hold no hidden matrix: embeddings, heads, norms, biases."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian import placement
from gramian.errors import InputError
from gramian.optim.guard import limited
from gramian.optim.norms import Norms
from gramian.optim.sharding import not_finite, whole_norms
from gramian.optim.stacks import same

__all__ = ["Rest"]

States = MutableMapping[Tensor, dict[str, Any]]


class Rest:
    """What AdamW steps of a parameter group: which parameters, and their state, looked up once and used while it fits.

    A step is torch's fused AdamW for every parameter whose gradient is finite and has a finite square: one that
    overflows would stay in the second moment, and the parameter would never move again. A gradient that is larger than
    ten times the usual counts for that much (`gramian.optim.guard`), by its Frobenius norm.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._lots: list[_Lot] = []
        self._norms = Norms([])

    def step(self, groups: Sequence[Mapping[str, Any]], state: States) -> tuple[list[Tensor], Tensor | None]:
        """Steps all parameters of some groups.

        Args:
            groups: of parameters with one rate and gradients, with `lr`, `betas`, `eps`, `weight_decay`, `maximize`;
                with `fused=False` for steps that are the same, to the bit, for parts of the parameters.
            state: by parameter; torch's, of the same form, and the usual norm of its gradients.

        Returns the parameters, and which of them were skipped (P,), `None` for none.
        """
        params = [p for group in groups for p in group["params"]]
        grads: list[Any] = [p.grad for p in params]
        if not same(params, self._norms.params):
            self._norms = Norms(params)
        entrywise = not all(group.get("fused", True) for group in groups)
        sizes, bad, stepped = None if entrywise else self._norms.finite(grads), None, params
        if sizes is None and params:
            bad = not_finite(grads, power=2)
            stepped = [p for p, is_bad in zip(params, bad.tolist(), strict=True) if not is_bad]
        if not self._fits(stepped, state):
            self._arrange(groups, stepped, state)
        for lot in self._lots:
            if sizes is None:
                placed = [_placed_as(p, p.grad) for p in lot.params]
                parts, known = placement.locals_of(placed), torch.stack(whole_norms(placed, wide=entrywise))
            elif len(lot.params) == len(params):
                parts, known = grads, sizes
            else:
                parts, known = [grads[place] for place in lot.places], sizes[lot.places]
            lot.step(groups, limited(parts, known.to(lot.usual.dtype), lot.usual))
        return params, bad

    def _fits(self, params: Sequence[Tensor], state: States) -> bool:
        """Whether these are the parameters, and their state is what it was, in their present dtype and device."""
        return same(params, self._params) and all(lot.holds(state) for lot in self._lots)

    def _arrange(self, groups: Sequence[Mapping[str, Any]], params: list[Tensor], state: States) -> None:
        numbers: dict[Tensor, int] = {p: number for number, group in enumerate(groups) for p in group["params"]}
        alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, p in enumerate(params):
            alike.setdefault((p.dtype, p.device), []).append(place)
        self._lots = [
            _lot([(params[i], numbers[params[i]]) for i in places], places, state) for places in alike.values()
        ]
        self._params = params


class _Lot(NamedTuple):
    """Parameters of one dtype on one device, and their state.

    Number of steps and usual norms are one tensor (P,) each, of which the states hold the entries.
    """

    params: list[Tensor]
    places: list[int]
    spans: list[tuple[int, slice]]  # the group of each part of them
    states: list[dict[str, Any]]
    means: list[Tensor]
    squares: list[Tensor]
    counts: list[Tensor]
    entries: list[tuple[Any, ...]]  # all that each state holds
    steps: Tensor
    usual: Tensor
    sharded: bool

    def holds(self, state: States) -> bool:
        """Whether the state of the parameters is still this one."""
        if not same(list(map(state.get, self.params)), self.states):
            return False
        for known, entries in zip(self.states, self.entries, strict=True):
            if not same(known.values(), entries):
                return False
        return all(
            mean.dtype == p.dtype and mean.device == p.device and mean.shape == p.shape
            for p, mean in zip(self.params, self.means, strict=True)
        )

    def step(self, groups: Sequence[Mapping[str, Any]], grads: list[Tensor]) -> None:
        """A step with these gradients, this rank's part of each."""
        self.steps.add_(1)
        parts = [self.params, self.means, self.squares]
        params, means, squares = map(placement.locals_of, parts) if self.sharded else parts
        for number, span in self.spans:
            members = (params[span], grads[span], means[span], squares[span], self.counts[span])
            if all(p.is_contiguous() for p in members[0]):
                stepped = _fused if groups[number].get("fused", True) else _entrywise
                stepped(*members, groups[number])
                continue
            # The fused step goes through memory and ignores strides: what is not contiguous is stepped as a copy, and
            # one by one, since such parameters may share memory.
            for p, grad, mean, square, count in zip(*members, strict=True):
                copied = p.contiguous()
                _fused([copied], [grad], [mean], [square], [count], groups[number])
                if copied is not p:
                    p.copy_(copied)


def _lot(numbered: Sequence[tuple[Tensor, int]], places: list[int], state: States) -> _Lot:
    params = [p for p, _ in numbered]
    states = [_state_of(p, state) for p in params]
    steps = torch.stack([s["step"].to(p.device, torch.float32) for p, s in zip(params, states, strict=True)])
    usual = torch.stack([s["usual"] for s in states])
    counts = list(steps.unbind())
    for known, count, size in zip(states, counts, usual.unbind(), strict=True):
        known |= {"step": count, "usual": size}
    spans, start = [], 0
    for number, members in groupby(numbered, key=lambda pair: pair[1]):
        stop = start + len(list(members))
        spans.append((number, slice(start, stop)))
        start = stop
    means, squares = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
    sharded = any(hasattr(p, "placements") for p in params)
    entries = [tuple(known.values()) for known in states]
    return _Lot(params, places, spans, states, means, squares, counts, entries, steps, usual, sharded)


def _state_of(p: Tensor, state: States) -> dict[str, Any]:
    """The state of a parameter, in its dtype and on its device, which the user may have changed."""
    known = state.get(p, {})
    if not known:
        zeros = {key: torch.zeros_like(p, memory_format=torch.contiguous_format) for key in ("exp_avg", "exp_avg_sq")}
        state[p] = known = {"step": torch.zeros((), device=p.device), **zeros, "usual": _usual_of(p, {})}
    elif known["exp_avg"].dtype != p.dtype or known["exp_avg"].device != p.device:
        known |= {key: known[key].to(p.device, p.dtype) for key in ("exp_avg", "exp_avg_sq")}
        known["step"] = known["step"].to(p.device)
        known["usual"] = _usual_of(p, known)
    for key in ("exp_avg", "exp_avg_sq"):
        if not known[key].is_contiguous():
            known[key] = known[key].contiguous()
    if "usual" not in known:  # taken over from torch's AdamW, which has no guard
        known["usual"] = _usual_of(p, known)
    if known["exp_avg"].shape != p.shape:  # the fused step would read memory that is not its own
        raise InputError(
            f"a parameter of shape {tuple(p.shape)} has a state of shape {tuple(known['exp_avg'].shape)}; build the "
            "optimizer again after a parameter has changed its shape"
        )
    return known


def _usual_of(p: Tensor, known: Mapping[str, Any]) -> Tensor:
    """The usual norm of its gradients, in float32 or wider; zero before the first."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return known["usual"].to(p.device, wide) if "usual" in known else torch.zeros((), dtype=wide, device=p.device)


def _fused(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    counts: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    """torch's kernel itself: its function around it takes several times as long for small parameters."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        params,
        [g if g.is_contiguous() else g.contiguous() for g in grads],
        means,
        squares,
        [],
        counts,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


def _entrywise(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    counts: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    """The same step in operations that round an entry alike wherever it lies, so that a part is stepped as the whole.

    Kernels that multiply and add at once, as the fused one and torch's lerp, do not round the last entries of a tensor
    as the others.
    """
    beta1, beta2 = group["betas"]
    rate, sign = float(group["lr"]), -1.0 if group["maximize"] else 1.0
    steps = [float(count) for count in counts]
    own = torch._foreach_mul(grads, sign * (1 - beta1))
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, own)
    own = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(own, 1 - beta2)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_add_(squares, own)
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(sizes, group["eps"])
    deltas = torch._foreach_div(means, sizes)
    torch._foreach_mul_(deltas, [-rate / (1 - beta1**step) for step in steps])
    torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
    torch._foreach_add_(params, deltas)


def _placed_as(p: Any, grad: Any) -> Tensor:
    """The gradient, spread over the ranks as its parameter is."""
    if not hasattr(p, "placements") or grad.placements == p.placements:
        return grad
    return grad.redistribute(p.device_mesh, p.placements)
