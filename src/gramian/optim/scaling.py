"""Sizes: of gradients, whose squares must neither overflow nor vanish; and of steps, by what a network is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gramian.layout import Layout
from gramian.linalg.engine.scaling import peak, pow2
from gramian.optim.route import Route
from gramian.optim.stacks import State

__all__ = [
    "as_long_as_polar",
    "faded",
    "for_short_run",
    "is_plain",
    "num_in_sequence",
    "rescale_",
    "step_length",
    "usual_kernel_lr",
    "usual_lr",
    "usual_table_lr",
]

SPAN = 24  # powers of two by which gradients may grow or shrink before their unit changes
LARGEST = {torch.float32: 126, torch.float64: 1022}  # largest k for which 2**k and 2**-k are both normal numbers

TABLE_LR = (3e-3, 1e-2)  # least and largest usual rate under AdamW
OUTPUT_STEP = 2.4  # how far one step of AdamW may move an output of a head, all inputs being of size one
BASE_LR, MOST_GROWTH = 0.1, 3.0  # the matrices' rate from which the tables' grows with it, and by how much
KERNEL_LR = (3e-3, 3e-2)
KERNEL_STEP = 0.147  # the same for an output of a depthwise kernel: what 3e-3 is for ConvNeXt's 7 × 7 taps

SHORT, LEAST_STEPS = 300, 100  # runs of fewer steps take a larger usual rate, down to so many
SHALLOW, MOST_DEPTH = 2, 10.0  # the L up to which the usual rate is the base, and by how much it grows with L at most
MOST_PLAIN = 2.0  # the same where nothing tells of skips or gates
ADDED_UP = 0.5  # what steps in random directions may add up to before the usual rate fades

PARALLEL = ("e",)  # axes of the layouts of gramian.layers that number experts
COEFFICIENTS = "c"  # the axis of their rows that are coefficients of a recurrence
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def num_in_sequence(weights: Iterable[tuple[str, Layout]]) -> int:
    """The number of matrices that one unit of the function passes through: the L of `scale="spectral"`.

    Each matrix has the share 1/L in the change of the function, and shares add along a path (Large et al. 2024, §3).
    Fused parts count each, since attention multiplies queries, keys and values, and a gated layer gate and value. The
    experts of a layer count once, since a token gets a weighted mean of their outputs, in which their changes do not
    add up. (By the same argument the groups of a convolution would; nothing was measured there, and they count each.)
    The matrices that make the coefficients of a Mamba's recurrence do not count beside others: the unit passes by them,
    through the kernel, D and the gate, and a step of theirs changes the outputs a hundredth as much
    (docs/measured/optim.md).

    Args:
        weights: name and layout of each. Experts that are modules of their own are told by the name `experts.N.`.

    >>> fused = Layout("(three o) i -> three o i", (6, 2)), Layout("e (two o) i -> e two o i", (8, 4, 2))
    >>> num_in_sequence([("qkv", fused[0])]), num_in_sequence([("experts.gate_up_proj", fused[1])])
    (3, 2)
    >>> num_in_sequence((f"experts.{k}.up", Layout("o i -> o i", (4, 2))) for k in range(8))
    1
    >>> num_in_sequence([("mixer.x_proj", Layout("c i -> c i", (20, 64))), ("out", Layout("o i -> o i", (64, 64)))])
    1
    """
    counts: dict[str, int] = {}
    beside = False
    for name, layout in weights:
        if COEFFICIENTS in layout.sides[1]:
            beside = True
            continue
        place = _EXPERT.sub(r"\1experts.*.", name)
        experts = math.prod(layout.axes[axis] for axis in layout.sides[0] if axis in PARALLEL)
        counts[place] = max(counts.get(place, 0), len(layout.labels) // max(experts, 1))
    return sum(counts.values()) or int(beside)


def is_plain(routes: Iterable[Route]) -> bool:
    """Whether nothing tells of gates or skips: no matrices fused in a tensor, and no vector that is the gain of a norm.

    Norms stand in place of evidence: which layers a skip passes by is not told by parameters, and deep networks with
    skips have norms.

    >>> from torch import nn
    >>> from gramian.optim import Muon
    >>> nets = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.LSTM(4, 4)
    >>> [is_plain(Muon(net)._routes.values()) for net in nets]
    [True, False, False]
    """
    for route in routes:
        if route.layout is not None and len((route.whole or route.layout).labels) > 1:
            return False
        if route.named and route.shape is not None and len(route.shape) == 1 and route.name.endswith("weight"):
            return False
    return True


def usual_lr(base: float, num_matrices: int, *, plain: bool = False) -> float:
    """The matrices' rate where none is given: `base · √(L/2)`, from the base to ten times it, to twice if `plain`.

    With `scale="spectral"` a matrix steps by `lr / L`, so that steps whose effects all add up change the function as
    much at any depth. Those of gates and of layers beside a skip connection do not add up: the tuned rate grows with L
    (docs/measured/learning_rates.md). In plain networks they do: at depth 100 the tanh network of the demo learns at
    0.2, and nothing at 0.7.

    >>> [round(usual_lr(0.1, num), 3) for num in (0, 1, 2, 18, 72, 1000)]
    [0.1, 0.1, 0.1, 0.3, 0.6, 1.0]
    >>> [round(usual_lr(0.1, num, plain=True), 3) for num in (2, 7, 8, 100)]
    [0.1, 0.187, 0.2, 0.2]
    """
    return base * min(MOST_PLAIN if plain else MOST_DEPTH, max(1.0, (num_matrices / SHALLOW) ** 0.5))


def faded(steps: int, lr: float, num_matrices: int) -> float:
    """The share of the usual rate that is left after so many steps: √(T/steps) beyond `T = (L / 2 lr)²` of them.

    Every singular value of a polar factor is one, be its gradient signal or the noise of a small batch, so that the
    noise adds up: t steps of `lr / L` in random directions grow as √t, and T make a half. Whether a schedule lowers the
    rate nobody tells an optimizer (docs/measured/optim.md).

    >>> [round(faded(steps, 0.1, 2), 2) for steps in (1, 100, 400, 10_000)], round(faded(900, 0.3, 18), 2)
    ([1.0, 1.0, 0.5, 0.1], 1.0)
    """
    return min(1.0, ADDED_UP * num_matrices / (lr * max(steps, 1) ** 0.5))


def for_short_run(steps: float | int) -> float:
    """By how much the usual rate grows for a run of so many steps that decays to zero: `√(300/steps)`, from 1 to √3.

    >>> [round(for_short_run(steps), 2) for steps in (20, 100, 150, 300, 10_000)]
    [1.73, 1.73, 1.41, 1.0, 1.0]
    """
    return max(1.0, (SHORT / max(steps, LEAST_STEPS)) ** 0.5)


def usual_table_lr(tables: Iterable[Tensor], lr: float = BASE_LR) -> float:
    """AdamW's rate for embeddings and the head where none is given: 3e-3, up to 1e-2 for narrow ones, at `lr=0.1`.

    A step of AdamW moves each entry by the rate, and so an output of a head by up to the rate times its number of
    inputs: that is to be at most 2.4, as with the rate of 1/320 at a width of 768 (Jordan et al., Muon, 2024).

    Where the matrices take a larger `lr` than 0.1, as short runs do, it grows in proportion, at most threefold.

    >>> usual_table_lr([torch.empty(10, 64)]), usual_table_lr([torch.empty(10, 64), torch.empty(10, 4096)])
    (0.01, 0.003)
    >>> usual_table_lr([torch.empty(10, 64)], lr=0.2), usual_table_lr([torch.empty(10, 64)], lr=10.0)
    (0.02, 0.03)
    """
    widest = max((t.shape[-1] for t in tables), default=1)
    usual = min(TABLE_LR[1], max(TABLE_LR[0], OUTPUT_STEP / max(widest, 1)))
    return usual * min(MOST_GROWTH, max(1.0, lr / BASE_LR))


def usual_kernel_lr(num_taps: Iterable[int]) -> float:
    """AdamW's rate for depthwise kernels where none is given: 3e-3 for 7 × 7 taps, and more for fewer, up to 3e-2.

    A step of AdamW moves each tap by the rate, and so an output by up to the rate times the number of taps.

    >>> usual_kernel_lr([49]), usual_kernel_lr([4]), round(usual_kernel_lr([9, 4]), 4)
    (0.003, 0.03, 0.0163)
    """
    return min(KERNEL_LR[1], max(KERNEL_LR[0], KERNEL_STEP / max(num_taps, default=1)))


def step_length(shape: Sequence[int], scale: str, num_matrices: int) -> float:
    """The s of a matrix (..., m, n): the length of its step at `lr=1`, by the rule that the option `scale` names.

    >>> step_length((4, 16), "spectral", 2), step_length((4, 16), "match_rms_adamw", 2)
    (0.25, 0.8)
    """
    m, n = shape[-2:]
    return math.sqrt(m / n) / num_matrices if scale == "spectral" else 0.2 * math.sqrt(max(m, n))


def rescale_(g: Tensor, state: State, powers: Mapping[str, int]) -> None:
    """Divides each matrix's gradient, in place, by the unit in which its state is stored, and keeps that unit suitable.

    The unit is a power of two for each matrix, `2 ** state["unit"]` (K, 1, 1), one at first. It changes to the size of
    the largest entry of a gradient that is 2²⁴ times larger; or of one 2²⁴ times smaller, once the buffers of power 1
    are that small too. `powers` says by which power of the unit each buffer scales; they are converted, exactly but for
    underflow. Where a buffer or its square would overflow in the new unit, the state of that matrix is reset to zero.
    """
    unit = state["unit"]
    largest = peak(g, (-2, -1))
    wanted = torch.frexp(largest)[1].to(g.dtype).clamp_(-LARGEST[g.dtype], LARGEST[g.dtype])
    moves = (largest > 0) & ((wanted - unit).abs() > SPAN)
    if g.device.type != "cpu" or bool(moves.any()):
        held = {name: power for name, power in powers.items() if name in state}
        small = torch.ones_like(moves)
        for name in (name for name, power in held.items() if power == 1):
            top = peak(state[name], (-2, -1))
            small &= (top == 0) | (torch.frexp(top)[1] < -SPAN)
        moves &= (wanted > unit) | small
        shift = torch.where(moves, unit - wanted, 0.0)
        lost = torch.zeros_like(moves)
        for name, power in held.items():
            top = peak(state[name], (-2, -1))
            lost |= (shift > 0) & (top > 0) & (torch.frexp(top)[1] + shift * power > LARGEST[g.dtype] // 2)
        for name, power in held.items():
            _ldexp_(state[name].masked_fill_(lost, 0.0), shift * power)
    unit.copy_(torch.where(moves, wanted, unit))
    if g.device.type != "cpu" or bool(unit.any()):
        _ldexp_(g, -unit)


def as_long_as_polar(d: Tensor) -> Tensor:
    """Each matrix (K, m, n), scaled to the Frobenius norm of a polar factor, √min(m, n); zeros stay zeros.

    >>> as_long_as_polar(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])).tolist()
    [[[0.6000000238418579, 0.800000011920929]], [[0.0, 0.0]]]
    """
    norm = torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True)
    return d * torch.where(norm > 0, min(d.shape[-2:]) ** 0.5 / norm, 0.0)


def _ldexp_(x: Tensor, exponent: Tensor) -> None:
    x.mul_(pow2(exponent.clamp(-LARGEST[x.dtype], LARGEST[x.dtype]).long()).to(x.dtype))
