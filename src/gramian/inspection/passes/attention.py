"""Attention's weights: their entropy, and the queries that see no key."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NUM_SAMPLES", "attention_weights", "entropy_and_masked", "visible_keys"]

# Samples of which attention's weights are computed.
NUM_SAMPLES = 4

# Samples, or samples times heads, of which it is kept which keys they see.
NUM_ROWS = 64

# A score of this or less is masked: masks write −∞, −1e4, −1e9 or the dtype's lowest number.
MASKED = -9e3


def entropy_and_masked(weights: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean entropy as a share of that of equal weights, and the share of the queries whose keys are all masked.

    Args:
        weights: (…, T, S), softmax over the last dimension.
        scores: (…, T, S), what the softmax was applied to; `None` where only the weights are known, of which those that
            are zero then count as masked.

    Returns: both, the first over the queries that see several keys, and the number of these; scalars on the device.
    Cost: a few passes over the weights.
    """
    p = weights.detach().float().nan_to_num()
    seen = (p > 0 if scores is None else scores.detach().float() > MASKED).sum(-1)
    masked = (seen == 0).float().mean() if seen.numel() else p.new_zeros(())
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1) / seen.clamp(min=2).float().log()
    several = seen > 1
    seeing = several.sum()
    return torch.where(several, entropy, 0.0).sum() / seeing.clamp(min=1), masked, seeing


def visible_keys(scores: Tensor) -> Tensor | None:
    """Which keys (B, T, S) a head sees, by the scores (…, T, S), of the first rows; `None` where no score is masked."""
    seen = scores.detach()[:NUM_ROWS] > MASKED
    if bool(seen.all()):
        return None
    return seen.flatten(1, -3).any(1) if seen.ndim > 3 else seen


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The weights and scores of `scaled_dot_product_attention`, whose arguments these are, of the first samples.

    Returns: both, (N, …, T, S); `None` where the shapes are not those of attention, or samples differ in length.
    """
    if query.is_nested or key.is_nested:
        return None
    with torch.no_grad():
        q, k = query[:NUM_SAMPLES].float(), key[:NUM_SAMPLES].float()
        if q.shape[:-2] != k.shape[:-2]:
            if q.ndim < 4 or q.shape[1] % k.shape[1]:
                return None
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
        if isinstance(attn_mask, Tensor):
            try:
                mask = attn_mask[:NUM_SAMPLES] if attn_mask.ndim == query.ndim else attn_mask
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            except RuntimeError:
                return None
        return scores.softmax(-1), scores
