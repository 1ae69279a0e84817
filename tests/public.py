"""What is public: what stands in `__all__` of a module directly inside the package. Nothing is listed here by hand."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import gramian

COMMANDS = {"cli", "demo", "bench", "__main__"}
"""Modules that stand above the library: the commands, which --help documents."""


def modules() -> list[ModuleType]:
    """The package itself first, and its public modules in alphabetical order."""
    names = [name for _, name, _ in pkgutil.iter_modules(gramian.__path__) if name not in COMMANDS]
    found = [gramian, *(importlib.import_module(f"gramian.{name}") for name in sorted(names))]
    return [module for module in found if hasattr(module, "__all__")]
