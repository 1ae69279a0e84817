"""Leading singular vectors in readable form: as images of the input, or as tokens of an embedding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.inspection.weights.quadrature import leading_vectors
from gramian.report import Direction
from gramian.texts import read_text

__all__ = ["image_directions", "image_side", "read_tokens", "token_directions"]

NUM_DIRECTIONS = 4
NUM_TOKENS = 8
# Sides of images. Smaller squares are too common as widths, and larger ones are usually hidden widths.
LEAST_SIDE, MOST_SIDE = 8, 64


def image_side(length: int) -> int | None:
    """Return the side of a square image with this many pixels; `None` where there is none.

    >>> image_side(784), image_side(100), image_side(384)
    (28, 10, None)
    """
    side = math.isqrt(length)
    return side if side * side == length and LEAST_SIDE <= side <= MOST_SIDE else None


def image_directions(name: str, w: Float[Tensor, "m n"]) -> list[Direction]:
    """Return the first layer's leading right singular vectors as images, where its number of inputs is a square.

    That the inputs are an image is a guess from their number, and the report says so.
    """
    side = image_side(w.shape[1])
    if side is None or min(w.shape) < 2 or not bool(w.isfinite().all()) or not bool(w.any()):
        return []
    vectors, values = leading_vectors(w, min(NUM_DIRECTIONS, *w.shape))
    return [
        Direction(name, k + 1, float(values[k]), tuple(tuple(row) for row in vectors[:, k].view(side, side).tolist()))
        for k in range(vectors.shape[1])
    ]


def token_directions(name: str, w: Float[Tensor, "v d"], tokens: list[str]) -> list[Direction]:
    """Return the tokens at both ends of an embedding's leading left singular vectors."""
    if w.shape[0] > len(tokens) + 1024 or len(tokens) < 2 or not bool(w.isfinite().all()) or not bool(w.any()):
        return []
    vectors, values = leading_vectors(w, min(NUM_DIRECTIONS, *w.shape))
    unit = float(w.abs().max())
    found = []
    for k in range(vectors.shape[1]):
        along = (w.float() / unit) @ vectors[:, k].float()
        count = min(NUM_TOKENS, len(along) // 2)
        ends = [torch.topk(sign * along, count).indices.tolist() for sign in (1.0, -1.0)]
        words = tuple(tuple(tokens[i] if i < len(tokens) else f"#{i}" for i in end) for end in ends)
        found.append(Direction(name, k + 1, float(values[k]), (), words))
    return found


def read_tokens(path: Path) -> list[str]:
    """Return the vocabulary, by index, from the `tokenizer.json` or `vocab.txt` beside a checkpoint, or an empty list.

    Only the list is read: no tokenizer is run.
    """
    folder = path if path.is_dir() else path.parent
    try:
        if (folder / "tokenizer.json").exists():
            content = json.loads(read_text(folder / "tokenizer.json"))
            return _listed(content["model"]["vocab"], content.get("added_tokens") or [])
        if (folder / "vocab.txt").exists():
            return read_text(folder / "vocab.txt").splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return []


def _listed(vocabulary: Any, added: list[Any]) -> list[str]:
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        return [str(pair[0]) for pair in vocabulary]
    places = {int(number): str(token) for token, number in vocabulary.items()}
    places |= {int(token["id"]): str(token["content"]) for token in added}
    if not places or min(places) < 0 or max(places) > 4 * len(places) + 1024:  # a hostile file must not fill memory
        return []
    return [places.get(number, f"#{number}") for number in range(max(places) + 1)]
