"""What shapes alone tell of convolution kernels: which are transposed, grouped, or depthwise.

A kernel (o, i, h, w) looks the same whatever the groups, and a transposed one is (i, o, h, w). A bias has as many
entries as there are outputs. The inputs of a convolution without groups are the outputs of other layers, or of two that
are concatenated. What follows from neither is assumed, and the kernel's note says so. No answer depends on the order in
which the tensors come.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gramian.layout import Layout

__all__ = ["GROUPED", "Kernels"]

GROUPED = "grouped"  # the last word of the kind of a kernel that probably is

ASSUMED = "groups 1 and not transposed, as assumed"
IMAGES = (1, 2, 3)  # channels of an input that no layer made
COLORS = 3

_AXES = {3: "w", 4: "h w", 5: "d h w"}
_DIGITS = re.compile(r"(\d+)")


class Kernels:
    """The kernels among tensors that are known by their names and shapes.

    Args:
        shapes: of all tensors by name, biases and norms too.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._kernels = [name for name, shape in shapes.items() if len(shape) in _AXES and name.endswith("weight")]
        self._outputs = {shape[0] for shape in shapes.values() if shape}
        self._outputs |= {shapes[name][1] for name in self._kernels if self._transposed_groups(name)}
        plain = [name for name in self._kernels if not self._transposed_groups(name)]
        strange = [name for name in plain if not self._is_fed(shapes[name][1])]
        # One such kernel is the network's first.
        self._grouped = set(strange) if len(strange) > 1 else set()

    def describe(self, name: str, layout: Layout, kind: str) -> tuple[Layout, str, str]:
        """The layout, kind and note of a kernel that the table of names took for one of a plain convolution."""
        shape, groups = self._shapes[name], self._transposed_groups(name)
        if groups:
            axes = _AXES[len(shape)]
            text = f"(g i) o {axes} -> g (o {axes}) i" if groups > 1 else f"i o {axes} -> (o {axes}) i"
            sizes = {"g": groups} if groups > 1 else {}
            return Layout(text, shape, sizes), f"{kind} transposed", "transposed, as its bias has it"
        if name in self._grouped:
            note = f"its {shape[1]} input channels are the outputs of no layer, so it is probably grouped: these "
            return layout, f"{kind} {GROUPED}", note + "are statistics of the groups' kernels on top of each other"
        return layout, kind, ASSUMED

    def depthwise(self, among: Mapping[str, tuple[int, ...]], tables: bool) -> set[str]:
        """The kernels of one input channel, but for the first of a network that sees gray images.

        Such a network shows no kernel for the three channels of color, and looks up no tokens. Its first kernel is one
        that cannot be depthwise, since no other layer, nor two together, have a number of outputs that divides its own;
        or else the one that is least deep in the model by its name, and the first of these by name.

        Args:
            among: the shapes of the kernels by name.
            tables: whether the model has embeddings.
        """
        single = [name for name, shape in among.items() if shape[1] == 1 and self._transposed_groups(name) != 1]
        if not single or tables or any(shape[1] == COLORS for shape in among.values()):
            return set(single)
        first = {name for name in single if not self._may_be_depthwise(name)}
        return set(single) - (first or {min(single, key=_depth)})

    def _may_be_depthwise(self, name: str) -> bool:
        """Whether the kernel (multiplier · channels, 1, …) may act on the outputs of other layers."""
        own = self._shapes[name][0]
        others = [shape[0] for other, shape in self._shapes.items() if len(shape) > 1 and other != name]
        sums = {a + b for a in set(others) for b in set(others)} | set(others)
        return any(channels > 1 and own % channels == 0 for channels in sums)

    def _transposed_groups(self, name: str) -> int:
        """The groups of a transposed kernel, (in, out / groups, …), where a bias shows that it is one; otherwise 0."""
        shape, bias = self._shapes[name], self._shapes.get(name.removesuffix("weight") + "bias")
        if bias is None or len(bias) != 1 or len(shape) < 3:
            return 0
        outputs, (first, second) = bias[0], shape[:2]
        groups, rest = divmod(outputs, second) if second else (0, 1)
        return groups if outputs != first and not rest and groups and first % groups == 0 else 0

    def _is_fed(self, inputs: int) -> bool:
        """Whether some layer, or two together, have that many outputs."""
        if inputs in IMAGES or inputs in self._outputs:
            return True
        return any(inputs - other in self._outputs for other in self._outputs)


def _depth(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Order by the number of modules around a tensor, then by name with `layers.2` before `layers.10`."""
    words: list[tuple[int, int | str]] = [(0, int(w)) if w.isdigit() else (1, w) for w in _DIGITS.split(name) if w]
    return name.count("."), words
