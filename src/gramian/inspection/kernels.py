"""What a file tells of a convolution's kernel: whether it is transposed or grouped, as far as shapes go.

A kernel (o, i, h, w) looks the same whatever the groups, and a transposed one is (i, o, h, w). A bias has as many
entries as there are outputs. The inputs of a convolution without groups are the outputs of other layers, or of two that
are concatenated. What follows from neither is assumed, and the layer's note says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from gramian.checkpoint import Entry
from gramian.layout import Layout

__all__ = ["Kernels"]

ASSUMED = "groups 1 and not transposed, as assumed"
IMAGES = (1, 2, 3)  # channels of an input that no layer made

_AXES = {3: "w", 4: "h w", 5: "d h w"}


class Kernels:
    """The kernels of a file, by its names and shapes."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._outputs = {e.shape[0] for e in entries.values() if e.shape and not e.part_of}
        kernels = [
            e for e in entries.values() if len(e.shape) in _AXES and e.weight.endswith("weight") and e.kind == "float"
        ]
        self._outputs |= {e.shape[1] for e in kernels if self._transposed_groups(e)}
        strange = [e for e in kernels if not self._transposed_groups(e) and not self._is_fed(e.shape[1])]
        # One such kernel is the network's first.
        self._grouped = {e.name for e in strange} if len(strange) > 1 else set()

    def describe(self, entry: Entry, layout: Layout, kind: str) -> tuple[Layout, str, str]:
        """The layout, kind and note of a kernel that the table of names took for one of a plain convolution."""
        groups = self._transposed_groups(entry)
        if groups:
            axes = _AXES[len(entry.shape)]
            text = f"(g i) o {axes} -> g (o {axes}) i" if groups > 1 else f"i o {axes} -> (o {axes}) i"
            sizes = {"g": groups} if groups > 1 else {}
            return Layout(text, entry.shape, sizes), f"{kind} transposed", "transposed, as its bias has it"
        if entry.name in self._grouped:
            note = f"its {entry.shape[1]} input channels are the outputs of no layer, so it is probably grouped: these "
            return layout, f"{kind} grouped", note + "are statistics of the groups' kernels on top of each other"
        return layout, kind, ASSUMED

    def _transposed_groups(self, entry: Entry) -> int:
        """The groups of a transposed kernel, (in, out / groups, …), where a bias shows that it is one; otherwise 0."""
        bias = self._entries.get(entry.weight.removesuffix("weight") + "bias")
        if bias is None or len(bias.shape) != 1 or len(entry.shape) < 3:
            return 0
        outputs, (first, second) = bias.shape[0], entry.shape[:2]
        groups, rest = divmod(outputs, second) if second else (0, 1)
        return groups if outputs != first and not rest and groups and first % groups == 0 else 0

    def _is_fed(self, inputs: int) -> bool:
        """Whether some layer, or two together, have that many outputs."""
        if inputs in IMAGES or inputs in self._outputs:
            return True
        return any(inputs - other in self._outputs for other in self._outputs)
