"""What all matrix optimizers share: a step of each stack of matrices, its safety, and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.optim.flags import Flags
from gramian.optim.guard import is_ordinary, limit_, vanished
from gramian.optim.health import Row, measure
from gramian.optim.parameters import check_not_replaced, check_step
from gramian.optim.plan import Plan
from gramian.optim.rates import lr_now
from gramian.optim.recipe import StepContext
from gramian.optim.refresh import due, stagger
from gramian.optim.route import Route
from gramian.optim.saved import Saved
from gramian.optim.scaling import step_length
from gramian.optim.stacks import Stack, alike, joined
from gramian.rows import NamedRows

__all__ = ["MatrixOptimizer"]


class MatrixOptimizer(Saved):
    """Steps each matrix along a direction D, `W ← (1 − lr·weight_decay) W − lr · s · D`, and the rest by AdamW.

    A subclass declares how D is computed, its `recipe`; everything else is done here.

    A parameter whose gradient is not finite is skipped for that step, with its state, and counted in `health()`; all
    ranks agree. Zero, rank-one and extremely scaled gradients give a finite step (under AdamW, a gradient whose square
    overflows is skipped). A parameter without a gradient does not move.

    The matrices of a sharded parameter (FSDP2) are computed whole, each on one rank, which holds their state;
    `state_dict()` and `load_state_dict()` are collective then. Every rank gets its part of the state, large tensors as
    `DTensor` slices and small ones whole, so that each rank can save its own part, or `torch.distributed.checkpoint`
    all of them, to be loaded by any number of ranks.

    Args:
        params: the model (best: matrices are found by their role), its `named_parameters()` (by name and shape, as in a
            file), or `parameters()`; or torch's parameter groups of these, which stay as they are given. A group's own
            `lr`, `weight_decay` and other options apply to its matrices and its other parameters alike, and other keys
            are kept. Frozen parameters that hold no real numbers
            (quantized weights) are left out; `explain()` says so.
        lr: length of a step of the matrices, in the unit that `scale` sets. Where a schedule changes it in a group,
            AdamW's rates there follow in proportion; `rates()` tells them.
        options: those of the direction, by name.
        shared: the options of all matrix optimizers:

            - `weight_decay`: decoupled, of the matrices.
            - `scale`: `"spectral"`: `s = √(m/n) / L`, where L is the number of matrices that a unit of the function
              passes through (those frozen when they were given do not count, nor those that make the coefficients of a
              Mamba's recurrence; the experts of a layer count once): each matrix has the same share in the change of
              the network's function, so that one rate carries across widths and depths. `"match_rms_adamw"`:
              `s = 0.2 √max(m, n)`, so that a rate tuned for AdamW can be reused.
            - `rest_lr`, `rest_betas`, `rest_eps`, `rest_weight_decay`: of AdamW. `rest_lr`, its rate while `lr` is what
              it was at the start, is 3e-3 by default, and up to 1e-2 where all embeddings and heads are narrower than
              800; where the `lr` at the start is larger than 0.1, it grows in proportion, at most threefold. (Depthwise
              kernels take 3e-3, and up to 3e-2 where all have fewer than 49 taps.) With `scale="match_rms_adamw"`, it
              is `lr` itself. With `scale="spectral"`, vectors (biases, norms) take the rate `lr / L` where
              that is less. Vectors do not decay.
            - `part_size`: a matrix whose smaller side is longer is cut along that side into equal parts of at most so
              many rows (or columns). Each part has its own direction, which costs less. `None`: never.
            - `refresh`: steps between two recomputations of a direction's costly parts, staggered over the matrices.
            - `max_overhead`: the largest share of a step's time that the optimizer may take. `refresh` is then set
              once, after nine steps have been timed, by all ranks together; it is kept in `state_dict()` and replayed.
            - `approach`: how a polar factor is computed, in float32 or bfloat16, by composed quintics or by inverses of
              the Gram matrix: `"predicted"`, the cheapest by a cost model, which is the same in every run on a kind of
              processor (with a matrix unit for bfloat16, with other instructions for it, or without); or `"measured"`
              (of `Muon`), the fastest, timed within a second when a group is built, which is collective then. The group
              and its state keep either as `approaches`: a resumed run replays it, also on another kind of processor.
            - `model`: where `params` are its parameters or groups of them: the roles, and the names, are then the
              model's. Without it and without names, whatever has two or more dimensions steps as a matrix, and a
              `GramianWarning` says so.
            - `routes`: overrides by name pattern: `{"0.weight": "matrix", "*.pos_emb": "adamw"}`.
              A stack of matrices that nothing tells of needs `layouts`.
            - `layouts`: as in `gm.blocks`.
            - `maximize`: ascend.

    Raises:
        InputError: for an empty list, a pattern that matches nothing, an unknown option, or one out of its range,
            parameters that are complex, or whose entries share memory; in `step()`, before anything moves, where the
            model has other parameters now than the optimizer, where one has another shape, or where an option of a
            group is out of its range.
        UnsupportedError: in `step()`, before anything moves: for sparse gradients, parameters on the meta device, and
            those that a wrapper has flattened (DeepSpeed's ZeRO, FSDP1). Those that accelerate replaces under FSDP2
            are followed.
        TypeError: as torch's, for one tensor, or a set.
    """

    @torch._disable_dynamo  # an optimizer's step of its own kernels; torch.compile of a loop goes around it
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = self._prepared()
        self._skipped.begin()
        with self._clock.timed([g for g, plan in zip(self.param_groups, plans, strict=True) if plan.matrices]):
            for group, plan in zip(self.param_groups, plans, strict=True):
                self._step_matrices(group, plan)
            for group, plan in zip(self.param_groups, plans, strict=True):
                self._count(*plan.rest.step(plan.rest_groups(group), self.state))
                group["step"] += 1
        return loss

    def _prepared(self) -> list[Plan]:
        """The plan of each group. Refuses what cannot be stepped, before anything moves, and follows replacements."""
        self._follow()
        plans = []
        for number, group in enumerate(self.param_groups):
            plan = self._plans.get(number)
            if plan is None or not plan.of(group["params"]):
                plan = self._plans[number] = Plan(group, self._routes)
            changed = plan.changed(group, self._options)
            if changed:
                self._check({key: group[key] for key in changed})
                plan = self._plans[number] = self._with_options(group, plan, changed)
            plan.see(check_step(plan.params, plan.routes))
            plans.append(plan)
        num_missing = sum(plan.present.count(False) for plan in plans)
        model = self._model() if self._model is not None else None
        if model is not None and num_missing != self._num_missing:  # perhaps the model has others in their place
            check_not_replaced(model, self._routes.values())
        self._num_missing = num_missing
        return plans

    def _with_options(self, group: dict[str, Any], plan: Plan, changed: Sequence[str]) -> Plan:
        """The plan for options that have changed. Raises `InputError` for one that can no longer be honored."""
        if "max_overhead" in changed and len({g["max_overhead"] for g in self.param_groups}) > 1:
            raise InputError("max_overhead is of the whole optimizer: give all parameter groups the same one")
        before, plan.options = plan.options, {key: group[key] for key in self._options}
        shaping = [key for key in changed if key in self.recipe.options or key in ("part_size", "approach")]
        if not shaping:
            return plan
        routes = [r.cut(group["part_size"]) for r in plan.routes]
        group.update(self._choices(routes, group))
        same = True
        for old, new in zip(plan.routes, routes, strict=True):
            if old.layout is None or new.layout is None:
                continue
            shapes, wanted = self._shapes(old, before), self._shapes(new, plan.options)
            if before and group["step"] and any(shapes[k] != wanted[k] for k in shapes.keys() & wanted.keys()):
                plan.options = before
                raise InputError(
                    f"{', '.join(f'{key}={group[key]!r}' for key in shaping)}: the state of {old.name!r} has another "
                    "shape by now. Set it before the first step, or build the optimizer again"
                )
            same = same and shapes == wanted
        if same:
            plan.stacks = None  # what may be padded to one shape may have changed
            return plan
        self._routes.update((r.parameter, r) for r in routes)
        new_plan = Plan(group, self._routes)
        new_plan.options = plan.options
        return new_plan

    def _step_matrices(self, group: dict[str, Any], plan: Plan) -> None:
        params = plan.stepped.get("matrix", [])
        if params:
            flags = Flags(params, plan.grads)
            grads, updates = self._sharding.gradients(params), {}
            rate = lr_now(group) * group["weight_decay"]
            for stack in self._current(group, plan, grads):
                given = [grads.get(p) for p in stack.params]
                update = self._step_stack(stack, group, given, flags)
                if self._sharding:
                    updates.update(zip(stack.params, stack.unstacked(update), strict=True))
                else:  # at once, while it lies in the cache and in memory that the next stack takes
                    stack.add_(update, [g is not None for g in given], flags.keep(rate))
            if self._sharding:
                self._sharding.add_(params, updates, flags.keep(rate))
            self._count(params, flags.bad)

    def _pauses(self, p: Tensor) -> bool:
        """Whether a parameter has a state but no gradient in this step: it keeps its place in a stack."""
        return p.grad is None and p.requires_grad and bool(self.state.get(p))

    def _current(self, group: dict[str, Any], plan: Plan, grads: Mapping[Tensor, Tensor]) -> Sequence[Stack]:
        """The stacks of the parameters that this rank steps, with the state as it is now."""
        stacks = plan.current(group["refresh"], self.state)
        if stacks is None:
            for p in plan.matrices:
                if p.grad is not None:
                    self.state.setdefault(p, {})  # on all ranks, which torch.distributed.checkpoint wants
            routes = [self._routes[p] for p in plan.matrices if p in grads or self._pauses(p)]
            alike, sides = self._alike(routes, group), self.recipe.sides
            stacks = [Stack(same, lambda m: self._initial(m, group), self.state, sides) for same in alike]
            for stack in stacks:
                self.state.update((r.parameter, views) for r, views in zip(stack.routes, stack.views, strict=True))
            stagger(stacks, [self._routes[p] for p in plan.matrices], group["refresh"])
            plan.keep(stacks, group["refresh"])
        return stacks

    def _alike(self, routes: Sequence[Route], group: Mapping[str, Any]) -> list[list[Route]]:
        """The routes of each stack. Sharded matrices are not padded: which are together depends on the ranks. In a run
        that is to be the same on all numbers of ranks (`fused=False`, as for AdamW's part) each parameter is a stack:
        BLAS and LAPACK round a matrix by where it lies in memory.
        """
        found, pads = alike(routes), self.recipe.pads
        if not group.get("fused", True):
            return [[route] for same in found for route in same]
        if pads is None or self._sharding:
            return found
        return joined(found, lambda shapes, room, device: pads(shapes, room, device, group))

    def _step_stack(self, stack: Stack, group: dict[str, Any], grads: list[Tensor | None], flags: Flags) -> Tensor:
        """The update of the stack's matrices (K, m, n), which is still to be added."""
        g = stack.stacked(grads, lasting=bool(self._sharding))
        if group["maximize"]:
            g.neg_()
        bad = None
        if not (flags.waits and all(given is not None for given in grads) and is_ordinary(g, stack.state)):
            bad = flags.of(stack, grads)
            # Bad gradients are masked on the device, without synchronizing; on a CPU, it costs nothing to look first.
            if g.device.type != "cpu" or bool(bad.any()):
                g.masked_fill_(bad, 0.0)
            else:
                bad = None
            limit_(g, stack.state)
        alive = stack.alive if bad is None else (~bad).to(g.dtype)
        context = StepContext(alive, bad is None, due(stack, group), group, stack.first, stack.sizes)
        direction = self.recipe.update(g, stack.state, context)
        if group["refresh"] > 1:
            stack.fresh.clear()
        factors = self._scales(stack, group) * -lr_now(group)
        for share in (None if bad is None else alive, vanished(stack.state)):
            if share is not None:
                factors.mul_(share)
        # In place where the direction is new: another tensor of that size costs more than the product.
        if direction is g:
            return g.mul_(factors)
        memory = direction.untyped_storage().data_ptr()
        kept = any(buffer.untyped_storage().data_ptr() == memory for buffer in stack.state.values())
        return direction * factors if kept else direction.mul_(factors)

    def _scales(self, stack: Stack, group: Mapping[str, Any]) -> Tensor:
        """The s of each matrix, (K, 1, 1)."""
        given = group["scale"], group["num_matrices"]
        if stack.scaled_for != given:
            values = [step_length(r.matrices, *given) for r in stack.routes]
            stack.scaled_for = given
            stack.scales = stack.repeated(torch.tensor(values, dtype=stack.dtype, device=stack.device))
        return stack.scales

    def _count(self, params: list[Tensor], bad: Tensor | None) -> None:
        if params:
            self._skipped.add(params, bad, self._routes)

    def skipped(self) -> dict[Tensor, Tensor]:
        """Whether each parameter was skipped in the last step because its gradient was not finite; on its device."""
        return self._skipped.last()

    def health(self, detail: Literal["counts", "spectra"] = "counts") -> dict[str, Row]:
        """What happened to each parameter, by name.

        `skipped`: steps that it missed because its gradient was not finite. `fallbacks`: results that were not good
        enough (inverse roots that were not certified, say), so that the ones before stayed. With `detail="spectra"`
        also three numbers about its matrices, the worst where it holds several; `None` before its first step:

        - `condition`: σ₁/σₘ of the momentum, infinite where it is singular; `None` without a momentum;
        - `effective_rank`: exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ/Σσ, of the momentum: from one to min(m, n);
        - `drift`: the staleness, from 0 to 1, of results that are recomputed only every `refresh` steps: the share of
          the second moment off the diagonal in its basis (SOAP), or the sine of the angle between a direction or root
          that is kept and its present value. `None` where nothing is kept.

        Of a sharded parameter, only the rank that computes its steps reports fallbacks and spectra; others, `None`.

        Cost: counts synchronize with the device once; spectra take a singular value decomposition of each matrix.
        Source: the effective rank: Roy and Vetterli (2007), eq. 3.

        >>> from torch import nn
        >>> from gramian.optim import Muon
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> optimizer = Muon([("weight", layer.weight)])
        >>> layer.weight.grad = torch.full((2, 3), float("nan"))
        >>> optimizer.step()
        >>> optimizer.health()["weight"]["skipped"]
        1
        """
        if detail not in ("counts", "spectra"):
            raise InputError(f"health: detail must be 'counts' or 'spectra', got {detail!r}")
        self._follow()
        skipped = self._skipped.counts()
        groups = {p: g for g in self.param_groups for p in g["params"] if self._routes[p].layout is not None}
        rows: dict[str, Row] = NamedRows()
        for p, r in self._routes.items():
            rows[r.name] = {"skipped": skipped.get(r.name, 0)}
            if p in groups:
                rows[r.name] |= measure(self.state.get(p, {}), self.recipe, groups[p], detail)
        return rows
