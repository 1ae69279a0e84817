"""Weights in files: read tensor by tensor, without executing anything in them; written whole or not at all.

Importing this package loads nothing but what cleans names; the rest is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gramian.checkpoint.names import clean_name

if TYPE_CHECKING:
    from gramian.checkpoint.filling import load_into
    from gramian.checkpoint.formats import Entry
    from gramian.checkpoint.reading import Checkpoint, open_checkpoint
    from gramian.checkpoint.trees import load_tree, save_tree
    from gramian.checkpoint.writing import load_tensors, save_tensors, verify_file

__all__ = [
    "Checkpoint",
    "Entry",
    "clean_name",
    "load_into",
    "load_tensors",
    "load_tree",
    "open_checkpoint",
    "save_tensors",
    "save_tree",
    "verify_file",
]

_LAZY = {
    "Checkpoint": "reading",
    "Entry": "formats",
    "load_into": "filling",
    "load_tensors": "writing",
    "load_tree": "trees",
    "open_checkpoint": "reading",
    "save_tensors": "writing",
    "save_tree": "trees",
    "verify_file": "writing",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
