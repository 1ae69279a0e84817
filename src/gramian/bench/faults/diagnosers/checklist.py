"""A checklist of plain hooks in training mode, as a good engineer writes it in an hour.

One forward and one backward pass of the first batch, in the mode in which the model is trained. It looks at the data,
the parameters, the outputs of every leaf module and the gradient of every parameter, in that order, and tells the
first thing of each that is out of range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gramian.bench.faults.diagnosers import Told
from gramian.bench.faults.setup import Setup
from gramian.objective import as_objective

SMALL, LARGE = 1e-3, 1e2
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid)


def diagnose(setup: Setup) -> list[Told]:
    """Everything that is out of range, in the order of the checklist."""
    found = _inputs(setup) + _labels(setup) + _parameters(setup.model) + _optimizer(setup)
    return found + _signals(setup)


def _inputs(setup: Setup) -> list[Told]:
    x = torch.cat([x for x, _ in setup.batches])
    if bool((x == x[:1]).all()):
        return [Told("input-constant")]
    if not x.is_floating_point():
        return []
    if not bool(x.isfinite().all()):
        return [Told("input-non-finite")]
    mean, std, each = x.mean().abs(), x.std(), x.flatten(1).std(0)
    if each.max() > 50 * each.median() > 0:
        return [Told("input-dominated")]
    if mean > 5 * std:
        return [Told("input-offset")]
    return [Told("input-scale")] if not 0.02 < std < 50 else []


def _labels(setup: Setup) -> list[Told]:
    y = torch.cat([y.flatten() for _, y in setup.batches])
    return [Told("labels-constant")] if bool((y == y[0]).all()) else []


def _parameters(model: nn.Module) -> list[Told]:
    found = []
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            found.append(Told("parameter-non-finite", name))
        elif not p.requires_grad:
            found.append(Told("parameter-frozen", name, "warning"))
        elif p.dim() > 1 and not bool(p.any()):
            found.append(Told("parameter-zero", name))
        elif p.dim() > 1 and float(p.std()) == 0:
            found.append(Told("parameter-constant", name))
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p >= 0.8:
            found.append(Told("dropout-rate", name))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not module.training:
            found.append(Told("norm-evaluation-mode", name))
    return found


def _optimizer(setup: Setup) -> list[Told]:
    stepped = {id(p) for g in setup.optimizer.param_groups if g["lr"] > 0 for p in g["params"]}
    left = [name for name, p in setup.model.named_parameters() if p.requires_grad and id(p) not in stepped]
    return [Told("parameter-not-stepped", left[0], "error")] if left else []


def _signals(setup: Setup) -> list[Told]:
    """Sizes of activations and gradients by layer, and the loss at the start against ln C."""
    sizes: dict[str, Tensor] = {}

    def hook(name: str):
        def note(module: nn.Module, args: object, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and name not in sizes:
                sizes[name] = output.detach().float()

        return note

    leaves = {n: m for n, m in setup.model.named_modules() if not list(m.children())}
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves.items()]
    try:
        total, units = as_objective(setup.objective).loss(setup.model, setup.batches[0])
        loss = total / units
        setup.model.zero_grad()
        loss.backward()
    except (RuntimeError, IndexError, ValueError) as error:
        return [Told("labels-out-of-range" if "arget" in str(error) or "label" in str(error) else "graph-cut")]
    finally:
        for handle in handles:
            handle.remove()
    found = _activations(sizes, leaves)
    classes = int(torch.cat([y.flatten() for _, y in setup.batches]).max()) + 1
    if not math.isfinite(float(loss)):
        found.append(Told("loss-non-finite"))
    elif float(loss) > 3 * math.log(classes):
        found.append(Told("head-scale", "head", "warning"))
    gradients = {n: p.grad for n, p in setup.model.named_parameters() if p.requires_grad}
    missing = [name for name, g in gradients.items() if g is None]
    silent = {
        name for name in leaves if name not in sizes and not name.endswith("out_proj")
    }  # torch calls no hook there
    uncalled = [name for name in missing if name.rpartition(".")[0] in silent]
    if uncalled:
        found.append(Told("parameter-unused", uncalled[0]))
    elif missing:
        found.append(Told("graph-cut", missing[-1]))
    norms = {n: float(g.norm()) for n, g in gradients.items() if g is not None and g.dim() > 1}
    if norms and max(norms.values()) > 1e3:
        found.append(Told("gradient-explodes", max(norms, key=lambda name: norms[name])))
    weak = [name for name, norm in norms.items() if norm < 1e-7]
    return [*found, Told("gradient-vanishes", weak[0])] if weak else found


def _activations(sizes: dict[str, Tensor], leaves: dict[str, nn.Module]) -> list[Told]:
    found, before = [], 1.0
    for name, output in sizes.items():
        std = float(output.std())
        if isinstance(leaves[name], nn.ReLU) and float((output > 0).float().mean()) < 0.02:
            found.append(Told("dead-units", name))
        elif isinstance(leaves[name], nn.Tanh) and float((output.abs() > 0.99).float().mean()) > 0.8:
            found.append(Told("saturated-units", name))
        elif std < SMALL * before:
            found.append(Told("gain-below-one", name))
        elif std > LARGE * before:
            found.append(Told("gain-above-one", name))
        before = max(std, 1e-30) if math.isfinite(std) else before
    return found
