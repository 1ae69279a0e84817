"""Weights in files: read tensor by tensor, without executing anything in them; written whole or not at all."""

from gramian.checkpoint.filling import load_into
from gramian.checkpoint.formats import Entry
from gramian.checkpoint.reading import Checkpoint, clean_name, open_checkpoint
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
