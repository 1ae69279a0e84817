"""Values that the shell completes: written out, since their tables load torch; a test compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["AUGMENTATIONS", "INITS", "OPTIMIZERS", "PENALTIES", "PRECISIONS", "SCHEDULES", "TASKS", "completing"]

OPTIMIZERS = ("auto", "muon", "adamw", "sgd", "balanced", "shampoo", "soap")
SCHEDULES = ("linear", "constant", "cosine", "step", "exponential", "plateau")
PENALTIES = ("l1", "l2", "nuclear", "spectral", "orthogonal")
AUGMENTATIONS = ("shift", "rotate", "scale", "flip", "cutout", "noise", "mask", "mixup")
PRECISIONS = ("float32", "bfloat16", "float16")
INITS = ("auto", "default", "isometric")
TASKS = ("digits", "digits-10", "digits-cnn", "autoencoder", "mnist1d", "diabetes", "copying", "chars")


def completing(names: Iterable[str], *, several: bool = False, end: str = "") -> Callable[[str], list[str]]:
    """A completer for the option of a command.

    Args:
        names: what it may be.
        several: whether it is a list with commas, each name once.
        end: what follows a name.

    Returns: a function from what was typed to what it may become.

    >>> completing(["l1", "l2", "nuclear"], several=True, end="=")("l1=1e-4,l")
    ['l1=1e-4,l2=']
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        taken = {part.partition("=")[0] for part in before.split(",")}
        return [f"{before}{comma}{name}{end}" for name in names if name.startswith(last) and name not in taken]

    return complete
