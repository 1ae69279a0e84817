"""The operations of a forward pass, also those that no module wraps: activations, attention, sums, additions, gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.experiments.softmax_over_queries import OverQueries
from gramian.inspection.passes.attention import NUM_SAMPLES, attention_weights, entropy_and_masked, visible_keys
from gramian.inspection.passes.cosine_scores import Heads
from gramian.inspection.passes.dropout import DROPOUTS, share_dropped
from gramian.inspection.passes.elementwise import ElementWise
from gramian.inspection.passes.gate_functions import ADDITIONS
from gramian.inspection.passes.gating import Gating
from gramian.inspection.passes.mixtures import Mixtures
from gramian.inspection.passes.moments import as_moments, version
from gramian.inspection.passes.parameter_sources import trace
from gramian.inspection.passes.records import Activation, Addition, Attention, Reduction, Visible
from gramian.inspection.passes.routing import SOFTMAX, Routings
from gramian.inspection.passes.step_records import Observed

__all__ = ["Operations"]

# A unit of tanh or sigmoid counts as saturated this close to an end of its range, as a share of the range.
SATURATED = 0.01

# A pre-activation below this is one that a mask has set.
MASKED = -1e4

# A mean of n values counts as canceled below this share of their size over √n, which independent values would have.
CANCELS = 1e-4

# Activations whose zeros are dead units, and those with an end on both sides: name, lower and upper end.
_RECTIFIERS: dict[Callable, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", Tensor.relu: "relu", Tensor.relu_: "relu",
    F.relu6: "relu6", F.hardtanh: "hardtanh",
}  # fmt: skip
_BOUNDED: dict[Callable, tuple[str, float, float]] = {
    torch.tanh: ("tanh", -1.0, 1.0), Tensor.tanh: ("tanh", -1.0, 1.0), F.tanh: ("tanh", -1.0, 1.0),
    torch.sigmoid: ("sigmoid", 0.0, 1.0), Tensor.sigmoid: ("sigmoid", 0.0, 1.0), F.sigmoid: ("sigmoid", 0.0, 1.0),
}  # fmt: skip
_MEANS = {torch.mean, Tensor.mean, torch.sum, Tensor.sum}

Read = Callable[[Sequence[Tensor], Callable[..., None]], None]
"""Gives a function the numbers of scalars on the device: now or later, in the order of the calls."""


class Operations:
    """Adds to an `Observed` what single operations show.

    Args:
        seen: gets it.
        names: of the model's parameters, by id.
        read: gives the numbers of scalars on the device to a function.
        squares: the numbers for the moments of a tensor.
        live: whether the pass is one of the user's own, in which nothing may synchronize.
    """

    def __init__(
        self,
        seen: Observed,
        names: Mapping[int, str],
        read: Read,
        squares: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        live: bool,
    ) -> None:
        self.seen, self.names, self.read, self.squares, self.live = seen, names, read, squares, live
        self.heads = Heads(seen, names)
        self.over_queries = OverQueries(seen)
        self.mixtures = Mixtures(seen)
        self.elementwise = ElementWise(names)
        self.gating = Gating(seen, names, read, live=live)
        self.routings = Routings(seen, names)
        self.is_outside = False  # whether no module is running
        self.is_convolutional = False  # whether the last module with a matrix was a convolution
        self.unfused = 0  # depth of calls that run unfused
        self.made_by: dict[int, list[str]] = {}  # modules, by the id of what they gave

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.gating.clear()
        self.routings.clear()
        self.heads.clear()
        self.over_queries.clear()
        self.mixtures.clear()
        self.elementwise.clear()
        self.made_by.clear()

    def see(
        self,
        name: str,
        order: int,
        func: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
        made: Tensor,
    ) -> None:
        """Keeps what an operation shows.

        Args:
            name: the module in which it is.
            order: its place in the pass.
            func, args, kwargs: the call.
            given: the tensors in its arguments.
            made: its result, or the first of them.
        """
        if not self.live:
            self.heads.see(func, args, kwargs, given, made)
            self.over_queries.see(name, func, args, kwargs, given, made)
            self.mixtures.see(func, args, kwargs, given, made)
            self.routings.see(name, order, func, args, kwargs, made)
        self.elementwise.see(self.seen, func, args, given, made)
        self.gating.see(name, order, func, args, kwargs, given, made)
        if func in DROPOUTS and not self.live:
            self.seen.dropouts[name] = max(share_dropped(func, args, kwargs), self.seen.dropouts.get(name, 0.0))
        if func in SOFTMAX and given and not self.live:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            is_single = isinstance(dim, int) and made.ndim > 2 and made.shape[dim] == 1 < made.shape[1]
            if is_single and trace(given[0], self.names).sources:
                self.seen.single_softmax.setdefault(name, tuple(made.shape))
        if func in _RECTIFIERS:
            self._activation(name, order, _RECTIFIERS[func], made, None)
        elif func in _BOUNDED:
            function, low, high = _BOUNDED[func]
            before = next((t for t in given if t.shape == made.shape), None)
            self._activation(name, order, function, made, (low, high), before)
        elif func in SOFTMAX and made.ndim >= 3 and made.shape[-1] > 1 and not self._is_of_classes(args, kwargs, made):
            self._attention(name, order, made, given[0] if given and given[0].shape == made.shape else None)
        elif func is F.scaled_dot_product_attention:
            self._attention(name, order, *(attention_weights(*args, **kwargs) or ()))
        elif func in _MEANS and given and made.ndim and made.is_floating_point():
            self._reduction(name, order, func, given[0], made)
        elif func in ADDITIONS and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            self.seen.added |= {self.names[id(a)] for a in args if id(a) in self.names}
            self._addition(name, order, args[0], args[1], made)

    def _is_of_classes(self, args: tuple, kwargs: Mapping[str, Any], made: Tensor) -> bool:
        """Whether a softmax is over another dimension than keys stand in, or the loss takes it of the outputs."""
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return self.is_outside or (isinstance(dim, int) and dim % made.ndim != made.ndim - 1)

    def _activation(
        self,
        name: str,
        order: int,
        function: str,
        made: Tensor,
        ends: tuple[float, float] | None,
        given: Tensor | None = None,
    ) -> None:
        if made.ndim < 2 or not made.numel():
            return
        values = made.detach()
        axis = 1 if made.ndim == 4 or (made.ndim == 3 and self.is_convolutional) else made.ndim - 1
        others = [d for d in range(made.ndim) if d != axis]
        channels, rows = made.shape[axis], made.numel() // max(1, made.shape[axis])
        mean, finite = values.mean(dtype=torch.float32), torch.ones((), device=made.device)
        if ends is None:
            zero = values.amax(others) == 0
            dead = zero if function != "hardtanh" else zero & (values.amin(others) == 0)
            saturated = torch.zeros((), device=made.device)
        else:
            low, high = ends
            margin = SATURATED * (high - low)
            at_end = ((values < low + margin) | (values > high - margin)).float().mean(others)
            dead, saturated = at_end > 0.99, at_end.mean()
            finite = finite if given is None else (given.detach() > MASKED).all() & given.detach().isfinite().all()

        is_outside = self.is_outside

        def keep(mean: float, dead: float, saturated: float, finite: float) -> None:
            if finite:  # scores that a mask has set are at their end on purpose
                found = Activation(name, function, order, channels, int(dead), saturated, mean, rows, is_outside)
                self.seen.activations.append(found)

        self.read((mean, dead.sum(), saturated, finite), keep)

    def _attention(self, name: str, order: int, weights: Tensor | None = None, scores: Tensor | None = None) -> None:
        if weights is None:
            return
        if self.live:
            weights, scores = weights[:NUM_SAMPLES], None if scores is None else scores[:NUM_SAMPLES]
        elif scores is not None and (seen := visible_keys(scores)) is not None:
            is_lost = bool((scores.detach() == -math.inf).all(-1).any())
            self.seen.visible.append(Visible(name, order, seen, len(scores), is_lost))

        def keep(entropy: float, masked: float, seeing: float) -> None:
            if seeing or masked:
                self.seen.attentions.append(Attention(name, order, entropy if seeing else 1.0, masked))

        self.read(entropy_and_masked(weights, scores), keep)

    def _reduction(self, name: str, order: int, func: Callable, given: Tensor, made: Tensor) -> None:
        count = given.numel() / max(1, made.numel())
        if count < 2 or not given.numel():
            return
        function, scale = func.__name__, count**-0.5 if "sum" in func.__name__ else count**0.5

        def keep(before: float, after: float) -> None:
            share = math.sqrt(after / before) * scale if before > 0 else 1.0
            if share < CANCELS:
                self.seen.reductions.append(Reduction(name, function, order, share))

        self.read([t.detach().float().square().mean() for t in (given, made)], keep)

    def _addition(self, name: str, order: int, left: Tensor, right: Tensor, made: Tensor) -> None:
        if left.shape != right.shape or left.ndim < 2 or not left.is_floating_point():
            return
        if self.unfused or id(left) in self.names or id(right) in self.names:
            return
        self.seen.branch_ends |= {*self.made_by.get(id(left), ()), *self.made_by.get(id(right), ())}
        written = version(made)

        def keep(*sizes: float) -> None:
            rms = as_moments(made if version(made) == written else None, *sizes).rms
            self.seen.additions.append(Addition(name, order, made.shape, rms))

        self.read(self.squares(made), keep)
