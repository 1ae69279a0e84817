"""The polar factor by several methods, and directions for optimizers."""

from gramian.linalg.polar_factor.polar import polar, polar_ex

__all__ = ["polar", "polar_ex"]
