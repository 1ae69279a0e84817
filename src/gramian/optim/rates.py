"""At which rate each parameter of a group steps: the matrices at `lr`, the rest at AdamW's rates, which follow it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from gramian.optim.route import Route
from gramian.optim.scaling import faded, usual_kernel_lr, usual_table_lr

__all__ = ["Kind", "by_kind", "full_rate", "full_rates", "lr_now", "rates_of", "rest_groups"]

Kind = Literal["matrix", "table", "kernel", "vector"]


def full_rate(own: Mapping[str, Any], lr: Any, others: Iterable[Any]) -> float:
    """The `lr` of a group at which AdamW's rate is `rest_lr`: the one that schedules start from.

    Args:
        own: the options that the group came with: a state's `full_lr`, a scheduler's `initial_lr`.
        lr: the group's rate now.
        others: rates to take where that is zero, in order.
    """
    candidates = (own.get("full_lr"), own.get("initial_lr"), lr, *others)
    return next((float(rate) for rate in candidates if rate is not None and float(rate) > 0), 1.0)


def lr_now(group: Mapping[str, Any]) -> float:
    """The rate of the group's matrices in the next step: its `lr`, or what is left of a usual one that fades."""
    lr = float(group["lr"])
    if not group.get("fades"):  # which states of earlier versions lack
        return lr
    return lr * faded(group["step"] + 1, group["full_lr"], group["num_matrices"])


def _kind(r: Route) -> Kind:
    if r.layout is not None:
        return "matrix"
    if r.parameter.ndim < 2:
        return "vector"
    return "kernel" if r.role == "elementwise" and r.whole is not None else "table"


def by_kind(routes: Iterable[Route]) -> dict[Kind, list[Route]]:
    """The routes of each kind: all of a kind step at one rate."""
    kinds: dict[Kind, list[Route]] = {}
    for r in routes:
        kinds.setdefault(_kind(r), []).append(r)
    return kinds


def full_rates(group: Mapping[str, Any], kinds: Mapping[Kind, list[Route]]) -> dict[Kind, float]:
    """AdamW's rate of each kind at the full `lr`."""
    full, rest = group["full_lr"], group["rest_lr"]
    spectral = group["scale"] == "spectral"
    usual = rest is None and spectral
    if rest is None:
        rest = usual_table_lr((r.parameter for r in kinds.get("table", [])), full) if spectral else full
    rest = float(rest)
    rates: dict[Kind, float] = {"table": rest, "kernel": rest, "vector": rest}
    if usual:
        kernels = kinds.get("kernel", [])
        rates["kernel"] = usual_kernel_lr(r.whole.matrices[-1] for r in kernels if r.whole is not None)
    if spectral and group["num_matrices"]:
        # Vectors of all layers move at once, as the matrices do, so that they share the change of the function too.
        rates["vector"] = min(rest, full / group["num_matrices"])
    return rates


def rates_of(group: Mapping[str, Any], routes: Mapping[Tensor, Route]) -> dict[Tensor, float]:
    """The rate at which each parameter of a group steps now.

    AdamW's are those of the full `lr`, times the factor by which a schedule has changed that.
    """
    kinds = by_kind(routes[p] for p in group["params"])
    lr = lr_now(group)
    rates: dict[Kind, float] = {k: rate * (lr / group["full_lr"]) for k, rate in full_rates(group, kinds).items()}
    rates["matrix"] = lr
    return {r.parameter: rates[kind] for kind, members in kinds.items() for r in members}


def rest_groups(
    group: Mapping[str, Any], rates: Mapping[Kind, float], members: Mapping[Kind, list[Tensor]]
) -> list[dict[str, Any]]:
    """What AdamW steps of a group, by kind, as groups for `Rest.step`. Vectors do not decay.

    Args:
        group: the parameter group.
        rates: `full_rates` of it.
        members: the parameters of each kind. Kinds that step alike are one group: a call takes longer than its work.
    """
    factor = lr_now(group) / group["full_lr"]
    alike: dict[tuple[float, float], list[Tensor]] = {}
    for kind, params in members.items():
        if kind != "matrix":
            decay = 0.0 if kind == "vector" else group["rest_weight_decay"]
            alike.setdefault((rates[kind], decay), []).extend(params)
    return [
        {
            "params": params,
            "lr": rate * factor,
            "weight_decay": decay,
            "betas": group["rest_betas"],
            "eps": group["rest_eps"],
            "maximize": group["maximize"],
            "fused": group.get("fused", True),
        }
        for (rate, decay), params in alike.items()
    ]
