"""The weights that an initialization may set, how each is written, and why the others are left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from gramian.block import Block, blocks
from gramian.errors import InputError
from gramian.init.paths import COMPOSED
from gramian.layers import is_affine, layer_of, operation_of, runs_as_its_class
from gramian.layers.lookup import SCALE, host_of

__all__ = ["Weight", "Weights", "find_weights", "is_centered"]

ADAPTER = "BaseTunerLayer"  # the class of PEFT from which its adapters derive

LEAST_BIAS = 16  # entries of a bias from which its mean tells something

# Passes of the power iteration of a spectral norm after its weight changed. One is enough for an orthogonal matrix.
NUM_POWER_STEPS = 3


@dataclass(eq=False)
class Weight:
    """The weight of a linear layer or a convolution, or one of several of a composed module.

    Args:
        block: its matrices. Of a parametrized weight, those of the parameter that it is computed from.
        layer: the module that applies it.
        name: its name there: `weight`, `in_proj_weight`, `weight_hh_l0`.
    """

    block: Block
    layer: nn.Module
    name: str

    @property
    def value(self) -> Tensor:
        """The weight that is applied."""
        return getattr(self.layer, self.name).detach()

    @torch.no_grad()
    def set_(self, value: Tensor) -> bool:
        """Make `value` the weight that is applied; `False`, and nothing changed, where a parametrization forbids it.

        A parametrization that fixes the size (a spectral norm, orthogonality) gets the weight as close as it allows:
        a multiple of `value`.
        """
        if self.layer._parameters.get(self.name) is self.block.parameter:
            self.block.parameter.copy_(value)
            return True
        before = copy.deepcopy(self.layer.state_dict())
        try:
            self._write(value)
        except (NotImplementedError, RuntimeError, ValueError):  # what a right inverse may raise
            written = None
        else:
            written = self.value
        if written is not None and _parallel(written, value):
            return True
        self.layer.load_state_dict(before)
        return False

    def _write(self, value: Tensor) -> None:
        layer, name = self.layer, self.name
        if parametrize.is_parametrized(layer, name):
            setattr(layer, name, value)
            steps: nn.Module = layer.get_submodule(f"parametrizations.{name}")
            modes = {step: step.training for step in steps.modules()}
            steps.train()  # a spectral norm updates its vectors in training alone
            for _ in range(NUM_POWER_STEPS):
                getattr(layer, name)
            for step, mode in modes.items():
                step.training = mode
            return
        for hook in layer._forward_pre_hooks.values():  # torch.nn.utils.weight_norm and spectral_norm of old
            if isinstance(hook, SpectralNorm) and hook.name == name:
                getattr(layer, f"{name}_orig").copy_(value)
                for _ in range(NUM_POWER_STEPS):
                    setattr(layer, name, hook.compute_weight(layer, do_power_iteration=True))
                return
        length = getattr(layer, f"{name}_g")
        dims = [dim for dim in range(value.ndim) if length.ndim == 0 or length.shape[dim] == 1]
        length.copy_(torch.linalg.vector_norm(value, dim=dims, keepdim=length.ndim > 0))
        getattr(layer, f"{name}_v").copy_(value)
        setattr(layer, name, value.clone())


def _parallel(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are multiples of each other, to the dtype's precision."""
    # Of entries that are rounded to ε each, the cosine is off by ε² or so.
    eps = torch.finfo(x.dtype).eps + torch.finfo(y.dtype).eps
    x, y = x.double().flatten(), y.double().flatten()
    cosine = float(x @ y / (x.norm() * y.norm()))
    return cosine > 1 - max(16 * torch.finfo(torch.float64).eps ** 0.5, eps**2)


@dataclass
class Weights:
    """The weights that an initialization may set, by layer; the other modules that hold matrices; the names left.

    `composed` has modules that apply several matrices inside one function of torch (attention, recurrence), with the
    weights of each; `depthwise` those of the others that act on each channel alone.

    `left` has the names by reason, as a warning says it.
    """

    by_layer: dict[nn.Module, Weight] = field(default_factory=dict)
    others: set[nn.Module] = field(default_factory=set)
    composed: dict[nn.Module, list[Weight]] = field(default_factory=dict)
    depthwise: set[nn.Module] = field(default_factory=set)
    left: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        """Note that a weight is left as it is."""
        names = self.left.setdefault(reason, [])
        if name not in names:
            names.append(name)


