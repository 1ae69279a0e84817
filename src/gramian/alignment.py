"""What a model returns beside the labels of a batch: shifts, weights, and the positions that are no padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.batch import LABELS, described, fields, main_input, parts, token_mask
from gramian.calls import tensor_of
from gramian.errors import GramianWarning, InputError

__all__ = ["Aligned", "aligned_labels", "aligned_tokens", "labels_of"]

_NAMES_OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Aligned:
    """The model's output, or what of it is compared, with labels at the same positions.

    Args:
        scores: (..., C).
        labels: (...).
        weights: (...), or `None` where all are one.
        keep: (...) of bool: false at padding, or `None` where there is none.
    """

    scores: Tensor
    labels: Tensor
    weights: Tensor | None = None
    keep: Tensor | None = None


# `select(output, batch)` finds the output tensor in what a model returns; `align(scores, batch)` puts it beside labels.
Select = Callable[[Any, Any], Tensor]
Align = Callable[[Tensor, Any], Aligned]


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch.

    Args:
        batch: any batch.

    Returns: the tensor.
    Raises:
        InputError: the batch has none.
    Cost: none.
    Source: this library's own.

    >>> labels_of({"x": torch.ones(1, 2), "labels": torch.zeros(1)})
    tensor([0.])
    """
    labels = parts(batch).labels
    if not isinstance(labels, Tensor):
        raise InputError(
            f"objective: found no tensor of labels in the batch, {described(batch)}; wanted (x, y), or one of the keys "
            f"{', '.join(LABELS)}"
        )
    return labels


def aligned_labels() -> tuple[Select, Align]:
    """Scores against labels at the same position: classes of samples, tokens or pixels.

    Returns: a function that finds the scores, and one that aligns them.
    Raises: nothing of its own.
    Cost: none.
    Source: the shapes of `torch.nn.functional.cross_entropy`.

    >>> select, align = aligned_labels()
    >>> align(torch.ones(2, 5, 4, 4), (None, torch.zeros(2, 4, 4))).scores.shape
    torch.Size([2, 4, 4, 5])
    """

    def fits(t: Tensor, labels: Any) -> bool:
        if t.ndim < 2 or not t.is_floating_point():
            return False
        return not isinstance(labels, Tensor) or labels.shape in (t.shape[:-1], t.shape[:1] + t.shape[2:])

    def select(output: Any, batch: Any) -> Tensor:
        if isinstance(output, Tensor):  # at once: a training step asks twice
            return output
        labels = parts(batch).labels
        wanted = f"(..., classes) for labels {tuple(labels.shape)}" if isinstance(labels, Tensor) else "(..., classes)"
        return tensor_of(output, lambda t: fits(t, labels), wanted)

    def align(scores: Tensor, batch: Any) -> Aligned:
        labels = labels_of(batch).to(scores.device)
        if scores.shape[:-1] != labels.shape and fits(scores, labels):
            scores = scores.movedim(1, -1)  # torch's order for images: (B, C, H, W)
        keep = kept(batch, labels)
        return Aligned(scores, labels, weights_of(batch, labels), keep)

    return select, align


