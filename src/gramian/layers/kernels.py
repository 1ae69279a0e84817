"""What a file tells of a convolution's kernel: whether it is transposed or grouped, as far as shapes go.

A kernel (o, i, h, w) looks the same whatever the groups, and a transposed one is (i, o, h, w). A bias has as many
entries as there are outputs. The inputs of a convolution without groups are the outputs of other layers, or of two that
are concatenated. What follows from neither is assumed, and the layer's note says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from gramian.layout import Layout

__all__ = ["TRANSPOSED", "Kernels"]

TRANSPOSED = "transposed"  # the last word of the kind of such a kernel
ASSUMED = "groups 1 and not transposed, as assumed"
IMAGES = (1, 2, 3)  # channels of an input that no layer made

_AXES = {3: "w", 4: "h w", 5: "d h w"}


class Kernels:
    """The kernels among tensors that are known by their names and shapes.

    Args:
        shapes: of all parameters by the names that they have in the model, biases and norms too.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._outputs = {shape[0] for shape in shapes.values() if shape}
        kernels = [name for name, shape in shapes.items() if len(shape) in _AXES and name.endswith("weight")]
        self._outputs |= {shapes[name][1] for name in kernels if self._transposed_groups(name)}
        strange = [n for n in kernels if not self._transposed_groups(n) and not self._is_fed(shapes[n][1])]
        # One such kernel is the network's first.
        self._grouped = set(strange) if len(strange) > 1 else set()

    def describe(self, name: str, layout: Layout, kind: str) -> tuple[Layout, str, str]:
        """The layout, kind and note of a kernel that the table of names took for one of a plain convolution."""
        shape, groups = self._shapes[name], self._transposed_groups(name)
        if groups:
            axes = _AXES[len(shape)]
            text = f"(g i) o {axes} -> g (o {axes}) i" if groups > 1 else f"i o {axes} -> (o {axes}) i"
            sizes = {"g": groups} if groups > 1 else {}
            return Layout(text, shape, sizes), f"{kind} {TRANSPOSED}", "transposed, as its bias has it"
        if name in self._grouped:
            note = f"its {shape[1]} input channels are the outputs of no layer, so it is probably grouped: these "
            return layout, f"{kind} grouped", note + "are statistics of the groups' kernels on top of each other"
        return layout, kind, ASSUMED

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
