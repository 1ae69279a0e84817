"""Refitting: a compressed model's layers are fit, one after the other, to what the original's layers put out.

A layer is cut for the inputs that it has in the original. In the compressed model its inputs are off by what the layers
before it lost, and part of that it can make up for: its left factor and its bias are the least-squares ones for the
inputs that there are now. Where its output is added to a stream, the sum is what is fit, so that the error of the
stream is made up for too.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.calls import as_model, prepared, unwrapped
from gramian.compression.calibration.reading import cuttable, hashes
from gramian.compression.fitting.lockstep import Stop, Walk, watched
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.layers.modules import copied
from gramian.compression.layers.opening import is_open
from gramian.compression.storage.ranks import ranks_of
from gramian.errors import InputError, some
from gramian.layers import operation_of
from gramian.loader import Batches, as_batches
from gramian.objective import Objective, as_objective, differentiates
from gramian.recording import evaluating
from gramian.recording.hooks import hooks
from gramian.recording.recorder import MAX_DIM

__all__ = ["refit"]

SAMPLES = 512
"""That are fit to: all their passes are in memory at once, at one layer."""
PARTS, MOST = 4, 128
"""The least number of batches, of fewer the batches are cut; and the most."""
DAMPING = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What may be added to the correlations of a layer's inner values; which of them, the other half of the rows says."""


class Sums(NamedTuple):
    """Sums over rows of a layer: z its inner values, e what its output lacks.

    Attributes:
        num: of rows.
        z, zz: `Σ z`, `Σ z zᵀ`.
        e, ez: `Σ e`, `Σ e zᵀ`.
    """

    num: float
    z: Tensor
    zz: Tensor
    e: Tensor
    ez: Tensor

    def plus(self, other: Sums) -> Sums:
        """Of both."""
        return Sums(self.num + other.num, self.z + other.z, self.zz + other.zz, self.e + other.e, self.ez + other.ez)


def refit(
    model: nn.Module,
    original: nn.Module,
    batches: Batches,
    objective: Objective | Callable,
    *,
    exclude: Sequence[str] = (),
    samples: int = SAMPLES,
) -> nn.Module:
    """Fits the layers of a compressed model to the outputs of the model that it was made of, without training.

    Layer by layer, in the order in which they run: the left factor and the bias become the least-squares ones for the
    inputs that the layer has in the compressed model so far, and the outputs that it has in the original. A linear
    layer that is not factored is fit as a whole; a convolution, or one with a side above 8,192, by its bias. Where an
    output is added to another tensor next (a residual stream), it is the sum that is fit. How much each fit is damped,
    or whether there is none, is what does best on the other half of the rows. No labels and no gradients are needed,
    and the layers keep their ranks.

    Args:
        model: from `plan.apply()`; left as it is.
        original: the model that it was made of; left as it is.
        batches: to fit to, best those of the calibration. Under DDP each process fits by itself.
        objective: that of `gm.compress`; its `predict` calls the models, and its padding is left out.
        exclude: name patterns of layers that stay as they are.
        samples: how many are used, from the first on.

    Returns:
        A copy, refit. Layers that run several times in a pass, or share their weights, stay as they are, and so do
        tables, integers, and weights that are handed to one function (attention and recurrent layers of torch).

    Raises:
        InputError: the models are swapped, or not the same but for factored layers, or there are fewer than two
            samples, or most of them are copies.

    Cost: two forward passes of the samples, and `rows·(rank + outputs)·rank` operations a layer. Memory: one layer's
    inputs and outputs of all samples, with what each pass holds there. A thread for each batch.
    Source: this library's own; with inputs of the compressed model, as in GPTQ (2210.17323) and SparseGPT (2301.00774).

    >>> import gramian as gm
    >>> x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    >>> net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    >>> objective = gm.Objective.self_distillation()
    >>> small = gm.compress(net, batches=[x], objective=objective, keep=0.5).apply()
    >>> error = lambda m: float((m(x) - net(x)).square().mean())
    >>> error(gm.refit(small, net, [x], objective)) < error(small)
    True
    """
    small, original = pair_of(model, original, "refit")
    objective = as_objective(objective)
    given = _taken(batches, samples)
    pairs = _without(_pairs(small, original), exclude)

    def run(one: nn.Module, batch: Any) -> Callable[[], Any]:
        return lambda: objective.predict(one, batch)

    with ExitStack() as stack:
        stack.enter_context(evaluating(small))
        stack.enter_context(evaluating(original))
        batch = prepared(original, given[0])
        differentiates(objective, original, batch)  # is known before anything counts its layers
        once = _once(pairs, run(original, batch))
        pairs = {name: pair for name, pair in pairs.items() if name in once}
        stack.enter_context(watched({name: _last(layer) for name, (layer, _) in pairs.items()}))
        stack.enter_context(watched({name: layer for name, (_, layer) in pairs.items()}))
        passes = []
        for one in given:
            batch = prepared(original, one)
            both = Walk(run(small, batch)), Walk(run(original, batch))
            for walk in both:
                stack.callback(walk.close)
            passes.append((*both, objective.mask(batch)))
        _fit_all({name: layer for name, (layer, _) in pairs.items()}, passes)
    return small


