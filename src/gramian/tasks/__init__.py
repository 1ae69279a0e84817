"""Built-in tasks, and tasks from a user's file."""

from gramian.tasks.digits import Digits, autoencoder, digits, digits_cnn, plain_tanh_network
from gramian.tasks.files import load
from gramian.tasks.regression import diabetes
from gramian.tasks.sequences import LSTM, CausalTransformer, chars, copying
from gramian.tasks.signals import mnist1d
from gramian.tasks.table import TASKS, Builtin

__all__ = [
    "LSTM",
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
    "mnist1d",
    "plain_tanh_network",
]
