"""Every direction of the registry, as the tests of optimizers run it: small, and with options that it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from gramian.optim.registry import MATRIX_OPTIMIZERS, Checks, Entry

KEPT = "_kept"  # ends the name of a variant that recomputes its costly parts only now and then, against its default


def entry_of(name: str) -> Entry:
    """The row of a direction or of a variant."""
    return MATRIX_OPTIMIZERS[name.removesuffix(KEPT)]


def checks_of(name: str) -> Checks:
    return entry_of(name).checks


def has(name: str, option: str) -> bool:
    """Whether the optimizer has an option of its own by that name."""
    return option in entry_of(name).optimizer.recipe.options  # type: ignore[attr-defined]


def may_keep_direction(name: str) -> bool:
    """Whether this variant keeps its whole direction for several steps."""
    return checks_of(name).keeps_direction and name.endswith(KEPT)


def maker(name: str, *, exact: bool = False, **options: Any) -> Callable[..., Any]:
    """`make(params, **more)` for a direction, with its options for small matrices, and for exact steps."""
    checks = checks_of(name)
    return partial(entry_of(name).optimizer, **{**checks.small, **(checks.exact if exact else {}), **options})


def variants(refresh: int, *, exact: bool = False, **options: Any) -> dict[str, Callable[..., Any]]:
    """`{name: make(params, **more)}`: each direction with its costly parts recomputed every `refresh` steps.

    Those that recompute them in every step by default also do so here, by their own name; the other is `name_kept`.
    """
    makers: dict[str, Callable[..., Any]] = {}
    for name in MATRIX_OPTIMIZERS:
        kept = maker(name, exact=exact, refresh=refresh, **options)
        if maker(name)([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["refresh"] == 1:
            makers[name] = maker(name, exact=exact, **options)
            makers[name + KEPT] = kept
        else:
            makers[name] = kept
    return makers
