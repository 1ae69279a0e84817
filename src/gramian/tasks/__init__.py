"""Built-in tasks, and tasks from a user's file."""

from gramian.tasks.digits import Digits, autoencoder, digits, digits_cnn, plain_tanh_network
from gramian.tasks.files import load
from gramian.tasks.regression import diabetes
from gramian.tasks.sequences import CausalTransformer, chars, copying
from gramian.tasks.table import TASKS, Builtin

__all__ = [
    "TASKS",
    "Builtin",
    "CausalTransformer",
    "Digits",
    "autoencoder",
    "chars",
    "copying",
    "diabetes",
    "digits",
    "digits_cnn",
    "load",
    "plain_tanh_network",
]
