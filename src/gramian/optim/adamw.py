"""AdamW for parameters that hold no hidden matrix: embeddings, heads, norms, biases."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gramian import placement
from gramian.errors import InputError
from gramian.optim.guard import limited
from gramian.optim.sharding import not_finite, whole_norms

__all__ = ["step_adamw"]


def step_adamw(
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
    norms: Mapping[Tensor, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """A step of torch's fused AdamW for every parameter whose gradient is finite and has a finite square.

    A square that overflows would stay in the second moment, and the parameter would never move again. A gradient that
    is larger than ten times the usual counts for that much (`gramian.optim.guard`), by its Frobenius norm.

    Args:
        groups: parameter groups, with `lr`, `betas`, `eps`, `weight_decay` and `maximize`.
        state: by parameter; torch's, of the same form, and the usual norm of its gradients.
        norms: of each parameter's gradient, where they and their squares are known to be finite.

    Returns the parameters that have a gradient, and which of them were skipped (P,), `None` for none.
    """
    params = [p for group in groups for p in group["params"] if p.grad is not None and p.grad.numel()]
    if not params:
        return [], None
    bad = None if norms is not None else not_finite([p.grad for p in params], power=2)
    kept = params if bad is None else [p for p, is_bad in zip(params, bad.tolist(), strict=True) if not is_bad]
    states = [_state_of(p, state) for p in kept]
    # By id, since a tensor's hash is a call of Python's, a hundred of which cost as much as the step itself.
    entries = {id(p): (p, g, s) for p, g, s in zip(kept, _guarded(kept, states, norms), states, strict=True)}
    for group in groups:
        members = [entries[id(p)] for p in group["params"] if id(p) in entries]
        # Parameters that are not contiguous step one by one, since they may share memory and are stepped as copies.
        contiguous = [part.is_contiguous() for part in placement.locals_of([p for p, _, _ in members])]
        plain = [member for member, is_plain in zip(members, contiguous, strict=True) if is_plain]
        others = [member for member, is_plain in zip(members, contiguous, strict=True) if not is_plain]
        for together in (plain, *([member] for member in others)):
            if together:
                _step([p for p, _, _ in together], [g for _, g, _ in together], [s for _, _, s in together], group)
    return params, bad


def _guarded(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], norms: Mapping[Tensor, Tensor] | None
) -> list[Tensor]:
    """This rank's part of each gradient, spread over the ranks as its parameter is, as far as it counts."""
    placed = [_placed_as(p, p.grad) for p in params]
    sizes = whole_norms(placed) if norms is None else [norms[p] for p in params]
    parts = placement.locals_of(placed)
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, known in enumerate(states):
        alike.setdefault((known["usual"].dtype, known["usual"].device), []).append(i)
    for (dtype, _), these in alike.items():
        size, usual = (torch.stack(x) for x in ([sizes[i] for i in these], [states[i]["usual"] for i in these]))
        kept = limited([parts[i] for i in these], size.to(dtype), usual)
        for i, own, grad in zip(these, usual.unbind(), kept, strict=True):
            states[i]["usual"], parts[i] = own, grad
    return parts


def _state_of(p: Tensor, state: MutableMapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """The state of a parameter, in its dtype and on its device, which the user may have changed."""
    known = state.get(p, {})
    if not known:
        zeros = {key: torch.zeros_like(p, memory_format=torch.contiguous_format) for key in ("exp_avg", "exp_avg_sq")}
        state[p] = known = {"step": torch.zeros((), device=p.device), **zeros, "usual": _usual_of(p, {})}
    elif known["exp_avg"].dtype != p.dtype or known["exp_avg"].device != p.device:
        known |= {key: known[key].to(p.device, p.dtype) for key in ("exp_avg", "exp_avg_sq")}
        known["step"] = known["step"].to(p.device)
        known["usual"] = _usual_of(p, known)
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


def _step(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> None:
    moments = [[s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")]
    written = [placement.locals_of(tensors) for tensors in (params, *moments)]
    # The fused step goes through memory and ignores strides: what is not contiguous is stepped as a copy.
    plain = [[x if x.is_contiguous() else x.contiguous() for x in tensors] for tensors in written]
    beta1, beta2 = group["betas"]
    adamw(
        plain[0],
        [g.contiguous() for g in grads],
        plain[1],
        plain[2],
        [],
        [s["step"] for s in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for tensors, copies in zip(written, plain, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _placed_as(p: Any, grad: Any) -> Tensor:
    """The gradient, spread over the ranks as its parameter is."""
    if not hasattr(p, "placements") or grad.placements == p.placements:
        return grad
    return grad.redistribute(p.device_mesh, p.placements)
