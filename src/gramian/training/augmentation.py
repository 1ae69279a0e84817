"""Random changes of the training inputs: of images, of sequences of tokens, and of any numbers; and mixup.

Each is a switch with a strength. What is drawn depends on the seed, the epoch and the number of the batch alone, so a
resumed run draws the same, and so do all ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.errors import UnsupportedError
from gramian.training import argument_errors

__all__ = ["AUGMENTATIONS", "augmented", "check", "mixed"]


def augmented(batch: Any, strengths: Mapping[str, float], seed: tuple[int, ...]) -> Any:
    """Return the batch with its inputs changed, in the order of `strengths`; `mixed` does the rest of mixup.

    Args:
        batch: `(x, …)`, a list or a tuple whose first tensor holds the inputs; or a tensor.
        strengths: by a name of `AUGMENTATIONS`.
        seed: numbers that tell this batch from all others.
    """
    if not strengths:
        return batch
    x = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, (tuple, list)) and batch else None
    if not isinstance(x, Tensor) or not x.ndim:
        raise UnsupportedError(
            f"train: augment changes the first tensor of a batch (x, …); this batch is a {type(batch).__name__}. "
            "Change the inputs in train_batches instead"
        )
    generator = _generator(seed)
    for name, strength in strengths.items():
        x = _mixed_inputs(x, strength, seed) if name == MIXUP else AUGMENTATIONS[name][0](x, strength, generator)
    return x if isinstance(batch, Tensor) else type(batch)([x, *batch[1:]])


def mixed(batch: Any, strengths: Mapping[str, float], seed: tuple[int, ...]) -> list[tuple[float, Any]]:
    """Return the batches, with weights, whose losses add up to that of a batch that `augmented` changed.

    Without mixup that is the batch itself. With it (Zhang et al., 1710.09412), each input is λ of its own and 1 − λ of
    another's, and so is its loss: λ of that with its own labels and 1 − λ of that with the other's.
    """
    strength = strengths.get(MIXUP, 0.0)
    if not strength or isinstance(batch, Tensor) or len(batch) == 1:  # what is to be rebuilt is the mixed input
        return [(1.0, batch)]
    weight, order = _mixing(len(batch[0]), strength, seed)

    def other(values: Tensor) -> Tensor:
        if not values.ndim or len(values) != len(order):
            raise UnsupportedError(
                f"train: augment by mixup pairs the {len(order)} rows of a batch, but its labels are of shape "
                f"{tuple(values.shape)}. Give one row of labels for each input"
            )
        return values[order.to(values.device)]

    return [(weight, batch), (1 - weight, type(batch)([batch[0], *(mapped(part, other) for part in batch[1:])]))]


def _mixing(num: int, strength: float, seed: tuple[int, ...]) -> tuple[float, Tensor]:
    """A weight λ of a Beta(strength, strength) distribution, and with whom each row is mixed."""
    generator = _generator((*seed, 1))
    shares = torch._standard_gamma(torch.full((2,), strength, dtype=torch.float64), generator=generator)
    weight = float(shares[0] / shares.sum()) if float(shares.sum()) else 1.0
    return weight, torch.randperm(num, generator=generator)


def _mixed_inputs(x: Tensor, strength: float, seed: tuple[int, ...]) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError(f"train: augment by mixup needs floating numbers; got {x.dtype}. For tokens, use mask")
    if not strength:
        return x
    weight, order = _mixing(len(x), strength, seed)
    return weight * x + (1 - weight) * x[order.to(x.device)]


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def check(strengths: Mapping[str, float]) -> None:
    """Raise `InputError` for an unknown name or a strength out of its range."""
    for name, strength in strengths.items():
        argument_errors.one_of("augment", name, (*AUGMENTATIONS, MIXUP))
        largest = AUGMENTATIONS[name][1] if name != MIXUP else math.inf
        wanted = f"between 0 and {largest:g}" if math.isfinite(largest) else "zero or a positive number"
        argument_errors.check(f"augment {name}", strength, partial(_is_strength, largest=largest), wanted)


def _is_strength(value: float, largest: float) -> bool:
    return 0 <= value <= largest and math.isfinite(value)


def _images(x: Tensor) -> tuple[Tensor, torch.Size]:
    """The inputs as images `(B, C, H, W)`, and their own shape; rows of pixels are those of a square."""
    side = math.isqrt(x.shape[-1])
    if not x.is_floating_point() or x.ndim not in (2, 3, 4) or (x.ndim == 2 and side * side != x.shape[1]):
        raise UnsupportedError(
            f"train: augment by shift, rotate, scale, flip or cutout needs images (B, C, H, W), (B, H, W) or rows of "
            f"square ones (B, n²), of floating numbers; got {tuple(x.shape)} of {x.dtype}"
        )
    shape = (len(x), 1, side, side) if x.ndim == 2 else (len(x), 1, *x.shape[1:]) if x.ndim == 3 else x.shape
    return x.reshape(shape), x.shape


def _uniform(num: int, generator: torch.Generator) -> Tensor:
    """Numbers from −1 to 1."""
    return 2 * torch.rand(num, generator=generator) - 1


def _moved(x: Tensor, matrices: Tensor) -> Tensor:
    """The images under affine maps (B, 2, 3) of their coordinates, which run from −1 to 1; zero comes in."""
    images, shape = _images(x)
    grid = nn.functional.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False).reshape(shape)


def _shift(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """By up to `strength` pixels, whole ones, along both axes."""
    images, shape = _images(x)
    most = int(strength)
    by = torch.randint(-most, most + 1, (len(images), 2), generator=generator).to(images.device)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - by[:, :1]
    columns = torch.arange(width, device=images.device) - by[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[batch, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return torch.where(inside, moved.permute(0, 3, 1, 2), 0.0).reshape(shape)


def _rotate(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """By an angle of up to `strength` degrees, bilinearly interpolated."""
    images, _ = _images(x)
    angle = _uniform(len(x), generator) * math.radians(strength)
    ratio = images.shape[-2] / images.shape[-1]
    zero, c, s = torch.zeros(len(x)), angle.cos(), angle.sin()
    rows = torch.stack([c, -s * ratio, zero, s / ratio, c, zero], 1)
    return _moved(x, rows.view(-1, 2, 3))


def _scale(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images enlarged or made smaller by a factor from 1 − strength to 1 + strength."""
    factor = 1 / (1 + strength * _uniform(len(x), generator))
    zero = torch.zeros(len(x))
    return _moved(x, torch.stack([factor, zero, zero, zero, factor, zero], 1).view(-1, 2, 3))