def pair_of(model: nn.Module, original: nn.Module, verb: str) -> tuple[nn.Module, nn.Module]:
    """A copy of a compressed model, and the model that it was made of, unwrapped, and not the one for the other.

    Raises:
        InputError: one of them is no model, or layers are compressed in the original that are dense in the model.
    """
    model, original = unwrapped(as_model(model, verb)), unwrapped(as_model(original, verb))
    only = ranks_of(original).keys() - ranks_of(model).keys()
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, original)]
    if only and counts[0] > counts[1]:
        raise InputError(
            f"{verb}: {some(sorted(only))} of the second model is compressed, and dense in the first, which has "
            f"{counts[0]:,} parameters and the second {counts[1]:,}. Swap them: the compressed model comes first"
        )
    return copied(model), original


Pass = tuple[Walk, Walk, Tensor | None]
"""Of the compressed model, of the original, and which rows count."""


@torch.no_grad()
def _fit_all(layers: Mapping[str, nn.Module], passes: Sequence[Pass]) -> None:
    """Leads all passes from layer to layer. A pass that comes to a layer that is fit already goes on with that."""
    done: set[str] = set()
    for walk, _, _ in passes:
        walk.advance()
    while True:
        for walk, _, _ in passes:
            while walk.stop is not None and walk.stop.name in done:
                walk.advance()
        at = Counter(walk.stop.name for walk, _, _ in passes if walk.stop is not None)
        if not at:
            return
        name = at.most_common(1)[0][0]
        here = [one for one in passes if one[0].stop is not None and one[0].stop.name == name]
        _fit(layers[name], here)
        done.add(name)


def _fit(layer: nn.Module, passes: Sequence[Pass]) -> None:
    """Fits one layer, and changes the outputs at which the passes stand."""
    halves: list[Sums | None] = [None, None]
    for i, (walk, other, mask) in enumerate(passes):
        assert walk.stop is not None
        target = _target(walk.stop, other)
        if target is not None:
            found = _sums(layer, walk.stop, target, mask)
            before = halves[i % 2]
            halves[i % 2] = found if before is None else before.plus(found)
    one, two = halves
    last: Any = _last(layer)
    fitted = None if one is None or two is None else _solved(one, two, getattr(last, "bias", None) is not None)
    if fitted is None:
        return
    change, shift = fitted
    if change.numel():
        # Not seen by autograd: a walk that will differentiate has passed this layer already.
        last.weight.data += change.reshape(last.weight.shape).to(last.weight.dtype)
    if last.bias is not None:
        last.bias.data += shift.to(last.bias.dtype)
    for walk, _, _ in passes:
        assert walk.stop is not None
        output = last(walk.stop.inputs)
        for tensor in walk.stop.outputs:
            tensor.copy_(output)


def _target(stop: Stop, original: Walk) -> Tensor | None:
    """What the output should be; `None` where the original's pass does not come to this layer, or to another form."""
    while original.advance() is not None:
        there = original.stop
        assert there is not None
        if there.name != stop.name:
            continue
        wanted = there.outputs[0]
        if wanted.shape != stop.outputs[0].shape:
            return None
        if there.other is not None and stop.other is not None:
            wanted = wanted.float() + (there.other.float() - stop.other.float())
        return wanted.float()
    return None


def _sums(layer: nn.Module, stop: Stop, target: Tensor, mask: Tensor | None) -> Sums:
    lacking, inner = target - stop.outputs[0].float(), stop.inputs.float()
    if operation_of(_last(layer)).factors == "convolution":
        lacking, inner = lacking.movedim(1, -1), inner.movedim(1, -1)
    if _fits_bias_alone(layer):
        inner = lacking[..., :0]
    if mask is not None and lacking.shape[: mask.ndim] == mask.shape and lacking.ndim > mask.ndim:
        lacking, inner = lacking[mask], inner[mask]
    e, z = lacking.flatten(0, -2), inner.flatten(0, -2)
    return Sums(len(e), z.double().sum(0), (z.mT @ z).double(), e.double().sum(0), (e.mT @ z).double())


def _solved(one: Sums, two: Sums, centered: bool) -> tuple[Tensor, Tensor] | None:
    """The change of the factor and of the bias; `None` where it is best that there is none."""
    best, damping = 0.0, None
    for trial in DAMPING:
        error = _error(_change(one, trial, centered), two) + _error(_change(two, trial, centered), one)
        if error < best:  # also not where it is NaN
            best, damping = error, trial
        if not one.z.numel():  # there is nothing to damp
            break
    return None if damping is None else _change(one.plus(two), damping, centered)