NOT_AFFINE = "sets layers that compute W x + b alone; left as they were"
NOT_REACHED = "left as they were, since the sample does not reach them"
FROZEN = "left as they were, since frozen"
IN_ADAPTER = "left as they were, as parts of an adapter"
ZERO = "left zero, as residual branches are by design (set them first if they are not)"
PARAMETRIZED = "left as they were, since their parametrization takes no such weight"
DESIGNED = "left as they were, with a bias that is neither constant nor centered, as if by design"
NORMALIZED = "left as they were, since a norm undoes any scale of what they compute"
BYPASSED = "left as they were, since a skip goes around them"
DEPTHWISE = "left as they were, since they act on each channel alone"


def find_weights(model: nn.Module) -> Weights:
    """The weights that can be set: of linear layers, convolutions, attention and recurrence, and trainable.

    Embeddings and norms are left without a word: they keep their initialization by definition. So is a matrix that is
    an embedding too.
    """
    found, rest = blocks(model)
    weights = Weights()
    adapters = set(_adapters(model))
    inside: dict[nn.Module, nn.Module] = {
        m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    for block in found:
        name, module = block.owners[0]
        layer, local = host_of(model, name, module, block.parameter)
        host = inside.get(layer, layer)
        if layer_of(host).operation in COMPOSED and runs_as_its_class(host) and len(block.owners) == 1:
            weights.others.add(host)
            if not block.parameter.requires_grad:
                weights.leave(FROZEN, name)
            elif host in adapters or layer in adapters:
                weights.leave(IN_ADAPTER, name)
            else:
                weights.composed.setdefault(host, []).append(Weight(block, layer, local))
            continue
        reason = "" if block.role == "embedding" else _obstacle(block, layer, local, adapters)
        if reason or block.role == "embedding":
            weights.others.update(owner for _, owner in block.owners)
            if block.role == "elementwise":
                weights.depthwise.update(owner for _, owner in block.owners)
            if reason:
                weights.leave(reason, name)
            continue
        weight = Weight(block, layer, local)
        weights.by_layer[layer] = weight
        weights.by_layer.update((m, weight) for _, m in block.owners[1:] if operation_of(m).init)
    for row in rest:
        p = row.parameter
        if isinstance(p, UninitializedParameter):
            continue
        narrow = p.is_floating_point() and p.element_size() < 2
        if p.requires_grad and narrow and p.ndim >= 2:
            raise InputError(
                f"isometric_: {row.name} is of {p.dtype}, in which a matrix is not orthogonal. Initialize the model in "
                "float32 or bfloat16, then convert it"
            )
        if row.reason.endswith(SCALE):
            continue  # it goes with the weight, which is set or named above
        if p.ndim > 2 or (p.ndim == 2 and (p.is_complex() or (not p.requires_grad and not row.elementwise))):
            weights.leave(NOT_AFFINE if p.requires_grad else FROZEN, row.name)
    return weights


def _obstacle(block: Block, layer: nn.Module, local: str, adapters: set[nn.Module]) -> str:
    """Why a weight is left; empty where it may be set."""
    bias = getattr(layer, "bias", None)
    if not block.parameter.requires_grad:
        return FROZEN
    if any(owner in adapters for _, owner in block.owners):
        return IN_ADAPTER
    if not _is_affine(layer, local):
        return NOT_AFFINE
    if block.role == "elementwise":
        return DEPTHWISE
    if isinstance(bias, Tensor) and not _is_plain(bias.detach().double()):
        return DESIGNED
    return ""


def _is_plain(bias: Tensor) -> bool:
    """Whether a bias is constant, or draws around zero: not as in Mamba, where it sets the scales of time."""
    return bias.numel() < LEAST_BIAS or bool((bias == bias[0]).all()) or is_centered(bias)


def is_centered(bias: Tensor) -> bool:
    """Whether a bias is zero, or draws around zero."""
    spread = float(bias.std()) if bias.numel() > 1 else 0.0
    return abs(float(bias.mean())) < 2 * spread or not bool(bias.any())


def _adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in PEFT's adapters, other than the layers that they adapt."""
    for module in model.modules():
        if any(cls.__name__ == ADAPTER for cls in type(module).__mro__):
            base = getattr(module, "base_layer", None)
            kept = set() if base is None else set(base.modules())
            yield from (m for m in module.modules() if m not in kept)


def _is_affine(layer: nn.Module, local: str) -> bool:
    """Whether a layer computes W x + b with this weight, which may be parametrized."""
    if not operation_of(layer).init or local != "weight":
        return False
    if "weight" in layer._parameters:
        return is_affine(layer)
    made = {"weight_g", "weight_v", "weight_orig"}
    own = {name for name, _ in layer.named_parameters(recurse=False)} - made
    return own <= {"bias"} and runs_as_its_class(layer)
