"""Initialization that makes every layer an isometry, so that signals and gradients cross any depth."""

from gramian.init.gains import activation_gain
from gramian.init.isometric import isometric_
from gramian.init.reset import reset_
from gramian.inspection.weights.trained import signs_of_training

__all__ = ["activation_gain", "isometric_", "reset_", "signs_of_training"]
