"""Actions on weights and modules that may cure a finding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

from gramian.block import blocks
from gramian.init.reset import USUAL, sizes
from gramian.remedies.asked import Asked
from gramian.report import Action

__all__ = [
    "constant",
    "dropout",
    "everything",
    "gates",
    "half_precision",
    "non_finite",
    "norm_gain",
    "places",
    "rescaled",
    "rescaled_embedding",
    "sigmoids",
    "small_branches",
    "statistics",
    "unfreeze",
    "unshared",
    "zero",
]

ISOMETRIC = Action("isometric_")
RESET_ALL = Action("reset_all")

# Root mean squares of embeddings: torch's, transformers', and one between.
EMBEDDINGS = (1.0, 0.14, 0.02)

# Size rms(W) √fan_in of matrices in branches that no norm divides.
BRANCH = 0.3

USUAL_DROPOUT, USUAL_NORM_MOMENTUM = 0.1, 0.1


def everything(asked: Asked) -> Iterator[Action]:
    """All matrices anew."""
    yield ISOMETRIC
    yield RESET_ALL


def everything_by_depth(asked: Asked) -> Iterator[Action]:
    """All matrices anew, where the finding says that it is they who lose the signal."""
    if asked.finding.action is not None:
        yield from everything(asked)


def places(asked: Asked) -> Iterator[Action]:
    """What the finding names anew."""
    if asked.places:
        yield Action("reset", {"names": asked.places})


def small_branches(asked: Asked) -> Iterator[Action]:
    """All matrices but the first and the head, so small that the branches that they are in add little."""
    names = [block.name for block in blocks(asked.model).blocks if block.role == "hidden"]
    if len(names) > 1:
        yield Action("reset_to_size", {"names": tuple(names[1:]), "size": BRANCH})


def zero(asked: Asked) -> Iterator[Action]:
    """Matrices of zeros anew."""
    names = asked.parameters(lambda p: p.ndim > 1 and not bool(p.any()))
    if names:
        yield Action("reset", {"names": names})


def constant(asked: Asked) -> Iterator[Action]:
    """Constant matrices anew."""
    names = asked.parameters(lambda p: p.ndim > 1 and p.numel() > 1 and bool((p == p.flatten()[0]).all()))
    if names:
        yield Action("reset", {"names": names})


def non_finite(asked: Asked) -> Iterator[Action]:
    """Zeros for what is not finite, or those parameters anew."""
    yield Action("zero_non_finite")
    yield Action("reset", {"names": asked.parameters(lambda p: not bool(p.isfinite().all()))})


def rescaled(asked: Asked) -> Iterator[Action]:
    """Keep the directions and change the size: to that of the other matrices."""
    found = sizes(asked.model)
    usual = [s for n, s in found.items() if n not in asked.places and USUAL[0] < s < USUAL[1]]
    odd = [n for n in asked.places if n in found and found[n] > 0 and math.isfinite(found[n])]
    if len(odd) == 1:
        factor = (median(usual) if usual else 1.0) / found[odd[0]]
        yield Action("rescale", {"name": odd[0], "factor": _rounded(factor)})


def rescaled_embedding(asked: Asked) -> Iterator[Action]:
    """Keep the directions, at the usual sizes of embeddings."""
    for name, p in asked.model.named_parameters():
        rms = float(p.detach().float().square().mean().sqrt())
        if name != (asked.places or ("",))[0] or not 0 < rms < math.inf:
            continue
        for wanted in EMBEDDINGS:
            yield Action("rescale", {"name": name, "factor": _rounded(wanted / rms)})


def gates(asked: Asked) -> Iterator[Action]:
    """The weights, where no bias shuts the gate, which the finding's own action would reset."""
    if asked.finding.action is None:
        yield from places(asked)


def norm_gain(asked: Asked) -> Iterator[Action]:
    """Ones for gains of zero."""
    names = [
        f"{name}.weight"
        for name, module in asked.modules.items()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and not bool(weight.detach().any())
    ]
    if names:
        yield Action("fill_with_ones", {"names": tuple(names)})


def sigmoids(asked: Asked) -> Iterator[Action]:
    """ReLU for sigmoids."""
    names = [name for name, module in asked.model.named_modules() if type(module) is nn.Sigmoid and name]
    if len(names) > 1:
        yield Action("rectify", {"names": tuple(names)})


def dropout(asked: Asked) -> Iterator[Action]:
    """The usual dropout."""
    for attribute, kinds in (
        ("p", nn.modules.dropout._DropoutNd),
        ("dropout", (nn.MultiheadAttention, nn.RNNBase)),
    ):
        names = [
            name
            for name, module in asked.model.named_modules()
            if isinstance(module, kinds) and getattr(module, attribute) >= 0.5
        ]
        if names:
            yield Action("set", {"names": tuple(names), "attribute": attribute, "value": USUAL_DROPOUT})


def statistics(asked: Asked) -> Iterator[Action]:
    """Running statistics of the data, or a momentum that follows them."""
    slow = tuple(
        name
        for name, module in asked.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.momentum is not None
        and module.momentum < USUAL_NORM_MOMENTUM / 10
    )
    if slow and asked.fitting.is_called_with_the_first:
        yield Action("set_norm_momentum", {"names": slow, "momentum": USUAL_NORM_MOMENTUM})
    elif slow:  # training then renews the statistics
        yield Action("set", {"names": slow, "attribute": "momentum", "value": USUAL_NORM_MOMENTUM})
    else:
        yield Action("update_statistics")


def unshared(asked: Asked) -> Iterator[Action]:
    """Copies of layers that are one by mistake."""
    holders = {name.rpartition(".")[0] for name in asked.places}
    holder = next(iter(holders)) if len(holders) == 1 else ""
    if holder and isinstance(asked.model.get_submodule(holder), nn.ModuleList) and asked.setting.groups:
        yield Action("unshare", {"module": holder})


def unfreeze(asked: Asked) -> Iterator[Action]:
    """Unfreeze, and give the optimizer what it was made without."""
    known = {p for group in asked.setting.groups for p in group["params"]}
    lacks = asked.setting.optimizer is not None and any(p not in known for p in asked.model.parameters())
    yield Action("unfreeze_and_add" if lacks else "unfreeze")


def half_precision(asked: Asked) -> Iterator[Action]:
    """bfloat16 for float16."""
    if asked.parameters(lambda p: p.dtype == torch.float16):
        yield Action("cast_to_bfloat16")


def _rounded(factor: float) -> float:
    return float(f"{factor:.3g}")