def _change(sums: Sums, damping: float, centered: bool) -> tuple[Tensor, Tensor]:
    """The ridge regression of e on z, with correlations damped."""
    num = max(sums.num, 1.0)
    z, e = (sums.z / num, sums.e / num) if centered else (torch.zeros_like(sums.z), torch.zeros_like(sums.e))
    square, cross = sums.zz / num - z[:, None] * z, sums.ez / num - e[:, None] * z
    size = square.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 1e-12 * size.amax(), 1 / size, 0.0) if len(size) else size
    system = scale[:, None] * square * scale + damping * torch.eye(len(size), dtype=square.dtype, device=square.device)
    change = torch.linalg.solve_ex(system, (cross * scale).mT)[0].mT * scale
    return change, e - change @ z


def _error(change: tuple[Tensor, Tensor], sums: Sums) -> float:
    """By how much a change moves the squared error of rows, each row counting alike: below zero, it helps."""
    d, c = change
    linear = (d * sums.ez).sum() + c @ sums.e
    square = (d * (d @ sums.zz)).sum() + 2 * c @ (d @ sums.z) + sums.num * c @ c
    return float(square - 2 * linear)


def _fits_bias_alone(layer: nn.Module) -> bool:
    """Whether a dense layer is a convolution, whose windows are no rows here, or wide, as a head of a vocabulary."""
    weight = layer.get_parameter("weight") if not isinstance(layer, LowRank) else None
    return weight is not None and (weight.ndim != 2 or max(weight.shape) > MAX_DIM)


def _last(layer: nn.Module) -> nn.Module:
    """What has the left factor and the bias."""
    return layer[1] if isinstance(layer, LowRank) else layer


def _pairs(small: nn.Module, original: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The layers that can be fit, with those of the original."""
    owners = Counter(id(p) for m in small.modules() for p in m._parameters.values() if p is not None)
    dense, found = dict(original.named_modules()), {}
    inside: set[nn.Module] = set()
    for name, layer in small.named_modules():
        if isinstance(layer, LowRank) or is_open(layer):  # whose layers are no modules of the original's
            inside.update(one for one in layer.modules() if one is not layer)
        if layer in inside or (isinstance(layer, LowRank) and layer.is_table):
            continue
        last = _last(layer)
        weight, bias = (last._parameters.get(key) for key in ("weight", "bias"))
        shared = any(owners[id(p)] > 1 for p in (weight, bias) if p is not None)
        plain = weight is not None and weight.is_floating_point() and not shared
        if not plain or operation_of(last).factors not in ("linear", "convolution"):
            continue
        if name not in dense:
            raise InputError(f"refit: the original has no layer {name!r}: give the model that this one was made of")
        if isinstance(layer, LowRank) or bias is not None or not _fits_bias_alone(layer):
            found[name] = (layer, dense[name])
    return found


def _without(
    pairs: dict[str, tuple[nn.Module, nn.Module]], exclude: Sequence[str]
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The pairs whose names match none of the patterns."""
    if isinstance(exclude, str):
        raise InputError("refit: exclude is a list of patterns: exclude=['lm_head']")
    for pattern in exclude:
        if not fnmatch.filter(pairs, pattern):
            raise InputError(f"refit: no layer that can be fit matches {pattern!r}")
    return {name: pair for name, pair in pairs.items() if not any(fnmatch.fnmatch(name, one) for one in exclude)}


def _once(pairs: Mapping[str, tuple[nn.Module, nn.Module]], run: Callable[[], Any]) -> set[str]:
    """The layers that run once in a pass."""
    calls: Counter[str] = Counter()
    handles = [
        layer.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, (_, layer) in pairs.items()
    ]
    with hooks(handles), torch.no_grad():
        run()
    return {name for name, num in calls.items() if num == 1}


def _taken(batches: Batches, samples: int) -> list[Any]:
    """The first batches, in at least PARTS parts where they can be cut."""
    if samples < 2:
        raise InputError(f"refit: samples must be at least 2, got {samples!r}")
    found: list[Any] = []
    distinct: set[int] = set()
    num = seen = 0
    for batch in as_batches(batches, "refit"):
        found.append(batch)
        num += cuttable(batch) or 1
        each = hashes(batch, num)
        distinct.update(each)
        seen += len(each)
        if num >= samples or len(found) == MOST:
            break
    parts = list(_cut(found, -(-PARTS // len(found)))) if found else []
    if len(parts) < 2:
        raise InputError("refit: needs two samples at least: one half says how far the fit of the other can be trusted")
    if len(distinct) < seen / 2:
        raise InputError(
            f"refit: only {len(distinct)} of {seen} samples are distinct, so that no half tells of another"
        )
    return parts


def _cut(batches: Sequence[Any], parts: int) -> Iterator[Any]:
    for batch in batches:
        size = -(-cuttable(batch) // parts)
        if parts == 1 or not size:
            yield batch
            continue
        for begin in range(0, cuttable(batch), size):
            yield mapped(batch, lambda t, at=slice(begin, begin + size): t[at])
