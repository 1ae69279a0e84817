"""The signal of a batch: sizes and gradients by layer, gains, and the end-to-end Jacobian."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from gramian.batch import mapped, num_samples, tensors
from gramian.inspection.measurements import Measured
from gramian.objective import Objective
from gramian.operators import NoJacobian, try_jacobian
from gramian.operators.gains import try_gains
from gramian.recording import capture
from gramian.report import Layer
from gramian.report.model import COVERAGE, HALF
from gramian.samples import first_samples

__all__ = ["SIGNAL", "in_words", "measure_signal"]

SIGNAL = "signal and gradients by layer"
"""What a report calls it."""

JACOBIAN = "end-to-end Jacobian"

# Samples at which the end-to-end Jacobian is computed, fewer (at least one) where all their rows together would cost
# more than this many backward passes of the batch; the report shows the median of each singular value over them.
NUM_JACOBIANS, JACOBIAN_PASSES = 8, 3

# It is computed up to this side, and up to a side of this many times the batch.
LEAST_ROWS, MOST_PASSES = 256, 8

# Samples from which on two random vectors for each serve for the gains, and not four. As many are enough where their
# inputs of a layer have so many entries together, by which a gain's relative error is a hundredth or two.
MANY, ENTRIES = 16, 2**13


def measure_signal(
    measured: Measured,
    model: nn.Module,
    batch: Any,
    objective: Objective,
    layouts: Mapping[str, Any] | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Measure sizes, gradients, gains and the Jacobian of one batch, and put the layers in their forward order.

    Args:
        measured: gets all of it.
        model, batch, objective: as in `capture`.
        layouts: as in `inspect`.
        progress: called as `progress(what, done, total)`.
    """
    progress("signal", 0, 1)
    stats = capture(
        model,
        [batch],
        objective,
        layouts=layouts,
        max_dim=1,  # sizes and means, and no matrices
        fisher="empirical",
        non_finite="keep",
    )
    progress("signal", 1, 1)
    measured.stats = stats
    measured.notes += stats.summary()
    measured.looked_at.append(SIGNAL)
    progress("gains", 0, 1)
    _measure_gains(measured, model, batch, objective)
    progress("gains", 1, 1)
    progress("jacobian", 0, 1)
    _measure_jacobian(measured, model, batch, objective)
    progress("jacobian", 1, 1)
    order = {name: i for i, name in enumerate(stats)}
    last = len(order)

    def key(layer: Layer) -> tuple[int, int]:
        return order.get(_parameter(layer.name), last), layer.depth

    rows = sorted(zip(measured.layers, measured.spectra, strict=True), key=lambda row: key(row[0]))
    measured.spectra = [spectrum for _, spectrum in rows]
    measured.layers = []
    for depth, (layer, _) in enumerate(rows):
        sites = stats.get(_parameter(layer.name))
        site = sites[0] if sites else None
        gain = measured.gains.get(_parameter(layer.name))
        measured.layers.append(
            replace(
                layer,
                depth=depth,
                gain=gain.chi if gain else None,
                activation_rms=site.A.rms if site and site.A is not None and layer.role != "embedding" else None,
                gradient_rms=site.G.rms if site and site.G is not None else None,
                note="; ".join(part for part in (layer.note, site.reason if site else "") if part),
            )
        )
    measured.facts |= {"loss per unit": stats.loss, "units": int(stats.units)}
    if stats.coverage < HALF:
        measured.facts[COVERAGE] = stats.coverage
    measured.notes.append("Measured without dropout, and with the batch's statistics in batch norms.")


def _measure_gains(measured: Measured, model: nn.Module, batch: Any, objective: Objective) -> None:
    try:
        num = num_samples(batch)
        probes = 2 if num >= MANY else 4
        sites = measured.stats.sites() if measured.stats is not None else ()
        entries = median(
            [site.A.dim * float(site.A.count.max()) / num for site in sites if site.A is not None] or [1.0]
        )
        enough = max(MANY, math.ceil(ENTRIES / max(entries, 1.0)))
        try:
            measured.gains, reasons = try_gains(model, first_samples(batch, enough), objective, num_probes=probes)
        except Exception:  # a part of a batch may be none
            measured.gains, reasons = try_gains(model, batch, objective, num_probes=probes)
    except Exception as error:  # a model that runs may still not be differentiated layer by layer
        measured.skipped |= {"gains": in_words(error)}
        return
    known = sum(gain is not None for gain in measured.gains.values())
    if known:
        measured.looked_at.append("gains")
    if known < len(measured.gains):
        measured.skipped |= {
            f"gains of {len(measured.gains) - known} of {len(measured.gains)} layers": "undefined: "
            + "; ".join(f"{num} {reason}" for reason, num in Counter(reasons.values()).most_common())
        }


def _measure_jacobian(measured: Measured, model: nn.Module, batch: Any, objective: Objective) -> None:
    sites = reversed(list(measured.stats.sites() if measured.stats is not None else ()))
    side = next((site.A.dim for site in sites if site.A is not None), 1)
    batch_size = num_samples(batch)
    most = max(MOST_PASSES * batch_size, LEAST_ROWS)
    are_rows = all(
        len(t) == batch_size for t in tensors(batch) if t.ndim
    )  # one sample of a graph would be no part of it
    passes = JACOBIAN_PASSES * batch_size if are_rows else most
    num = max(1, min(NUM_JACOBIANS, batch_size, passes // side))
    copies = max(1, min(side, batch_size // num))
    try:
        try:
            repeated = mapped(first_samples(batch, num), lambda t: t.repeat_interleave(copies, 0) if t.ndim else t)
            few = first_samples(batch, NUM_JACOBIANS) if num * copies > NUM_JACOBIANS else None
            found = try_jacobian(model, repeated, objective, copies=copies, most=most, few=few)
        except Exception:  # a part of a batch may be none: the nodes of a graph without the other ends of its edges
            found = try_jacobian(model, batch, objective, most=most)
    except Exception as error:
        measured.skipped |= {JACOBIAN: in_words(error)}
        return
    if isinstance(found, NoJacobian):
        measured.skipped |= {JACOBIAN: found.reason}
        measured.is_chain = found.is_chain
        if not found.is_chain:
            measured.skipped |= {
                "gradient of the first layer against the last": "the last does not depend on the first"
            }
    elif torch.isfinite(found).all():
        wide = found.double()  # whose rounding is far below that of the passes that made it
        if wide.shape[-1] > 2 * wide.shape[-2]:  # R has the same singular values, and is made sooner than they are
            wide = torch.linalg.qr(wide.mT, mode="r").R
        values = torch.linalg.svdvals(wide)
        measured.jacobian = tuple(values.median(0).values.tolist())
        measured.looked_at.append(JACOBIAN)
    else:
        measured.skipped |= {JACOBIAN: "it is not finite"}


def in_words(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"


def _parameter(name: str) -> str:
    """Return a row's block: its name without the index of a matrix in a fused parameter."""
    return name.partition("[")[0]