def _flip(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Left and right exchanged, with the probability `strength`."""
    images, shape = _images(x)
    chosen = (torch.rand(len(x), generator=generator) < strength).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images).reshape(shape)


def _cutout(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A square of zeros, of the share `strength` of the sides, centered on any pixel (DeVries & Taylor 1708.04552)."""
    images, shape = _images(x)
    axes = []
    for size in images.shape[-2:]:
        center = torch.rand(len(x), generator=generator) * size
        axes.append(((torch.arange(size) + 0.5 - center[:, None]).abs() < strength * size / 2).to(images.device))
    return torch.where(axes[0][:, None, :, None] & axes[1][:, None, None, :], 0.0, images).reshape(shape)


def _noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Normal noise of the standard deviation `strength`, added to numbers."""
    if not x.is_floating_point():
        raise UnsupportedError(f"train: augment by noise needs floating numbers; got {x.dtype}. For tokens, use mask")
    return x + strength * torch.randn(x.shape, generator=generator).to(x)


def _mask(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """With the probability `strength` a number is zero, and a token is another one of the batch, drawn at random."""
    chosen = (torch.rand(x.shape, generator=generator) < strength).to(x.device)
    if x.is_floating_point():
        return torch.where(chosen, torch.zeros((), dtype=x.dtype, device=x.device), x)
    drawn = torch.randint(x.numel(), x.shape, generator=generator).to(x.device)
    return torch.where(chosen, x.reshape(-1)[drawn], x)


# It also changes the loss, by `mixed`; its strength is the parameter of a Beta distribution.
MIXUP = "mixup"

# By name: the change, and its largest strength. A new one is a function and a row.
AUGMENTATIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], float]] = {
    "shift": (_shift, math.inf),
    "rotate": (_rotate, 180.0),
    "scale": (_scale, 0.9),
    "flip": (_flip, 1.0),
    "cutout": (_cutout, 1.0),
    "noise": (_noise, math.inf),
    "mask": (_mask, 1.0),
}
