"""Optimizers that treat parameters as matrices: `OPTIMIZERS` by name, their classes, and `Proximal`."""

from gramian.optim.proximal import Proximal
from gramian.optim.registry import *  # noqa: F403  the classes of its rows
from gramian.optim.registry import __all__ as _registered

__all__ = ["Proximal", *_registered]  # pyright: ignore[reportUnsupportedDunderAll]
