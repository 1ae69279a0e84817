"""A few parameters drawn anew, at the size of the others: what is lost is these parameters, and not the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor, nn

from gramian.block import Block, blocks
from gramian.errors import InputError, some

__all__ = ["reset_", "sizes"]

# Sizes rms(W) √fan_in that a fresh or trained layer has; others do not count where the size of siblings is asked.
USUAL = (0.2, 4.0)
EMBEDDING = 0.1  # torch draws embeddings with a deviation of 1, transformers with 0.02


def reset_(
    model: nn.Module,
    names: Iterable[str] = (),
    *,
    size: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draws some parameters anew: matrices with independent normal entries, biases 0, the weights of norms 1.

    A matrix W of n columns gets entries of deviation `size / √n`, where the size is the median of rms(W) √n over the
    other matrices of the model whose size is usual (0.2 to 4), or 1 where there is none. Embeddings get a deviation of
    0.1, and the forget gates of an LSTM a bias of 1.

    What was learned in these parameters is lost; the others stay as they are.

    Args:
        model: changed in place.
        names: of parameters, or of modules all of whose own parameters are meant, and those of the modules inside;
            where empty, all matrices but embeddings.
        size: in place of the median of the others.
        generator: draws the entries; seeded with 0 by default.

    Returns:
        The model.

    Raises:
        InputError: a name that is neither a parameter's nor a module's.

    Cost: a pass over the parameters. Accuracy: not applicable.
    Source: LeCun et al., Efficient BackProp (1998), for 1/√n; Jozefowicz et al. (2015) for the forget gate.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    >>> _ = nn.init.zeros_(net[2].weight)
    >>> round(float(reset_(net, ["2.weight"])[2].weight.std() / net[0].weight.std()), 1)
    1.0
    """
    every = {block.name: block for block in blocks(model).blocks}
    every |= {alias: block for block in every.values() for alias in block.aliases}
    wanted = list(names)
    chosen = _parameters(model, wanted) if wanted else [n for n, b in every.items() if b.role in ("hidden", "head")]
    usual = [s for n, s in sizes(model).items() if n not in chosen and USUAL[0] < s < USUAL[1]]
    size = (median(usual) if usual else 1.0) if size is None else size
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name in chosen:
            p = model.get_parameter(name)
            if name in every:
                p.copy_(_drawn(every[name], p, size, generator))
            else:
                _reset_vector(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], p)
    return model


def sizes(model: nn.Module) -> dict[str, float]:
    """The size rms(W) √fan_in of the hidden matrices and the head, by name; NaN and infinity where W is not finite."""
    return {
        block.name: math.sqrt(float(block.parameter.detach().float().square().mean()) * block.shape[-1])
        for block in blocks(model).blocks
        if block.role in ("hidden", "head") and block.parameter.numel()
    }


def _parameters(model: nn.Module, names: list[str]) -> list[str]:
    """The names of the parameters, those of modules replaced by the names of their parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    for name in names:
        if name in parameters:
            found[name] = None
        elif name in modules:
            found |= {f"{name}.{own}" if name else own: None for own, _ in modules[name].named_parameters()}
        else:
            raise InputError(
                f"reset_: {name!r} is neither a parameter nor a module of {type(model).__name__}; "
                f"parameters are {some(parameters)}"
            )
    return list(found)


def _drawn(block: Block, p: Tensor, size: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
    return drawn * (EMBEDDING if block.role == "embedding" else size / math.sqrt(block.shape[-1]))


def _reset_vector(module: nn.Module, own: str, p: Tensor) -> None:
    p.fill_(1.0 if own == "weight" and p.ndim == 1 else 0.0)
    if own.startswith("bias_ih") and isinstance(module, (nn.LSTM, nn.LSTMCell)):
        p[module.hidden_size : 2 * module.hidden_size] = 1.0
