"""Whether a plain deep network will train, from what a report measured before its first step."""

from __future__ import annotations

import math

from gramian.report import Report

__all__ = ["DECADES_LOST", "decades_lost"]

DECADES_LOST = "decades lost across the depth"
"""What a report calls it."""

# Directions that must survive, and the weights of what is added up. Chosen on the development networks of
# benchmarks/trainability.py, before the held-out ones were scored.
DIRECTIONS, SCALE, VARIATION, LAYERS = 3, 0.5, 0.5, 100

# What is zero, or not finite, counts as so many decades.
ALL = 40.0


def decades_lost(report: Report) -> float | None:
    """How much of the signal a plain network loses between its input and its head, in decades.

    With the singular values σ₁ ≥ σ₂ ≥ … of the end-to-end Jacobian, the sum of

    - log₁₀(σ₁ / σ₃): how far the directions of the input are from arriving alike. With one direction left, all samples
      lie on a line, and no number of steps at a stable rate separates ten classes;
    - half of |log₁₀ (σ₁ σ₂ σ₃)^(1/3)|: how far what arrives is from its size. An optimizer that divides by the size of
      gradients makes up for much of it, so it weighs half;
    - half of −log₁₀ of the share of the last hidden layer's output that differs between samples;
    - a hundredth for each layer, since each makes the largest stable rate smaller.

    Args:
        report: of `inspect` with batches and an objective.

    Returns:
        The sum; `None` where the network is not plain (layers other than linear ones, norms, skips), or the report has
        no Jacobian.

    Cost: none; everything was measured. Accuracy: see docs/inspect.md.
    Source: this library's own. The parts are those of Schoenholz et al. 1611.01232 (sizes, correlations) and Pennington
        et al. 1711.04735 (the Jacobian's spectrum), measured on the network itself, so that its finite width counts.

    >>> decades_lost(Report("net")) is None
    True
    """
    if not _is_plain(report):
        return None
    logs = [_decades(value) for value in report.jacobian[:DIRECTIONS]]
    variation = next((p.variation for p in reversed(report.depth[:-1]) if p.variation is not None), 1.0)
    size = abs(sum(logs) / len(logs))
    return logs[0] - logs[-1] + SCALE * size - VARIATION * _decades(variation) + len(report.layers) / LAYERS


def _is_plain(report: Report) -> bool:
    """Whether the network is a chain of linear layers and functions of single values."""
    hidden = report.layers[:-1]
    return (
        len(report.jacobian) >= DIRECTIONS
        and all(layer.kind == "Linear" for layer in report.layers)
        and all(layer.gain is not None for layer in hidden)
        and not any("Norm" in place.kind for place in report.depth)
    )


def _decades(value: float) -> float:
    if not math.isfinite(value):
        return ALL
    return max(-ALL, min(ALL, math.log10(value))) if value > 0 else -ALL
