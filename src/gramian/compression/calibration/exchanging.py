"""What ranks that calibrate together tell each other: batches and decompositions, sent without pickle."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load, save

from gramian import placement
from gramian.checkpoint.trees import PackedTree, pack_tree, unpack_tree

__all__ = ["exchanged"]


def exchanged(value: Any, group: Any) -> list[Any]:
    """The values of all ranks, by rank, with their tensors in main memory. Collective.

    Args:
        value: dicts, lists and tuples of tensors, numbers, text and `None`.
        group: a process group; all ranks by default.

    Raises:
        UnsupportedError: on every rank, where one has a value with anything else in it; the message says where.
    """
    with placement.agreed("compress", group):
        packed = pack_tree(value).copied()
    texts = placement.exchange(packed.text, group)
    found = placement.exchange_bytes(save({name: t.contiguous() for name, t in packed.tensors.items()}), group)
    return [unpack_tree(PackedTree(load(data), text)) for data, text in zip(found, texts, strict=True)]
