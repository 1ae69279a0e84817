"""The options that all matrix optimizers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from gramian.errors import InputError
from gramian.optim.routing import Direction

__all__ = ["DEFAULTS", "REST_LR", "Scale", "Shared", "check"]

Scale = Literal["spectral", "match_rms_adamw"]


class Shared(TypedDict, total=False):
    """The keyword arguments of every matrix optimizer; see `MatrixOptimizer`."""

    weight_decay: float
    scale: Scale
    rest_lr: float | None
    rest_betas: tuple[float, float]
    rest_eps: float
    rest_weight_decay: float
    part_size: int | None
    refresh: int
    max_overhead: float | None
    routes: Mapping[str, Direction] | None
    layouts: Mapping[str, Any] | None
    maximize: bool


REST_LR = 3e-3

DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "scale": "spectral",
    "rest_lr": None,
    "rest_betas": (0.9, 0.95),
    "rest_eps": 1e-8,
    "rest_weight_decay": 0.0,
    "part_size": 256,
    "refresh": 1,
    "max_overhead": None,
    "routes": None,
    "layouts": None,
    "maximize": False,
}


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises for an option out of its range."""
    for key, value in options.items():
        if value is None:
            continue
        if key.endswith(("lr", "weight_decay")) and not value >= 0:
            raise InputError(f"{name}: {key} must not be negative, got {value}")
        if key.endswith(("beta", "momentum")) and not 0 <= value < 1:
            raise InputError(f"{name}: {key} must be in [0, 1), got {value}")
        if key == "rtol" and not 0 < value < 1:
            raise InputError(f"{name}: rtol must be between 0 and 1, got {value}")
        if key == "damping" and not value > 0:
            raise InputError(f"{name}: damping must be positive, got {value}")
        if key == "rank" and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name}: rank must be a number of eigenvectors, at least 1, got {value!r}")
    if options["scale"] not in ("spectral", "match_rms_adamw"):
        raise InputError(f"{name}: scale must be 'spectral' or 'match_rms_adamw', got {options['scale']!r}")
    size = options["part_size"]
    if size is not None and not (isinstance(size, int) and size >= 1):
        raise InputError(f"{name}: part_size must be a number of rows, at least 1, or None, got {size!r}")
    share: float | None = options["max_overhead"]
    if share is not None and not 0 < share < 1:
        raise InputError(f"{name}: max_overhead must be a share of a step's time between 0 and 1, got {share}")
    if not (isinstance(options["refresh"], int) and options["refresh"] >= 1):
        raise InputError(f"{name}: refresh must be a whole number of steps, at least 1, got {options['refresh']!r}")