def aligned_tokens(padding: int | None) -> tuple[Select, Align]:
    """Scores against the tokens that follow, which are shifted here unless the batch has them at their place.

    Args:
        padding: a token that is not predicted.

    Returns: a function that finds the scores, and one that aligns them.
    Raises: nothing of its own.
    Cost: none.
    Source: the labels of Hugging Face's causal models, which are the inputs, shifted in the model.

    >>> select, align = aligned_tokens(None)
    >>> align(torch.ones(1, 3, 9), torch.tensor([[5, 6, 7]])).labels
    tensor([[6, 7]])
    """

    def tokens_of(batch: Any) -> tuple[Tensor, bool]:
        """The labels, and whether they are still the inputs."""
        given = parts(batch)
        labels = main_input(batch) if given.labels is None else given.labels
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(
                f"objective: next_token wants integer tokens, got {with_dtype(labels)}. A tuple is (tokens, next "
                "tokens, weights); give a mask by its name, in a dict: input_ids, attention_mask"
            )
        named = fields(given.inputs) is not None and fields(batch) is not None
        return labels, given.labels is None or (named and not _has_decoder(batch))

    def select(output: Any, batch: Any) -> Tensor:
        shape = tokens_of(batch)[0].shape
        return tensor_of(
            output,
            lambda t: t.ndim == len(shape) + 1 and t.is_floating_point() and t.shape[:-1] == shape,
            f"(B, T, vocabulary) for tokens {tuple(shape)}",
        )

    def align(scores: Tensor, batch: Any) -> Aligned:
        labels, shifted = tokens_of(batch)
        labels = labels.to(scores.device)
        weights, keep = weights_of(batch, labels), kept(batch, labels)
        if shifted and scores.ndim > 2:
            scores, labels = scores[:, :-1], labels[:, 1:]
            weights = None if weights is None else weights[:, 1:]
            keep = None if keep is None else keep[:, 1:] & keep[:, :-1]
        if padding is not None:
            keep = (labels != padding) if keep is None else (labels != padding) & keep
        return Aligned(scores, labels, weights, keep)

    return select, align


def weights_of(batch: Any, like: Tensor) -> Tensor | None:
    """The weights of a batch, repeated over the dimensions of `like` that they lack."""
    weights = parts(batch).weights
    if weights is None:
        return None
    fits = isinstance(weights, Tensor) and weights.ndim > 0 and weights.shape == like.shape[: weights.ndim]
    if not fits or not (weights.is_floating_point() or weights.dtype == torch.bool):
        shapes = " or ".join(dict.fromkeys((str(tuple(like.shape[:1])), str(tuple(like.shape)))))
        raise InputError(
            f"objective: weights must be floating or bool, of shape {shapes}; got {with_dtype(weights)}. A tuple is "
            "(inputs, labels, weights); name other parts in a dict"
        )
    weights = weights.to(like.device, torch.promote_types(weights.dtype, torch.float32))
    if not bool((weights >= 0).all()):
        raise InputError("objective: weights must be at least zero, and not NaN")
    return weights.reshape(*weights.shape, *[1] * (like.ndim - weights.ndim)).expand(like.shape)


def kept(batch: Any, like: Tensor) -> Tensor | None:
    """Where the positions (B, T) of `like` are no padding; `None` where the batch does not tell."""
    mask = None if _has_decoder(batch) else token_mask(batch)
    return None if mask is None or mask.shape != like.shape else mask.to(like.device)


def _decoder_inputs(batch: Any) -> Tensor | None:
    """What a decoder reads, if there is one: its positions are not those of `attention_mask`."""
    named = fields(batch)
    if not named:
        return None
    return next((named[name] for name in _NAMES_OF_DECODER if named.get(name) is not None), None)


def _has_decoder(batch: Any) -> bool:
    return _decoder_inputs(batch) is not None


def unpadded(padding: int | None) -> Callable[[Any], Tensor | None]:
    """Which rows of the inputs are no padding, by the batch's attention mask and the padding token."""

    def rows(batch: Any) -> Tensor | None:
        mask, decoder = token_mask(batch), _decoder_inputs(batch)
        if padding is not None:
            real = main_input(batch) != padding
            mask = real if mask is None or mask.shape != real.shape else real & mask
        if mask is None or decoder is None or decoder.shape[:2] != mask.shape or bool(mask.all()):
            return mask
        warnings.warn(
            f"objective: a decoder reads as many tokens as the encoder, {tuple(mask.shape)}, so that their rows cannot "
            "be told apart, and padding counts in the second moments of inputs. Pad the two to different lengths",
            GramianWarning,
            stacklevel=2,
        )
        return None

    return rows


def with_dtype(value: Any) -> str:
    """A value in a few words, with its dtype, for an error."""
    return f"{described(value)} of {value.dtype}" if isinstance(value, Tensor) else described(value)
