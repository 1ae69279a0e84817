"""Libraries that gramian does not depend on, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gramian.errors import UnsupportedError

__all__ = ["load"]


def load(module: str, extra: str) -> Any:
    """Imports a module; where it is not installed, the error says what to install.

    Args:
        module: its full name.
        extra: of gramian, that has the library.

    Returns:
        The module.

    Raises:
        UnsupportedError: the library is not installed.

    Cost: that of the import.

    >>> load("math", "hf").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the library is there, and lacks something itself
        raise UnsupportedError(f'{error.name} is not installed: pip install "gramian[{extra}]"') from None
