"""Capture: one streamed pass over the data gives the Gram matrices of every layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gramian.block import Blocks, blocks
from gramian.errors import InputError
from gramian.objective import Fisher, Objective, as_objective
from gramian.statistics import DiagonalGram, Gram, Site, Statistics

__all__ = ["capture", "evaluating", "measuring"]


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | Callable,
    *,
    fisher: Fisher | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """The Gram matrices of every layer's inputs (A) and output gradients (G), in one streamed pass.

    `A = (1/rows) Σ a aᵀ` over the rows that enter the layer (samples, tokens, patches of a convolution);
    `G = (1/units) Σ g gᵀ` over the gradients, at the layer's output, of the sum of losses.

    Args:
        model: captured in evaluation mode, and left as it was found: mode, gradients, buffers, hooks, random state.
        batches: any iterable of batches.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean` (then `fisher="empirical"`).
        fisher: which second moment G is; the objective's own by default.
        generator: draws the labels of `fisher="sampled"`; by default one seeded with 0.
        progress: called after each batch with the number of batches done.

    Returns:
        Sites by block name in forward order: `stats["0.weight"].A`, `.G`. A parameter tied across modules has one site
        under each of its names; a module that is used twice is one site. Linear, Conv2d (one group) and Embedding are
        captured; others have `None` and the reason. Where all samples share a row (an embedding of positions), its
        gradient is their sum.

    Raises:
        InputError: no batches, a loss that is not finite-shaped, or a `fisher` that the objective lacks.

    Cost: forward, one backward pass per loss (gauss_newton: one per output dimension) without weight gradients, and
    `rows·d²` for each Gram. Memory: the Grams and the layers' output gradients.
    Source: A and G as in K-FAC (Martens & Grosse 1503.05671, eq. 1); shared weights as "expand" (2311.00636, §3).
    """
    objective = as_objective(objective)
    fisher = fisher or objective.fisher
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = generator or torch.Generator(device).manual_seed(0)
    stats = Statistics(fisher=fisher)
    total_loss, num_batches = 0.0, 0
    with measuring(model), _recording(blocks(model), stats) as recorder:
        for batch in batches:
            with torch.enable_grad():
                recorder.edges.clear()
                recorder.active = True
                output = objective.predict(model, batch)
                recorder.active = False
                loss, units = objective.checked(objective.criterion(output, batch))
                stats.units += float(units)
                total_loss += float(loss.detach())
                losses = list(objective.losses(output, batch, fisher, generator))
                for i, pseudo in enumerate(losses):
                    recorder.accumulate(pseudo, retain=i + 1 < len(losses))
            num_batches += 1
            if progress is not None:
                progress(num_batches)
    if num_batches == 0:
        raise InputError("capture: there were no batches; pass a list, or any iterable that is not a spent generator")
    stats.loss = total_loss / stats.units
    for site in stats.sites.values():
        if site.G is not None:
            site.G.count = stats.units  # also where some batches did not use the layer: their gradient is zero
        elif not site.reason:
            site.reason = "no gradient reached it"
    return stats


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's own mode and the global random state again."""
    training = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and uncompiled: hooks that are added to a model after its compilation do not run."""
    compiles = "torch._dynamo" in sys.modules
    with evaluating(model), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        yield


class _Recorder:
    """The forward hooks' state: which sites were reached in this batch, and the gradient edges of their outputs."""

    def __init__(self) -> None:
        self.active = False
        self.edges: list[tuple[Site, nn.Module, Any]] = []

    def accumulate(self, loss: Tensor, *, retain: bool) -> None:
        """Adds the gradients of `loss` at every recorded output to G, whose count is set once all units are known."""
        if not self.edges or not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss, [edge for _, _, edge in self.edges], retain_graph=retain, allow_unused=True)
        for (site, module, _), grad in zip(self.edges, grads, strict=True):
            if grad is None:
                continue
            rows = _output_rows(module, grad)
            if site.G is None:
                site.G = Gram(rows.shape[-1], device=rows.device)
            site.G.update(rows, count=0.0)


@contextmanager
def _recording(found: Blocks, stats: Statistics) -> Iterator[_Recorder]:
    recorder = _Recorder()
    handles = []
    sites: dict[str, Site] = {}
    hooked: set[nn.Module] = set()
    for name, module in (owner for block in found.blocks for owner in block.owners):
        unsupported = _unsupported(module)
        if module in hooked:
            continue
        sites[name] = site = Site(reason=unsupported or "no batch reached it")
        if not unsupported:
            hooked.add(module)
            handles.append(module.register_forward_hook(_hook(recorder, stats, site, name), with_kwargs=True))
    try:
        yield recorder
        for name, site in sites.items():  # those that the pass did not reach, after those that it did
            stats.sites.setdefault(name, site)
    finally:
        for handle in handles:
            handle.remove()


def _hook(recorder: _Recorder, stats: Statistics, site: Site, name: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        started = None
        if not output.requires_grad and torch.is_grad_enabled():
            # A frozen model has no graph until one is started here: at a copy, since a leaf allows nothing in place.
            output = started = output.detach().requires_grad_().clone()
        if recorder.active:  # else recomputed by activation checkpointing, and counted already
            stats.sites.setdefault(name, site)
            site.calls += 1
            site.reason = ""
            _update_inputs(site, module, args[0] if args else kwargs["input"])
            if output.requires_grad:
                # The edge, not the tensor: an in-place activation later makes the tensor stand for another value.
                recorder.edges.append((site, module, torch.autograd.graph.get_gradient_edge(output)))
            else:
                site.reason = "it ran without autograd: in torch.no_grad(), or checkpoint(use_reentrant=True)"
        return started

    return hook


def _unsupported(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"Conv2d with {module.groups} groups is not captured yet"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention, which applies it, is not captured yet"
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        return ""
    return f"{type(module).__name__} is not captured yet: Linear, Conv2d and Embedding are"


def _update_inputs(site: Site, module: nn.Module, x: Tensor) -> None:
    x = x.detach()
    if isinstance(module, nn.Embedding):
        site.A = site.A or DiagonalGram(module.num_embeddings, device=x.device)
        assert isinstance(site.A, DiagonalGram)
        site.A.update(x)
        return
    rows = patches(module, x) if isinstance(module, nn.Conv2d) else x
    site.A = site.A or Gram(rows.shape[-1], device=rows.device)
    assert isinstance(site.A, Gram)
    site.A.update(rows)


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The rows that a convolution's matrix multiplies: `(N·L, i·h·w)` from `(N, i, H, W)`, padding as the module does.

    `patches(conv, x) @ conv.weight.flatten(1).T` is the convolution without its bias (im2col).
    """
    x = x if x.ndim == 4 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    columns = nn.functional.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.mT.flatten(0, 1)


def _output_rows(module: nn.Module, grad: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return grad.movedim(-3, -1).reshape(-1, grad.shape[-3])
    return grad.reshape(-1, grad.shape[-1])
